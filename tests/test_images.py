import errno
import json
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from ulfine_fast import images
from ulfine_fast.images import (
    ChosenImages,
    ImageArray,
    ImageFiles,
    JoinedImages,
    MachineError,
    ReadReport,
    UnreadableImage,
)

PIXELS = np.random.RandomState(0).randint(0, 256, (24, 36, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
# a picture of few colours and large areas, which lossy formats keep
HALVES = Image.fromarray(np.repeat(np.repeat([[[255, 0, 0], [0, 0, 255]]], 16, 0), 8, 1).astype(np.uint8))


def reading(path: Path, at_least: int | None = None, **options) -> tuple[np.ndarray, dict[str, int]]:
    files = ImageFiles([path], **options)
    picture = files.read(0, at_least)
    assert picture.mode == "RGB"
    return np.asarray(picture), files.report.converted()


def refusal(path: Path, **options) -> str:
    files = ImageFiles([path], **options)
    with pytest.raises(UnreadableImage) as raised:
        files.read(0)
    assert raised.value.name == str(path)
    assert str(raised.value) == f"{path}: {raised.value.reason}"
    assert "\n" not in str(raised.value)
    assert files.report.unreadable() == {raised.value.reason: 1}
    return raised.value.reason


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_plain_files_are_read_as_they_are(suffix: str, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / f"a.{suffix}")
    pixels, converted = reading(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels, PIXELS)
    assert converted == {}


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "ppm", "webp", "jp2"])
def test_a_truncated_file_is_not_filled_in(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    PICTURE.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert not any(figure.isdecimal() for figure in refusal(path))


def test_pillow_may_not_be_told_to_fill_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match=r"LOAD_TRUNCATED_IMAGES must be False, got True$"):
        ImageFiles([])


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    assert refusal(tmp_path / "empty.jpg") == "empty file"
    assert refusal(tmp_path / "text.jpg").startswith("not an image in JPEG, PNG")
    assert refusal(tmp_path / "folder.jpg") == "Is a directory"
    assert refusal(tmp_path / "absent.jpg") == "No such file or directory"


def test_files_of_any_name_are_read_and_named_in_one_line(tmp_path: Path) -> None:
    names = [b"caf\xe9.png", b"two\nlines.png", b"\x1b[31m.png"]
    paths = [os.path.join(os.fsencode(tmp_path), name) for name in names]  # noqa: PTH118 (bytes)
    for path in paths:
        PICTURE.save(os.fsdecode(path))
    files = ImageFiles(list(map(os.fsdecode, paths)))
    assert all(files.read(row).size == PICTURE.size for row in range(len(files)))
    shown = [files.name(row).removeprefix(f"{tmp_path}/") for row in range(len(files))]
    assert shown == [r"caf\xe9.png", r"two\nlines.png", r"\x1b[31m.png"]
    Path(os.fsdecode(paths[0])).write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"caf\\xe9\.png: empty file$"):
        files.read(0)
    assert r"caf\xe9.png" in files.report.summary()


def test_a_format_that_runs_programs_is_refused(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.jpg", format="EPS")
    assert refusal(tmp_path / "a.jpg").startswith("not an image in")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.os, "open", denied)
    assert refusal(tmp_path / "a.jpg") == "Permission denied"


def test_any_error_of_a_decoder_is_an_unreadable_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError

    monkeypatch.setattr(images.Image, "open", broken)
    (tmp_path / "a.jpg").write_text("any")
    assert refusal(tmp_path / "a.jpg") == "IndexError"


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        assert refusal(tmp_path / f"{name}.jpg") == "not a regular file"


def failing(times: int, error: Exception, work: Callable[..., object]) -> Callable[..., object]:
    """`work`, of which the first `times` calls raise `error`."""
    left = [times]

    def run(*arguments: object, **options: object) -> object:
        if left[0]:
            left[0] -= 1
            raise error
        return work(*arguments, **options)

    return run


MACHINE = [
    ("os.open", OSError(number, os.strerror(number)))
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
]


