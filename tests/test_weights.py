"""Checkpoint files of every kind give their tensors, or say in a line what they are."""

from __future__ import annotations

import argparse
import gzip
import os
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ulfine_fast.weights import check_values, read_weights, weights_of

NAMES = ("stem.weight", "blocks.0.bias")


def state(value: float = 1.0) -> dict[str, Tensor]:
    return {"stem.weight": torch.full((2, 3), value), "blocks.0.bias": torch.full((3,), value)}


def prefixed(prefix: str, value: float = 1.0) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state(value).items()}


def same(found: dict[str, Tensor], value: float = 1.0) -> bool:
    return found.keys() == state().keys() and all(bool((w == value).all()) for w in found.values())


@pytest.mark.parametrize(
    "content",
    [
        state(),
        {"state_dict": state(), "epoch": 3},
        {"model": prefixed("module."), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 3)}}}},
        {"model_state": prefixed("_orig_mod.")},
        {"state_dict": prefixed("module._orig_mod.visual."), "args": argparse.Namespace(lr=0.1)},
        {"net": {"backbone": state()}},
        {"state_dict": prefixed("module.", 2.0), "model_ema": prefixed("module.")},
        {"student": prefixed("backbone.", 2.0), "teacher": prefixed("backbone.")},
        {**prefixed("module.base_encoder."), **prefixed("module.momentum_encoder.", 2.0)},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers_and_prefixes_are_taken_off(content, zipped, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert same(weights_of(read_weights(path), NAMES))


def test_the_extension_does_not_matter(tmp_path):
    save_file(state(), tmp_path / "weights.pt")
    torch.save(state(), tmp_path / "weights.safetensors")
    for path in tmp_path.iterdir():
        assert same(read_weights(path))


def test_what_has_no_known_name_stays_as_it_is():
    assert weights_of({"a.b": torch.zeros(1)}, NAMES).keys() == {"a.b"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 2).half()
        # a row of a larger storage
        self.row = nn.Parameter(torch.arange(6.0).view(2, 3)[1])
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.row[:2] + self.count


def test_a_torchscript_archive_gives_its_tensors(tmp_path, monkeypatch):
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(str(tmp_path / "net.pt"))
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("code of the archive may run"))
    found = read_weights(tmp_path / "net.pt")
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_never_runs(zipped, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({**state(), "code": Code(tmp_path / "pwned")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"Python objects \(posix.mkdir\), which are never loaded"):
        read_weights(path)
    assert not (tmp_path / "pwned").exists()


def test_code_in_a_torchscript_archive_never_runs(tmp_path):
    torch.save({"code": Code(tmp_path / "pwned")}, tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "weights.pt", "a") as archive:
        archive.writestr("weights/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"a damaged file \(posix.mkdir in a TorchScript archive\)"):
        read_weights(tmp_path / "weights.pt")
    assert not (tmp_path / "pwned").exists()


def write(kind: str, path: Path) -> None:
    whole = path.with_name("whole")
    torch.save(state(), whole)
    match kind:
        case "empty":
            path.touch()
        case "lfs":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
        case "page":
            path.write_text("\n<!DOCTYPE html><html>404</html>")
        case "text":
            path.write_text("weights\n")
        case "gzip":
            path.write_bytes(gzip.compress(whole.read_bytes()))
        case "tar":
            with tarfile.open(path, "w") as archive:
                archive.add(whole)
        case "numpy":
            with path.open("wb") as file:
                np.savez(file, a=np.zeros(3))
        case "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("readme.md", "no weights")
        case "bomb":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a/data.pkl", bytes(1 << 22))
        case "truncated":
            path.write_bytes(whole.read_bytes()[:-200])
        case "truncated safetensors":
            save_file(state(), path)
            path.write_bytes(path.read_bytes()[:-4])
        case "noise":
            path.write_bytes(np.random.default_rng(0).bytes(5000))
        case "nothing":
            torch.save({"epoch": 3}, path)
        case "itself":
            content: dict[str, object] = {"epoch": 3}
            content["again"] = content
            torch.save(content, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "an empty file"),
        ("lfs", "a Git LFS pointer in place of the file: fetch it with git lfs pull"),
        ("page", "a web page in place of the file: look at it, and download again"),
        ("text", "a text file"),
        ("gzip", "a compressed file: unpack it first"),
        ("tar", "a tar archive: unpack it first"),
        ("numpy", "a NumPy archive"),
        ("zip", "a ZIP archive of something else"),
        ("bomb", "a compressed ZIP archive"),
        ("truncated", "a damaged file (File is not a zip file)"),
        ("truncated safetensors", "a damaged file"),
        ("noise", "a file that is no checkpoint, or a damaged one"),
        ("nothing", "a file without tensors"),
        ("itself", "a file without tensors"),
    ],
)
def test_what_is_no_checkpoint_is_named(kind, message, tmp_path):
    path = tmp_path / "weights.pt"
    write(kind, path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared below)
        read_weights(path)
    assert str(caught.value).startswith(message)
    # torch's own words advise to run what is pickled
    assert "weights_only" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_no_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "absent.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    with pytest.raises(ValueError, match="blocks.0.bias with values that are not finite"):
        check_values({**state(), "blocks.0.bias": torch.tensor([0.0, value])}, state())
    check_values(state(), state())


def test_weights_that_were_made_whole_numbers():
    with pytest.raises(ValueError, match="blocks.0.bias must be of floating point, got int8"):
        check_values({**state(), "blocks.0.bias": torch.ones(3, dtype=torch.int8)}, state())
