"""What a run leaves for people: pictures, JSON, CSV and tables. Every file is written whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ulfine_fast.checkpoint import replacing
from ulfine_fast.config import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
STYLE = {
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
    elif name in METHODS:
        index = list(METHODS).index(name) % len(PALETTE)
    else:
        return {"color": "black", "marker": "."}
    return {"color": PALETTE[index], "marker": MARKERS[index], "zorder": 2 + index / 10}


def save_class_counts(
    path: Path, class_names: Sequence[str], labelled: Any, unlabelled: Any, note: str = ""
) -> None:
    """Labelled and, if they are known, unlabelled images [C] per class; logarithmic from a ratio of 20.

    In this and the other pictures classes are in the given order, and those whose names are numbers are ranks; `note`
    ends the title.
    """
    bars = [(np.asarray(labelled), 0.0, LABELLED, "labelled")]
    if unlabelled is not None:
        bars = [(bars[0][0], -0.2, *bars[0][2:]), (np.asarray(unlabelled), 0.2, UNLABELLED, "unlabelled")]
    with _figure(path, (8, 4)) as figure:
        axes = figure.subplots()
        places = np.arange(len(class_names))
        for counts, offset, colour, name in bars:
            drawn = axes.bar(places + offset, counts, 0.38, color=colour, label=name)
            if len(class_names) <= 20:
                axes.bar_label(drawn, fontsize=8, padding=1)
        present = np.concatenate([counts for counts, *_ in bars])
        present = present[present > 0]
        if len(present) and present.max() >= 20 * present.min():
            axes.set_yscale("log")
            axes.set_ylim(0.7, 1.7 * present.max())
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("training images")
        _legend_below(figure, axes)
        _class_axis(axes, class_names, "Training images per class" + note)


def save_per_class_accuracy(
    path: Path, class_names: Sequence[str], accuracy: Mapping[str, Sequence[float | None]], note: str = ""
) -> None:
    """Accuracy [C] in [0, 1] of each method per class, in the given order; None leaves a gap."""
    with _figure(path, (9, 4.8)) as figure:
        axes = figure.subplots()
        for name, values in accuracy.items():
            percent = [math.nan if x is None else 100 * x for x in values]
            axes.plot(percent, label=name, linewidth=1.5, markersize=5, **method_style(name))
        axes.set_ylim(-3, 103)
        axes.set_ylabel("accuracy (%)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        _class_axis(axes, class_names, "Test accuracy per class" + note)


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
    with _figure(path, (2 + 3 * len(panels), 4)) as figure:
        grid = figure.subplots(1, len(panels), sharex=True, squeeze=False)
        for axes, (key, label) in zip(grid[0], panels.items(), strict=True):
            for name, records in curves.items():
                values = [math.nan if r[key] is None else 100 * r[key] for r in records]
                style = method_style(name) | {"markersize": 4, "markevery": max(len(values) // 10, 1)}
                axes.plot([r["step"] for r in records], values, label=name, linewidth=1.5, **style)
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
    with _figure(path, (9, 4.5)) as figure:
        axes = figure.subplots()
        places = np.arange(len(class_names))
        bars = [(labelled, -0.2, "#b3b3b3", "labelled images")]
        if truth is not None:
            bars.append((truth, 0.2, "#e0c98f", "unlabelled images (truth)"))
        for counts, offset, colour, name in bars:
            axes.bar(places + offset, 100 * _shares(counts), 0.38, color=colour, label=name)
        for name, estimate in estimates.items():
            axes.plot(places, 100 * _shares(estimate), label=f"$P_u$ of {name}", **method_style(name))
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("share of the images (%)")
        _legend_below(figure, axes)
        title = "Class distribution, estimated" + (" and true" if truth is not None else "")
        _class_axis(axes, class_names, title + note)


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
    path: Path, truth: Any, predictions: Mapping[str, tuple[Any, Any]], *, names: Sequence[str] | None = None
) -> None:
    """CSV of the test images: index or name, truth, then prediction and confidence of each method.

    predictions: name -> (label [N], confidence [N]). names: of the images [N], None numbers them. Classes are numbers,
    confidences have 4 decimals.
    """
    header = ["index" if names is None else "image", "truth"]
    columns: list[list[Any]] = [list(names or range(len(truth))), np.asarray(truth).tolist()]
    for name, (label, confidence) in predictions.items():
        header += [f"{name}_prediction", f"{name}_confidence"]
        columns += [np.asarray(label).tolist(), [f"{x:.4f}" for x in np.asarray(confidence).tolist()]]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(zip(*columns, strict=True))


def percent(value: float | None, std: float | None = None) -> str:
    """Fraction `value` as percent with one decimal, "± std" behind it if given, "-" for None."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def split_report(rows: Sequence[ClassRow], title: str, unlabelled: int | None = None) -> Table:
    """Table of a split: one line per class from head to tail and a line of totals; of many classes both ends.

    unlabelled: images in all, None is the sum over the classes.
    """
    from rich.table import Table

    if unlabelled is None:
        unlabelled = sum(row.unlabelled for row in rows)
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("class", "all")
    table.add_column("labelled", f"{sum(row.labelled for row in rows):,}", justify="right")
    table.add_column("unlabelled", f"{unlabelled:,}", justify="right")
    table.add_column("group")
    left_out = range(LONGEST_END, len(rows) - LONGEST_END)
    for rank, row in enumerate(rows):
        if rank not in left_out:
            known = "-" if row.unlabelled is None else f"{row.unlabelled:,}"
            table.add_row(row.name, f"{row.labelled:,}", known, row.group)
        elif rank == left_out.start:
            table.add_row(f"({len(left_out):,} more)")
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
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure in the house style, saved to `path` at the end of the block without a display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6))


def _class_axis(axes: Axes, class_names: Sequence[str], title: str) -> None:
    ranks = all(name.isdigit() for name in class_names)
    axes.set_xlabel(
        "rank of the class, 1 = most labelled images" if ranks else "class, most labelled images first"
    )
    axes.set_title(title, fontsize=11, loc="left")
    if len(class_names) <= 30:
        places, tilt = range(len(class_names)), 0 if ranks else 30
        axes.set_xticks(places, class_names, rotation=tilt, ha="right" if tilt else "center")


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
