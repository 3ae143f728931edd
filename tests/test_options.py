"""Options of records: what they check, and the options of the command line that are made from them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from ulfine_fast import augment, datasets, tuning
from ulfine_fast.cli import app
from ulfine_fast.command_options import record, settings_of, with_options
from ulfine_fast.config import METHODS, PRESETS, Encoder, Images, Method, Training
from ulfine_fast.datasets import load_dataset
from ulfine_fast.learners import LEARNERS, changed_method
from ulfine_fast.options import Record, did_you_mean, one_of, option, options_of, redefined, share
from ulfine_fast.towers import load_tower

RECORDS = (Images, Encoder, Training, *dict.fromkeys(map(type, LEARNERS.values())))


@dataclass(frozen=True)
class Trip(Record):
    """One option of each kind."""

    days: int = option(3, "How long.", at_least=1, common=True)
    speed: float = option(1.5, "How fast.", above=0)
    rest: float = share(0.25, "Share of the time.")
    loss: float = option(0.0, "Of the way.", at_least=0, below=1)
    height: float = option(0.0, "Above the sea.")
    by: str = option("foot", "How", choices=("foot", "ferry"))
    to: str = option(
        "Rome", "Where to", choices=("Rome", "Reykjavik", "Riga"), spellings=("--to", "--towards")
    )
    shared: bool = option(False, "With others.")
    guests: int | None = option(None, "How many.", at_least=0, shown="nobody counts")
    stops: tuple[str, ...] | None = option(None, "On the way.", metavar="TEXT", spellings=("--stop",))
    map: str | None = option(None, "A map.", metavar="FILE")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("days", 0, "at least 1, got 0"),
        ("days", 1.0, "a whole number, got 1.0"),
        ("days", True, "a whole number, got True"),
        ("days", "3", "a whole number, got '3'"),
        ("days", None, "a whole number, got None"),
        ("speed", 0.0, "above 0, got 0.0"),
        ("speed", math.inf, "finite, got inf"),
        ("speed", math.nan, "finite, got nan"),
        ("speed", 10**400, "finite, got 1000"),
        ("speed", "fast", "a number, got 'fast'"),
        ("rest", 1.5, "in [0, 1], got 1.5"),
        ("rest", math.nan, "in [0, 1], got nan"),
        ("loss", 1.0, "in [0, 1), got 1.0"),
        ("height", -math.inf, "finite, got -inf"),
        ("by", "fot", "foot or ferry, got 'fot'; did you mean foot?"),
        ("to", "riga", "one of Rome, Reykjavik, Riga, got 'riga'; did you mean Riga?"),
        ("to", "Oslo", "one of Rome, Reykjavik, Riga, got 'Oslo'"),
        ("to", 3, "a string, got 3"),
        ("shared", 1, "True or False, got 1"),
        ("guests", -1, "at least 0, got -1"),
        ("stops", "Oslo", "strings in a tuple, got 'Oslo'"),
        ("stops", (1,), "strings in a tuple, got (1,)"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name} must be {re.escape(expected)}"):
        Trip(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"days": np.int64(2), "speed": 2, "rest": 0, "loss": np.float32(0.5), "height": -1e300},
        {"guests": 0, "stops": (), "map": "m", "shared": True},
        {"stops": ["Oslo"], "rest": 1},
    ],
)
def test_values_that_fit_are_kept(values):
    trip = Trip(**values)
    assert {name: getattr(trip, name) for name in values} == values


def test_an_option_with_another_default_keeps_the_rest():
    @dataclass(frozen=True)
    class Longer(Record):
        days: int | None = redefined(Trip, "days", None, common=False)

    assert Longer().days is None
    (longer,) = options_of(Longer).values()
    assert (longer.help, longer.at_least, longer.common, longer.plain) == ("How long.", 1, False, int)
    with pytest.raises(ValueError, match="days must be at least 1, got 0"):
        Longer(days=0)


@pytest.mark.parametrize("kind", RECORDS)
def test_every_field_says_what_it_is(kind):
    assert {entry.name for entry in fields(kind)} - {"summary"} == set(options_of(kind))
    for name, each in options_of(kind).items():
        assert each.help, name
        if each.default is not None:
            assert not each.fault(each.default), name


def test_presets_change_options_and_nothing_else():
    for preset in PRESETS.values():
        assert record(Training, preset.training)
        assert set(preset.training) <= set(options_of(Training))
        assert preset.learner in LEARNERS


def test_the_names_that_a_record_takes_are_those_that_there_are():
    assert list(options_of(Images)["dataset"].choices) == list(datasets.IMAGE_DATASETS)
    assert list(options_of(Training)["tuning"].choices) == list(tuning.TUNINGS)
    assert list(options_of(Training)["pipeline"].choices) == list(augment.PIPELINES)


@pytest.mark.parametrize(
    ("got", "near"),
    [
        ("ulfin", "ulfine"),
        ("ULFINE_PLUS", "ulfine_plus"),
        ("fixmach", "fixmatch"),
        ("zzz", ""),
        (3, ""),
        ("", ""),
    ],
)
def test_the_nearest_name_is_suggested(got, near):
    said = f"; did you mean {near}?" if near else ""
    assert did_you_mean(got, METHODS) == said
    assert one_of(METHODS, got, " here") == f"one of {', '.join(METHODS)} here, got {got!r}{said}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_tower("lite1"), r"got 'lite1'; did you mean lite\d\?"),
        (lambda: load_tower("vit-b-61"), r"got 'vit-b-61'; did you mean ViT-B-16\?"),
        (lambda: load_tower("timm:resnet5"), r"got 'timm:resnet5'; did you mean timm:resnet\d+\?"),
        (lambda: load_dataset("cifar-10"), r"got 'cifar-10'; did you mean cifar10\?"),
        (lambda: augment.build_pipeline("lift+"), r"got 'lift\+'; did you mean lift\?"),
    ],
)
def test_unknown_names_are_met_with_the_nearest_one(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The command line


def run(*words: str) -> tuple[dict[str, Any], str]:
    """What a command with the options of `Trip` is given, and what it prints."""
    found, command = {}, typer.Typer(rich_markup_mode="rich")

    @command.command()
    @with_options({"Travel": Trip}, {"days": "3, or what is left"})
    def travel(ctx: typer.Context, *, given: dict[str, Any], out: Path = Path("here")) -> None:
        """Travel."""
        found.update(given, out=out)

    result = CliRunner().invoke(command, list(words), env={"COLUMNS": "160"})
    return found, result.output


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], {}),
        (["--days", "3"], {"days": 3}),
        (["--speed", "2"], {"speed": 2.0}),
        (["--shared"], {"shared": True}),
        (["--by", "ferry"], {"by": "ferry"}),
        (["--towards", "Riga"], {"to": "Riga"}),
        (["--guests", "0"], {"guests": 0}),
        (["--stop", "Oslo", "--stop", "Bern"], {"stops": ("Oslo", "Bern")}),
        (["--map", "maps//a/"], {"map": "maps/a"}),
    ],
)
def test_what_is_given_is_told_from_a_default(words, given):
    found, output = run(*words)
    assert found == {**given, "out": Path("here")}, output
    assert record(Trip, found) == Trip(**given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--days", "0"], "Invalid value for '--days': expected at least 1, got 0"),
        (["--loss", "1"], "Invalid value for '--loss': expected in [0, 1), got 1.0"),
        (["--speed", "nan"], "Invalid value for '--speed': expected finite, got nan"),
        (
            ["--by", "fery"],
            "Invalid value for '--by': expected foot or ferry, got 'fery'; did you mean ferry?",
        ),
        (["--guests", "-1"], "Invalid value for '--guests': expected at least 0, got -1"),
        (["--speeed", "1"], "--speed"),
        (["--no-shared"], "No such option: --no-shared"),
    ],
)
def test_a_word_that_does_not_fit_is_named(words, message):
    found, output = run(*words)
    assert not found
    assert message in " ".join(output.replace("│", " ").split())


def test_help_has_ranges_choices_and_defaults():
    said = " ".join(run("--help")[1].replace("│", " ").split())
    # what stands for a number is the choice of the version of typer
    said = re.sub(r"(?<=--(?:days|loss) )\S+|(?<=--guests )\S+", "NUMBER", said)
    for part in (
        "--days NUMBER How long. [default: (3, or what is left)]",
        "--loss NUMBER Of the way (in [0, 1)). [default: 0.0]",
        "--by <foot|ferry> How. [default: foot]",
        "--to,--towards NAME Where to: Rome, Reykjavik, Riga. [default: Rome]",
        "--guests NUMBER How many. [default: (nobody counts)]",
        "--stop TEXT On the way.",
        "--map FILE A map.",
    ):
        assert part in said
    # common ones are in no panel
    assert said.index("Options") < said.index("--days") < said.index("Travel ─") < said.index("--speed")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_names_every_field_and_ten_of_them_first(command, width):
    said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": str(width)}).output
    for kind in (Images, Encoder, Training):
        for name, each in options_of(kind).items():
            for spelling in each.spellings or (f"--{name.replace('_', '-')}",):
                assert re.search(rf"[ ,]{spelling}\b", said), spelling
    panels = re.split(r"╭─ (\w+) ─+╮", said)
    arguments = ["Arguments"] if command == "compare" else []
    assert panels[1::2] == [*arguments, "Options", "Data", "Encoder", "Training", "Run"]
    first = panels[panels.index("Options") + 1]
    assert len(re.findall(r"^│ --(?!help)", first, re.MULTILINE)) == 10


# --set


def test_settings_are_read_by_the_kind_of_their_field():
    settings = settings_of(Method, ["eta=1", "scale_rows=8", "normalize_linear=false", "linear_init=random"])
    given = changed_method("ulfine_plus", settings)
    assert (given.eta, given.scale_rows, given.normalize_linear, given.linear_init) == (
        1.0,
        8,
        False,
        "random",
    )
    # an eta that is given is not chosen
    assert given.eta_folds == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mu", "--set: expected FIELD=VALUE, got 'mu'"),
        ("summary=x", "--set: expected one of eta, .*, got 'summary'$"),
        ("threshhold=1", r"got 'threshhold'; did you mean threshold\?"),
        ("mu=high", "--set mu: expected float, got 'high'"),
        ("trained=1", "--set trained: expected true or false, got '1'"),
        ("mu=2", r"mu must be in \[0, 1\], got 2.0"),
        (
            "fitting=posterier",
            r"fitting must be compounding or posterior, got 'posterier'; did you mean posterior\?",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        changed_method("ulfine", settings_of(Method, [setting]))
