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
    data = folders(tree)
    assert data.class_names == ("ape", "cat", "sea lion", "zebra")
    assert data.labelled_counts.tolist() == [1, 2, 1, 0]
    assert data.test_labels.tolist() == [1, 2, 3]
    assert data.notes == ("labelled: no image of 1 classes: zebra", "test: no image of 1 classes: ape")


def test_a_folder_without_images_is_no_class(tree: Path) -> None:
    for name in ("labelled/empty", "labelled/Makefiles/x", "test/known"):
        (tree / name).mkdir(parents=True)
    (tree / "labelled/Makefiles/x/Makefile").touch()
    data = folders(tree)
    assert data.class_names == ("cat", "sea lion")
    assert "no image in any part, so no class: Makefiles, empty, known" in data.notes
    write(tree, "pool/known/1.png pool/cat/2.png")
    assert folders(tree, "pool").class_names == ("cat", "known", "sea lion")


def test_folders_of_the_system_are_ignored(tree: Path) -> None:
    write(tree, "labelled/__MACOSX/cat/1.png labelled/cat/@eaDir/1.jpg test/$RECYCLE.BIN/1.png")
    (tree / "labelled/lost+found").mkdir()
    data = folders(tree)
    assert data.class_names == ("cat", "sea lion")
    assert data.labelled_counts.tolist() == [2, 1]
    assert data.notes == ()


def test_pictures_of_runs_are_no_data(tree: Path) -> None:
    before = folders(tree)
    write(tree, "unlabelled/runs/a/class_counts.png labelled/cat/run/class_counts.png")
    for run in ("unlabelled/runs/a", "labelled/cat/run"):
        for name in ("metrics.json", "predictions.csv"):
            (tree / run / name).touch()
    data = folders(tree)
    assert data.identity == before.identity
    assert len(data.notes) == 2
    assert all(note.endswith(": folder of a run 1") for note in data.notes)


def test_files_that_are_left_out(tree: Path) -> None:
    for name in ("a.txt", "b.TXT", "Makefile", ".c.png", "d.heic"):
        (tree / "labelled/cat" / name).touch()
    os.mkfifo(tree / "labelled/cat/pipe.png")
    write(tree, "labelled/.git/1.png labelled/stray.png")
    (tree / "labelled/cat/gone.png").symlink_to(tree / "nowhere")
    data = folders(tree)
    assert data.labelled_counts.tolist() == [2, 1]
    assert data.notes == (
        "labelled: skipped 6 files, by name no images in JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, AVIF, JPEG2000:"
        " .heic 1, .txt 2, dead link 1, no regular file 1, without extension 1",
        f"labelled: skipped 1 images outside a class folder: {tree}/labelled/stray.png",
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


def test_a_relative_and_an_absolute_folder_hold_the_same_images(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree / "test")
    data = folder_data(Path("../labelled"), tree / "labelled", Path())
    assert len(data.train) == 3
    assert data.unlabelled_is_labelled.all()


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
    assert any(note.startswith("labelled: skipped 1 ") and "dead link 1" in note for note in data.notes)


def test_names_with_spaces_and_unicode(tree: Path) -> None:
    composed, combining = (unicodedata.normalize(form, "café au lait") for form in ("NFC", "NFD"))
    write(tree, "labelled/猫/图.png")
    for part, name in (("labelled", composed), ("test", combining)):
        (tree / part / name).mkdir()
        Image.new("RGB", (2, 2)).save(tree / part / name / "a b.png")
    (tree / "labelled/sea lion").mkdir()
    Image.new("RGB", (2, 2)).save(tree / "labelled/sea lion/1.png")
    data = folders(tree)
    assert data.class_names == (composed, "cat", "sea lion", "猫")
    assert data.labelled_counts.tolist() == [1, 2, 2, 1]
    assert 0 in data.test_labels
    assert "labelled: several folders are one class: sea lion" in data.notes
    assert all(data.train.read(i).mode == "RGB" for i in range(len(data.train)))


def test_training_images_in_the_test_part(tree: Path) -> None:
    (tree / "test/cat/leak.png").symlink_to(tree / "labelled/cat/1.png")
    assert folders(tree).notes == (f"test: 1 images are training images too: {tree}/test/cat/leak.png",)


def test_an_image_of_two_classes(tree: Path) -> None:
    (tree / "labelled/sea_lion/same.png").symlink_to(tree / "labelled/cat/1.png")
    message = f"^labelled: an image must have one class, got cat .*/cat/1.png. and sea lion .* for {tree}/.*/same.png$"
    with pytest.raises(ValueError, match=message):
        folders(tree)


def test_a_training_image_of_another_class_in_the_test_part(tree: Path) -> None:
    (tree / "test/sea_lion/leak.png").symlink_to(tree / "labelled/cat/1.png")
    with pytest.raises(ValueError, match=r"^test: an image must have one class, got cat .* and sea lion"):
        folders(tree)


@pytest.mark.parametrize("part", ["labelled", "test"])
def test_empty_folder(part: str, tree: Path) -> None:
    (tree / "empty").mkdir()
    paths = {"labelled": tree / "labelled", "test": tree / "test", part: tree / "empty"}
    with pytest.raises(
        ValueError, match=f"^{part} must have class folders with images, got none in {tree}/empty$"
    ):
        folder_data(paths["labelled"], None, paths["test"])


def test_a_folder_of_other_formats_says_which(tree: Path) -> None:
    (tree / "phone/cat").mkdir(parents=True)
    (tree / "phone/cat/1.heic").touch()
    with pytest.raises(ValueError, match=r"got none in .*phone; .*no images in JPEG, .*: \.heic 1$"):
        folders(tree, "phone")


def test_one_class_only(tmp_path: Path) -> None:
    write(tmp_path, "labelled/cat/1.png test/cat/2.png")
    with pytest.raises(ValueError, match="^classes must be at least two, got cat$"):
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
    with pytest.raises(OSError, match="^labelled must be .*/labelled/cat/deep: Permission denied$"):
        folders(tree)


def test_the_pixel_limit_and_the_report_reach_every_source(tree: Path) -> None:
    data = folder_data(tree / "labelled", tree / "unlabelled", tree / "test", max_pixels=3)
    for source in (data.train, data.test):
        with pytest.raises(UnreadableImage):
            source.read(0)
    assert data.report.unreadable() == {"more than 3 pixels": 2}
