"""Files for people: strict JSON, CSV, pictures, tables."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from ulfine_fast import report
from ulfine_fast.config import METHODS
from ulfine_fast.splits import ClassRow
from ulfine_fast.terminal import make_console

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
    report.write_predictions(path, torch.tensor([0, 2]), {"lift": one, "ulfine": two}, NAMES)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        [
            *("index", "truth", "truth_name"),
            *("lift_prediction", "lift_prediction_name", "lift_confidence"),
            *("ulfine_prediction", "ulfine_prediction_name", "ulfine_confidence"),
        ],
        ["0", "0", "coat", "0", "coat", "0.5000", "1", "bag", "1.0000"],
        ["1", "2", "shirt", "1", "bag", "0.2500", "1", "bag", "0.1235"],
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


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(save, *arguments)`: the figure that a function of pictures saves."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (path.touch(), figures.append(figure)))

    def draw(save, *arguments):
        save(tmp_path / "picture.png", *arguments)
        figures[-1].draw_without_rendering()
        return figures[-1]

    return draw


def tick_names(figure):
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


@pytest.mark.parametrize("classes", [3, 88, 300])
def test_classes_have_their_names_where_there_is_room(drawn, classes):
    names = [f"class of kind {k}" for k in range(classes)]
    figure = drawn(report.save_class_counts, names, np.arange(classes, 0, -1), None)
    if classes <= report.MOST_NAMED:
        assert tick_names(figure) == names
        boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    else:
        assert not {*names} & {*tick_names(figure)}
        assert figure.axes[0].get_xlabel() == "rank of the class, 1 = most labelled images"


@pytest.mark.parametrize("truth", [None, [1, 2, 3]])
def test_bars_stand_over_their_class(drawn, truth):
    estimates = {"ulfine": [0.2, 0.3, 0.5]}
    for save, *arguments in (
        (report.save_class_counts, [3, 2, 1], truth),
        (report.save_class_distribution, truth, [3, 2, 1], estimates),
    ):
        axes = drawn(save, NAMES, *arguments).axes[0]
        centres = np.mean(
            [[bar.get_x() + bar.get_width() / 2 for bar in bars] for bars in axes.containers], axis=0
        )
        assert centres == pytest.approx(axes.get_xticks())


def test_methods_that_agree_are_both_seen(drawn):
    same = [0.5, 0.6, 0.7]
    axes = drawn(report.save_per_class_accuracy, NAMES, {"fused": same, "linear": same}).axes[0]
    fused, linear = (line.get_xdata() for line in axes.lines)
    assert not set(fused) & set(linear)
    curve = [{"step": 1, "precision": None, "precision_few": None, "acceptance": 0.5}]
    axes = drawn(report.save_pseudo_labels, {"fused": curve, "linear": curve}).axes[0]
    fused, linear = axes.lines
    assert fused.get_zorder() > linear.get_zorder()
    assert fused.get_linewidth() < linear.get_linewidth()


def test_legends_are_whole(drawn):
    estimates = {name: [0.2, 0.3, 0.5] for name in METHODS}
    figure = drawn(report.save_class_distribution, NAMES, [1, 2, 3], [3, 2, 1], estimates)
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert len(legend.get_texts()) == 2 + len(METHODS)


def test_names_are_not_read_as_mathematics(drawn):
    names = ["$", "$$", "$x^$"]
    assert tick_names(drawn(report.save_class_counts, names, [3, 2, 1], None)) == names


def test_names_in_pictures(monkeypatch):
    rows = [
        ClassRow(k, name, 1, None, "few")
        for k, name in ((4, "coat"), (7, "\u732b"), (2, "coat"), (0, "x" * 99))
    ]
    monkeypatch.setattr(report, "_fonts_for", lambda text: None if "\u732b" in text else [])
    names = report.names_in_pictures(rows)
    assert names[:3] == ["coat (4)", "class 7", "coat (2)"]
    assert names[3] == "x" * 27 + "\u2026"


def test_a_font_is_found_for_characters_that_the_usual_one_lacks(monkeypatch):
    of_font = {"DejaVu Sans": "ab", "A": "ac", "B": "d", "C": "cd"}
    fonts = [
        font_manager.FontEntry(fname=name, name=name, style="normal", variant="normal", weight=400)
        for name in reversed(of_font)
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findfont", lambda font: "DejaVu Sans")
    monkeypatch.setattr(report, "_characters", lambda font: {*map(ord, of_font[font])})
    usual = font_manager.FontProperties().get_family()
    report._fonts_for.cache_clear()
    try:
        assert report._fonts_for("a b") == usual
        assert report._fonts_for("abcd") == [*usual, "A", "B"]
        assert report._fonts_for("abx") is None
    finally:
        report._fonts_for.cache_clear()


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
    rows = [ClassRow(1, "coat", 1500, 2500, "many"), ClassRow(0, "bag", 3, 5, "few")]
    text = printed(report.split_report(rows, "Split"))
    assert "1,500" in text
    assert "1,503" in text
    assert "2,505" in text


def test_tables_print_names_as_they_are(capsys):
    names = ["[/happy]", "[red]", ":smile:", "beach [edited]"]
    rows = [ClassRow(k, name, 1, 1, "few") for k, name in enumerate(names)]
    make_console().print(report.split_report(rows, "[bold]Split"))
    text = capsys.readouterr().out
    assert all(f"│ {name} " in text for name in names)
    assert "[bold]Split" in text


def test_the_table_of_many_classes_shows_both_ends():
    rows = [ClassRow(k, f"class {k}", 100 - k, None, "few") for k in range(50)]
    text = printed(report.split_report(rows, "Split", 1234))
    for shown in ("class 0 ", "class 14 ", "(20 more)", "class 35 ", "class 49 "):
        assert shown in text
    assert "class 15 " not in text
    assert "class 34 " not in text
    assert "1,234" in text
    last = next(line for line in text.splitlines() if "class 49 " in line)
    assert [cell.strip() for cell in last.strip("│").split("│")] == ["49", "class 49", "51", "-", "few"]


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
