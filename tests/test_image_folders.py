import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ulfine_fast import image_folders
from ulfine_fast.image_data import ImageData
from ulfine_fast.image_folders import folder_data
from ulfine_fast.images import ImageSource, UnreadableImage

TREE = (
    "labelled/cat/1.png labelled/cat/deep/er/2.JPG labelled/sea_lion/3.png"
    " test/cat/4.png test/sea_lion/5.png"
    " unlabelled/6.png unlabelled/any/7.png unlabelled/any/where/8.png"
)


def write(root: Path, names: str) -> None:
    for i, name in enumerate(names.split()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (i, 0, 0)).save(path, format="PNG")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path, TREE)
    return tmp_path


def folders(root: Path, unlabelled: str | None = "unlabelled") -> ImageData:
    return folder_data(root / "labelled", unlabelled and root / unlabelled, root / "test")


def names(source: ImageSource, root: Path, rows: np.ndarray | None = None) -> list[str]:
    rows = range(len(source)) if rows is None else rows
    return [str(Path(source.name(int(row))).relative_to(root)) for row in rows]


def test_folders(tree: Path) -> None:
    data = folders(tree)
    assert data.class_names == ("cat", "sea lion")
    assert names(data.train, tree, data.labelled) == [
        "labelled/cat/1.png",
        "labelled/cat/deep/er/2.JPG",
        "labelled/sea_lion/3.png",
    ]
    assert data.labels.tolist() == [0, 0, 1]
    assert names(data.train, tree, data.unlabelled) == [
        "unlabelled/6.png",
        "unlabelled/any/7.png",
        "unlabelled/any/where/8.png",
    ]
    assert data.unlabelled_truth.tolist() == [-1] * 3
    assert data.unlabelled_counts is None
    assert names(data.test, tree) == ["test/cat/4.png", "test/sea_lion/5.png"]
    assert data.test_labels.tolist() == [0, 1]
    assert data.notes == ()
    assert data.train.read(int(data.labelled[2])).getpixel((0, 0)) == (2, 0, 0)


def test_no_unlabelled_folder(tree: Path) -> None:
    data = folders(tree, None)
    assert len(data.unlabelled) == len(data.unlabelled_truth) == 0
    assert len(data.train) == 3


def test_a_moved_folder_has_the_same_identity(tree: Path) -> None:
    before = folders(tree).identity
    (tree / "moved").mkdir()
    for part in ("labelled", "unlabelled", "test"):
        (tree / part).rename(tree / "moved" / part)
    assert folders(tree / "moved").identity == before
    write(tree, "moved/unlabelled/9.png")
    assert folders(tree / "moved").identity != before


def test_classes_that_one_part_lacks(tree: Path) -> None:
    write(tree, "labelled/ape/1.png test/zebra/1.png")
    (tree / "labelled/empty").mkdir()
    data = folders(tree)
    assert data.class_names == ("ape", "cat", "empty", "sea lion", "zebra")
    assert data.labelled_counts.tolist() == [1, 2, 0, 1, 0]
    assert data.test_labels.tolist() == [1, 3, 4]
    assert data.notes == (
        "labelled: no image of 2 classes: empty, zebra",
        "test: no image of 2 classes: ape, empty",
    )


def test_files_that_are_left_out(tree: Path) -> None:
    for name in ("labelled/cat/a.txt", "labelled/cat/b.TXT", "labelled/cat/Makefile", "labelled/cat/.c.png"):
        (tree / name).touch()
    write(tree, "labelled/.git/1.png labelled/stray.png")
    (tree / "labelled/cat/gone.png").symlink_to(tree / "nowhere")
    data = folders(tree)
    assert data.labelled_counts.tolist() == [2, 1]
    assert data.notes == (
        "labelled: skipped 4 files that are no images by their extension (.txt 2, dead link 1, without 1)",
        f"labelled: skipped 1 images outside a class folder, such as {tree}/labelled/stray.png",
    )


def test_unlabelled_class_folders_are_for_reports_only(tree: Path) -> None:
    write(tree, "pool/cat/1.png pool/sea_lion/2.png pool/sea_lion/3.png")
    data = folders(tree, "pool")
    assert data.unlabelled_truth.tolist() == [0, 1, 1]
    assert data.unlabelled_counts.tolist() == [1, 2]
    assert [note for note in data.notes if "never in training" in note] == list(data.notes)
    assert len(data.notes) == 1
    for other in ("pool/4.png", "pool/dog/4.png"):
        write(tree, other)
        assert folders(tree, "pool").unlabelled_truth.tolist() == [-1] * 4
        (tree / other).unlink()


