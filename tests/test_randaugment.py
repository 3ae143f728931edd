import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ulfine_fast import randaugment as module
from ulfine_fast.randaugment import CUTOUT_GREY, RANDAUGMENT_POOL, randaugment

NOISE = np.random.RandomState(0).randint(0, 256, (48, 64, 3)).astype(np.uint8)
# pale, so that no operation leaves it as it is
SMOOTH = np.asarray(Image.fromarray(NOISE[:6, :8] // 2 + 90).resize((64, 48), Image.Resampling.BICUBIC))
GREY = NOISE[..., 0]
CLOSE = {"autocontrast": 1, "colour": 1, "contrast": 1, "sharpness": 1}
MOVED = {"rotate", "shear_x", "shear_y"}


def tensor(picture: Image.Image) -> torch.Tensor:
    pixels = np.atleast_3d(np.asarray(picture))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


@pytest.mark.parametrize("operation", RANDAUGMENT_POOL, ids=lambda operation: operation.name)
@pytest.mark.parametrize("pixels", [NOISE, SMOOTH], ids=["noise", "smooth"])
def test_an_operation_means_the_same_on_pictures_and_tensors(operation, pixels) -> None:
    picture = Image.fromarray(pixels)
    for level in (0.1, 0.5, 0.9):
        for sign in (-1, 1):
            expected = tensor(operation(picture, level, sign)).int()
            got = operation(tensor(picture), level, sign)
            assert got.dtype == torch.uint8
            difference = (got.int() - expected).abs()
            if operation.name in MOVED:
                # a wrong sign, centre or interpolation moves most pixels
                assert (difference > 0).float().mean() < 0.03
            else:
                assert difference.max() <= CLOSE.get(operation.name, 0)


def test_the_pool_has_fourteen_operations_on_grey_and_colour() -> None:
    assert len({operation.name for operation in RANDAUGMENT_POOL}) == 14
    for pixels in (GREY, NOISE):
        picture = Image.fromarray(pixels)
        for operation in RANDAUGMENT_POOL:
            for level in (0.1, 0.9):
                for sign in (-1, 1):
                    changed = operation(picture, level, sign)
                    assert changed.size == picture.size
                    assert changed.mode == picture.mode


def test_every_operation_but_the_identity_changes_something() -> None:
    unchanged = {
        operation.name
        for operation in RANDAUGMENT_POOL
        if np.array_equal(np.asarray(operation(Image.fromarray(SMOOTH), 0.5, 1)), SMOOTH)
    }
    assert unchanged == {"identity"}


def test_operations_have_the_published_ranges() -> None:
    white = Image.fromarray(np.full((100, 100), 200, dtype=np.uint8))
    brightness, posterize, rotate, shear_x, solarize, translate_x = (
        RANDAUGMENT_POOL[place] for place in (1, 6, 7, 9, 11, 12)
    )
    assert np.asarray(brightness(white, 0.9, 1)).max() == int(200 * 0.86)
    assert np.asarray(brightness(white, 0.1, 1)).max() == int(200 * 0.14)
    assert np.asarray(posterize(white, 0.1, 1)).max() == 200 & 0b11110000
    assert np.array_equal(np.asarray(rotate(white, 0.9, 1)), np.asarray(white.rotate(27)))
    assert (np.asarray(translate_x(white, 0.9, 1))[0] == 0).sum() == 27
    assert (np.asarray(shear_x(white, 0.9, 1))[99] == 0).sum() == 27
    assert np.asarray(solarize(white, 0.9, 1)).max() == 255 - 200
    assert np.asarray(solarize(white, 0.1, 1)).max() == 200


@pytest.mark.parametrize("pixels", [GREY, NOISE], ids=["grey", "colour"])
def test_pictures_and_tensors_get_the_same_draws(pixels) -> None:
    """With the operations left out, the squares of both are in the same places."""
    flat = np.zeros_like(pixels)
    for seed in range(20):
        picture = randaugment(Image.fromarray(flat), np.random.default_rng(seed), cutout_side=9)
        got = randaugment(tensor(Image.fromarray(flat)), np.random.default_rng(seed), cutout_side=9)
        square = tensor(picture) == CUTOUT_GREY
        assert square.any()
        assert torch.equal(got == CUTOUT_GREY, square)


def test_two_operations_each_with_probability_one_half(monkeypatch) -> None:
    applied = []

    def record(place):
        return lambda image, level, sign: applied.append((place, round(level * 10), sign)) or image

    monkeypatch.setattr(module, "RANDAUGMENT_POOL", [record(place) for place in range(14)])
    random = np.random.default_rng(0)
    counts = []
    for _ in range(2000):
        before = len(applied)
        randaugment(Image.new("RGB", (4, 4)), random, cutout_side=0)
        counts.append(len(applied) - before)
    # 2000 +- 4 standard deviations of 4000 fair coins, and both, one or none of two
    assert 2000 - 127 < len(applied) < 2000 + 127
    assert set(counts) == {0, 1, 2}
    places, levels, signs = (set(column) for column in zip(*applied, strict=True))
    assert places == set(range(14))
    assert levels == set(range(1, 10))
    assert signs == {-1, 1}


@pytest.mark.parametrize("kind", [Image.fromarray, lambda pixels: tensor(Image.fromarray(pixels))])
def test_the_given_image_is_left_alone(kind) -> None:
    image = kind(SMOOTH.copy())
    for seed in range(10):
        randaugment(image, np.random.default_rng(seed), cutout_side=16)
    assert torch.equal(image if isinstance(image, torch.Tensor) else tensor(image), tensor(SMOOTH))


def test_tensors_without_torchvision(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(ImportError, match=r"pip install 'ulfine-fast\[clip\]'"):
        RANDAUGMENT_POOL[0](torch.zeros(3, 4, 4, dtype=torch.uint8), 0.5, 1)
