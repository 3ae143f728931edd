"""Features of all views of an image set, by a tower that averages pixels."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import LABELLED, TEST, UNLABELLED, photos
from processes import run_together
from torch import nn
from torch.nn import functional as F

from ulfine_fast import augment, feature_cache
from ulfine_fast.augment import PIPELINES, build_pipeline, five_crops
from ulfine_fast.cache import CacheError
from ulfine_fast.checkpoint import digest_of, load_checkpoint
from ulfine_fast.distributed import process_group, world
from ulfine_fast.feature_cache import encoded_features
from ulfine_fast.image_data import ImageData
from ulfine_fast.image_folders import folder_data
from ulfine_fast.images import ImageArray, MachineError
from ulfine_fast.loader import ViewLoader
from ulfine_fast.towers import TextSide, Tower

SIZE, DIM = 32, 16
BLOCK = 8
NAMES = ("disc", "ring", "bar")
# images, in blocks of eight: 3 of labelled ones, 5 of unlabelled ones, 2 of test images
LABELLED_ROWS, UNLABELLED_ROWS, TESTED = 20, 37, 13
VIEWS = 2 * LABELLED_ROWS + 4 * UNLABELLED_ROWS + TESTED


class Pixels(nn.Module):
    """Means of 4 x 4 fields; counts what it encodes, and calls `before` first."""

    def __init__(self, before=lambda: None) -> None:
        super().__init__()
        self.encoded, self.before, self.scale = 0, before, 1.0

    def forward(self, images):
        self.before()
        self.encoded += len(images)
        return self.scale * F.avg_pool2d(images.mean(1), SIZE // 4).flatten(1)


def pixels(before=lambda: None, **options) -> Tower:
    def embed(texts, device):
        return torch.stack([torch.arange(float(DIM)) == len(text) for text in texts]).float()

    fields = {
        "name": "pixels",
        "dim": DIM,
        "size": SIZE,
        "patch": None,
        "mean": [100.0, 120.0, 140.0],
        "std": [50.0, 60.0, 70.0],
        "fingerprint": "pixels",
        "text": TextSide(embed, lambda texts: texts, ("{}",)),
    }
    return Tower(Pixels(before), **{**fields, **options})


def pictures(unlabelled: int = UNLABELLED_ROWS) -> ImageData:
    random = np.random.default_rng(0)
    # the last five labelled images are unlabelled ones too
    rows = np.arange(LABELLED_ROWS - 5, LABELLED_ROWS - 5 + unlabelled)
    train = random.integers(0, 256, (LABELLED_ROWS - 5 + UNLABELLED_ROWS, 20, 24, 3), dtype=np.uint8)
    test = random.integers(0, 256, (TESTED, 20, 24), dtype=np.uint8)
    return ImageData(
        train=ImageArray(train, "train"),
        labelled=np.arange(LABELLED_ROWS),
        labels=np.arange(LABELLED_ROWS) % 3,
        unlabelled=rows,
        unlabelled_truth=rows % 3,
        test=ImageArray(test, "test"),
        test_labels=np.arange(TESTED) % 3,
        class_names=NAMES,
    )


def build(folder, tower=None, data=None, pipeline="finessl", **options):
    options = {"workers": 0, "batch_size": 3, "progress": False, **options}
    pipeline = PIPELINES[pipeline] if isinstance(pipeline, str) else pipeline
    return encoded_features(tower or pixels(), data or pictures(), pipeline, cache_dir=folder, **options)


@pytest.fixture(autouse=True)
def _blocks(monkeypatch) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", BLOCK)


def blocks(folder: Path) -> dict[str, str]:
    """What is in each block, by its path in `folder`; the order of a file's metadata is left to chance."""
    found = {}
    for path in sorted(folder.glob("*/0*.safetensors")):
        tensors, record = load_checkpoint(path)
        found[str(path.relative_to(folder))] = digest_of(tensors, json.dumps(record))
    return found


def tensors(features) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(features).items() if isinstance(value, torch.Tensor)}


def assert_equal(one, other) -> None:
    assert list(tensors(one)) == list(tensors(other))
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, tensors(other)[name]), name


def by_hand(kind, copy, progress, pipeline, data, seed=0):
    """Features of the views that the loader of image training draws."""
    rows = data.labelled if kind == "labelled" else data.unlabelled
    with ViewLoader(
        data.train,
        PIPELINES[pipeline],
        labelled=data.labelled,
        unlabelled=data.unlabelled,
        size=SIZE,
        seed=seed,
        workers=0,
    ) as loader:
        views = loader.submit(kind, rows, step=copy, slots=rows, progress=progress).result()
    return pixels()(views.images)


