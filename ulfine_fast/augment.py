"""Views of one picture for image training, by the pipelines of the field.

A view is a pure function of the picture and a random generator. Pixels are Pillow's, as in the sources of the
field, with two differences that are not seen: of a resized picture only the window that a view shows is
computed, so a picture of 1 x 1000 pixels costs no more than a square one (rounding differs, by at most 2 of 255), and
flips come after crops, which are symmetric.

Sources: Shi et al., LIFT, 2024, and LIFT+, 2025; Gan and Wei, FineSSL, 2024; LoFT, 2025; Wei and Gan, ACR,
2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ulfine_fast.options import one_of
from ulfine_fast.randaugment import randaugment

Kind = Literal["labelled", "weak", "strong"]
Growth = Literal["min", "linear", "convex", "concave", "max"]

SMALLEST_AREA = 0.08
CUTOUT_PX = 16

_MOST_TRIES = 10
_FIVE_CROPS_MARGIN = 24
_ASPECTS = (3 / 4, 4 / 3)
_FLIP = Image.Transpose.FLIP_LEFT_RIGHT

# (picture, generator, side, resampling, smallest area) -> picture [side, side]
Geometry = Callable[
    [Image.Image, np.random.Generator, int, Image.Resampling, float],
    Image.Image,
]
# (picture, side, resampling) -> picture [side, side]
TestGeometry = Callable[[Image.Image, int, Image.Resampling], Image.Image]


@dataclass(frozen=True)
class Pipeline:
    """What the views of a line of work are; `PIPELINES` has the published ones.

    labelled, weak, test: the geometry of a view; a strong view has the weak geometry, then RandAugment and a
    grey square. flip: a labelled or weak view is mirrored with probability 1/2. growth: how the smallest area
    of a crop grows with training (`smallest_area`), None where no crop is drawn by area. cutout_px >= 0: side
    of the grey square; cutout_ratio in [0, 1], unless None, takes its place: a share of the view's side.
    Raises ValueError for a value outside its range.
    """

    name: str
    labelled: Geometry
    weak: Geometry
    test: TestGeometry
    resampling: Image.Resampling = Image.Resampling.BILINEAR
    flip: bool = True
    growth: Growth | None = None
    cutout_px: int = CUTOUT_PX
    cutout_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.growth is not None and self.growth not in get_args(Growth):
            raise ValueError(
                f"Pipeline: growth must be one of {', '.join(get_args(Growth))}, got {self.growth!r}"
            )
        if self.cutout_px < 0:
            raise ValueError(f"Pipeline: cutout_px must be >= 0, got {self.cutout_px}")
        if self.cutout_ratio is not None and not 0 <= self.cutout_ratio <= 1:
            raise ValueError(f"Pipeline: cutout_ratio must be in [0, 1], got {self.cutout_ratio}")

    def cutout_side(self, size: int) -> int:
        """Side in pixels of the grey square on a view of `size` pixels."""
        return self.cutout_px if self.cutout_ratio is None else round(self.cutout_ratio * size)


def build_pipeline(
    name: str,
    *,
    growth: Growth | None = None,
    cutout_px: int | None = None,
    cutout_ratio: float | None = None,
) -> Pipeline:
    """The pipeline called `name` in `PIPELINES`, with the parameters that are not None in place of its own.

    Raises ValueError for an unknown name, for a growth where no crop is drawn by area, and for a value outside
    its range.
    """
    if name not in PIPELINES:
        raise ValueError(f"build_pipeline: name must be {one_of(PIPELINES, name)}")
    pipeline = PIPELINES[name]
    if growth is not None and pipeline.growth is None:
        raise ValueError(f"build_pipeline: growth must be None for {name}, got {growth!r}")
    given = {"growth": growth, "cutout_px": cutout_px, "cutout_ratio": cutout_ratio}
    return replace(pipeline, **{field: value for field, value in given.items() if value is not None})


def smallest_area(growth: Growth, progress: float) -> float:
    """s = 0.08 + 0.92 phi(u), the smallest share of the picture that a crop shows at progress u in [0, 1].

    phi: min 0, linear u, convex 1 - sqrt(1 - u^2), concave sqrt(1 - (1 - u)^2), max 1. Source: LIFT+.
    """
    match growth:
        case "min":
            phi = 0.0
        case "linear":
            phi = progress
        case "convex":
            phi = 1 - math.sqrt(1 - progress**2)
        case "concave":
            phi = math.sqrt(1 - (1 - progress) ** 2)
        case "max":
            phi = 1.0
    return SMALLEST_AREA + (1 - SMALLEST_AREA) * phi


def sufficient_side(pipeline: Pipeline, size: int, progress: float) -> int:
    """Short side from which on no training view of a picture is enlarged, however small its crop is.

    For crops by area size / sqrt(3 s / 4), s being `smallest_area` and 3/4 the narrowest aspect ratio; otherwise what
    the picture is resized to. Measured on a JPEG file of 4000 x 3000 pixels and views of 224: at full size one view takes
    100 ms; decoded no larger than this 60 ms for crops from 8 % of the area, with a quarter of the memory, and 40 ms
    for the other pipelines, with a 64th.
    """
    if pipeline.growth is None:
        return _enlarged(size)
    smallest = smallest_area(pipeline.growth, progress)
    return max(math.ceil(size / math.sqrt(smallest * _ASPECTS[0])), _enlarged(size))


def sufficient_test_side(size: int) -> int:
    """Short side from which on `test_views` and `five_crops` do not enlarge a picture."""
    return max(_enlarged(size), size + _FIVE_CROPS_MARGIN)


def view(
    image: Image.Image,
    pipeline: Pipeline,
    kind: Kind,
    random: np.random.Generator,
    *,
    size: int,
    progress: float = 0.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """One random view of a picture: uint8 [3, size, size].

    image: mode RGB, of any size. progress in [0, 1]: how far training is, for crops that grow. device: where
    the view goes. None: everything is Pillow's and the view is on the CPU. Otherwise RandAugment works on the
    device's tensor, with the same draws; see `randaugment` for how little that changes. Raises ValueError for
    an argument outside its range.
    """
    picture = draw_geometry(image, pipeline, kind, random, size=size, progress=progress)
    cutout_side = pipeline.cutout_side(size)
    if device is None:
        if kind == "strong":
            picture = randaugment(picture, random, cutout_side=cutout_side)
        return torch.from_numpy(channels_first(picture))
    pixels = torch.from_numpy(channels_first(picture)).to(device)
    return randaugment(pixels, random, cutout_side=cutout_side) if kind == "strong" else pixels


def draw_geometry(
    image: Image.Image,
    pipeline: Pipeline,
    kind: Kind,
    random: np.random.Generator,
    *,
    size: int,
    progress: float = 0.0,
) -> Image.Image:
    """The picture [size, size] that `view` shows, before RandAugment; arguments and errors are those of `view`."""
    if kind not in get_args(Kind):
        raise ValueError(f"view: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not 0 <= progress <= 1:
        raise ValueError(f"view: progress must be in [0, 1], got {progress}")
    _check_picture("view", image, size)
    area = SMALLEST_AREA if pipeline.growth is None else smallest_area(pipeline.growth, progress)
    geometry = pipeline.labelled if kind == "labelled" else pipeline.weak
    picture = geometry(image, random, size, pipeline.resampling, area)
    return picture.transpose(_FLIP) if pipeline.flip and random.random() < 0.5 else picture


def test_views(image: Image.Image, pipeline: Pipeline, size: int) -> Tensor:
    """The view that a pipeline tests on: uint8 [1, 3, size, size]. image: mode RGB."""
    _check_picture("test_views", image, size)
    return torch.from_numpy(channels_first(pipeline.test(image, size, pipeline.resampling))[None])


def five_crops(
    image: Image.Image,
    size: int,
    patch: int | None = None,
    *,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> Tensor:
    """The four corners and the centre, for test-time ensembling: uint8 [5, 3, size, size].

    The short side is resized to size + e, e = 21 for a tower with patches of 14 pixels, else 24. image: mode
    RGB. Source: LIFT, which averages the logits.
    """
    _check_picture("five_crops", image, size)
    width, height = scaled = _short_side(image, size + (21 if patch == 14 else _FIVE_CROPS_MARGIN))
    right, bottom = width - size, height - size
    centre = round(right / 2), round(bottom / 2)
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), centre]
    crops = [channels_first(_window(image, scaled, corner, size, resampling)) for corner in corners]
    return torch.from_numpy(np.stack(crops))


def channels_first(picture: Image.Image) -> np.ndarray:
    """The pixels of an RGB picture, uint8 [3, H, W]."""
    # numpy, not torch: a copy by torch in a thread of the loader would start a team of OpenMP threads of its own
    return np.asarray(picture).transpose(2, 0, 1).copy()


def _check_picture(function: str, image: Image.Image, size: int) -> None:
    if image.mode != "RGB":
        raise ValueError(f"{function}: image must be in mode RGB, got {image.mode}")
    if size < 1:
        raise ValueError(f"{function}: size must be >= 1, got {size}")


def _resized_crop(
    image: Image.Image,
    random: np.random.Generator,
    size: int,
    resampling: Image.Resampling,
    area: float,
) -> Image.Image:
    """A crop with a share of the area in [area, 1] and an aspect ratio in [3/4, 4/3], then resized."""
    width, height = image.size
    low, high = _ASPECTS
    for _ in range(_MOST_TRIES):
        pixels = width * height * random.uniform(area, 1)
        aspect = math.exp(random.uniform(math.log(low), math.log(high)))
        crop_width, crop_height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(random.integers(0, height - crop_height + 1))
            left = int(random.integers(0, width - crop_width + 1))
            break
    else:
        # no luck, or a picture so long that no such crop fits: the largest centred one, as in the field
        crop_width, crop_height = min(width, round(height * high)), min(height, round(width / low))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    crop = image.crop((left, top, left + crop_width, top + crop_height))
    return crop.resize((size, size), resampling)


def _growing_crop(
    image: Image.Image,
    random: np.random.Generator,
    size: int,
    resampling: Image.Resampling,
    area: float,
) -> Image.Image:
    """A square crop with a share of the area in [area, 1], as far as a square fits, then resized."""
    width, height = image.size
    side = round(math.sqrt(width * height * random.uniform(area, 1)))
    side = min(max(side, 1), width, height)
    top = int(random.integers(0, height - side + 1))
    left = int(random.integers(0, width - side + 1))
    return image.crop((left, top, left + side, top + side)).resize((size, size), resampling)


def _padded_crop(
    image: Image.Image,
    random: np.random.Generator,
    size: int,
    resampling: Image.Resampling,
    _area: float,
    enlarged: bool = False,
) -> Image.Image:
    """A crop of the resized picture after reflect padding by size / 8."""
    width, height = scaled = _short_side(image, _enlarged(size) if enlarged else size)
    padding = size // 8
    top = int(random.integers(-padding, height + padding - size + 1))
    left = int(random.integers(-padding, width + padding - size + 1))
    return _window(image, scaled, (left, top), size, resampling)


def _centre_crop(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    width, height = scaled = _short_side(image, _enlarged(size))
    corner = round((width - size) / 2), round((height - size) / 2)
    return _window(image, scaled, corner, size, resampling)


def _whole(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    return image.resize((size, size), resampling)


def _enlarged(size: int) -> int:
    """256 for 224."""
    return size * 8 // 7


def _short_side(image: Image.Image, short: int) -> tuple[int, int]:
    """Width and height of the picture when its short side is resized to `short` pixels."""
    width, height = image.size
    shorter = min(width, height)
    return width * short // shorter, height * short // shorter


def _window(
    image: Image.Image,
    scaled: tuple[int, int],
    corner: tuple[int, int],
    size: int,
    resampling: Image.Resampling,
) -> Image.Image:
    """The square of `size` pixels at `corner` (left, top) of the picture resized to `scaled`.

    What lies outside of the picture is reflected; it may be less than half of the window.
    """
    (width, height), (left, top) = scaled, corner
    x0, x1 = max(left, 0), min(left + size, width)
    y0, y1 = max(top, 0), min(top + size, height)
    box = (
        x0 * image.width / width,
        y0 * image.height / height,
        x1 * image.width / width,
        y1 * image.height / height,
    )
    seen = image.resize((x1 - x0, y1 - y0), resampling, box)
    if seen.size == (size, size):
        return seen
    beyond = ((y0 - top, top + size - y1), (x0 - left, left + size - x1), (0, 0))
    return Image.fromarray(np.pad(np.asarray(seen), beyond, mode="reflect"))


PIPELINES = {
    # Bilinear but for LIFT+, and LIFT's test views for LIFT+ and LoFT, are our choice where nothing is published.
    "lift": Pipeline("lift", _resized_crop, _resized_crop, _centre_crop, growth="min"),
    "lift_plus": Pipeline(
        "lift_plus",
        _growing_crop,
        _growing_crop,
        _centre_crop,
        resampling=Image.Resampling.BICUBIC,
        flip=False,
        growth="convex",
    ),
    "finessl": Pipeline(
        "finessl", partial(_padded_crop, enlarged=True), partial(_padded_crop, enlarged=True), _whole
    ),
    "loft": Pipeline("loft", _resized_crop, _padded_crop, _centre_crop, growth="min"),
    # ACR, DASO and CCL at 32 pixels
    "small": Pipeline("small", _padded_crop, _padded_crop, _whole),
}
