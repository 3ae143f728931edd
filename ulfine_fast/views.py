"""Views of an image: as it is, weakly and strongly augmented, on uint8 arrays.

"plain" is the image. "weak" is a horizontal flip with probability 1/2 and a random crop after reflect padding
by an eighth of the side. "strong" is weak, then `randaugment`.

Every draw is a pure function of (view, seed, copy, image index): neither the order of the images nor the size
of a batch changes a view. A change of any draw or range raises `VIEWS_VERSION`, which cached features carry
in their key.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from PIL import Image

from ulfine_fast.images import check_pixels
from ulfine_fast.randaugment import randaugment

View = Literal["plain", "weak", "strong"]

VIEWS_VERSION = 1
CUTOUT_RATIO = 0.25

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
    check_pixels("augment", images)
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
        if view == "strong":
            picture = Image.fromarray(np.ascontiguousarray(image))
            side = round(cutout_ratio * max(picture.size))
            image = np.asarray(randaugment(picture, random, cutout_side=side))
        views[row] = image
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
