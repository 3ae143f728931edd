"""Features of one's own: one file with everything that a head is trained and tested on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.features import FeatureData, class_means, unit_
from ulfine_fast.image_data import UNKNOWN

_NEEDED = ("labelled", "labels", "test", "test_labels")
_OPTIONAL = ("weak", "strong", "prototypes", "unlabelled_truth", "unlabelled_is_labelled")
_NAMES = "class_names"


def read_features(path: Path | str) -> FeatureData:
    """The features in a file that ends in .safetensors or .npz.

    Needed are labelled [n_l, D] or [K, n_l, D], K weak views of each labelled image; labels [n_l], whole numbers in
    0..C-1; test [n_t, D] or [n_t, V, D], V views of each; test_labels [n_t]. For methods that learn from unlabelled images
    weak and strong, each [n_u, D] or [K, n_u, D], row for row of the same images. May be left out, too:

    prototypes [C, D]: class means of the labelled rows take their place.
    class_names: C texts, an array of text in an .npz file, a JSON list in the metadata of a .safetensors file; else
        classes are called by their number.
    unlabelled_truth [n_u]: classes of the unlabelled images for reports, -1 where unknown, as they are all without it.
    unlabelled_is_labelled [n_u] bool: which of them are labelled images too; none without it.

    C is the number of class names or prototypes, else one more than the largest label. Features are of any floating
    dtype and finite. Rows need not be of unit length: they are normalised. They are not centred: where an encoder needs
    that, subtract one mean from all of them, prototypes excepted, before they are written.

    Nothing in a file is run: pickled arrays are refused. Raises ValueError, "expected ..., got ...", for a file that is
    not as described, OSError for one that cannot be read.
    """
    path = Path(path)
    readers = {".npz": _npz, ".safetensors": _safetensors}
    try:
        if path.suffix not in readers:
            raise _Fault("a file that ends in .safetensors or .npz", path.name)
        return _checked(*readers[path.suffix](path))
    except _Fault as fault:
        raise ValueError(f"{path}: expected {fault.expected}, got {fault.got}") from fault


class _Fault(Exception):  # noqa: N818 (of a file; what is raised in the end is a ValueError that names it)
    def __init__(self, expected: str, got: object) -> None:
        super().__init__(expected, got)
        self.expected, self.got = expected, got


def _npz(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    try:
        # opened here: of a damaged file numpy would not close its own
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, MemoryError):
        raise
    # a damaged file can make the reader raise anything
    except Exception as error:
        raise _Fault("an .npz file without pickled objects", shorten(str(error), 120)) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise _Fault("an .npz file of arrays alone", name)
    names = arrays.pop(_NAMES, None)
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise _Fault(f"{_NAMES} to be an array [C] of text", f"{names.dtype} {list(names.shape)}")
    tensors = {}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise _Fault(f"{name} to be of numbers", array.dtype)
        tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    return tensors, None if names is None else tuple(names.tolist())


def _safetensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            text = (file.metadata() or {}).get(_NAMES)
    except (SafetensorError, UnicodeDecodeError) as error:
        raise _Fault("a safetensors file", shorten(str(error), 120)) from error
    if text is None:
        return tensors, None
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Fault(f"{_NAMES} in the metadata to be a JSON list of texts", shorten(text, 120))
    return tensors, tuple(names)


def _checked(tensors: Mapping[str, Tensor], names: tuple[str, ...] | None) -> FeatureData:
    for name in _NEEDED:
        if name not in tensors:
            raise _Fault(f"tensors {', '.join(_NEEDED)}", f"no {name}")
    for name in tensors:
        if name not in (*_NEEDED, *_OPTIONAL):
            raise _Fault(f"tensors among {', '.join((*_NEEDED, *_OPTIONAL))}", name)
    if ("weak" in tensors) != ("strong" in tensors):
        raise _Fault("weak and strong, or neither", "weak alone" if "weak" in tensors else "strong alone")
    labelled = _features(tensors, "labelled", ("n_l", "D"), ("K", "n_l", "D"))
    width = labelled.shape[-1]
    test = _features(tensors, "test", ("n_t", "D"), ("n_t", "V", "D"), width=width)
    # without unlabelled images: one copy of none
    weak = strong = labelled.new_zeros(1, 0, width)
    if "weak" in tensors:
        weak = _features(tensors, "weak", ("n_u", "D"), ("K", "n_u", "D"), width=width)
        strong = _features(tensors, "strong", ("n_u", "D"), ("K", "n_u", "D"), width=width)
        if strong.shape[-2] != weak.shape[-2]:
            raise _Fault(f"strong views of the {weak.shape[-2]} images of weak", strong.shape[-2])
    labelled, weak, strong = (rows if rows.ndim == 3 else rows[None] for rows in (labelled, weak, strong))
    test = test if test.ndim == 3 else test[:, None]
    prototypes = None
    if "prototypes" in tensors:
        prototypes = _features(tensors, "prototypes", ("C", "D"), width=width)

    unlabelled = weak.shape[1]
    labels = _labels(tensors, "labels", labelled.shape[1])
    test_labels = _labels(tensors, "test_labels", len(test))
    truth = torch.full((unlabelled,), UNKNOWN)
    if "unlabelled_truth" in tensors:
        truth = _labels(tensors, "unlabelled_truth", unlabelled)
    is_labelled = tensors.get("unlabelled_is_labelled", torch.zeros(unlabelled, dtype=torch.bool))
    if is_labelled.dtype != torch.bool or is_labelled.shape != (unlabelled,):
        raise _Fault(f"unlabelled_is_labelled bool [{unlabelled}]", _described(is_labelled))

    if names is not None:
        classes = len(names)
    elif prototypes is not None:
        classes = len(prototypes)
    else:
        classes = 1 + int(torch.cat([labels, test_labels, truth]).max())
    if classes < 2:
        raise _Fault("at least two classes", classes)
    if prototypes is not None and len(prototypes) != classes:
        raise _Fault(f"{classes} prototypes, one for each of {_NAMES}", len(prototypes))
    names = names or tuple(map(str, range(classes)))
    if not all(name.strip() for name in names):
        raise _Fault(f"{_NAMES} that are not empty", repr(names))
    for name, found, low in (
        ("labels", labels, 0),
        ("test_labels", test_labels, 0),
        ("unlabelled_truth", truth, UNKNOWN),
    ):
        wrong = found[(found < low) | (found >= classes)]
        if len(wrong):
            raise _Fault(f"{name} in {low}..{classes - 1}", int(wrong[0]))
    counts = torch.bincount(labels, minlength=classes)
    if prototypes is None:
        if not counts.all():
            raise _Fault(
                "prototypes, or labelled rows of every class", f"none of {names[int(counts.argmin())]!r}"
            )
        prototypes = class_means(labelled, labels, names)
    known = truth[~is_labelled]
    return FeatureData(
        labelled=labelled,
        labels=labels,
        weak=weak,
        strong=strong,
        unlabelled_truth=truth,
        test=test,
        test_labels=test_labels,
        validation=None,
        validation_labels=None,
        prototypes=prototypes,
        class_names=names,
        labelled_counts=counts,
        unlabelled_counts=None if (known == UNKNOWN).any() else torch.bincount(known, minlength=classes),
        unlabelled_is_labelled=is_labelled,
    )


def _features(
    tensors: Mapping[str, Tensor], name: str, *shapes: tuple[str, ...], width: int | None = None
) -> Tensor:
    """Unit rows float32 of a tensor in one of `shapes`, the last length of which is `width`."""
    rows = tensors[name]
    if not rows.is_floating_point() or rows.ndim not in map(len, shapes) or not rows.numel():
        expected = " or ".join(f"[{', '.join(shape)}]" for shape in shapes)
        raise _Fault(f"{name} of a floating dtype, {expected}", _described(rows))
    if width is not None and rows.shape[-1] != width:
        raise _Fault(f"{name} of width {width}, as labelled", rows.shape[-1])
    rows = rows.float()
    # also where every number is finite and their squares are not
    finite = torch.linalg.vector_norm(rows, dim=-1).isfinite()
    if not finite.all():
        raise _Fault(
            f"{name} to be rows of finite length in float32", f"{int((~finite).sum())} rows that are not"
        )
    return unit_(rows)


def _labels(tensors: Mapping[str, Tensor], name: str, length: int) -> Tensor:
    labels = tensors[name]
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.shape != (length,):
        raise _Fault(f"{name} of whole numbers, [{length}]", _described(labels))
    return labels.long()


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
