"""Weights from checkpoint files of every kind: named tensors come out, and nothing in a file is ever run.

A file is known by its content, not by its extension: safetensors, what torch.save writes of tensors in containers,
or the archive of a TorchScript module, of which only the tensors are read (OpenAI's CLIP). What is around the weights
of a network, such as an optimizer or the wrapper of a training script, is a prefix of names, see `weights_of`.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from io import BytesIO
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# How files begin that are mistaken for checkpoints; the first that fits counts.
_OTHER_KINDS = (
    (rb"version https://git-lfs", "a Git LFS pointer in place of the file: fetch it with git lfs pull"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page in place of the file: look at it, and download again"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"GGUF", "a GGUF file"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd", "a compressed file: unpack it first"),
    (rb"(?s:.{257})ustar", "a tar archive: unpack it first"),
    (rb"[\t\n\r\x20-\x7e]+$", "a text file"),
)
# A running mean of the weights is what its authors evaluated.
_AVERAGED = re.compile(r"ema|averag|teacher")
_SCRIPT_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors in a checkpoint file, on the CPU; the names of nested containers are joined by dots.

    Raises ValueError that says what the file is where it is none, OSError where it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(512)
    size = path.stat().st_size
    if not start:
        raise ValueError("an empty file")
    for pattern, kind in _OTHER_KINDS:
        if re.match(pattern, start, re.IGNORECASE):
            raise ValueError(kind)
    try:
        if start[8:9] == b"{":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        script = start.startswith(b"PK") and _is_script(path, size)
        content = _script(path) if script else _pickled(path)
    except OSError:
        raise
    except (SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(f"a damaged file ({shorten(str(error), 120)})") from error
    tensors = _flat(content)
    if not tensors:
        raise ValueError("a file without tensors")
    return tensors


def weights_of(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors whose names are a prefix and then those of a network, without the prefix.

    The prefix ("", "module.", "model._orig_mod.", "state_dict.visual.", ...) is the one that leaves the most of `names`;
    among equals one of averaged weights ("ema", "teacher") and then the first. What else has the prefix comes along.
    Returns all tensors where no name is known.
    """
    known, found = set(names), Counter()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                found["".join(f"{part}." for part in parts[:start])] += 1
    if not found:
        return dict(tensors)
    most = max(found.values())
    equal = [prefix for prefix, count in found.items() if count == most]
    prefix = next(filter(_AVERAGED.search, equal), equal[0])
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_values(tensors: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> None:
    """ValueError that names the first of `tensors` whose values are not finite, or whole numbers where `network` has none.

    Weights that were made whole numbers would be copied as if they were the weights.
    """
    for name, tensor in tensors.items():
        if name in network and network[name].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be of floating point, got {str(tensor.dtype).removeprefix('torch.')}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} with values that are not finite")


def _is_script(path: Path, size: int) -> bool:
    """Whether a ZIP archive is that of a TorchScript module; ValueError for one that torch did not write."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if not any(name.endswith("data.pkl") for name in names):
        arrays = any(name.endswith(".npy") for name in names)
        raise ValueError("a NumPy archive" if arrays else "a ZIP archive of something else")
    # torch compresses nothing: a small file would otherwise fill the memory
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("a compressed ZIP archive")
    return any(name.endswith("/constants.pkl") for name in names)


def _pickled(path: Path) -> object:
    try:
        # timm and others save the arguments of a training script, which are plain data
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            path.open("rb") as file,
            warnings.catch_warnings(),
        ):
            # of old formats; what is wrong with a file is said below
            warnings.simplefilter("ignore")
            # a file, not its path: torch goes by the extension of a path
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(error) from error
    except pickle.UnpicklingError as error:
        # torch's own words advise to run the code
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ValueError("a file that is no checkpoint, or a damaged one") from error
        raise ValueError(
            f"a file with Python objects ({named[1]}), which are never loaded: save the state_dict alone"
        ) from error
    # a damaged file can make the reader raise anything
    except Exception as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> ValueError:
    text = shorten(str(error), 120)
    # as above
    return ValueError("a damaged file" + (f" ({text})" if text and "weights_only" not in text else ""))


def _script(path: Path) -> object:
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return _ScriptUnpickler(archive, name.removesuffix("data.pkl")).load()
    except OSError:
        raise
    # as above
    except Exception as error:
        raise _damaged(error) from error


class _Stored:
    """A module of TorchScript: its tensors and modules are attributes."""


class _ScriptUnpickler(pickle.Unpickler):
    """Reads what a TorchScript archive holds: modules become `_Stored`, and no other object is made."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Callable[..., object] | torch.dtype:
        if module.startswith("__torch__"):
            return _Stored
        if module == "torch" and name in _SCRIPT_STORAGES:
            return _SCRIPT_STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if module == "torch.jit._pickle":
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"{module}.{name} in a TorchScript archive")

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> Tensor:
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            octets = bytearray(self._archive.read(f"{self._root}data/{key}"))
            self._storages[key] = (
                torch.frombuffer(octets, dtype=dtype) if octets else torch.empty(0, dtype=dtype)
            )
        return self._storages[key]


def _flat(content: object) -> dict[str, Tensor]:
    found, waiting, seen = {}, [("", content)], set()
    while waiting:
        name, item = waiting.pop()
        inner = vars(item) if isinstance(item, _Stored) else item
        if isinstance(item, Tensor):
            found[name] = item
        # a container may hold itself
        elif isinstance(inner, Mapping) and id(inner) not in seen:
            seen.add(id(inner))
            parts = [(f"{name}.{key}" if name else str(key), value) for key, value in inner.items()]
            waiting += reversed(parts)
    return found
