"""Files for people: strict JSON, CSV, pictures, tables."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ulfine_fast import report
from ulfine_fast.config import METHODS
from ulfine_fast.splits import ClassRow

NAMES = ["coat", "bag", "shirt"]


def printed(table) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_json_is_strict_and_atomic(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    record = {"a": math.nan, "b": [np.float64(0.5), torch.tensor([1, 2])], "c": (math.inf, None), 3: True}
    report.write_json(path, record)

    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    got = json.loads(path.read_text(), parse_constant=refuse)
    assert got == {"a": None, "b": [0.5, [1, 2]], "c": [None, None], "3": True}
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == got
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_predictions_have_one_line_per_image(tmp_path):
    path = tmp_path / "predictions.csv"
    one = torch.tensor([0, 1]), torch.tensor([0.5, 0.25])
    two = torch.tensor([1, 1]), torch.tensor([1.0, 0.12345])
    report.write_predictions(path, torch.tensor([0, 2]), {"lift": one, "ulfine": two})
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["index", "truth", "lift_prediction", "lift_confidence", "ulfine_prediction", "ulfine_confidence"],
        ["0", "0", "0", "0.5000", "1", "1.0000"],
        ["1", "2", "1", "0.2500", "1", "0.1235"],
    ]


def pictures(folder, curves):
    return report.save_pictures(
        folder,
        NAMES,
        labelled=[100, 30, 0],
        unlabelled=[200, 60, 4],
        truth=[200, 60, 4],
        accuracy={"lift": [0.9, 0.5, None], "ulfine": [1.0, 0.0, 0.5]},
        curves=curves,
        estimates={name: [0.7, 0.3, 0.0] for name in curves},
    )


def test_every_picture_is_written(tmp_path):
    curve = [
        {"step": 10, "precision": 0.9, "precision_few": None, "acceptance": 0.5},
        {"step": 20, "precision": 0.95, "precision_few": 0.5, "acceptance": 0.6},
    ]
    names = pictures(tmp_path, {"ulfine": curve})
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4
    for name in names:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            assert image.width >= 1000
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_pictures_of_pseudo_labels_need_some(tmp_path):
    (tmp_path / "pseudo_labels.png").write_bytes(b"of an earlier run")
    names = pictures(tmp_path, {})
    assert sorted(names) == ["class_counts.png", "per_class_accuracy.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_picture_that_fails_leaves_nothing(tmp_path):
    with pytest.raises((ValueError, TypeError)):
        report.save_class_counts(tmp_path / "class_counts.png", NAMES, [1, 2], [3])
    assert not list(tmp_path.iterdir())


def test_many_classes_have_no_names_on_the_axis(tmp_path):
    names = [f"class {k}" for k in range(200)]
    report.save_class_counts(tmp_path / "many.png", names, np.arange(200, 0, -1), np.arange(200, 0, -1))
    with Image.open(tmp_path / "many.png") as image:
        assert image.height < 1000


def test_methods_look_different_and_always_the_same():
    styles = [(s["color"], s["marker"]) for s in map(report.method_style, METHODS)]
    assert len(set(styles)) == len(METHODS)
    assert len({colour for colour, _ in styles}) == len(METHODS)
    assert report.method_style("fused") == report.method_style("ulfine")
    assert report.method_style("something else")["color"] == "black"


def test_percent():
    assert report.percent(0.7123) == "71.2"
    assert report.percent(0.7123, 0.0131) == "71.2 ± 1.3"
    assert report.percent(None) == "-"


def test_split_table_has_totals():
    rows = [ClassRow("coat", 1500, 2500, "many"), ClassRow("bag", 3, 5, "few")]
    text = printed(report.split_report(rows, "Split"))
    assert "1,500" in text
    assert "1,503" in text
    assert "2,505" in text


def test_the_table_of_many_classes_shows_both_ends():
    rows = [ClassRow(f"class {k}", 100 - k, None, "few") for k in range(50)]
    text = printed(report.split_report(rows, "Split", 1234))
    for shown in ("class 0 ", "class 14 ", "(20 more)", "class 35 ", "class 49 "):
        assert shown in text
    assert "class 15 " not in text
    assert "class 34 " not in text
    assert "1,234" in text
    last = next(line for line in text.splitlines() if "class 49 " in line)
    assert [cell.strip() for cell in last.strip("│").split("│")] == ["class 49", "51", "-", "few"]


def test_pictures_leave_out_what_is_not_known(tmp_path):
    records = [{"step": step, "precision": None, "precision_few": None, "acceptance": 0.5} for step in (1, 2)]
    known = [{**record, "precision": 0.5, "precision_few": 0.5} for record in records]
    report.save_pseudo_labels(tmp_path / "unknown.png", {"ulfine": records})
    report.save_pseudo_labels(tmp_path / "known.png", {"ulfine": known})
    widths = {}
    for name in ("unknown", "known"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            widths[name] = picture.width
    # one panel in the place of three
    assert widths["unknown"] < widths["known"] / 2
    report.save_class_counts(tmp_path / "counts.png", NAMES, [100, 30, 1], None)
    assert (tmp_path / "counts.png").exists()


def test_accuracy_table_shows_mean_and_deviation():
    cell = {"mean": 0.5, "std": 0.1}
    row = dict.fromkeys(("overall", "many", "medium"), cell)
    row |= {"few": {"mean": None, "std": None}, "seconds": {"mean": 1.25, "std": None}}
    text = printed(report.accuracy_table({"ulfine": row}, "Demo", "caption"))
    assert "50.0 ± 10.0" in text
    assert " - " in text
    assert "caption" in text


def test_captions_are_not_as_narrow_as_their_table():
    caption = "words " * 15
    table = report.accuracy_table({}, "Demo", caption)
    assert caption.strip() in printed(table)


def test_branch_table_shows_the_groups():
    row = {
        "overall": 0.7,
        "by_rank": {"many": 0.9, "medium": None, "few": 0.4},
        "worst": 0.1,
        "harmonic_mean": 0.3,
        "calibration_error": 0.05,
    }
    text = printed(report.branch_table({"fused": row}, "Run"))
    for value in ("70.0", "90.0", "-", "40.0", "10.0", "30.0", "5.0"):
        assert value in text
