from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ulfine_fast import features
from ulfine_fast.cache import cached_features
from ulfine_fast.datasets import ImageSet
from ulfine_fast.encoder import LiteClip
from ulfine_fast.features import FeatureData, load_features
from ulfine_fast.splits import make_split

SPLIT = {"labelled_largest": 6, "unlabelled_largest": 12, "imbalance": 3}


class PixelEncoder:
    dim = 16
    fingerprint = "pixels"

    def __init__(self) -> None:
        self.images = 0

    def encode_images(self, images: np.ndarray, *, size: int, invert: bool) -> torch.Tensor:
        self.images += len(images)
        pixels = torch.from_numpy(images.reshape(len(images), -1)[:, :16].astype(np.float32)) / 255
        return 1 - pixels if invert else pixels

    def text_prototypes(self, class_names: tuple[str, ...]) -> torch.Tensor:
        return torch.eye(len(class_names), self.dim)


def toy_set(images: int, seed: int) -> ImageSet:
    random = np.random.RandomState(seed)
    labels = random.permutation(np.arange(images) % 4)
    pixels = random.randint(0, 256, (images, 8, 8)).astype(np.uint8)
    return ImageSet("toy", pixels, labels, ("a", "b", "c", "d"), invert=True)


TRAIN, TEST = toy_set(120, 0), toy_set(40, 1)


@pytest.fixture
def toy_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "load_dataset", lambda _name: (TRAIN, TEST))


def load(cache_dir: Path, encoder: PixelEncoder | None = None, **changed: object) -> FeatureData:
    return load_features(
        "toy",
        encoder=encoder or PixelEncoder(),
        cache_dir=cache_dir,
        progress=False,
        **{**SPLIT, **changed},
    )


def raw(cache_dir: Path, view: str, copies: int) -> torch.Tensor:
    array = cached_features(
        PixelEncoder(),
        TRAIN.images,
        view=view,
        copies=copies,
        invert=True,
        cache_dir=cache_dir,
        progress=False,
    )
    return torch.from_numpy(np.array(array)).float()


@pytest.mark.usefixtures("toy_dataset")
@pytest.mark.parametrize("protocol", ["acr", "daso", "usb"])
def test_rows_are_centred_unit_features_of_the_split(protocol: str, tmp_path: Path) -> None:
    data = load(tmp_path, protocol=protocol, weak_copies=3, strong_copies=2)
    split = make_split(TRAIN.labels, protocol=protocol, **SPLIT)
    weak, strong = raw(tmp_path, "weak", 3), raw(tmp_path, "strong", 2)
    training = np.unique(np.concatenate([split.labelled, split.unlabelled]))
    mean = weak[:, training].mean(dim=(0, 1))

    def centred(rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows - mean, dim=-1)

    torch.testing.assert_close(data.labelled, centred(weak[:, split.labelled]))
    torch.testing.assert_close(data.weak, centred(weak[:, split.unlabelled]))
    torch.testing.assert_close(data.strong, centred(strong[:, split.unlabelled]))
    test = torch.from_numpy(TEST.images.reshape(40, -1)[:, :16].astype(np.float32)) / 255
    torch.testing.assert_close(data.test, centred((1 - test).half().float()))
    assert np.array_equal(data.labels, TRAIN.labels[split.labelled])
    assert np.array_equal(data.unlabelled_truth, TRAIN.labels[split.unlabelled])
    assert np.array_equal(data.test_labels, TEST.labels)
    assert np.array_equal(data.unlabelled_is_labelled, split.unlabelled_is_labelled)
    assert data.labelled_counts.tolist() == [6, 4, 2, 2]
    assert data.unlabelled_counts.tolist() == [12, 8, 5, 4]
    assert data.class_names == ("a", "b", "c", "d")
    assert data.prototypes.shape == (4, 16)
    if protocol == "daso":
        assert np.array_equal(data.validation_labels, TRAIN.labels[split.validation])
        torch.testing.assert_close(data.validation, centred(raw(tmp_path, "plain", 1)[0, split.validation]))
    else:
        assert data.validation is None
        assert data.validation_labels is None


@pytest.mark.usefixtures("toy_dataset")
def test_seeds_share_the_cache(tmp_path: Path) -> None:
    encoder = PixelEncoder()
    first = load(tmp_path, encoder, protocol="usb", seed=0)
    assert encoder.images == 2 * 120 + 2 * 120 + 40
    second = load(tmp_path, encoder, protocol="usb", seed=1)
    assert encoder.images == 2 * 120 + 2 * 120 + 40
    assert not np.array_equal(first.split.labelled, second.split.labelled)


@pytest.mark.usefixtures("toy_dataset")
@pytest.mark.parametrize("protocol", ["acr", "daso"])
def test_encoding_the_split_alone_gives_the_same_features(protocol: str, tmp_path: Path) -> None:
    encoder = PixelEncoder()
    part = load(tmp_path / "part", encoder, protocol=protocol, encode="split")
    assert encoder.images < 2 * 120 + 2 * 120
    whole = load(tmp_path / "whole", protocol=protocol, encode="all")
    for field in ("labelled", "weak", "strong", "test", "labels", "unlabelled_truth"):
        assert torch.equal(getattr(part, field), getattr(whole, field))
    if protocol == "daso":
        assert torch.equal(part.validation, whole.validation)


@pytest.mark.usefixtures("toy_dataset")
def test_refresh_encodes_again(tmp_path: Path) -> None:
    load(tmp_path)
    encoder = PixelEncoder()
    load(tmp_path, encoder, refresh=True)
    assert encoder.images == 2 * 120 + 2 * 120 + 40


@pytest.mark.usefixtures("toy_dataset")
def test_unknown_encode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encode must be one of all, split, got 'some'"):
        load(tmp_path, encode="some")


def test_lite_clip_on_the_shipped_subset(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data = load_features(
        "fashion-mnist-subset",
        labelled_largest=12,
        unlabelled_largest=18,
        imbalance=3,
        weak_copies=1,
        strong_copies=1,
        size=32,
        encode="split",
        cache_dir=tmp_path,
        progress=False,
    )
    rows = int(data.labelled_counts.sum())
    assert data.labelled.shape == (1, rows, LiteClip.dim)
    assert data.weak.shape == data.strong.shape == (1, len(data.unlabelled_truth), LiteClip.dim)
    assert data.test.shape == (2000, LiteClip.dim)
    for part in (data.labelled, data.weak, data.strong, data.test, data.prototypes):
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(part.shape[:-1]))
