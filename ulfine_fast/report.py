"""What a run leaves for people: pictures, JSON, CSV and tables. Every file is written whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ulfine_fast.checkpoint import replacing
from ulfine_fast.config import METHODS, PRESETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure
    from rich.console import Group
    from rich.table import Table

    from ulfine_fast.splits import ClassRow

# Okabe and Ito, "Color Universal Design": distinct under the common colour blindnesses. Grey: no training.
PALETTE = ("#7f7f7f", "#56b4e9", "#0072b2", "#e69f00", "#cc79a7", "#009e73", "#d55e00", "#000000")
MARKERS = ("x", "v", "^", "s", "D", "P", "o", "*")
BRANCH_INDEX = {"fused": 6, "linear": 2, "text": 5}
LABELLED, UNLABELLED = "#0072b2", "#e69f00"
PICTURES = ("class_counts.png", "per_class_accuracy.png", "pseudo_labels.png", "class_distribution.png")
# Lines at each end of a table of classes: the head and the tail of a hundred classes still fit on a screen.
LONGEST_END = 15
# Classes that have room for their names on an axis, and for bars with their numbers; characters of a name there.
MOST_NAMED, MOST_COUNTED, LONGEST_NAME = 120, 20, 28
# Names are shown as they are, so no text is mathematics or TeX.
STYLE = {
    "text.parse_math": False,
    "text.usetex": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "font.size": 10,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def method_style(name: str) -> dict[str, Any]:
    """Colour, marker and layer of a method or branch: the same in every picture. Others share black dots."""
    if name in BRANCH_INDEX:
        index = BRANCH_INDEX[name]
    elif name in PRESETS:
        # those with a frozen encoder first, in the colours of their eight
        index = list(dict.fromkeys((*METHODS, *PRESETS))).index(name)
    else:
        return {"color": "black", "marker": "."}
    turn, place = divmod(index, len(PALETTE))
    return {
        "color": PALETTE[place],
        "marker": MARKERS[(place + turn) % len(MARKERS)],
        "zorder": 2 + index / 10,
    }


def names_in_pictures(rows: Sequence[ClassRow]) -> list[str]:
    """Names of classes for pictures, of at most `LONGEST_NAME` characters.

    The number of the class stands behind a name that others have too, and alone for a name that no installed font can
    draw.
    """
    several = Counter(row.name for row in rows)
    names = []
    for row in rows:
        name = row.name if len(row.name) <= LONGEST_NAME else row.name[: LONGEST_NAME - 1] + "…"
        if _fonts_for(name) is None:
            name = f"class {row.id}"
        elif several[row.name] > 1:
            name = f"{name} ({row.id})"
        names.append(name)
    return names


def save_class_counts(
    path: Path, class_names: Sequence[str], labelled: Any, unlabelled: Any, note: str = ""
) -> None:
    """Labelled and, if they are known, unlabelled images [C] per class; logarithmic from a ratio of 20.

    In this and the other pictures classes are in the given order, more than `MOST_NAMED` by rank without their names;
    `note` ends the title.
    """
    bars = [(np.asarray(labelled), LABELLED, "labelled")]
    if unlabelled is not None:
        bars.append((np.asarray(unlabelled), UNLABELLED, "unlabelled"))
    with _class_figure(path, class_names, "Training images per class" + note) as axes:
        for drawn in _draw_bars(axes, class_names, bars):
            if len(class_names) <= MOST_COUNTED:
                axes.bar_label(drawn, fontsize=8, padding=1)
        present = np.concatenate([counts for counts, *_ in bars])
        present = present[present > 0]
        if len(present) and present.max() >= 20 * present.min():
            axes.set_yscale("log")
            axes.set_ylim(0.7, 1.7 * present.max())
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("training images")


def save_per_class_accuracy(
    path: Path, class_names: Sequence[str], accuracy: Mapping[str, Sequence[float | None]], note: str = ""
) -> None:
    """Accuracy [C] in [0, 1] of each method per class, in the given order; None leaves a gap."""
    with _class_figure(path, class_names, "Test accuracy per class" + note) as axes:
        percents = {name: [math.nan if x is None else 100 * x for x in row] for name, row in accuracy.items()}
        _draw_points(axes, class_names, percents)
        axes.set_ylim(-3, 103)
        axes.set_ylabel("accuracy (%)")


def save_pseudo_labels(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]], note: str = "") -> None:
    """Precision, if it is known, and acceptance of pseudo-labels over the steps, one line for each name.

    curves: name -> records with "step" and the fractions "precision", "precision_few" and "acceptance".
    """
    panels = {
        "precision": "precision, all classes (%)",
        "precision_few": "precision, few classes (%; a gap: none kept)",
        "acceptance": "acceptance (%)",
    }
    records = [record for of_name in curves.values() for record in of_name]
    panels = {
        key: label for key, label in panels.items() if any(record[key] is not None for record in records)
    }
    # what lies below is broader, for methods may agree
    below = sorted(curves, key=lambda name: method_style(name).get("zorder", 2))
    widths = dict(zip(below, np.linspace(3.5 if len(below) > 1 else 1.2, 1.2, len(below)), strict=True))
    with _figure(path, (2 + 3 * len(panels), 4)) as figure:
        grid = figure.subplots(1, len(panels), sharex=True, squeeze=False)
        for axes, (key, label) in zip(grid[0], panels.items(), strict=True):
            for name, records in curves.items():
                values = [math.nan if r[key] is None else 100 * r[key] for r in records]
                style = method_style(name) | {"markersize": 4, "markevery": max(len(values) // 10, 1)}
                axes.plot([r["step"] for r in records], values, label=name, linewidth=widths[name], **style)
            axes.set_ylim(-3, 103)
            axes.set_xlim(left=0)
            axes.set_xlabel("training step")
            axes.set_title(label, fontsize=10, loc="left")
        _legend_below(figure, axes)
        figure.suptitle("Pseudo-labels of the unlabelled images" + note, fontsize=11, x=0.01, ha="left")


def save_class_distribution(
    path: Path,
    class_names: Sequence[str],
    truth: Any,
    labelled: Any,
    estimates: Mapping[str, Sequence[float]],
    note: str = "",
) -> None:
    """Shares [C] of the classes: truth of the unlabelled images if it is known, labelled prior, P_u of each method."""
    bars = [(100 * _shares(labelled), "#b3b3b3", "labelled images")]
    if truth is not None:
        bars.append((100 * _shares(truth), "#e0c98f", "unlabelled images (truth)"))
    title = "Class distribution, estimated" + (" and true" if truth is not None else "")
    with _class_figure(path, class_names, title + note) as axes:
        _draw_bars(axes, class_names, bars)
        shares = {name: 100 * _shares(row) for name, row in estimates.items()}
        _draw_points(axes, class_names, shares, "estimate of ")
        axes.set_ylabel("share of the images (%)")


def save_pictures(
    out: Path,
    class_names: Sequence[str],
    *,
    labelled: Any,
    unlabelled: Any,
    truth: Any,
    accuracy: Mapping[str, Sequence[float | None]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    estimates: Mapping[str, Sequence[float]],
    note: str = "",
) -> list[str]:
    """All pictures of a run into `out`, their names returned; the two on pseudo-labels only where there are any.

    Everything is per class [C] in the order of `class_names`: images `labelled` and `unlabelled`, of the
    latter `truth` without copies of labelled ones (both None where not known), `accuracy` and `estimates` of P_u by
    name. curves: see `save_pseudo_labels`. note: what the titles end with.
    """
    paths = [out / name for name in PICTURES]
    save_class_counts(paths[0], class_names, labelled, unlabelled, note)
    save_per_class_accuracy(paths[1], class_names, accuracy, note)
    if curves:
        save_pseudo_labels(paths[2], curves, note)
    if estimates:
        save_class_distribution(paths[3], class_names, truth, labelled, estimates, note)
    for path, drawn in ((paths[2], curves), (paths[3], estimates)):
        if not drawn:
            # an earlier run in the same folder may have left one
            path.unlink(missing_ok=True)
    return [path.name for path in paths if path.exists()]


def write_json(path: Path, record: Any) -> None:
    """Strict JSON, indented; NaN and infinities become null, arrays lists."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_predictions(
    path: Path,
    truth: Any,
    predictions: Mapping[str, tuple[Any, Any]],
    class_names: Sequence[str],
    *,
    images: Sequence[str] | None = None,
) -> None:
    """CSV of the test images: index or name, truth, then prediction and confidence of each method.

    predictions: name -> (label [N], confidence [N]). images: their names [N], None numbers them. A class is in two
    columns, its number and its name; confidences have 4 decimals.
    """

    def classes(column: str, labels: Any) -> dict[str, list[Any]]:
        labels = np.asarray(labels).tolist()
        return {column: labels, f"{column}_name": [class_names[label] for label in labels]}

    columns: dict[str, Sequence[Any]] = {"image": images} if images else {"index": range(len(truth))}
    columns |= classes("truth", truth)
    for name, (label, confidence) in predictions.items():
        columns |= classes(f"{name}_prediction", label)
        columns[f"{name}_confidence"] = [f"{x:.4f}" for x in np.asarray(confidence).tolist()]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def percent(value: float | None, std: float | None = None) -> str:
    """Fraction `value` as percent with one decimal, "± std" behind it if given, "-" for None."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def split_report(rows: Sequence[ClassRow], title: str, unlabelled: int | None = None) -> Table:
    """Table of a split: one line per class in the given order and a line of totals; of many classes both ends.

    unlabelled: images in all, None is the sum over the classes.
    """
    from rich.table import Table

    if unlabelled is None:
        unlabelled = sum(row.unlabelled for row in rows)
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("id", justify="right")
    table.add_column("class", "all")
    table.add_column("labelled", f"{sum(row.labelled for row in rows):,}", justify="right")
    table.add_column("unlabelled", f"{unlabelled:,}", justify="right")
    table.add_column("group")
    left_out = range(LONGEST_END, len(rows) - LONGEST_END)
    for rank, row in enumerate(rows):
        if rank not in left_out:
            known = "-" if row.unlabelled is None else f"{row.unlabelled:,}"
            table.add_row(str(row.id), row.name, f"{row.labelled:,}", known, row.group)
        elif rank == left_out.start:
            table.add_row("", f"({len(left_out):,} more)")
    return table


def accuracy_table(rows: Mapping[str, Mapping[str, Any]], title: str, caption: str) -> Group:
    """Table of accuracies in %: for each name overall, many, medium, few as {"mean", "std"}, and seconds."""
    from rich.console import Group
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("method")
    columns = ("overall", "many", "medium", "few")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("time (s)", justify="right")
    for name, row in rows.items():
        cells = [percent(row[column]["mean"], row[column]["std"]) for column in columns]
        seconds = row["seconds"]["mean"]
        table.add_row(name, *cells, f"{seconds:.1f}")
    # a caption of the table itself would be as narrow as the table
    return Group(table, caption)


def branch_table(metrics: Mapping[str, Mapping[str, Any]], title: str) -> Group:
    """Table of one run: `classification_metrics` of the fused head, the linear and the text branch."""
    from rich.console import Group
    from rich.table import Table

    caption = (
        "Test accuracy in %. many / medium / few: thirds of the classes by labelled images. ECE: expected"
        " calibration error in %, 15 bins."
    )
    table = Table(title=title, title_justify="left")
    table.add_column("branch")
    for column in ("overall", "many", "medium", "few", "worst class", "harmonic mean", "ECE"):
        table.add_column(column, justify="right")
    for name, row in metrics.items():
        groups = [row["by_rank"][group] for group in ("many", "medium", "few")]
        values = [row["overall"], *groups, row["worst"], row["harmonic_mean"], row["calibration_error"]]
        table.add_row(name, *map(percent, values))
    return Group(table, caption)


@contextmanager
def _figure(path: Path, size: tuple[float, float], text: str = "") -> Iterator[Figure]:
    """A figure in the house style, with fonts for `text`, saved to `path` at the end of the block without a display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fonts = _fonts_for(text)
    with rc_context(STYLE | ({} if fonts is None else {"font.family": fonts})):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    for columns in range(min(len(names), 6), 0, -1):
        legend = figure.legend(handles, names, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()


@contextmanager
def _class_figure(path: Path, class_names: Sequence[str], title: str) -> Iterator[Axes]:
    """The axes of a picture with a place for each class, see `_figure`; names and legend are drawn at the end."""
    named = len(class_names) <= MOST_NAMED
    width = 8 if not named else max(8, 1 + 0.2 * len(class_names))
    with _figure(path, (width, 5), "".join(class_names) if named else "") as figure:
        axes = figure.subplots()
        yield axes
        axes.grid(axis="x", visible=False)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlim(0.4, len(class_names) + 0.6)
        if named:
            few = len(class_names) <= 12
            tilt = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if few else {"rotation": 90}
            axes.set_xticks(_places(class_names), class_names, fontsize=10 if few else 8, **tilt)
            axes.set_xlabel("class, most labelled images first")
            axes.set_xticks(_places(class_names)[:-1] + 0.5, minor=True)
            axes.tick_params(axis="x", which="minor", length=0)
            axes.grid(axis="x", which="minor")
        else:
            axes.set_xlabel("rank of the class, 1 = most labelled images")
        _legend_below(figure, axes)


def _places(class_names: Sequence[str]) -> np.ndarray:
    return np.arange(1, len(class_names) + 1)


def _side_by_side(class_names: Sequence[str], count: int) -> Iterator[np.ndarray]:
    """Places [C] of the first, the second, ... of `count` items of every class."""
    for item in range(count):
        yield _places(class_names) + 0.8 * (item - (count - 1) / 2) / count


def _draw_bars(
    axes: Axes, class_names: Sequence[str], bars: Sequence[tuple[np.ndarray, str, str]]
) -> list[BarContainer]:
    """Bars of each class side by side: heights [C], colour and name of each kind."""
    return [
        axes.bar(places, heights, 0.76 / len(bars), color=colour, label=name)
        for places, (heights, colour, name) in zip(_side_by_side(class_names, len(bars)), bars, strict=True)
    ]


def _draw_points(
    axes: Axes, class_names: Sequence[str], values: Mapping[str, Sequence[float]], what: str = ""
) -> None:
    """Points [C] of each name, side by side: two that agree would hide one another. what: begins the legend."""
    for places, (name, row) in zip(_side_by_side(class_names, len(values)), values.items(), strict=True):
        # without room side by side, what lies below is seen through
        roomy = len(class_names) <= MOST_NAMED
        style = {"markersize": 5} if roomy else {"markersize": 4, "fillstyle": "none"}
        style |= {"linestyle": "none", **method_style(name)}
        axes.plot(places, row, label=what + name, **style)


@cache
def _fonts_for(text: str) -> list[str] | None:
    """Font families that between them have the characters of `text`, the usual one first; None if there are none."""
    from matplotlib import font_manager

    usual = font_manager.FontProperties()
    families = [*usual.get_family()]
    lacking = {ord(character) for character in text if not character.isspace()}
    lacking -= _characters(font_manager.findfont(usual))
    # by name: the order of the list is that of the disk
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name, font.fname)):
        if not lacking:
            break
        plain = (font.style, font.variant, str(font.weight)) == ("normal", "normal", "400")
        # its glyphs are boxes
        if plain and not font.name.startswith("Last Resort") and lacking & _characters(font.fname):
            families.append(font.name)
            lacking -= _characters(font.fname)
    return None if lacking else families


@cache
def _characters(font: str) -> frozenset[int]:
    from matplotlib import font_manager

    try:
        face = font_manager.get_font(font)
    except (OSError, RuntimeError):
        # it is listed, and was removed or damaged since
        return frozenset()
    # fonts of coloured pictures have one size, which is none of ours
    return frozenset(face.get_charmap() if face.scalable else ())


def _shares(counts: Any) -> np.ndarray:
    counts = np.asarray(counts, dtype=np.float64)
    return counts / max(counts.sum(), 1e-12)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
