"""Views of an image: as it is, weakly and strongly augmented, on uint8 arrays.

"plain" is the image. "weak" is a horizontal flip with probability 1/2 and a random crop after reflect padding
by an eighth of the side. "strong" is weak, then RandAugment in FixMatch's form (14 operations, two drawn with
replacement, each applied with probability 1/2 at an integer level 1..9 of 10), then a grey square (127) over
a random place. Sources: Sohn et al., FixMatch, 2020, for the pool and ranges; Cubuk et al., RandAugment,
2020.

Every draw is a pure function of (view, seed, copy, image index): neither the order of the images nor the size
of a batch changes a view. A change of any draw or range raises `VIEWS_VERSION`, which cached features carry
in their key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

View = Literal["plain", "weak", "strong"]

VIEWS_VERSION = 1
CUTOUT_GREY = 127
CUTOUT_RATIO = 0.25

_LEVELS = 10
_OPERATIONS_PER_IMAGE = 2
_VIEW_STREAM = {"weak": 1, "strong": 2}


def augment(
    images: np.ndarray,
    view: View,
    seed: int,
    *,
    indices: np.ndarray | None = None,
    copy: int = 0,
    cutout_ratio: float = CUTOUT_RATIO,
) -> np.ndarray:
    """One view of each image.

    images: uint8 [N, H, W] or [N, H, W, 3]. seed >= 0. indices [N] int: the index each image has in its data
    set, which selects its draws; default 0..N-1. copy >= 0 selects independent draws of the same view.
    cutout_ratio in [0, 1]: side of the strong view's square over the longer side of the image, rounded to a
    pixel; 0.25 is ours, the field's protocol is 16 pixels whatever the image (0.5 at 32 pixels), 0 leaves the
    square out.

    Returns a new uint8 array of the same shape; "plain" returns an equal copy and uses no other argument.
    Raises ValueError when an argument is outside its range.
    """
    if view not in get_args(View):
        raise ValueError(f"augment: view must be one of {', '.join(get_args(View))}, got {view!r}")
    shape = images.shape
    if images.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise ValueError(
            f"augment: images must be uint8 [N, H, W] or [N, H, W, 3], got {images.dtype} {shape}"
        )
    if seed < 0 or copy < 0:
        raise ValueError(f"augment: seed and copy must be >= 0, got {seed} and {copy}")
    if not 0 <= cutout_ratio <= 1:
        raise ValueError(f"augment: cutout_ratio must be in [0, 1], got {cutout_ratio}")
    if indices is None:
        indices = np.arange(len(images))
    elif len(indices) != len(images):
        raise ValueError(f"augment: expected {len(images)} indices, got {len(indices)}")
    elif len(indices) and np.min(indices) < 0:
        raise ValueError(f"augment: indices must be >= 0, got {np.min(indices)}")
    if view == "plain":
        return images.copy()

    views = np.empty_like(images)
    for row, index in enumerate(indices):
        random = np.random.default_rng((_VIEW_STREAM[view], seed, copy, int(index)))
        image = _flip_and_crop(images[row], random)
        views[row] = image if view == "weak" else _strong(image, random, cutout_ratio)
    return views


def _flip_and_crop(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    if random.random() < 0.5:
        image = image[:, ::-1]
    pad_y, pad_x = height // 8, width // 8
    padding = [(pad_y, pad_y), (pad_x, pad_x)] + [(0, 0)] * (image.ndim - 2)
    padded = np.pad(image, padding, mode="reflect")
    top = random.integers(0, 2 * pad_y + 1)
    left = random.integers(0, 2 * pad_x + 1)
    return padded[top : top + height, left : left + width]


def _strong(image: np.ndarray, random: np.random.Generator, cutout_ratio: float) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(image))
    for operation in random.integers(0, len(RANDAUGMENT_POOL), size=_OPERATIONS_PER_IMAGE):
        level = int(random.integers(1, _LEVELS))
        sign = 1 if random.random() < 0.5 else -1
        if random.random() < 0.5:
            picture = RANDAUGMENT_POOL[operation](picture, level / _LEVELS, sign)
    return np.asarray(_cutout(picture, random, cutout_ratio))


def _cutout(picture: Image.Image, random: np.random.Generator, ratio: float) -> Image.Image:
    side = round(ratio * max(picture.size))
    centre_x, centre_y = (random.integers(0, length) for length in picture.size)
    if side == 0:
        return picture
    # the square is cut at the border, as in the field's protocol, so its visible part may be smaller
    left, top = int(centre_x) - side // 2, int(centre_y) - side // 2
    picture = picture.copy()
    grey = CUTOUT_GREY if picture.mode == "L" else (CUTOUT_GREY,) * 3
    ImageDraw.Draw(picture).rectangle((left, top, left + side - 1, top + side - 1), fill=grey)
    return picture


def _enhancer(kind: type) -> Callable[[Image.Image, float, int], Image.Image]:
    return lambda picture, level, _sign: kind(picture).enhance(0.05 + 0.9 * level)


def _auto_contrast(picture: Image.Image, _level: float, _sign: int) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, _level: float, _sign: int) -> Image.Image:
    return ImageOps.equalize(picture)


def _identity(picture: Image.Image, _level: float, _sign: int) -> Image.Image:
    return picture


def _posterize(picture: Image.Image, level: float, _sign: int) -> Image.Image:
    return ImageOps.posterize(picture, 4 + int(4 * level))


def _rotate(picture: Image.Image, level: float, sign: int) -> Image.Image:
    return picture.rotate(sign * int(30 * level))


def _shear_x(picture: Image.Image, level: float, sign: int) -> Image.Image:
    return _affine(picture, (1, sign * 0.3 * level, 0, 0, 1, 0))


def _shear_y(picture: Image.Image, level: float, sign: int) -> Image.Image:
    return _affine(picture, (1, 0, 0, sign * 0.3 * level, 1, 0))


def _solarize(picture: Image.Image, level: float, _sign: int) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(256 * level))


def _translate_x(picture: Image.Image, level: float, sign: int) -> Image.Image:
    return _affine(picture, (1, 0, sign * int(0.3 * level * picture.width), 0, 1, 0))


def _translate_y(picture: Image.Image, level: float, sign: int) -> Image.Image:
    return _affine(picture, (1, 0, 0, 0, 1, sign * int(0.3 * level * picture.height)))


def _affine(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    # nearest neighbour and a black border: Pillow's defaults, which the published ranges were set with
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix)


# (picture, level in 0.1..0.9, sign in {-1, 1}) -> picture
RANDAUGMENT_POOL: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    _auto_contrast,
    _enhancer(ImageEnhance.Brightness),
    _enhancer(ImageEnhance.Color),
    _enhancer(ImageEnhance.Contrast),
    _equalize,
    _identity,
    _posterize,
    _rotate,
    _enhancer(ImageEnhance.Sharpness),
    _shear_x,
    _shear_y,
    _solarize,
    _translate_x,
    _translate_y,
)