def test_unlabelled_copies_of_labelled_images(tree: Path) -> None:
    (tree / "unlabelled/linked").symlink_to(tree / "labelled/cat")
    data = folders(tree)
    assert len(data.train) == 6
    copies = data.unlabelled[data.unlabelled_is_labelled]
    assert sorted(names(data.train, tree, copies)) == ["labelled/cat/1.png", "labelled/cat/deep/er/2.JPG"]
    assert len(data.unlabelled) == 5


def test_labelled_links_to_unlabelled_images(tree: Path) -> None:
    (tree / "labelled/cat/known.png").symlink_to(tree / "unlabelled/6.png")
    data = folders(tree)
    assert len(data.train) == 6
    assert data.unlabelled_is_labelled.tolist() == [True, False, False]
    assert data.labels[data.labelled == data.unlabelled[0]].tolist() == [0]


def test_links_end(tree: Path) -> None:
    (tree / "labelled/cat/deep/up").symlink_to(tree / "labelled/cat")
    (tree / "labelled/cat/self").symlink_to(tree / "labelled/cat/self")
    (tree / "unlabelled/up").symlink_to(tree / "unlabelled")
    data = folders(tree)
    assert data.labelled_counts.tolist() == [2, 1]
    assert len(data.unlabelled) == 3
    assert "unlabelled: 3 images are listed twice and used once" in data.notes
    assert "labelled: skipped 1 files that are no images by their extension (dead link 1)" in data.notes


def test_names_with_spaces_and_unicode(tree: Path) -> None:
    composed, combining = (unicodedata.normalize(form, "café au lait") for form in ("NFC", "NFD"))
    write(tree, "labelled/猫/图.png")
    for part, name in (("labelled", composed), ("test", combining)):
        (tree / part / name).mkdir()
        Image.new("RGB", (2, 2)).save(tree / part / name / "a b.png")
    data = folders(tree)
    assert data.class_names == (composed, "cat", "sea lion", "猫")
    assert data.labelled_counts.tolist() == [1, 2, 1, 1]
    assert 0 in data.test_labels
    assert all(data.train.read(i).mode == "RGB" for i in range(len(data.train)))


def test_training_images_in_the_test_part(tree: Path) -> None:
    (tree / "test/cat/leak.png").symlink_to(tree / "labelled/cat/1.png")
    assert folders(tree).notes == (f"test: 1 images are training images too: {tree}/test/cat/leak.png",)


def test_an_image_of_two_classes(tree: Path) -> None:
    (tree / "labelled/sea_lion/same.png").symlink_to(tree / "labelled/cat/1.png")
    with pytest.raises(ValueError, match=r"^folder_data: labelled must give an image one class, got two for"):
        folders(tree)


@pytest.mark.parametrize("part", ["labelled", "test"])
def test_empty_folder(part: str, tree: Path) -> None:
    (tree / "empty").mkdir()
    paths = {"labelled": tree / "labelled", "test": tree / "test", part: tree / "empty"}
    with pytest.raises(
        ValueError, match=f"^folder_data: {part} must have class folders with images, got none"
    ):
        folder_data(paths["labelled"], None, paths["test"])


def test_one_class_only(tmp_path: Path) -> None:
    write(tmp_path, "labelled/cat/1.png test/cat/2.png")
    with pytest.raises(ValueError, match="at least two, distinct and not empty, got cat$"):
        folders(tmp_path, None)


def test_folders_that_cannot_be_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="unlabelled must be a readable folder, got .*/nowhere: No such file"):
        folders(tree, "nowhere")
    with pytest.raises(OSError, match="unlabelled must be a readable folder, got .*: Not a directory"):
        folders(tree, "unlabelled/6.png")
    scandir = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(image_folders.os, "scandir", denied)
    with pytest.raises(
        OSError, match="^folder_data: labelled must be .*/labelled/cat/deep: Permission denied$"
    ):
        folders(tree)


def test_the_pixel_limit_and_the_report_reach_every_source(tree: Path) -> None:
    data = folder_data(tree / "labelled", tree / "unlabelled", tree / "test", max_pixels=3)
    for source in (data.train, data.test):
        with pytest.raises(UnreadableImage):
            source.read(0)
    assert data.report.unreadable() == {"more than 3 pixels": 2}
