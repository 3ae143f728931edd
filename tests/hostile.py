"""Files as people have them and as nobody should: images, checkpoints, tables, lists, names and folders of every kind.

    python tests/hostile.py --files 500

writes a corpus from a seed, reads each file as the package would, in a process of limited memory and with a limit of
time for each file, and prints what became of them. A file is read, or refused by an error of ours in one line; any other
end is a fault, and so is a count that is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from safetensors.torch import save as safetensors_bytes
from tiny_clip import tiny_clip

SECONDS, MEMORY = 60, 3 << 30
ROLES = ("image", "checkpoint", "table", "list", "names", "folder")
# how many of a hundred files have each role
SHARES = (62, 20, 7, 4, 4, 3)
READ, REFUSED, EITHER, FAULT = "read", "refused", "either", "fault"


class Case(NamedTuple):
    """A file, and what has to become of it."""

    role: str
    kind: str
    path: str
    expected: str


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    octets = BytesIO()
    picture.save(octets, form, **options)
    return octets.getvalue()


def picture(draw: random.Random, mode: str = "RGB") -> Image.Image:
    width, height = draw.randint(1, 90), draw.randint(1, 90)
    pixels = np.random.default_rng(draw.randrange(1 << 30)).integers(
        0, 256, (height, width, 4), dtype=np.uint8
    )
    return Image.fromarray(pixels).convert("RGB").convert(mode)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes, bits: int = 1, colour: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def black(width: int, height: int) -> bytes:
    """A bilevel picture that takes a thousandth of its pixels."""
    return png(width, height, chunk(b"IDAT", zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)))


def oriented(draw: random.Random) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = draw.randint(0, 12)
    return encoded(picture(draw), draw.choice(["JPEG", "PNG"]), exif=exif)


FORMS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000")
GOOD_IMAGES: dict[str, Callable[[random.Random], bytes]] = {
    **{form: lambda draw, form=form: encoded(picture(draw), form) for form in FORMS},
    "animated": lambda draw: encoded(
        Image.new("RGB", (9, 9)),
        draw.choice(["GIF", "WEBP", "PNG"]),
        save_all=True,
        append_images=[Image.new("RGB", (9, 9), "red")] * 3,
    ),
    "16 bits": lambda draw: encoded(
        Image.fromarray(np.full((5, 7), draw.randrange(1 << 16), np.uint16)), draw.choice(["PNG", "TIFF"])
    ),
    "CMYK": lambda draw: encoded(picture(draw, "CMYK"), draw.choice(["JPEG", "TIFF"])),
    "palette": lambda draw: encoded(picture(draw).quantize(9), "PNG", transparency=draw.randrange(9)),
    "alpha": lambda draw: encoded(picture(draw, draw.choice(["LA", "RGBA"])), "PNG"),
    "one bit": lambda draw: encoded(picture(draw, "1"), draw.choice(["PNG", "TIFF", "GIF"])),
    "orientation": oriented,
    "long": lambda draw: black(*draw.choice([(1, 60_000), (60_000, 1), (3, 9_000)])),
    "nearly too many pixels": lambda _: black(9_400, 9_400),
    "more behind its end": lambda draw: encoded(picture(draw), "JPEG") + bytes(1000),
    "damaged EXIF": lambda draw: encoded(picture(draw), "PNG", exif=b"Exif\0\0garbage"),
    "no profile": lambda draw: encoded(picture(draw), "JPEG", icc_profile=b"x" * 70_000),
    "LAB": lambda _: encoded(Image.new("LAB", (4, 4)), "TIFF"),
    "progressive": lambda draw: encoded(picture(draw), "JPEG", progressive=True),
}
BAD_IMAGES: dict[str, Callable[[random.Random], bytes]] = {
    "empty": lambda _: b"",
    "zeros": lambda _: bytes(5000),
    "noise": lambda draw: draw.randbytes(5000),
    "text": lambda _: b"no picture",
    "page": lambda _: b"<!DOCTYPE html><html>404",
    "SVG": lambda _: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "EPS": lambda draw: encoded(picture(draw), "EPS"),
    "PDF": lambda draw: encoded(picture(draw), "PDF"),
    "icon": lambda draw: encoded(picture(draw).resize((32, 32)), "ICO", sizes=[(16, 16)]),
    "HEIC": lambda _: struct.pack(">I", 24) + b"ftypheic" + bytes(100),
    "float": lambda _: encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "bomb": lambda _: black(30_000, 30_000),
    "bomb of words": lambda draw: png(
        4,
        4,
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26), 9)),
        chunk(b"IDAT", zlib.compress(bytes(8))),
    ),
    "claims many pixels": lambda draw: draw.choice(
        [
            png(50_000, 50_000),
            png(2**31 - 1, 2**31 - 1),
            b"P6 20000 20000 255\n",
            b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
            b"BM"
            + struct.pack(
                "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0
            ),
        ]
    ),
    "no data": lambda draw: draw.choice(
        [png(9, 9), b"P6 9 9 255\n", b"\xff\xd8\xff\xd9", b"RIFF\0\0\0\0WEBPVP8 "]
    ),
    "no width": lambda draw: draw.choice([png(0, 9), b"P5 0 9 255\n", b"P6 9 0 255\n"]),
    "wrong sum": lambda draw: (lambda octets: octets[:-20] + bytes([octets[-20] ^ 255]) + octets[-19:])(
        png(9, 9, chunk(b"IDAT", zlib.compress(bytes(27))))
    ),
    "TIFF that begins again": lambda _: b"II*\0" + struct.pack("<IHI", 8, 0, 8),
}


def cut(draw: random.Random) -> bytes:
    form = draw.choice(FORMS)
    whole = encoded(picture(draw).resize((60, 60)), form)
    return whole[: int(len(whole) * draw.uniform(0.1, 0.8))]


def altered(draw: random.Random, whole: bytes) -> bytes:
    octets = bytearray(whole)
    for _ in range(draw.randint(1, 12)):
        if octets:
            place = draw.randrange(min(len(octets), 300) if draw.random() < 0.6 else len(octets))
            octets[place] = draw.randrange(256)
    if octets and draw.random() < 0.3:
        start, end = sorted(draw.randrange(len(octets)) for _ in range(2))
        octets[start:end] = b"" if draw.random() < 0.5 else octets[start:end] * 2
    return bytes(octets)


class Special:
    """What stands under the name of an image and is no file."""

    KINDS = ("folder", "pipe", "dead link", "link to itself", "device", "socket", "absent", "sparse")

    @staticmethod
    def write(kind: str, path: Path) -> None:
        match kind:
            case "folder":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
            case "dead link":
                path.symlink_to("nowhere")
            case "link to itself":
                path.symlink_to(path.name)
            case "device":
                path.symlink_to("/dev/zero")
            case "socket":
                os.mknod(path, 0o140600)
            case "sparse":
                with path.open("wb") as file:
                    file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
                    file.truncate(3 << 30)


NAMES = (
    "a",
    "[red]",
    "ünï",
    "$x$",
    "a b",
    "{0}",
    "new\nline",
    "\udcff",
    "-rf",
    "x" * 200,
    "emoji \U0001f600",
    "%s",
    "'\"",
)


def image(draw: random.Random, path: Path) -> tuple[str, str]:
    choice = draw.random()
    if choice < 0.35:
        kind = draw.choice(list(GOOD_IMAGES))
        path.write_bytes(GOOD_IMAGES[kind](draw))
        return kind, READ
    if choice < 0.6:
        kind = draw.choice(list(BAD_IMAGES))
        path.write_bytes(BAD_IMAGES[kind](draw))
        return kind, REFUSED
    if choice < 0.7:
        kind = draw.choice(Special.KINDS)
        Special.write(kind, path)
        return kind, REFUSED
    if choice < 0.8:
        path.write_bytes(cut(draw))
        return "truncated", REFUSED
    kind = draw.choice(list(GOOD_IMAGES))
    path.write_bytes(altered(draw, GOOD_IMAGES[kind](draw)))
    return f"{kind}, altered", EITHER


def zipped(**entries: bytes) -> bytes:
    octets = BytesIO()
    with zipfile.ZipFile(octets, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return octets.getvalue()


def saved(content: object, *, zip_format: bool = True) -> bytes:
    octets = BytesIO()
    torch.save(content, octets, _use_new_zipfile_serialization=zip_format)
    return octets.getvalue()


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


def checkpoint(draw: random.Random, path: Path, weights: dict[str, torch.Tensor]) -> tuple[str, str]:
    prefix = draw.choice(["", "module.", "_orig_mod.", "module._orig_mod.", "visual.", "model.backbone."])
    own = {prefix + name: tensor for name, tensor in weights.items()}
    wrapper = draw.choice(["state_dict", "model", "model_state", "ema", "net"])
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float64])
    nan = {name: torch.full_like(tensor, float("nan")) for name, tensor in own.items()}
    loop: dict[str, object] = {"epoch": 1}
    loop["again"] = loop
    short = dict(list(own.items())[:-3])
    kinds: dict[str, tuple[str, Callable[[], bytes]]] = {
        "bare": (READ, lambda: saved(own)),
        "legacy": (READ, lambda: saved(own, zip_format=False)),
        "safetensors": (READ, lambda: safetensors_bytes(own)),
        "wrapped": (
            READ,
            lambda: saved({wrapper: own, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}),
        ),
        "another type": (READ, lambda: saved({name: tensor.to(dtype) for name, tensor in own.items()})),
        "arguments": (READ, lambda: saved({wrapper: own, "args": argparse.Namespace(lr=0.1)})),
        "not finite": (REFUSED, lambda: saved(nan)),
        "too few": (REFUSED, lambda: saved(short)),
        "others": (REFUSED, lambda: saved({"weight": torch.ones(3)})),
        "no tensor": (REFUSED, lambda: saved({"epoch": 3})),
        "a tensor": (REFUSED, lambda: saved(torch.ones(3))),
        "list": (REFUSED, lambda: saved([torch.ones(3)])),
        "itself": (REFUSED, lambda: saved(loop)),
        "code": (REFUSED, lambda: saved({**own, "code": Code()}, zip_format=draw.random() < 0.5)),
        "empty": (REFUSED, lambda: b""),
        "text": (REFUSED, lambda: b"weights\n"),
        "page": (REFUSED, lambda: b"<html>404</html>"),
        "pointer": (REFUSED, lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "noise": (REFUSED, lambda: draw.randbytes(3000)),
        "zeros": (REFUSED, lambda: bytes(3000)),
        "bomb": (REFUSED, lambda: zipped(**{"a/data.pkl": bytes(1 << 28), "a/version": b"3"})),
        "script of nothing": (REFUSED, lambda: zipped(**{"a/data.pkl": b"", "a/constants.pkl": b""})),
        "truncated": (REFUSED, lambda: (lambda octets: octets[: len(octets) // 2])(saved(own))),
        "truncated safetensors": (REFUSED, lambda: safetensors_bytes(own)[:-9]),
        "long header": (REFUSED, lambda: struct.pack("<Q", 2**62) + b"{}" + bytes(99)),
        "altered": (EITHER, lambda: altered(draw, saved(own))),
        "altered legacy": (EITHER, lambda: altered(draw, saved(own, zip_format=False))),
        "altered safetensors": (EITHER, lambda: altered(draw, safetensors_bytes(own))),
        **{kind: (REFUSED, lambda: b"") for kind in ("folder", "pipe", "dead link", "device", "absent")},
    }
    kind = draw.choice(list(kinds))
    expected, content = kinds[kind]
    if kind in Special.KINDS:
        Special.write(kind, path)
    else:
        path.write_bytes(content())
    return kind, expected


def text(draw: random.Random, role: str, images: list[str]) -> tuple[str, bytes, str]:
    """Kind, content and what has to become of a table, a list or a file of names."""
    paths = [draw.choice(images) for _ in range(6)] if images else ["a.png"] * 6
    odd = [draw.choice(NAMES).replace("\n", " ") for _ in range(6)]
    rows = {
        "table": "path,label,split\n"
        + "".join(f'"{path}","c{i % 2}",{"test" if i > 3 else "train"}\n' for i, path in enumerate(paths)),
        "list": "".join(f"{path} {i % 2}\n" for i, path in enumerate(paths)),
        "names": "".join(f"{name} {i}\n" for i, name in enumerate(odd)),
    }[role].encode("utf-8", "surrogateescape")
    kinds: dict[str, bytes] = {
        "plain": rows,
        "byte order mark": b"\xef\xbb\xbf" + rows,
        "UTF-16": rows.decode("utf-8", "replace").encode("utf-16"),
        "Latin-1": rows + b"\xff\xfe\n",
        "null": rows + b"\0\0\n",
        "empty": b"",
        "noise": draw.randbytes(800),
        "other ends of lines": rows.replace(b"\n", b"\r\n"),
        "old ends of lines": rows.replace(b"\n", b"\r"),
        "one long line": b"x" * 3_000_000,
        "open quote": rows + b'"a,b\n' * 3,
        "semicolons": rows.replace(b",", b";"),
        "altered": altered(draw, rows),
        "half": rows[: len(rows) // 2],
        "large number": b"a.png 99999999999999999999\n" + rows,
        "other digits": "a.png \u0663\nb.png \u00b2\n".encode() + rows,
    }
    kind = draw.choice(list(kinds))
    return kind, kinds[kind], EITHER


def folder(draw: random.Random, path: Path) -> tuple[str, str]:
    for part in ("labelled", "test"):
        for name in draw.sample(NAMES, draw.randint(1, 5)):
            inside = path / part / name
            inside.mkdir(parents=True)
            for number in range(draw.randint(0, 3)):
                kind = draw.choice(("file", *Special.KINDS))
                target = inside / f"{number}.{draw.choice(['png', 'PNG', 'jpg', 'txt', 'gif'])}"
                if kind == "file":
                    target.write_bytes(GOOD_IMAGES["PNG"](draw))
                else:
                    Special.write(kind, target)
            if draw.random() < 0.3:
                (inside / "up").symlink_to(path)
            if draw.random() < 0.3:
                (inside / "/".join(["deep"] * 60)).mkdir(parents=True)
    return "folders", EITHER


def write_corpus(root: Path, count: int, seed: int) -> list[Case]:
    """`count` files in `root`, every kind of them drawn from `seed`."""
    import timm

    draw = random.Random(seed)
    torch.manual_seed(seed)
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    tiny_clip(root / "clip")
    cases: list[Case] = []
    for role, share in zip(ROLES, SHARES, strict=True):
        (root / role).mkdir()
        for number in range(-(-count * share // 100)):
            name = f"{number} {draw.choice(NAMES)}"
            path = root / role / name
            if role == "image":
                path = path.with_name(f"{name}.{draw.choice(['jpg', 'png', 'gif', 'webp', 'tif', 'jp2'])}")
                kind, expected = image(draw, path)
            elif role == "checkpoint":
                path = path.with_name(f"{number}.{draw.choice(['pt', 'pth', 'bin', 'safetensors'])}")
                kind, expected = checkpoint(draw, path, weights)
            elif role == "folder":
                kind, expected = folder(draw, path)
            else:
                images = [f"../image/{Path(case.path).name}" for case in cases if case.role == "image"]
                path = path.with_name(f"{number}{'.csv' if role == 'table' else '.txt'}")
                kind, content, expected = text(draw, role, [name for name in images if "\n" not in name])
                path.write_bytes(content)
            cases.append(Case(role, kind, str(path), expected))
    return cases


def read(case: Case) -> None:
    """What the package does with a file of that role."""
    from ulfine_fast import augment, image_folders, image_tables
    from ulfine_fast.images import ImageFiles
    from ulfine_fast.towers import load_tower

    path = Path(case.path)
    match case.role:
        case "image":
            pipeline, files = augment.PIPELINES["lift"], ImageFiles([case.path])
            for at_least in (None, 40):
                found = files.read(0, at_least)
                augment.test_views(found, pipeline, 32)
                augment.view(found, pipeline, "strong", np.random.default_rng(0), size=32)
        case "checkpoint":
            load_tower("timm:test_vit", case.path)
        case "table":
            image_tables.table_data(path)
        case "list":
            image_tables.list_data(path, path, path.parent)
        case "names":
            image_tables.read_class_names(path)
        case "folder":
            image_folders.folder_data(path / "labelled", path / "labelled", path / "test")


def read_all(cases: list[Case]) -> Iterator[dict[str, str]]:
    """What became of each case. A time limit ends the process."""
    from ulfine_fast import images

    images._PAUSES = ()
    for number, case in enumerate(cases):
        print(json.dumps({"begun": number}), flush=True)
        signal.alarm(SECONDS)
        try:
            read(case)
            yield {"became": READ, "text": ""}
        except Exception as error:  # noqa: BLE001 (each is refused by us, or a fault to be told)
            # a kind of error that is derived from these comes from a library
            ours = type(error) in (ValueError, OSError, FileNotFoundError, images.UnreadableImage)
            # names may have two lines
            ours = ours and "\n" not in str(error).replace(case.path, "").replace("new\nline", "")
            yield {"became": REFUSED if ours else FAULT, "text": f"{type(error).__name__}: {error}"}
        finally:
            signal.alarm(0)


def child(cases: list[Case]) -> None:
    """Read the cases and print what became of each, as JSON in lines."""
    # their memory is not that of the files
    import open_clip  # noqa: F401
    import timm  # noqa: F401

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for became in read_all(cases):
        print(json.dumps(became), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak": peak * 1024, "counted": counted(cases)}), flush=True)


def counted(cases: list[Case]) -> int:
    """How many images a whole evaluation counts as unreadable; ValueError if its report says otherwise."""
    from functools import partial

    from ulfine_fast import augment
    from ulfine_fast.images import ImageFiles
    from ulfine_fast.loader import evaluation_batches

    paths = [case.path for case in cases if case.role == "image"]
    if not paths:
        return 0
    files = ImageFiles(paths)
    views = partial(augment.test_views, pipeline=augment.PIPELINES["lift"], size=32)
    batches = evaluation_batches(
        files, views, batch_size=16, workers=4, at_least=40, on_unreadable=lambda _: None
    )
    unreadable = sum(int((~batch.readable).sum()) for batch in batches)
    if unreadable != sum(files.report.unreadable().values()):
        raise ValueError(f"{unreadable} images were unreadable, counted were {files.report.unreadable()}")
    return unreadable


def run_corpus(root: Path, cases: list[Case]) -> tuple[list[tuple[str, str]], list[str], dict[str, int]]:
    """What became of each case, the faults, and figures of the whole."""
    ends: list[tuple[str, str]] = []
    figures = {"peak": 0, "counted": 0}
    while len(ends) < len(cases):
        rest = root / "cases.json"
        rest.write_text(json.dumps(cases[len(ends) :]))
        command = [sys.executable, __file__, "--read", str(rest)]
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        ends += [(line["became"], line["text"]) for line in lines if "became" in line]
        last = lines[-1] if lines else {}
        if "peak" in last:
            figures = {
                "peak": max(figures["peak"], last["peak"]),
                "counted": figures["counted"] + last["counted"],
            }
        elif "begun" in last:
            ends.append((FAULT, f"the process ended with {process.returncode}: {process.stderr[-400:]}"))
        else:
            raise RuntimeError(process.stderr)
    faults = [
        f"{case.role} {case.kind} {case.path!r}: expected {case.expected}, got {became} {text!r}"
        for case, (became, text) in zip(cases, ends, strict=True)
        if became == FAULT or (case.expected != EITHER and became != case.expected) or "weights_only" in text
    ]
    if (root / "pwned").exists():
        faults.append("code of a checkpoint ran")
    refused = sum(
        became == REFUSED for case, (became, _) in zip(cases, ends, strict=True) if case.role == "image"
    )
    if figures["counted"] != refused:
        faults.append(f"{refused} images are unreadable, counted were {figures['counted']}")
    return ends, faults, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", type=Path, help="for its own processes")
    given = parser.parse_args()
    if given.read:
        child([Case(*case) for case in json.loads(given.read.read_text())])
        return
    with tempfile.TemporaryDirectory() as name:
        cases = write_corpus(Path(name), given.files, given.seed)
        ends, faults, figures = run_corpus(Path(name), cases)
    print(f"{'role':12}{'files':>6}{'read':>6}{'refused':>8}{'faults':>7}")
    for role in ROLES:
        found = Counter(end for case, (end, _) in zip(cases, ends, strict=True) if case.role == role)
        print(f"{role:12}{found.total():6}{found[READ]:6}{found[REFUSED]:8}{found[FAULT]:7}")
    print(f"{len(cases)} files, {len(faults)} faults, at most {figures['peak'] / 1e9:.1f} GB")
    for fault in faults:
        print(fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
