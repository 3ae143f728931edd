"""A small part of the corpus of `hostile.py`."""

from __future__ import annotations

from pathlib import Path

from hostile import ROLES, run_corpus, write_corpus


def test_a_hostile_corpus_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    cases = write_corpus(tmp_path, 60, seed=0)
    assert {case.role for case in cases} == set(ROLES)
    ends, faults, _ = run_corpus(tmp_path, cases)
    assert faults == []
    assert len(ends) == len(cases)