@pytest.mark.parametrize(("place", "error"), [*MACHINE, ("PIL.Image.open", MemoryError())])
def test_an_error_of_the_machine_is_no_damage(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PICTURE.save(tmp_path / "a.png")
    monkeypatch.setattr(images, "_PAUSES", (0.0, 0.0))
    work = os.open if place == "os.open" else Image.open
    monkeypatch.setattr(place, failing(2, error, work))
    assert np.array_equal(reading(tmp_path / "a.png")[0], PIXELS)
    monkeypatch.setattr(place, failing(3, error, work))
    files = ImageFiles([tmp_path / "a.png"])
    cause = getattr(error, "strerror", None) or "no memory"
    with pytest.raises(MachineError, match=f"a.png: expected to read it, got {cause} in 3 attempts"):
        files.read(0)
    assert files.report.unreadable() == {}


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_LARGE_PIXELS", 24 * 36 - 1)
    PICTURE.save(tmp_path / "a.png")
    inside, most, decode = [], [], images._upright

    def watched(image: Image.Image) -> object:
        inside.append(image)
        most.append(len(inside))
        try:
            return decode(image)
        finally:
            inside.remove(image)

    monkeypatch.setattr(images, "_upright", watched)
    files = ImageFiles([tmp_path / "a.png"] * 40)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(files.read, range(40)))) == 40
    assert max(most) == 1