@pytest.mark.parametrize("pipeline", ["finessl", "lift_plus", "loft"])
def test_features_are_those_of_the_views_of_image_training(tmp_path, pipeline):
    data = pictures()
    features = build(tmp_path, data=data, pipeline=pipeline, weak_copies=3, strong_copies=1, seed=5)
    for copy, progress in enumerate((1 / 2, 1 / 4, 3 / 4)):
        for name in ("labelled", "weak", "strong")[: 2 if copy else 3]:
            expected = by_hand(name, copy, progress, pipeline, data, seed=5)
            torch.testing.assert_close(
                getattr(features, name)[copy], F.normalize(expected), atol=5e-4, rtol=0
            )
    assert features.weak.shape == (3, UNLABELLED_ROWS, DIM)
    assert features.strong.shape == (1, UNLABELLED_ROWS, DIM)
    assert features.centre is None
    assert features.labels.tolist() == data.labels.tolist()
    assert features.labelled_counts.tolist() == data.labelled_counts.tolist()
    assert features.unlabelled_counts.tolist() == data.unlabelled_counts.tolist()
    assert features.unlabelled_is_labelled.tolist() == [True] * 5 + [False] * 32
    assert torch.equal(features.prototypes, pixels().text_prototypes(NAMES))
    assert features.class_names == NAMES


@pytest.mark.parametrize("crops", ["single", "five"])
def test_plain_views_of_a_test_image_are_those_of_evaluation(tmp_path, crops):
    data = replace(pictures(), validation=pictures().test, validation_labels=pictures().test_labels)
    features = build(tmp_path, data=data, crops=crops)
    views = {"single": partial(augment.test_views, pipeline=PIPELINES["finessl"]), "five": five_crops}[crops]
    for place in range(TESTED):
        expected = pixels()(views(data.test.read(place), size=SIZE))
        torch.testing.assert_close(features.test[place], F.normalize(expected), atol=5e-4, rtol=0)
    assert torch.equal(features.test, features.validation)
    assert torch.equal(features.test_labels, features.validation_labels)


