"""Who may write into a folder, and what a run that goes on there may change."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ulfine_fast.checkpoint import replacing, save_checkpoint
from ulfine_fast.run_folder import LOCK, claim, hold, located, read_configuration, reserve

RUN = {
    "images": {"seed": 0},
    "encoder": {},
    "name": "ulfine",
    "method": {"eta": 0.5},
    "training": {"steps": 40, "log_every": 10, "seed": 0},
}
HOLDS = """
import sys
from pathlib import Path
from ulfine_fast.run_folder import hold

with hold(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder "run"."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def with_schedule(**changes):
    return RUN | {"training": RUN["training"] | changes}


def make(folder: Path, configuration=RUN) -> None:
    options = {"resume": False}
    with reserve(folder, configuration, **options, overwrite=False), claim(folder, configuration, **options):
        save_checkpoint(folder / "checkpoint.safetensors", {}, {})


def test_a_folder_has_one_run_at_a_time(tmp_path, holder):
    with pytest.raises(FileExistsError, match=f"no other run works in, got process {holder.pid} on "):
        make(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_the_hold_of_a_killed_process_is_free_at_once(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    make(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
    ]


def test_without_locks_a_run_is_warned_and_removes_nothing(tmp_path, monkeypatch, caplog):
    def absent(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", absent)
    with hold(tmp_path / "run"):
        (tmp_path / "run" / ".checkpoint.0123456789abcdef.safetensors").touch()
    with hold(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [
            ".checkpoint.0123456789abcdef.safetensors"
        ]
    assert "has no locks: start no other run in this folder" in caplog.text


def test_an_unused_folder_is_removed_with_those_made_for_it(tmp_path):
    with hold(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a" / LOCK).exists()
    assert not any(tmp_path.iterdir())


def test_a_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), hold(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_lock_of_another_user_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    with (
        pytest.raises(PermissionError, match=r"expected a folder whose \.lock this user may write"),
        hold(tmp_path),
    ):
        pass


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    make(tmp_path)
    left = [".checkpoint.4711.safetensors", ".checkpoint.0123456789abcdef.safetensors", ".metrics.ab.json"]
    others = [".evaluation.0123456789abcdef.json", "checkpoint.safetensors", "config.json", "notes.txt"]
    for name in (*left, *others[:1], *others[3:]):
        (tmp_path / name).touch()
    make(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == others


def test_a_temporary_file_is_new_and_of_an_unknown_name(tmp_path):
    names = []
    for _ in range(2):
        with replacing(tmp_path / "checkpoint.safetensors") as temporary:
            assert temporary.exists() and not temporary.is_symlink()
            names.append(temporary.name)
    assert names[0] != names[1]
    assert str(os.getpid()) not in names[0].split(".")
    assert (tmp_path / "checkpoint.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_run_that_goes_on_may_be_longer_and_report_at_other_steps(tmp_path):
    make(tmp_path)
    longer = with_schedule(steps=60, log_every=5)
    with pytest.raises(FileExistsError, match=r"holds another run: training\.steps: expected 40, got 60"):
        make(tmp_path, longer)
    with reserve(tmp_path, longer, resume=True, overwrite=False), claim(tmp_path, longer, resume=True):
        pass
    assert read_configuration(tmp_path) == longer
    with (
        pytest.raises(FileExistsError, match=r"training\.seed: expected 0, got 1"),
        reserve(tmp_path, with_schedule(seed=1), resume=True, overwrite=False),
    ):
        pass


def test_a_run_has_the_configuration_of_its_checkpoint_also_where_a_resume_fails(tmp_path):
    def failed_resume(configuration, written):
        with claim(tmp_path, configuration, resume=True):
            if written:
                save_checkpoint(tmp_path / "checkpoint.safetensors", {}, {})
            raise KeyboardInterrupt

    make(tmp_path)
    longer = with_schedule(steps=60)
    for written, expected in ((False, RUN), (True, longer)):
        with pytest.raises(KeyboardInterrupt):
            failed_resume(longer, written)
        assert read_configuration(tmp_path) == expected


def image_run(folder: Path, test: str) -> dict:
    images = {"labelled": "labelled", "test": test, "table": None, "seed": 0}
    encoder = {"model": "clip", "pretrained": None, "size": 32}
    return RUN | {"images": images, "encoder": encoder, "began_in": str(folder)}


def test_images_and_weights_of_a_run_that_goes_on_may_have_been_moved(tmp_path):
    make(tmp_path / "run", image_run(tmp_path, "test"))
    moved = image_run(tmp_path / "elsewhere", "/mnt/test")
    moved["encoder"]["model"] = "/mnt/clip"
    with reserve(tmp_path / "run", moved, resume=True, overwrite=False):
        pass
    moved["encoder"]["size"] = 64
    with (
        pytest.raises(FileExistsError, match=r"encoder\.size: expected 32, got 64"),
        reserve(tmp_path / "run", moved, resume=True, overwrite=False),
    ):
        pass


def test_relative_paths_begin_where_the_run_began(tmp_path):
    (tmp_path / "test").mkdir()
    found = located(image_run(tmp_path, "test"), ["model=/mnt/clip"])
    assert found["images"] == {
        "labelled": "labelled",
        "test": f"{tmp_path}/test",
        "table": None,
        "seed": 0,
    }
    assert found["encoder"] == {"model": "/mnt/clip", "pretrained": None, "size": 32}


def test_a_model_or_tag_is_not_a_folder_that_is_called_after_it(tmp_path):
    for name in ("lite0", "openai"):
        (tmp_path / name).mkdir()
    run = image_run(tmp_path, "test")
    run["encoder"] |= {"model": "lite0", "pretrained": "openai"}
    assert located(run)["encoder"] == run["encoder"]


@pytest.mark.parametrize("at", ["seed=1", "test", "tests=/mnt"])
def test_what_has_no_place_was_not_moved(tmp_path, at):
    with pytest.raises(ValueError, match=f"--at: expected NAME=PATH with one of labelled, .*, got {at}"):
        located(image_run(tmp_path, "test"), [at])


def test_a_signal_before_the_first_checkpoint_leaves_the_folder_to_any_run(tmp_path):
    folder = tmp_path / "run"
    with (
        pytest.raises(KeyboardInterrupt),
        reserve(folder, RUN, resume=False, overwrite=False),
        claim(folder, RUN, resume=False),
    ):
        raise KeyboardInterrupt
    assert not folder.exists()