def test_too_many_bytes(tmp_path: Path) -> None:
    with (tmp_path / "a.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(images.MAX_BYTES + 1)
    assert refusal(tmp_path / "a.webp") == f"more than {images.MAX_BYTES} bytes"


def test_too_many_pixels(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    assert refusal(tmp_path / "a.png", max_pixels=24 * 36 - 1) == f"more than {24 * 36 - 1} pixels"
    assert np.array_equal(reading(tmp_path / "a.png", max_pixels=24 * 36)[0], PIXELS)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_pillows_warning_is_an_error_too(side: int, tmp_path: Path) -> None:
    # the header alone claims the size; Pillow warns of the smaller one and refuses the larger
    (tmp_path / "bomb.ppm").write_bytes(b"P6 %d %d 255\n" % (side, side))
    assert "pixels" in refusal(tmp_path / "bomb.ppm")


@pytest.mark.parametrize("limit", [0, 2 * images.MAX_PIXELS + 1])
def test_limit_out_of_range(limit: int) -> None:
    with pytest.raises(ValueError, match=rf"^ImageFiles: max_pixels must be in 1\.\.\d+, got {limit}$"):
        ImageFiles([], max_pixels=limit)


def test_warnings_of_pillow_are_not_raised_or_shown(tmp_path: Path) -> None:
    palette = PICTURE.quantize(8)
    palette.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reading(tmp_path / "a.png")
        warnings.warn_explicit("from Pillow", UserWarning, "Image.py", 1, module="PIL.Image")
        warnings.warn_explicit("from elsewhere", UserWarning, "x.py", 1, module="elsewhere")
    assert [str(warning.message) for warning in caught] == ["from elsewhere"]


def test_cmyk(tmp_path: Path) -> None:
    HALVES.convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    pixels, converted = reading(tmp_path / "a.jpg")
    assert np.abs(pixels.astype(int) - np.asarray(HALVES)).max() <= 4
    assert converted == {"mode CMYK": 1}


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_keeps_the_high_byte(suffix: str, tmp_path: Path) -> None:
    grey = np.array([[0, 255, 256], [40_000, 65_279, 65_535]], dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 3 2 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(path)
    pixels, converted = reading(path)
    assert pixels[..., 0].tolist() == [[0, 0, 1], [156, 254, 255]]
    assert converted == {"16-bit grey": 1}


def test_pixels_of_unknown_range(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "f.tif")
    assert refusal(tmp_path / "i.tif") == "pixels of mode I outside 0..65535"
    assert refusal(tmp_path / "f.tif").startswith("floating-point pixels")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode: str, tmp_path: Path) -> None:
    colours = [(*[50] * (len(mode) - 1), alpha) for alpha in (0, 255, 128)]
    picture = Image.new(mode, (3, 1))
    for x, colour in enumerate(colours):
        picture.putpixel((x, 0), colour)
    picture.save(tmp_path / "a.png")
    pixels, converted = reading(tmp_path / "a.png")
    # 50 * 128/255 + 255 * 127/255
    assert pixels[0].tolist() == [[255] * 3, [50] * 3, [152] * 3]
    assert converted == {"alpha over white": 1}


def test_transparent_palette_lies_over_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "transparent.png", transparency=bytes([0]))
    assert reading(tmp_path / "plain.png")[0][0].tolist() == [[10, 20, 30], [200, 100, 0]]
    assert reading(tmp_path / "plain.png")[1] == {}
    pixels, converted = reading(tmp_path / "transparent.png")
    assert pixels[0].tolist() == [[255, 255, 255], [200, 100, 0]]
    assert converted == {"alpha over white": 1}


def test_grey_and_1_bit(tmp_path: Path) -> None:
    PICTURE.convert("L").save(tmp_path / "grey.png")
    PICTURE.convert("1").save(tmp_path / "bit.png")
    pixels, converted = reading(tmp_path / "grey.png")
    assert np.array_equal(pixels, np.asarray(PICTURE.convert("L"))[..., None].repeat(3, -1))
    assert converted == {}
    pixels, converted = reading(tmp_path / "bit.png")
    assert np.array_equal(pixels[..., 0] == 255, np.asarray(PICTURE.convert("1")))
    assert converted == {"mode 1": 1}


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_first_of_several_frames(suffix: str, tmp_path: Path) -> None:
    HALVES.save(
        tmp_path / f"a.{suffix}", save_all=True, append_images=[HALVES.transpose(Image.Transpose.ROTATE_180)]
    )
    pixels, converted = reading(tmp_path / f"a.{suffix}")
    assert pixels[8, 2, 0] > 200 > 50 > pixels[8, 13, 0]
    assert converted == {"first of several frames": 1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    PICTURE.save(tmp_path / "a.png", exif=exif)
    # the first row and column of the file, by the EXIF standard: where the top and the left of the scene are
    row, column = PIXELS[0], PIXELS[:, 0]
    scene = {
        1: lambda x: (x[0], x[:, 0]),
        2: lambda x: (x[0, ::-1], x[:, -1]),
        3: lambda x: (x[-1, ::-1], x[::-1, -1]),
        4: lambda x: (x[-1], x[::-1, 0]),
        5: lambda x: (x[:, 0], x[0]),
        6: lambda x: (x[:, -1], x[0, ::-1]),
        7: lambda x: (x[::-1, -1], x[-1, ::-1]),
        8: lambda x: (x[::-1, 0], x[-1]),
    }
    pixels, converted = reading(tmp_path / "a.png")
    found = scene[orientation](pixels)
    assert np.array_equal(found[0], row)
    assert np.array_equal(found[1], column)
    assert converted == ({} if orientation == 1 else {"EXIF orientation": 1})


def test_tiff_is_turned_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    PICTURE.save(tmp_path / "a.tif", exif=exif)
    assert np.array_equal(reading(tmp_path / "a.tif")[0], np.rot90(PIXELS, -1))


def test_metadata_does_not_spoil_an_image(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "exif.png", exif=b"Exif\0\0garbage")
    PICTURE.save(tmp_path / "icc.png", icc_profile=b"x" * 200)
    for name, conversion in (("exif", "damaged EXIF ignored"), ("icc", "ICC profile ignored")):
        pixels, converted = reading(tmp_path / f"{name}.png")
        assert np.array_equal(pixels, PIXELS)
        assert converted == {conversion: 1}


def test_whatever_damaged_tags_raise_the_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PICTURE.save(tmp_path / "a.png")

    def broken(_image: Image.Image) -> None:
        raise TypeError("unorderable tags")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    pixels, converted = reading(tmp_path / "a.png")
    assert np.array_equal(pixels, PIXELS)
    assert converted == {"damaged EXIF ignored": 1}


def test_a_large_jpeg_is_decoded_at_a_reduced_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    HALVES.resize((640, 400)).save(path)
    sizes = {at_least: reading(path, at_least)[0].shape[:2] for at_least in (None, 401, 201, 200, 100, 50, 1)}
    assert sizes == {
        None: (400, 640),
        401: (400, 640),
        201: (400, 640),
        200: (200, 320),
        100: (100, 160),
        50: (50, 80),
        1: (50, 80),
    }
    assert np.array_equal(reading(path, 50)[0], reading(path, 50)[0])


def test_threads_read_the_same(tmp_path: Path) -> None:
    for i in range(8):
        Image.fromarray(np.roll(PIXELS, i)).convert("RGBA").save(tmp_path / f"{i}.png")
    (tmp_path / "8.png").touch()
    files = ImageFiles([tmp_path / f"{i}.png" for i in range(9)])

    def read(index: int) -> np.ndarray | str:
        try:
            return np.asarray(files.read(index))
        except UnreadableImage as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, list(range(9)) * 20))
    for index, pixels in enumerate(found):
        expected = np.roll(PIXELS, index % 9)
        assert pixels == "empty file" if index % 9 == 8 else np.array_equal(pixels, expected)
    # an image counts once, however often it is read
    assert files.report.converted() == {"alpha over white": 8}
    assert files.report.unreadable() == {"empty file": 1}


def test_summary_of_a_report() -> None:
    report = ReadReport()
    assert report.summary() == ""
    for name in "dcba":
        report.add_unreadable(name, "empty file")
    report.add_unreadable("e", "truncated")
    report.add_converted("f", ["mode CMYK", "EXIF orientation"])
    assert report.names("empty file") == ["a", "b", "c"]
    assert report.names("mode CMYK") == ["f"]
    assert report.names("nothing") == []
    assert report.summary() == (
        "unreadable images: 4 empty file (a, b, c, ...), 1 truncated (e);"
        " converted images: 1 EXIF orientation (f), 1 mode CMYK (f)"
    )


