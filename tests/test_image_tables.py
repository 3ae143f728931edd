import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ulfine_fast.image_tables import list_data, table_data
from ulfine_fast.images import ImageSource

TREE = "labelled/cat/1.png labelled/sea_lion/3.png test/cat/4.png test/sea_lion/5.png unlabelled/6.png unlabelled/any/7.png unlabelled/any/where/8.png"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in TREE.split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    return tmp_path


def names(source: ImageSource, root: Path, rows: np.ndarray | None = None) -> list[str]:
    rows = range(len(source)) if rows is None else rows
    return [str(Path(source.name(int(row))).relative_to(root)) for row in rows]


TABLE = """label,path,note,split
cat,labelled/cat/1.png,,train
,unlabelled/6.png,,Train
sea_lion,labelled/sea_lion/3.png,,training
sea_lion,unlabelled/any/7.png,,unlabeled
cat,"test/cat/4.png",,test
sea_lion,test/sea_lion/5.png,,val
"""


def parquet(path: Path, text: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    header, *rows = (line.replace('"', "").split(",") for line in text.splitlines())
    columns = {name: [row[i] or None for row in rows] for i, name in enumerate(header)}
    parquet.write_table(pyarrow.table(columns), path)


def written(root: Path, text: str, suffix: str = "csv") -> Path:
    path = root / f"table.{suffix}"
    if suffix == "parquet":
        parquet(path, text)
    else:
        path.write_text(text if suffix == "csv" else text.replace(",", "\t"), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables(suffix: str, tree: Path) -> None:
    data = table_data(written(tree, TABLE, suffix))
    assert data.class_names == ("cat", "sea lion")
    assert names(data.train, tree, data.labelled) == ["labelled/cat/1.png", "labelled/sea_lion/3.png"]
    assert data.labels.tolist() == [0, 1]
    assert names(data.train, tree, data.unlabelled) == ["unlabelled/6.png", "unlabelled/any/7.png"]
    assert data.unlabelled_truth.tolist() == [-1, 1]
    assert names(data.test, tree) == ["test/cat/4.png"]
    assert names(data.validation, tree) == ["test/sea_lion/5.png"]
    assert data.validation_labels.tolist() == [1]
    assert data.notes == ("test: no image of 1 classes: sea lion",)


def test_root_of_a_table(tree: Path) -> None:
    (tree / "tables").mkdir()
    path = written(tree / "tables", TABLE)
    assert len(table_data(path, tree).train) == 4
    with pytest.raises(ValueError, match=r"^labelled must name image files, got .*, which is not there$"):
        table_data(path)
    absolute = TABLE.replace("labelled/cat/1.png", str(tree / "labelled/cat/1.png"))
    assert len(table_data(written(tree / "tables", absolute), tree).train) == 4


def test_numbers_as_labels_are_in_order_of_number(tree: Path) -> None:
    table = "path,label,split\nlabelled/cat/1.png,10,train\nlabelled/sea_lion/3.png,9,train\ntest/cat/4.png,10,test\n"
    data = table_data(written(tree, table))
    assert data.class_names == ("9", "10")
    assert "classes are called by their number; text prototypes need names" in data.notes


def test_whole_numbers_stored_as_floating_point(tree: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "path": ["labelled/cat/1.png", "labelled/sea_lion/3.png", "unlabelled/6.png", "test/cat/4.png"],
        "label": [10.0, 9.0, float("nan"), 9.0],
        "split": ["train", "train", "train", "test"],
    }
    parquet.write_table(pyarrow.table(columns), tree / "table.parquet")
    data = table_data(tree / "table.parquet")
    assert data.class_names == ("9", "10")
    assert data.labels.tolist() == [1, 0]
    assert data.unlabelled_truth.tolist() == [-1]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("mark", ["-1", "-1.0", "nan", "None", "<NA>"])
def test_marks_of_no_label_are_none(mark: str, suffix: str, tree: Path) -> None:
    table = TABLE.replace(",unlabelled/6.png", f"{mark},unlabelled/6.png")
    data = table_data(written(tree, table, suffix))
    assert data.class_names == ("cat", "sea lion")
    assert data.unlabelled_truth.tolist() == [-1, 1]
    assert data.notes[0] == f"1 training rows are unlabelled: their label is {mark}"
    test = table.replace('cat,"test/cat', f'{mark},"test/cat')
    with pytest.raises(ValueError, match=f"6?, column label: expected a class, got {mark}$"):
        table_data(written(tree, test, suffix))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_whole_numbers_with_a_point_are_numbers(suffix: str, tree: Path) -> None:
    data = table_data(written(tree, TABLE.replace("cat,", "10.0,").replace("sea_lion,", "9.0,"), suffix))
    assert data.class_names == ("9", "10")


def test_columns_of_other_things_than_text_and_numbers(tree: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"path": ["labelled/cat/1.png"], "label": [["cat"]], "split": ["train"]}
    parquet.write_table(pyarrow.table(columns), tree / "table.parquet")
    with pytest.raises(ValueError, match=r"row 1, column label: expected text or a number, got list$"):
        table_data(tree / "table.parquet")


@pytest.mark.parametrize("mark", [";", "\t"])
def test_columns_may_be_apart_by_other_marks(mark: str, tree: Path) -> None:
    assert table_data(written(tree, TABLE.replace(",", mark))).class_names == ("cat", "sea lion")


def test_a_file_by_two_paths_is_one(tree: Path) -> None:
    (tree / "link.png").symlink_to(tree / "labelled/cat/1.png")
    (tree / "linked").symlink_to(tree / "labelled")
    (tree / "linked_cat").symlink_to(tree / "labelled/cat")
    # behind the link, the folder above is labelled/
    paths = ("link.png", "linked/cat/1.png", f"{tree}/labelled/cat/1.png", "linked_cat/../cat/1.png")
    for path in paths:
        copy = table_data(written(tree, f"{TABLE},{path},,unlabelled\n"))
        assert copy.unlabelled_is_labelled.tolist() == [False, False, True]
        leak = table_data(written(tree, f"{TABLE}cat,{path},,test\n"))
        assert (
            f"test: 1 images are training images too: {tree}/{path}".replace(f"{tree}//", "/") in leak.notes
        )
        for split in ("train", "test", "unlabelled"):
            with pytest.raises(
                ValueError, match="an image must have one class, got cat .line 2. and sea lion"
            ):
                table_data(written(tree, f"{TABLE}sea_lion,{path},,{split}\n"))


def test_a_path_in_another_form_of_unicode_is_that_of_the_file(tree: Path) -> None:
    composed, combining = "caf\u00e9", "cafe\u0301"
    for on_disk, listed in ((composed, combining), (combining, composed)):
        folder = tree / on_disk
        folder.mkdir()
        Image.new("RGB", (2, 2)).save(folder / f"{on_disk}.png")
        data = table_data(written(tree, f"{TABLE}{listed},{listed}/{listed}.png,,test\n"))
        assert data.test.read(1).size == (2, 2)
        assert data.class_names[0] == composed


def test_labels_that_only_unlabelled_rows_have(tree: Path) -> None:
    data = table_data(written(tree, TABLE + "dog,unlabelled/any/where/8.png,,unlabelled\n"))
    assert data.class_names == ("cat", "sea lion")
    assert data.unlabelled_truth.tolist() == [-1, 1, -1]
    assert "unlabelled: only unlabelled images have the labels dog; they are ignored" in data.notes


def test_an_image_in_two_parts(tree: Path) -> None:
    data = table_data(written(tree, TABLE + ",./labelled/cat/1.png,,unlabelled\n"))
    assert data.unlabelled_is_labelled.tolist() == [False, False, True]
    leak = table_data(written(tree, TABLE + "cat,labelled/cat/1.png,,test\n"))
    assert f"test: 1 images are training images too: {tree}/labelled/cat/1.png" in leak.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("label,path", "class,path"),
            ": expected the columns path, label, split, got class, path, note, split",
        ),
        ((",,val", ",,holdout"), ", line 7, column split: expected one of train, .*, got 'holdout'"),
        (("cat,labelled/cat/1.png", "cat,"), ", line 2, column path: expected a path, got nothing"),
        (('cat,"test/', ',"test/'), ", line 6, column label: expected a class, got nothing"),
        ((",,val", ",val"), ", line 7: expected 4 columns, got another number"),
        ((",,val", ",,,val"), ", line 7: expected 4 columns, got another number"),
        (("4.png", '4"png'), ", after line 5: .*expected after"),
        (
            (",,val\n", ",,val\nsea_lion,labelled/cat/1.png,,train\n"),
            r"^labelled: an image must have one class, got cat \(line 2\) and sea lion \(line 8\) for .*1.png$",
        ),
    ],
)
def test_errors_of_tables_name_line_and_column(change: tuple[str, str], message: str, tree: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        table_data(written(tree, TABLE.replace(*change)))
    assert "\n" not in str(raised.value)


def test_errors_of_parquet_name_the_row(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="row 6, column split: expected one of"):
        table_data(written(tree, TABLE.replace(",,val", ",,holdout"), "parquet"))
    with pytest.raises(ValueError, match="expected the columns path, label, split, got class"):
        table_data(written(tree, TABLE.replace("label,path", "class,path"), "parquet"))
    (tree / "table.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"table\.parquet: expected a Parquet file, got: ") as raised:
        table_data(tree / "table.parquet")
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^pyarrow is missing: pip install 'ulfine-fast\[images\]'$"):
        table_data(tree / "table.parquet")


def test_other_tables(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"^table must end in one of \.csv, \.tsv, \.parquet, got"):
        table_data(tree / "table.xlsx")
    with pytest.raises(FileNotFoundError):
        table_data(tree / "absent.csv")
    (tree / "table.csv").write_bytes(b"path,label,split\n\xff,a,train\n")
    with pytest.raises(ValueError, match=r"table\.csv, line 2: expected UTF-8 text, got the byte 0xff$"):
        table_data(tree / "table.csv")
    with pytest.raises(ValueError, match="expected the columns path, label, split, got none"):
        table_data(written(tree, ""))


def write_list(root: Path, name: str, labels: list[int]) -> Path:
    paths = [f"{name} images/{i}.png" for i in range(len(labels))]
    for path in paths:
        (root / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / path)
    lines = [f"{path} {label}" for path, label in zip(paths, labels, strict=True)]
    (root / f"{name}.txt").write_text("\n".join(lines) + "\n\n")
    return root / f"{name}.txt"


def test_lists_in_the_protocol_of_finessl(tmp_path: Path) -> None:
    train = write_list(tmp_path, "train", [1, 0, 0, 1, 0, 0, 0, 3])
    data = list_data(train, write_list(tmp_path, "test", [0, 1, 2, 3]), tmp_path)
    # ceil(0.25 * [5, 2, 0, 1]) = [2, 1, 0, 1] first images of each class
    assert names(data.train, tmp_path, data.labelled) == [f"train images/{i}.png" for i in (1, 2, 0, 7)]
    assert data.labels.tolist() == [0, 0, 1, 3]
    assert names(data.train, tmp_path, data.unlabelled) == [f"train images/{i}.png" for i in range(8)]
    assert data.unlabelled_truth.tolist() == [1, 0, 0, 1, 0, 0, 0, 3]
    assert data.unlabelled_is_labelled.tolist() == [True, True, True, False, False, False, False, True]
    assert data.unlabelled_counts.tolist() == [3, 1, 0, 0]
    assert data.class_names == ("0", "1", "2", "3")
    assert data.notes == (
        "classes are called by their number; text prototypes need names",
        "labelled: no image of 1 classes: 2",
    )


def test_options_of_lists(tmp_path: Path) -> None:
    lists = write_list(tmp_path, "train", [0] * 100 + [1]), write_list(tmp_path, "test", [0, 1])
    (tmp_path / "names.txt").write_text("sea_lion\ncafé\nunused\n", encoding="utf-8")
    validation = write_list(tmp_path, "val", [1, 1])
    data = list_data(
        *lists,
        tmp_path,
        labelled_share=0.07,
        validation_list=validation,
        class_names=tmp_path / "names.txt",
    )
    assert data.class_names == ("sea lion", "café", "unused")
    # 0.07 * 100 is 7.000000000000001 in floating point
    assert data.labelled_counts.tolist() == [7, 1, 0]
    assert data.validation_labels.tolist() == [1, 1]
    assert len(list_data(*lists, tmp_path, labelled_share=1).labelled) == 101


def test_names_of_several_classes(tmp_path: Path) -> None:
    lists = write_list(tmp_path, "train", [0, 1, 2]), write_list(tmp_path, "test", [0, 1, 2])
    (tmp_path / "names.txt").write_text("Sea_Lion\nmis\u2028sile\nSea Lion\n\n", encoding="utf-8")
    data = list_data(*lists, tmp_path, labelled_share=1, class_names=tmp_path / "names.txt")
    assert data.class_names == ("Sea Lion", "mis\\u2028sile", "Sea Lion")
    assert data.labels.tolist() == [0, 1, 2]
    assert data.notes[0].endswith("told apart by number: Sea Lion (0, 2)")


def test_text_files_in_another_encoding_are_named(tmp_path: Path) -> None:
    lists = write_list(tmp_path, "train", [0, 1]), write_list(tmp_path, "test", [0, 1])
    names = tmp_path / "names.txt"
    names.write_bytes("a\nb\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"names\.txt, line 1: expected UTF-8 text, got the byte 0xff$"):
        list_data(*lists, tmp_path, class_names=names)
    lists[1].write_bytes(b"a.png 0\r\ncaf\xe9.png 1\r\n")
    with pytest.raises(ValueError, match=r"test\.txt, line 2: expected UTF-8 text, got the byte 0xe9$"):
        list_data(*lists, tmp_path)


def edited(edit: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda path: path.write_text(edit(path.read_text()))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            edited(lambda text: text.replace("1.png 1", "1.png one")),
            "line 2: expected a path and a class number",
        ),
        (
            edited(lambda text: text.replace("1.png 1", "1.png -1")),
            "line 2: expected a path and a class number",
        ),
        (
            edited(lambda text: text.replace("png 1", "png\t77")),
            "labels must be in 0..C-1, got 77 among 4 images",
        ),
        (edited(lambda text: "7\n" + text), "line 1: expected a path and a class number, got '7'"),
        (edited(lambda text: text + "train images/0.png 1\n"), r"got 0 \(.* line 1\) and 1 \(.* line 4\)"),
    ],
)
def test_errors_of_lists_name_the_line(edit: Callable, message: str, tmp_path: Path) -> None:
    lists = write_list(tmp_path, "train", [0, 1]), write_list(tmp_path, "test", [0, 1])
    edit(lists[0])
    with pytest.raises(ValueError, match=message):
        list_data(*lists, tmp_path)


def test_other_errors_of_lists(tmp_path: Path) -> None:
    lists = write_list(tmp_path, "train", [0, 1]), write_list(tmp_path, "test", [0, 2])
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=rf"^labelled_share must be in \(0, 1\], got {share}$"):
            list_data(*lists, tmp_path, labelled_share=share)
    (tmp_path / "names.txt").write_text("a\n\nb\n")
    with pytest.raises(ValueError, match=r"names\.txt, line 2: expected a class name, got nothing$"):
        list_data(*lists, tmp_path, class_names=tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"names\.txt: expected 3 class names, got 2$"):
        list_data(*lists, tmp_path, class_names=tmp_path / "names.txt")
    with pytest.raises(ValueError, match="must name image files"):
        list_data(*lists, tmp_path / "elsewhere")
    for path in lists:
        path.write_text("")
    with pytest.raises(ValueError, match="^classes must be at least two, got none$"):
        list_data(*lists, tmp_path)
