"""RandAugment in FixMatch's form, and the grey square that always follows it, on pictures and on tensors.

14 operations, two drawn with replacement, each applied with probability 1/2 at an integer level 1..9 of 10;
then a grey square (127) over a random place. Sources: Sohn et al., FixMatch, 2020, for the pool and ranges;
Cubuk et al., RandAugment, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

CUTOUT_GREY = 127

_LEVELS = 10
_OPERATIONS_PER_IMAGE = 2

Picture = TypeVar("Picture", Image.Image, Tensor)


def randaugment(image: Picture, random: np.random.Generator, *, cutout_side: int) -> Picture:
    """One draw of RandAugment, then the grey square.

    image: a picture in mode L or RGB, or a uint8 tensor [C, H, W] with C of 1 or 3 on any device. cutout_side
    >= 0: side of the square in pixels, cut at the border as in the field's protocol, so its visible part may
    be smaller; 0 leaves it out. `random` gives the same draws for a picture and a tensor of the same size.

    Returns a new image of the type, mode and size of the given one. Pictures are changed by Pillow, which
    the published ranges were set with, and need nothing else. Tensors are changed by torchvision, with the
    same meaning of every operation: autocontrast, colour, contrast and sharpness round otherwise, by at most 1
    of 255; rotation and shear pick another nearest neighbour where two are almost equally near. Raises
    ImportError where a tensor meets no torchvision.
    """
    for place in random.integers(0, len(RANDAUGMENT_POOL), size=_OPERATIONS_PER_IMAGE):
        level = int(random.integers(1, _LEVELS))
        sign = 1 if random.random() < 0.5 else -1
        if random.random() < 0.5:
            image = RANDAUGMENT_POOL[place](image, level / _LEVELS, sign)
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
    left = int(random.integers(0, width)) - cutout_side // 2
    top = int(random.integers(0, height)) - cutout_side // 2
    return _with_square(image, left, top, cutout_side)


class Operation(NamedTuple):
    """One of the pool: (image, level in 0.1..0.9, sign in {-1, 1}) -> image of the same type and size.

    value: of (level, sign), what `name` takes: a factor, degrees, bits, a threshold or a share of the side.
    """

    name: str
    value: Callable[[float, int], float]

    def __call__(self, image: Picture, level: float, sign: int) -> Picture:
        """The changed image."""
        apply = _on_picture if isinstance(image, Image.Image) else _on_tensor
        return apply(self.name, image, self.value(level, sign))


def _no_value(_level: float, _sign: int) -> float:
    return 0.0


def _factor(level: float, _sign: int) -> float:
    return 0.05 + 0.9 * level


def _share(level: float, sign: int) -> float:
    return sign * 0.3 * level


RANDAUGMENT_POOL = (
    Operation("autocontrast", _no_value),
    Operation("brightness", _factor),
    Operation("colour", _factor),
    Operation("contrast", _factor),
    Operation("equalize", _no_value),
    Operation("identity", _no_value),
    Operation("posterize", lambda level, _sign: 4 + int(4 * level)),
    Operation("rotate", lambda level, sign: sign * int(30 * level)),
    Operation("sharpness", _factor),
    Operation("shear_x", _share),
    Operation("shear_y", _share),
    Operation("solarize", lambda level, _sign: 256 - int(256 * level)),
    Operation("translate_x", _share),
    Operation("translate_y", _share),
)


def _on_picture(name: str, picture: Image.Image, value: float) -> Image.Image:
    # nearest neighbour and a black border: Pillow's defaults, which the published ranges were set with
    def affine(*matrix: float) -> Image.Image:
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix)

    match name:
        case "autocontrast":
            return ImageOps.autocontrast(picture)
        case "brightness":
            return ImageEnhance.Brightness(picture).enhance(value)
        case "colour":
            return ImageEnhance.Color(picture).enhance(value)
        case "contrast":
            return ImageEnhance.Contrast(picture).enhance(value)
        case "equalize":
            return ImageOps.equalize(picture)
        case "posterize":
            return ImageOps.posterize(picture, value)
        case "rotate":
            return picture.rotate(value)
        case "sharpness":
            return ImageEnhance.Sharpness(picture).enhance(value)
        case "shear_x":
            return affine(1, value, 0, 0, 1, 0)
        case "shear_y":
            return affine(1, 0, 0, value, 1, 0)
        case "solarize":
            return ImageOps.solarize(picture, value)
        case "translate_x":
            return affine(1, 0, int(value * picture.width), 0, 1, 0)
        case "translate_y":
            return affine(1, 0, 0, 0, 1, int(value * picture.height))
    return picture


def _on_tensor(name: str, image: Tensor, value: float) -> Tensor:
    functional = _torchvision()

    # torchvision takes the forward map, Pillow the map from the new pixel to the old one: hence the signs
    def affine(*, translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        return functional.affine(
            image, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear), center=[0.0, 0.0]
        )

    match name:
        case "autocontrast":
            return functional.autocontrast(image)
        case "brightness":
            return functional.adjust_brightness(image, value)
        case "colour":
            return functional.adjust_saturation(image, value)
        case "contrast":
            return functional.adjust_contrast(image, value)
        case "equalize":
            return functional.equalize(image)
        case "posterize":
            return functional.posterize(image, value)
        case "rotate":
            return functional.rotate(image, value)
        case "sharpness":
            return functional.adjust_sharpness(image, value)
        case "shear_x":
            return affine(shear=(_degrees(value), 0.0))
        case "shear_y":
            return affine(shear=(0.0, _degrees(value)))
        case "solarize":
            return functional.solarize(image, value)
        case "translate_x":
            return affine(translate=(-int(value * image.shape[-1]), 0))
        case "translate_y":
            return affine(translate=(0, -int(value * image.shape[-2])))
    return image


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


def _with_square(image: Picture, left: int, top: int, side: int) -> Picture:
    if side == 0:
        return image
    if isinstance(image, Tensor):
        image = image.clone()
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = CUTOUT_GREY
        return image
    image = image.copy()
    grey = CUTOUT_GREY if image.mode == "L" else (CUTOUT_GREY,) * 3
    ImageDraw.Draw(image).rectangle((left, top, left + side - 1, top + side - 1), fill=grey)
    return image


def _torchvision() -> ModuleType:
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise ImportError(
            "RandAugment on tensors needs torchvision: pip install 'ulfine-fast[clip]'"
        ) from error
    return functional
