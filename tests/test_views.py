import numpy as np
import pytest

from ulfine_fast.randaugment import CUTOUT_GREY
from ulfine_fast.views import augment

GREY = np.random.RandomState(0).randint(0, 256, (12, 28, 28)).astype(np.uint8)
RGB = np.random.RandomState(1).randint(0, 256, (6, 32, 40, 3)).astype(np.uint8)


def test_plain_is_an_equal_copy() -> None:
    views = augment(GREY, "plain", 0)
    assert np.array_equal(views, GREY)
    views[:] = 0
    assert GREY.any()


@pytest.mark.parametrize("view", ["weak", "strong"])
@pytest.mark.parametrize("images", [GREY, RGB], ids=["grey", "rgb"])
def test_a_view_depends_on_seed_copy_and_index_alone(view: str, images: np.ndarray) -> None:
    before = images.copy()
    whole = augment(images, view, 3)
    assert whole.dtype == np.uint8
    assert whole.shape == images.shape
    assert np.array_equal(images, before)
    order = np.random.RandomState(2).permutation(len(images))
    assert np.array_equal(augment(images[order], view, 3, indices=order), whole[order])
    for index in range(len(images)):
        alone = augment(images[index : index + 1], view, 3, indices=np.array([index]))
        assert np.array_equal(alone[0], whole[index])
    assert not np.array_equal(augment(images, view, 4), whole)
    assert not np.array_equal(augment(images, view, 3, copy=1), whole)


def test_weak_draws_every_flip_and_crop_of_the_reflected_image() -> None:
    image = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    padded = np.pad(image, 2, mode="reflect")
    crops = {padded[y : y + 16, x : x + 16].tobytes() for y in range(5) for x in range(5)}
    # padding and flipping commute
    flips = {padded[:, ::-1][y : y + 16, x : x + 16].tobytes() for y in range(5) for x in range(5)}
    views = augment(np.repeat(image[None], 600, axis=0), "weak", 0)
    drawn = {view.tobytes() for view in views}
    assert drawn == crops | flips


def test_flips_half_of_the_images() -> None:
    image = np.zeros((16, 16), dtype=np.uint8)
    image[:, :8] = 255
    views = augment(np.repeat(image[None], 1000, axis=0), "weak", 0)
    flipped = (views[:, :, 0] == 0).all(axis=1).sum()
    # 500 +- 4 standard deviations
    assert 437 <= flipped <= 563


@pytest.mark.parametrize(("ratio", "largest"), [(0.25, 7), (0.5, 14), (1.0, 28)])
def test_cutout_covers_at_most_its_square(ratio: float, largest: int) -> None:
    images = np.full((200, 28, 28), 255, dtype=np.uint8)
    views = augment(images, "strong", 0, cutout_ratio=ratio)
    grey = views == CUTOUT_GREY
    heights = grey.any(axis=2).sum(axis=1)
    widths = grey.any(axis=1).sum(axis=1)
    assert heights.min() > 0
    assert heights.max() <= largest
    assert widths.max() <= largest
    assert (heights == largest).any()


def test_cutout_of_no_size_leaves_no_grey() -> None:
    images = np.full((100, 28, 28), 255, dtype=np.uint8)
    with_square = augment(images, "strong", 0, cutout_ratio=0.25)
    without = augment(images, "strong", 0, cutout_ratio=0.0)
    same = with_square == without
    assert np.array_equal(same.all(axis=(1, 2)), (with_square != CUTOUT_GREY).all(axis=(1, 2)))
    assert (with_square[~same] == CUTOUT_GREY).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GREY, "strongest", 0), "view must be one of plain, weak, strong, got 'strongest'"),
        ((GREY.astype(np.float32), "weak", 0), r"images must be uint8 .* got float32 \(12, 28, 28\)"),
        ((GREY[..., None], "weak", 0), r"got uint8 \(12, 28, 28, 1\)"),
        ((GREY, "weak", -1), "seed and copy must be >= 0, got -1 and 0"),
    ],
)
def test_augment_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment(*arguments)


def test_augment_keyword_errors() -> None:
    with pytest.raises(ValueError, match="indices must be >= 0, got -1"):
        augment(GREY, "weak", 0, indices=np.arange(len(GREY)) - 1)
    with pytest.raises(ValueError, match=r"cutout_ratio must be in \[0, 1\], got 1.5"):
        augment(GREY, "strong", 0, cutout_ratio=1.5)
    with pytest.raises(ValueError, match="expected 12 indices, got 3"):
        augment(GREY, "weak", 0, indices=np.arange(3))