def test_reports_of_several_processes_are_joined() -> None:
    report, other = ReadReport(), ReadReport()
    for part, names in ((report, "ab"), (other, "bc")):
        for name in names:
            part.add_unreadable(name, "empty file")
    other.add_converted("\udcff", ["mode CMYK"])
    report.add(json.loads(json.dumps(other.record())))
    assert report.unreadable() == {"empty file": 3}
    assert report.names("mode CMYK") == ["\udcff"]


def test_report_counts_from_many_threads() -> None:
    report = ReadReport()
    start = threading.Barrier(4)

    def add(thread: int) -> None:
        start.wait()
        for i in range(500):
            report.add_converted(f"{thread}/{i}", ["x"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert report.converted() == {"x": 2000}


def test_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([PIXELS, PIXELS // 2]))
    source = ImageArray(np.load(tmp_path / "a.npy", mmap_mode="r"), "toy/train")
    assert len(source) == 2
    assert source.name(1) == "toy/train[1]"
    assert np.array_equal(source.read(1), PIXELS // 2)
    grey = ImageArray(PIXELS[None, ..., 0], "grey", invert=True).read(0, at_least=2)
    assert np.array_equal(grey, 255 - PIXELS[..., :1].repeat(3, -1))
    # a view that is not contiguous: [N, 3, W, H] as [N, H, W, 3]
    turned = ImageArray(PIXELS.transpose(2, 1, 0)[None].transpose(0, 3, 2, 1), "turned")
    assert np.array_equal(turned.read(0), PIXELS)


@pytest.mark.parametrize("array", [np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 4, 4))])
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^ImageArray toy: images must be uint8 .* got \w+ \(2, 4, 4"):
        ImageArray(array, "toy")


def numbered(count: int, name: str, first: int = 0) -> ImageArray:
    return ImageArray(
        np.arange(first, first + count, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2), name
    )


def test_joined_and_chosen_images() -> None:
    joined = JoinedImages([numbered(2, "a"), numbered(0, "b"), numbered(3, "c", 10)])
    assert len(joined) == 5
    assert [joined.name(i) for i in range(5)] == ["a[0]", "a[1]", "c[0]", "c[1]", "c[2]"]
    assert [joined.read(i).getpixel((0, 0))[0] for i in range(5)] == [0, 1, 10, 11, 12]
    with pytest.raises(IndexError):
        joined.read(5)
    chosen = ChosenImages(joined, np.array([3, 0]))
    assert len(chosen) == 2
    assert [chosen.name(i) for i in range(2)] == ["c[1]", "a[0]"]
    assert [chosen.read(i).getpixel((0, 0))[0] for i in range(2)] == [11, 0]


def test_a_stamp_changes_when_the_image_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image"
    files = ImageFiles([path])
    stamps = [files.stamp(0)]
    path.write_bytes(b"12")
    os.utime(path, ns=(0, 0))
    stamps.append(files.stamp(0))
    os.utime(path, ns=(1, 0))
    assert files.stamp(0) == stamps[-1]
    os.utime(path, ns=(0, 1))
    stamps.append(files.stamp(0))
    path.write_bytes(b"123")
    os.utime(path, ns=(0, 1))
    stamps.append(files.stamp(0))
    monkeypatch.setattr("os.access", lambda *_: False)
    stamps.append(files.stamp(0))

    pixels = np.zeros((2, 4, 6), dtype=np.uint8)
    array, same = ImageArray(pixels, "a"), ImageArray(pixels.copy(), "b")
    assert array.stamp(0) == array.stamp(1) == same.stamp(1)
    stamps += [array.stamp(0), ImageArray(pixels, "a", invert=True).stamp(0)]
    stamps.append(ImageArray(pixels.reshape(2, 6, 4), "a").stamp(0))
    pixels[1, 2, 3] = 1
    stamps.append(array.stamp(1))
    assert len(set(stamps)) == len(stamps)
    joined = JoinedImages([same, array])
    assert [joined.stamp(row) for row in range(4)] == [stamps[5], stamps[5], stamps[5], stamps[8]]
    assert ChosenImages(joined, np.array([3])).stamp(0) == stamps[8]


def test_a_stamp_that_the_machine_cannot_give_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "stat", broken)
    with pytest.raises(MachineError, match="image: expected its size and time, got Input/output error"):
        ImageFiles(["image"]).stamp(0)
