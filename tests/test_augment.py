import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ulfine_fast import augment
from ulfine_fast.augment import (
    PIPELINES,
    build_pipeline,
    five_crops,
    smallest_area,
    sufficient_side,
    sufficient_test_side,
    view,
)
from ulfine_fast.randaugment import CUTOUT_GREY

KINDS = ("labelled", "weak", "strong")
# Pillow resizes in two passes that each round, in an order that depends on the size of what is wanted.
ROUNDING = 2
# (width, height); odd, flat and tiny ones are real
SIZES = [(50, 37), (1, 1), (1, 1000), (1000, 1), (7, 9), (224, 224), (300, 200)]


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, different everywhere."""
    small = np.random.RandomState(seed).randint(0, 256, (7, 9, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())


def furthest(got: torch.Tensor, expected: torch.Tensor) -> int:
    assert got.dtype == expected.dtype == torch.uint8
    assert got.shape == expected.shape
    return int((got.int() - expected.int()).abs().max())


def draw(picture: Image.Image, name: str, kind: str, seed: int = 0, **options) -> torch.Tensor:
    options = {"size": 32, **options}
    return view(picture, build_pipeline(name), kind, np.random.default_rng(seed), **options)


def test_channels_first_is_never_a_view_of_the_picture() -> None:
    # of one pixel, both orders are the same memory, and that of a picture cannot be written to
    assert augment.channels_first(photograph(1, 1)).flags.owndata
    assert augment.channels_first(photograph(1, 1)).flags.writeable


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", PIPELINES)
def test_every_view_of_every_shape(name, shape) -> None:
    picture = photograph(*shape)
    for kind in KINDS:
        for progress in (0.0, 1.0):
            for size in (32, 8):
                got = draw(picture, name, kind, size=size, progress=progress)
                assert got.dtype == torch.uint8
                assert got.shape == (3, size, size)
                assert got.is_contiguous()
                assert torch.equal(got, draw(picture, name, kind, size=size, progress=progress))
    assert augment.test_views(picture, PIPELINES[name], 32).shape == (1, 3, 32, 32)
    assert five_crops(picture, 32, 16).shape == (5, 3, 32, 32)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_draw_from_a_single_pixel(name) -> None:
    pipeline = build_pipeline(name, cutout_px=0)
    for seed in range(30):
        got = view(Image.new("RGB", (1, 1), (9, 8, 7)), pipeline, "weak", np.random.default_rng(seed), size=8)
        assert (got == torch.tensor([9, 8, 7])[:, None, None]).all()


def test_loft_crops_labelled_images_as_lift_does() -> None:
    picture = photograph(60, 50)
    assert torch.equal(draw(picture, "loft", "labelled"), draw(picture, "lift", "labelled"))
    assert not torch.equal(draw(picture, "loft", "weak"), draw(picture, "lift", "weak"))


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_drawn_anew_by_another_generator(name, kind) -> None:
    views = [draw(photograph(60, 50), name, kind, seed) for seed in range(6)]
    assert len({got.numpy().tobytes() for got in views}) == 6


@pytest.mark.parametrize("name", PIPELINES)
def test_a_strong_view_has_the_geometry_of_the_weak_one(name, monkeypatch) -> None:
    monkeypatch.setattr(augment, "randaugment", lambda image, random, cutout_side: image)
    picture = photograph(60, 50)
    for seed in range(5):
        assert torch.equal(draw(picture, name, "strong", seed), draw(picture, name, "weak", seed))


@pytest.mark.parametrize(("px", "ratio", "side"), [(16, None, 16), (5, None, 5), (16, 0.25, 8), (16, 0.0, 0)])
def test_the_grey_square(px, ratio, side) -> None:
    white = Image.new("RGB", (40, 40), (255, 255, 255))
    pipeline = build_pipeline("small", cutout_px=px, cutout_ratio=ratio)
    heights, widths = set(), set()
    for seed in range(60):
        got = view(white, pipeline, "strong", np.random.default_rng(seed), size=32)
        grey = (got == CUTOUT_GREY).all(dim=0)
        heights.add(int(grey.any(dim=1).sum()))
        widths.add(int(grey.any(dim=0).sum()))
    assert max(heights) == max(widths) == side
    # its middle is within the view
    assert min(heights) >= side // 2 and min(widths) >= side // 2


@pytest.mark.parametrize("name", PIPELINES)
def test_randaugment_on_a_device_draws_the_same(name, monkeypatch) -> None:
    """The tensor path gets the same picture and the same generator, at the same place in its stream."""
    seen = []

    def record(image, random, cutout_side):
        seen.append(
            (image if isinstance(image, torch.Tensor) else pixels(image), random.random(), cutout_side)
        )
        return image

    monkeypatch.setattr(augment, "randaugment", record)
    for device in (None, "cpu"):
        draw(photograph(60, 50), name, "strong", 3, device=device)
    (image, place, side), (image_there, place_there, side_there) = seen
    assert torch.equal(image, image_there)
    assert (place, side) == (place_there, side_there)


def test_randaugment_on_a_device_gives_nearly_the_same_view() -> None:
    differing = []
    for seed in range(40):
        here, there = (
            draw(photograph(60, 50), "finessl", "strong", seed, device=device) for device in (None, "cpu")
        )
        differing.append(((here.int() - there.int()).abs() > 8).float().mean())
    # a flat image may be equalized to far levels by a difference of one; most views have no such pixel
    assert np.median(differing) == 0
    assert np.mean(differing) < 0.02


def test_crops_by_area_have_the_published_ranges() -> None:
    """A crop of a picture whose colours say where they are: its area and its aspect ratio can be read off."""
    width, height = 256, 200
    across = np.broadcast_to(np.arange(width, dtype=np.uint8), (height, width))
    down = np.broadcast_to(np.arange(height, dtype=np.uint8)[:, None], (height, width))
    picture = Image.fromarray(np.stack([across, down, down], axis=-1))

    def shown(name, seed, progress):
        got = draw(picture, name, "weak", seed, size=64, progress=progress).int()
        # the middle of the first and the last pixel of a crop are one 64th of its side inside
        sides = [int(channel.max() - channel.min()) * 64 / 63 for channel in (got[0], got[1])]
        return sides[0], sides[1], bool(got[0, 0, 0] > got[0, 0, -1])

    crops = [shown("lift", seed, 0.0) for seed in range(300)]
    areas = np.array([x * y for x, y, _ in crops]) / (width * height)
    aspects = np.array([x / y for x, y, _ in crops])
    assert 0.06 < areas.min() < 0.12
    assert 0.9 < areas.max() < 1.02
    assert 0.69 < aspects.min() < 0.8
    assert 1.25 < aspects.max() < 1.44
    # uniform in area, as far as the crop fits: log-uniform or smaller shares would have another middle
    assert 0.4 < np.median(areas) < 0.58
    # 150 +- 4 standard deviations
    assert 115 < sum(flipped for _, _, flipped in crops) < 185

    for progress, least in ((0.0, 0.08), (0.9, smallest_area("convex", 0.9))):
        crops = [shown("lift_plus", seed, progress) for seed in range(200)]
        areas = np.array([x * y for x, y, _ in crops]) / (width * height)
        assert all(abs(x - y) < 6 for x, y, _ in crops)
        assert least - 0.02 < areas.min() < least + 0.06
        assert areas.max() < height * height / (width * height) + 0.02
        assert not any(flipped for _, _, flipped in crops)


def test_padded_crops_are_windows_of_the_padded_picture() -> None:
    """Every window of the resized picture with an eighth of reflection and its mirror image, nothing else."""
    picture = photograph(8, 8)
    padded = F.pad(pixels(picture), [1], padding_mode="reflect")
    windows = {padded[:, y : y + 8, x : x + 8].numpy().tobytes() for y in range(3) for x in range(3)}
    windows |= {
        padded[:, y : y + 8, x : x + 8].flip(-1).contiguous().numpy().tobytes()
        for y in range(3)
        for x in range(3)
    }
    for name, kind in (("small", "labelled"), ("small", "weak"), ("loft", "weak")):
        drawn = {draw(picture, name, kind, seed, size=8).numpy().tobytes() for seed in range(250)}
        assert drawn == windows


@pytest.mark.parametrize(("name", "short"), [("finessl", 32), ("loft", 28)])
def test_a_window_is_a_crop_of_the_whole_resized_and_padded_picture(name, short) -> None:
    picture = photograph(66, 45)
    padded = F.pad(pixels(F.resize(picture, [short])), [3], padding_mode="reflect")
    crops = padded.unfold(1, 28, 1).unfold(2, 28, 1).int()
    pipeline = replace(PIPELINES[name], flip=False)
    corners = set()
    for seed in range(150):
        got = view(picture, pipeline, "weak", np.random.default_rng(seed), size=28).int()
        distances = (crops - got[:, None, None]).abs().amax(dim=(0, 3, 4))
        assert distances.min() <= ROUNDING
        corners.add(divmod(int(distances.argmin()), distances.shape[1]))
    tops, lefts = (set(places) for places in zip(*corners, strict=True))
    assert tops == set(range(crops.shape[1]))
    assert lefts == set(range(crops.shape[2]))


@pytest.mark.parametrize("shape", [(131, 90), (90, 131), (40, 40), (20, 31)])
def test_test_views_are_those_of_the_field(shape) -> None:
    picture = photograph(*shape)
    for name, resampling in (("lift", "bilinear"), ("loft", "bilinear"), ("lift_plus", "bicubic")):
        expected = F.center_crop(F.resize(picture, [64], F.InterpolationMode(resampling)), [56])
        got = augment.test_views(picture, PIPELINES[name], 56)
        assert furthest(got, pixels(expected)[None]) <= ROUNDING
    for name in ("finessl", "small"):
        got = augment.test_views(picture, PIPELINES[name], 56)
        assert torch.equal(got, pixels(F.resize(picture, [56, 56]))[None])


def test_a_picture_of_the_right_size_is_tested_as_it_is() -> None:
    picture = photograph(32, 32)
    assert torch.equal(augment.test_views(picture, PIPELINES["small"], 32)[0], pixels(picture))


@pytest.mark.parametrize(("patch", "margin"), [(14, 21), (16, 24), (32, 24), (None, 24)])
def test_five_crops(patch, margin) -> None:
    picture = photograph(131, 90)
    expected = F.five_crop(F.resize(picture, [56 + margin]), [56])
    got = five_crops(picture, 56, patch)
    assert furthest(got, torch.stack([pixels(crop) for crop in expected])) <= ROUNDING
    bicubic = five_crops(picture, 56, patch, resampling=Image.Resampling.BICUBIC)
    assert not torch.equal(bicubic, got)


def test_a_long_picture_is_not_resized_as_a_whole() -> None:
    """1 x 3,000,000 pixels, enlarged 36 times, would be 11 GB."""
    picture = Image.new("RGB", (3_000_000, 1), (9, 8, 7))
    for name in PIPELINES:
        assert draw(picture, name, "weak")[:, 0, 0].tolist() == [9, 8, 7]
        assert augment.test_views(picture, PIPELINES[name], 32)[0, :, 0, 0].tolist() == [9, 8, 7]
    assert five_crops(picture, 32, 16)[:, :, 0, 0].tolist() == [[9, 8, 7]] * 5


def test_growth_of_the_smallest_area() -> None:
    for growth, at_half in (
        ("min", 0.0),
        ("linear", 0.5),
        ("convex", 1 - math.sqrt(0.75)),
        ("concave", math.sqrt(0.75)),
        ("max", 1.0),
    ):
        assert smallest_area(growth, 0.5) == pytest.approx(0.08 + 0.92 * at_half, abs=1e-12)
        assert smallest_area(growth, 0.0) == pytest.approx(1.0 if growth == "max" else 0.08, abs=1e-12)
        assert smallest_area(growth, 1.0) == pytest.approx(0.08 if growth == "min" else 1.0, abs=1e-12)
    assert PIPELINES["lift_plus"].growth == "convex"
    assert PIPELINES["lift"].growth == PIPELINES["loft"].growth == "min"


def test_a_fully_grown_crop_is_the_whole_square() -> None:
    picture = photograph(64, 64)
    got = draw(picture, "lift_plus", "weak", size=32, progress=1.0)
    assert torch.equal(got, pixels(picture.resize((32, 32), Image.Resampling.BICUBIC)))


@pytest.fixture
def enlarged(monkeypatch) -> list[float]:
    """How many pixels of a view each resized pixel gave, by side."""
    factors = []
    resize = Image.Image.resize

    def record(image, size, resample=None, box=None):
        left, top, right, bottom = box or (0, 0, *image.size)
        factors.extend((size[0] / (right - left), size[1] / (bottom - top)))
        return resize(image, size, resample, box)

    monkeypatch.setattr(Image.Image, "resize", record)
    return factors


class Smallest:
    """A generator whose draws make the smallest and narrowest crop."""

    def uniform(self, low: float, _high: float) -> float:
        return low

    def integers(self, low: int, _high: int) -> int:
        return low

    def random(self) -> float:
        return 1.0


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("progress", [0.0, 0.5, 0.99])
def test_no_view_of_a_picture_with_the_sufficient_side_is_enlarged(name, progress, enlarged) -> None:
    side = sufficient_side(PIPELINES[name], 32, progress)
    for width, height in ((side, side), (side, 3 * side), (2 * side, side)):
        picture = photograph(width, height)
        enlarged.clear()
        for kind in ("labelled", "weak"):
            view(picture, PIPELINES[name], kind, Smallest(), size=32, progress=progress)
        assert max(enlarged) <= 1
        # nor is it larger than needed, but for the aspect ratio of crops
        assert max(enlarged) > 0.8 or (width, height) != (side, side)


@pytest.mark.parametrize("size", [32, 224, 336])
def test_no_test_view_of_a_picture_with_the_sufficient_side_is_enlarged(size, enlarged) -> None:
    side = sufficient_test_side(size)
    picture = photograph(side, side + 9)
    enlarged.clear()
    for pipeline in PIPELINES.values():
        augment.test_views(picture, pipeline, size)
    for patch in (14, 16):
        five_crops(picture, size, patch)
    assert 0.9 < max(enlarged) <= 1


def test_build_pipeline() -> None:
    assert build_pipeline("lift") == PIPELINES["lift"]
    changed = build_pipeline("lift_plus", growth="linear", cutout_px=8)
    assert (changed.growth, changed.cutout_px) == ("linear", 8)
    assert build_pipeline("small", cutout_ratio=0.5).cutout_side(32) == 16
    for name, options, message in (
        ("lifted", {}, "name must be one of lift, lift_plus, finessl, loft, small, got 'lifted'"),
        ("small", {"growth": "linear"}, "growth must be None for small, got 'linear'"),
        ("lift", {"growth": "cubic"}, "growth must be one of min, .*, got 'cubic'"),
        ("lift", {"cutout_px": -1}, "cutout_px must be >= 0, got -1"),
        ("lift", {"cutout_ratio": 1.5}, r"cutout_ratio must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            build_pipeline(name, **options)


def test_view_errors() -> None:
    picture = photograph(8, 8)
    for call, message in (
        (
            lambda: draw(picture, "lift", "test"),
            "view: kind must be one of labelled, weak, strong, got 'test'",
        ),
        (lambda: draw(picture, "lift", "weak", progress=1.1), r"view: progress must be in \[0, 1\], got 1.1"),
        (lambda: draw(picture, "lift", "weak", size=0), "view: size must be >= 1, got 0"),
        (lambda: draw(picture.convert("L"), "lift", "weak"), "view: image must be in mode RGB, got L"),
        (lambda: five_crops(picture.convert("L"), 8), "five_crops: image must be in mode RGB, got L"),
        (lambda: augment.test_views(picture, PIPELINES["lift"], 0), "test_views: size must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
