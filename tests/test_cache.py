"""The feature cache with an encoder that costs nothing. Run as a script, this file is the other process."""

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ulfine_fast import cache
from ulfine_fast.cache import CacheError, cached_features, default_cache_dir
from ulfine_fast.views import augment

IMAGES = np.random.RandomState(0).randint(0, 256, (20, 8, 8)).astype(np.uint8)


class PixelEncoder:
    """The first 16 pixels; `before` runs ahead of every batch."""

    dim = 16
    fingerprint = "pixels"

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before
        self.images = 0

    def encode_images(self, images: np.ndarray, *, size: int, invert: bool) -> torch.Tensor:
        self.before()
        self.images += len(images)
        pixels = torch.from_numpy(images.reshape(len(images), -1)[:, :16].astype(np.float32)) / 255
        return (1 - pixels if invert else pixels) + size


def build(cache_dir: Path, encoder: PixelEncoder | None = None, **changed: object) -> np.memmap:
    arguments = {"view": "weak", "copies": 2, "seed": 0, "size": 32, "batch_size": 7, "progress": False}
    return cached_features(encoder or PixelEncoder(), IMAGES, cache_dir=cache_dir, **{**arguments, **changed})


def entries(cache_dir: Path) -> list[Path]:
    return [path for path in cache_dir.iterdir() if not path.name.startswith(".")]


def temporaries(cache_dir: Path) -> list[Path]:
    return list(cache_dir.glob(".building-*"))