def test_a_centred_tower_gets_the_mean_of_all_training_images_subtracted(tmp_path):
    data = pictures()
    tower = pixels(centred=True)
    features = build(tmp_path, tower, data)
    copies = [
        # a labelled image that is an unlabelled one too counts once
        [by_hand("labelled", copy, 0, "finessl", data)[:-5], by_hand("weak", copy, 0, "finessl", data)]
        for copy in range(2)
    ]
    mean = torch.cat([rows for copy in copies for rows in copy]).mean(0)
    torch.testing.assert_close(features.centre, mean, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(features.weak[1], F.normalize(copies[1][1] - mean), atol=5e-3, rtol=0)
    assert not tower.centre.any()
    tower.centre += features.centre
    for place in range(TESTED):
        expected = tower(augment.test_views(data.test.read(place), PIPELINES["finessl"], SIZE))
        torch.testing.assert_close(features.test[place], F.normalize(expected), atol=5e-3, rtol=0)
    # what is kept does not depend on the centre
    again = pixels()
    plain = build(tmp_path, again, data)
    assert again.network.encoded == 0
    torch.testing.assert_close(plain.weak[1], F.normalize(copies[1][1]), atol=5e-4, rtol=0)


def test_class_means_take_the_place_of_text(tmp_path):
    features = build(tmp_path, pixels(text=None))
    for k in range(3):
        mean = features.labelled[:, features.labels == k].sum((0, 1))
        torch.testing.assert_close(features.prototypes[k], F.normalize(mean, dim=0))


def test_a_second_run_reads_whatever_its_workers_and_batches(tmp_path):
    first, kept = build(tmp_path), blocks(tmp_path)
    for options in ({}, {"workers": 2}, {"batch_size": 7}, {"batch_size": 100}):
        tower = pixels()
        assert_equal(build(tmp_path, tower, **options), first)
        assert tower.network.encoded == 0
    assert blocks(tmp_path) == kept
    tower = pixels()
    assert_equal(build(tmp_path, tower, refresh=True), first)
    assert tower.network.encoded == VIEWS
    assert blocks(tmp_path) == kept


def other_pixels(data):
    images = np.array([np.asarray(data.train.read(row)) for row in range(len(data.train))])
    images[0, 0, 0, 0] ^= 1
    return replace(data, train=ImageArray(images, "train"))


ALL_RANDOM = 2 * LABELLED_ROWS + 4 * UNLABELLED_ROWS


@pytest.mark.parametrize(
    ("changed", "encoded"),
    [
        ({"seed": 1}, ALL_RANDOM),
        ({"precision": "bf16"}, VIEWS),
        ({"crops": "five"}, 5 * TESTED),
        ({"weak_copies": 3}, LABELLED_ROWS + UNLABELLED_ROWS),
        ({"strong_copies": 4}, 2 * UNLABELLED_ROWS),
        ({"weak_copies": 1, "strong_copies": 0}, 0),
        ({"pipeline": "small"}, VIEWS),
        ({"pipeline": build_pipeline("finessl", cutout_px=4)}, 2 * UNLABELLED_ROWS),
        ({"pipeline": build_pipeline("finessl", cutout_ratio=0.5)}, 0),
        ({"pipeline": replace(PIPELINES["finessl"], flip=False)}, ALL_RANDOM),
        ({"pipeline": replace(PIPELINES["finessl"], test=PIPELINES["lift"].test)}, TESTED),
        ({"pipeline": replace(PIPELINES["finessl"], resampling=PIPELINES["lift_plus"].resampling)}, VIEWS),
        ({"tower": pixels(fingerprint="other")}, VIEWS),
        ({"tower": pixels(text=None, centred=True)}, 0),
        ({"data": pictures(unlabelled=30)}, 4 * 30),
        ({"data": other_pixels(pictures())}, 2 * LABELLED_ROWS),
        ({"data": replace(pictures(), class_names=("a", "b", "c"))}, 0),
        ({"data": replace(pictures(), labels=np.zeros(LABELLED_ROWS, np.int64))}, 0),
        ({"templates": ["a {}"]}, 0),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_changes_the_features_is_encoded_and_nothing_else(tmp_path, changed, encoded):
    first = build(tmp_path)
    tower = changed.get("tower", pixels())
    tower.network.encoded = 0
    features = build(tmp_path, **{**changed, "tower": tower})
    assert tower.network.encoded == encoded
    if "weak_copies" in changed:
        assert torch.equal(features.weak[:1], first.weak[:1])
    # what was there before is still there
    again = pixels()
    build(tmp_path, again)
    assert again.network.encoded == 0


@pytest.fixture
def folder(tmp_path):
    return photos(tmp_path / "photos")


def of_folder(folder):
    return folder_data(folder / "labelled", folder / "unlabelled", folder / "test")


def test_a_changed_file_is_encoded_and_a_moved_folder_is_not(tmp_path, folder):
    build(tmp_path / "cache", data=of_folder(folder))
    tower = pixels()
    moved = folder.rename(tmp_path / "moved")
    build(tmp_path / "cache", tower, of_folder(moved))
    assert tower.network.encoded == 0
    path = moved / "test" / "tree" / "0.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    build(tmp_path / "cache", tower, of_folder(moved))
    assert tower.network.encoded == 3 * TEST + 2
    path.chmod(0o000)
    if not os.access(path, os.R_OK):
        build(tmp_path / "cache", tower, of_folder(moved))
        path.chmod(0o600)
        assert len(build(tmp_path / "cache", tower, of_folder(moved)).test) == 3 * TEST
    (moved / "unlabelled" / "tree-0.png").rename(moved / "unlabelled" / "zebra.png")
    tower = pixels()
    build(tmp_path / "cache", tower, of_folder(moved))
    assert tower.network.encoded == 4 * (3 * UNLABELLED + 1)


def test_unreadable_images_are_left_out_and_told_by_every_run(tmp_path, folder):
    reports = []
    for _ in range(2):
        data = of_folder(folder)
        features = build(tmp_path / "cache", data=data)
        reports.append(data.report.record()["unreadable"])
        assert features.labelled.shape == (2, sum(LABELLED), DIM)
        assert features.labelled_counts.tolist() == list(LABELLED)
        assert features.labels.tolist() == np.repeat(range(3), LABELLED).tolist()
        assert features.weak.shape == features.strong.shape == (2, 3 * UNLABELLED, DIM)
        assert features.unlabelled_truth.tolist() == [-1] * (3 * UNLABELLED)
        assert features.unlabelled_counts is None
        assert features.test.shape == (3 * TEST, 1, DIM)
        assert features.test_labels.tolist() == np.repeat(range(3), TEST).tolist()
        images = features.images
        assert (len(images.labelled), len(images.unlabelled), len(images.test)) == (
            sum(LABELLED),
            3 * UNLABELLED,
            3 * TEST,
        )
        for place in range(3 * TEST):
            expected = pixels()(augment.test_views(images.test.read(place), PIPELINES["finessl"], SIZE))
            torch.testing.assert_close(features.test[place], F.normalize(expected), atol=5e-4, rtol=0)
    assert reports[0] == reports[1]
    assert sum(map(len, reports[0].values())) == 4


def test_a_part_without_a_readable_image_is_an_error(tmp_path, folder):
    for path in (folder / "unlabelled").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(
        ValueError,
        match="unlabelled images must be readable, at least one of them, got 19 unreadable: .*broken.png",
    ):
        build(tmp_path / "cache", data=of_folder(folder))


def test_an_error_of_the_machine_is_not_kept(tmp_path, monkeypatch):
    data, read = pictures(), ImageArray.read

    def failing(source, index, at_least=None):
        if index == 30:
            raise MachineError("no memory")
        return read(source, index, at_least)

    with monkeypatch.context() as patched:
        patched.setattr(ImageArray, "read", failing)
        with pytest.raises(MachineError, match="no memory"):
            build(tmp_path, data=data)
    tower = pixels()
    assert_equal(build(tmp_path, tower), build(tmp_path / "other"))
    # labelled views and what of the first weak copy comes before it, without the block that was not reached
    assert tower.network.encoded == VIEWS - 2 * LABELLED_ROWS - BLOCK


class Stop(BaseException):
    pass


@pytest.mark.parametrize("calls", np.random.default_rng(7).integers(1, 80, 6).tolist())
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, calls):
    def before() -> None:
        nonlocal calls
        calls -= 1
        if not calls:
            raise Stop

    tower = pixels(before)
    with pytest.raises(Stop):
        build(tmp_path / "stopped", tower, workers=2)
    kept = blocks(tmp_path / "stopped")
    rest = pixels()
    features = build(tmp_path / "stopped", rest)
    assert_equal(features, build(tmp_path / "whole"))
    assert blocks(tmp_path / "stopped") == blocks(tmp_path / "whole")
    assert kept.items() <= blocks(tmp_path / "whole").items()
    # what was encoded twice is a part of one block
    assert tower.network.encoded + rest.network.encoded - VIEWS < BLOCK


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-P", "-W", "error", __file__, "kill", str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    found = len(list((tmp_path / "killed").glob("*/0*.safetensors")))
    assert found > 5
    tower = pixels()
    assert_equal(build(tmp_path / "killed", tower), build(tmp_path / "whole"))
    assert tower.network.encoded >= VIEWS - found * BLOCK
    assert blocks(tmp_path / "killed") == blocks(tmp_path / "whole")


def test_two_processes_encode_what_one_does(tmp_path):
    build(tmp_path / "one")
    script = Path(__file__).read_text()
    ended = run_together(script, 2, "together", str(tmp_path / "two"), folder=tmp_path)
    assert [process.code for process in ended] == [0, 0], ended[0].error + ended[1].error
    digests, encoded = zip(*(process.out.split() for process in ended), strict=True)
    assert digests[0] == digests[1] == digest_of(tensors(build(tmp_path / "one")))
    assert blocks(tmp_path / "two") == blocks(tmp_path / "one")
    assert sum(map(int, encoded)) == VIEWS
    assert abs(int(encoded[0]) - int(encoded[1])) < VIEWS / 5


def test_processes_without_a_folder_in_common_are_told(tmp_path):
    script = Path(__file__).read_text()
    ended = run_together(script, 2, "apart", str(tmp_path), folder=tmp_path)
    for process in ended:
        assert "CacheError" in process.error
        assert "expected what the other processes encoded, got no block" in process.error


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:-10],
        lambda content: b"",
        lambda content: b"\0" * len(content),
    ],
    ids=["a bit", "truncated", "empty", "zeros"],
)
def test_a_damaged_block_is_encoded_again(tmp_path, caplog, damage):
    first, kept = build(tmp_path), blocks(tmp_path)
    path = tmp_path / next(name for name in kept if name.endswith("000001.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    tower = pixels()
    assert_equal(build(tmp_path, tower), first)
    assert 0 < tower.network.encoded <= BLOCK
    assert blocks(tmp_path) == kept
    assert f"{path}: damaged checkpoint" in caplog.text
    assert "these images are encoded again" in caplog.text


def test_a_block_in_the_place_of_another_is_encoded_again(tmp_path):
    first = build(tmp_path)
    folders = [path for path in tmp_path.iterdir() if len(list(path.iterdir())) == 5]
    shutil.copy(folders[0] / "000001.safetensors", folders[0] / "000002.safetensors")
    shutil.copy(folders[1] / "000003.safetensors", folders[0] / "000003.safetensors")
    tower = pixels()
    assert_equal(build(tmp_path, tower), first)
    assert tower.network.encoded == 2 * BLOCK


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path):
    build(tmp_path)
    entry = next(tmp_path.iterdir())
    (entry / "000000.safetensors").unlink()
    old, young = entry / ".000001.00.safetensors", entry / ".000001.01.safetensors"
    for path, age in ((old, 2 * 24 * 3600), (young, 60)):
        path.write_bytes(b"")
        os.utime(path, (time.time() - age,) * 2)
    build(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_disk_without_room_is_told_before_any_work(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("ulfine_fast.feature_cache.shutil.disk_usage", lambda _: free)
    tower = pixels()
    with pytest.raises(
        CacheError, match=r"expected room for 0.0 MB, got 0.0 MB free; free some or set ULFINE_CACHE"
    ):
        build(tmp_path, tower)
    assert tower.network.encoded == 0


def test_a_disk_that_fills_up_keeps_what_was_written(tmp_path, monkeypatch):
    save, left = feature_cache.save_checkpoint, iter(range(4))

    def full(path, *arguments):
        if next(left, None) is None:
            raise OSError(f"{path}: expected to write it, got: No space left on device")
        save(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(feature_cache, "save_checkpoint", full)
        with pytest.raises(CacheError, match="No space left on device; make room, or set ULFINE_CACHE"):
            build(tmp_path)
    tower = pixels()
    build(tmp_path, tower)
    assert tower.network.encoded < VIEWS - 3 * BLOCK


def test_a_folder_must_be_one(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match="file"):
        build(tmp_path / "file")


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path, capsys, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(feature_cache, "_LINE_SECONDS", 0.0)
    build(tmp_path / "lines", progress=True)
    assert f"encoding: 3 of {VIEWS} views, about " in caplog.text
    assert f"encoding: {VIEWS} of {VIEWS} views, about 00:00 to go" in caplog.text
    caplog.clear()
    build(tmp_path / "lines", progress=True)
    build(tmp_path / "quiet", progress=False)
    assert caplog.text == capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    build(tmp_path / "terminal", progress=True)
    shown = capsys.readouterr().err
    assert "encoding:" in shown
    assert f"/{VIEWS}" in shown
    assert caplog.text == ""


def tuned():
    tower = pixels()
    tower.tuning = "lora"
    return tower


def centred():
    tower = pixels(centred=True)
    tower.centre += 1
    return tower


def large():
    tower = pixels()
    tower.network.scale = 1e6
    return tower


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weak_copies": 0}, "weak_copies must be >= 1, got 0"),
        ({"strong_copies": -1}, "strong_copies must be >= 0, got -1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"crops": "ten"}, "crops must be single or five, got 'ten'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"tower": tuned()}, "tower must be as it was loaded, got one that is tuned by lora"),
        ({"tower": centred()}, "tower must be as it was loaded, got one that is centred"),
        ({"tower": large()}, r"features must be finite in float16, got [\d.]+e\+0\d"),
    ],
)
def test_errors(tmp_path, changed, message):
    with pytest.raises(ValueError, match=f"encoded_features: {message}"):
        build(tmp_path, **changed)
    assert not list(tmp_path.glob("*/*"))


def test_without_unlabelled_images_only_labelled_ones_are_encoded(tmp_path):
    tower = pixels(centred=True)
    features = build(tmp_path, tower, pictures(unlabelled=0))
    assert tower.network.encoded == 2 * LABELLED_ROWS + TESTED
    assert features.weak.shape == (2, 0, DIM)
    torch.testing.assert_close(features.labelled.norm(dim=-1), torch.ones(2, LABELLED_ROWS))


def main(what: str, folder: str) -> None:
    torch.set_num_threads(1)
    feature_cache.BLOCK = BLOCK
    if what == "kill":
        # 3 of a batch, with the writer of blocks anywhere
        left = iter(range(40))
        build(folder, pixels(lambda: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL)))
    here = world()
    if what == "apart":
        folder = f"{folder}/{here.rank}"
    tower = pixels()
    with process_group(here, torch.device("cpu"), timeout=60):
        features = build(folder, tower, world=here)
    print(digest_of(tensors(features)), tower.network.encoded)


if __name__ == "__main__":
    main(*sys.argv[1:])