def start_blocked_build(cache_dir: Path) -> subprocess.Popen:
    """Another process in the middle of building the default entry, until it gets a line on its input."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(cache_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in the middle\n"
    return process


def test_features_are_those_of_the_views(tmp_path: Path) -> None:
    features = build(tmp_path, invert=True)
    assert isinstance(features, np.memmap)
    assert features.dtype == np.float16
    assert features.shape == (2, 20, 16)
    assert not features.flags.writeable
    for copy in range(2):
        views = augment(IMAGES, "weak", 0, copy=copy)
        expected = PixelEncoder().encode_images(views, size=32, invert=True).numpy().astype(np.float16)
        assert np.array_equal(features[copy], expected)
    assert {path.name for path in entries(tmp_path)[0].iterdir()} == {"features.npy", "meta.json"}


def test_a_second_run_reads(tmp_path: Path) -> None:
    first, encoder = build(tmp_path), PixelEncoder()
    assert np.array_equal(build(tmp_path, encoder, batch_size=3), first)
    assert encoder.images == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"copies": 1},
        {"view": "strong"},
        {"size": 64},
        {"invert": True},
        {"indices": np.arange(20) + 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_changes_the_features_changes_the_entry(changed: dict, tmp_path: Path) -> None:
    build(tmp_path)
    encoder = PixelEncoder()
    build(tmp_path, encoder, **changed)
    assert encoder.images > 0
    assert len(entries(tmp_path)) == 2


def test_other_images_and_encoders_have_other_entries(tmp_path: Path) -> None:
    build(tmp_path)
    other = PixelEncoder()
    other.fingerprint = "other"
    build(tmp_path, other)
    cached_features(PixelEncoder(), 255 - IMAGES, cache_dir=tmp_path, progress=False)
    assert len(entries(tmp_path)) == 3


def test_plain_ignores_the_seed_and_only_strong_heeds_the_square(tmp_path: Path) -> None:
    build(tmp_path, view="plain", copies=1)
    build(tmp_path, view="plain", copies=1, seed=5, indices=np.arange(20) + 3)
    assert len(entries(tmp_path)) == 1
    for view in ("weak", "strong"):
        for ratio in (0.25, 0.5):
            build(tmp_path, view=view, cutout_ratio=ratio)
    assert len(entries(tmp_path)) == 1 + 1 + 2


def test_the_index_selects_the_view_wherever_the_image_stands(tmp_path: Path) -> None:
    chosen = np.array([13, 2, 5])
    part = cached_features(
        PixelEncoder(),
        IMAGES[chosen],
        view="weak",
        copies=2,
        size=32,
        indices=chosen,
        cache_dir=tmp_path,
        progress=False,
    )
    assert np.array_equal(part, build(tmp_path)[:, chosen])


def flip_a_byte(entry: Path) -> None:
    content = bytearray((entry / "features.npy").read_bytes())
    content[-1] ^= 1
    (entry / "features.npy").write_bytes(content)


def truncate(entry: Path) -> None:
    (entry / "features.npy").write_bytes((entry / "features.npy").read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"features.npy: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}; delete the folder"),
        (truncate, r"features.npy: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}; delete the folder"),
        (
            lambda entry: (entry / "features.npy").unlink(),
            "features.npy: expected a readable file, got .*No such",
        ),
        (
            lambda entry: (entry / "meta.json").unlink(),
            "meta.json: expected a readable meta.json, got .*No such",
        ),
        (
            lambda entry: (entry / "meta.json").write_text("{"),
            "meta.json: expected a readable meta.json, got",
        ),
        (
            lambda entry: (entry / "meta.json").write_text("[]"),
            "meta.json: expected the description of this entry",
        ),
    ],
    ids=["byte", "truncated", "no features", "no meta", "meta not json", "other meta"],
)
def test_damage_is_told_and_refresh_mends_it(damage: Callable, message: str, tmp_path: Path) -> None:
    first = np.array(build(tmp_path))
    entry = entries(tmp_path)[0]
    damage(entry)
    with pytest.raises(CacheError, match=message) as raised:
        build(tmp_path)
    assert "refresh=True" in str(raised.value)
    assert str(entry) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert np.array_equal(build(tmp_path, refresh=True), first)
    assert np.array_equal(build(tmp_path), first)
    assert entries(tmp_path) == [entry]
    assert temporaries(tmp_path) == []


def test_full_disk_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = cache.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _path: free)
    encoder = PixelEncoder()
    with pytest.raises(
        CacheError, match=r"expected room for 0\.1 MB, got 0\.0 MB free \(No space left on device\)"
    ):
        build(tmp_path, encoder)
    assert encoder.images == 0
    assert entries(tmp_path) == temporaries(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(cache.os, "fsync", full)
        with pytest.raises(CacheError, match=r"No space left on device.*set ULFINE_CACHE to another folder"):
            build(tmp_path)
    assert entries(tmp_path) == temporaries(tmp_path) == []
    build(tmp_path)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(stop: type[BaseException], tmp_path: Path) -> None:
    encoder = PixelEncoder()

    def interrupt() -> None:
        if encoder.images:
            raise stop

    encoder.before = interrupt
    with pytest.raises(stop):
        build(tmp_path, encoder)
    assert entries(tmp_path) == temporaries(tmp_path) == []


def test_a_killed_run_leaves_no_entry_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    process = start_blocked_build(tmp_path)
    process.kill()
    process.communicate()
    assert entries(tmp_path) == []
    assert len(temporaries(tmp_path)) == 1
    encoder = PixelEncoder()
    build(tmp_path, encoder)
    assert encoder.images == 40
    assert temporaries(tmp_path) == []


def test_a_live_builder_is_left_alone(tmp_path: Path) -> None:
    process = start_blocked_build(tmp_path)
    theirs = temporaries(tmp_path)
    build(tmp_path, seed=1)
    assert temporaries(tmp_path) == theirs
    process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    assert temporaries(tmp_path) == []
    encoder = PixelEncoder()
    build(tmp_path, encoder)
    assert encoder.images == 0


def test_two_processes_build_the_same_entry(tmp_path: Path) -> None:
    processes = [start_blocked_build(tmp_path) for _ in range(2)]
    for process in processes:
        process.stdin.write("go on\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] == hashlib.sha256(build(tmp_path).tobytes()).hexdigest() + "\n"
    assert len(entries(tmp_path)) == 1
    assert temporaries(tmp_path) == []


def test_the_folder_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        CacheError, match=r"expected a writable folder, got .*; set ULFINE_CACHE to another folder"
    ):
        build(tmp_path / "file")


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ULFINE_CACHE", str(tmp_path / "named"))
    assert default_cache_dir() == tmp_path / "named"
    monkeypatch.delenv("ULFINE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "ulfine-fast"


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ULFINE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path / f"ulfine-fast-{os.getuid()}"


def test_a_user_without_a_home_has_a_folder_among_the_temporary_ones(no_home):
    assert default_cache_dir() == default_cache_dir() == no_home
    assert no_home.stat().st_mode & 0o777 == 0o700


def test_a_temporary_folder_of_another_user_is_no_cache(no_home, monkeypatch):
    no_home.mkdir()
    user = os.getuid()
    no_home.rename(no_home.with_name(f"ulfine-fast-{user + 1}"))
    monkeypatch.setattr("os.getuid", lambda: user + 1)
    with pytest.raises(CacheError, match="got one of another; set ULFINE_CACHE to a folder"):
        default_cache_dir()


def test_progress_names_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "piped", progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    build(tmp_path / "terminal", progress=True)
    shown = capsys.readouterr().err
    assert "encoding weak views: 100%" in shown
    assert "40/40" in shown
    assert "images/s" in shown


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"copies": 0}, "copies must be >= 1, and 1 for the plain view, got 0 of weak"),
        ({"view": "plain"}, "copies must be >= 1, and 1 for the plain view, got 2 of plain"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"view": "loud"}, "view must be one of plain, weak, strong, got 'loud'"),
        ({"indices": np.arange(3)}, "expected 20 indices, got 3"),
    ],
)
def test_argument_errors_write_nothing(changed: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changed)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_breaks_its_contract(tmp_path: Path) -> None:
    wide = PixelEncoder()
    wide.dim = 17
    with pytest.raises(ValueError, match=r"expected features of shape \(7, 17\), got \(7, 16\)"):
        build(tmp_path, wide)
    with pytest.raises(ValueError, match=r"expected features within float16, got 1e\+05"):
        build(tmp_path, size=100_000)
    with pytest.raises(ValueError, match="expected at least one image, got 0"):
        cached_features(PixelEncoder(), IMAGES[:0], cache_dir=tmp_path)
    assert entries(tmp_path) == temporaries(tmp_path) == []


def pause_in_the_middle() -> Callable[[], None]:
    batches = iter(range(1000))

    def pause() -> None:
        if next(batches) == 3:
            sys.stdout.write("in the middle\n")
            sys.stdout.flush()
            sys.stdin.readline()

    return pause


if __name__ == "__main__":
    built = build(Path(sys.argv[1]), PixelEncoder(pause_in_the_middle()))
    sys.stdout.write(hashlib.sha256(built.tobytes()).hexdigest() + "\n")
