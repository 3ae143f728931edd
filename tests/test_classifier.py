"""The Python face of a run: training, loading, and its classifier on images of all kinds."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import NAMES, TEST, photos
from PIL import Image
from safetensors.torch import load_file
from synthetic import small_data
from tiny_clip import tiny_clip
from torch.nn import functional as F
from typer.testing import CliRunner

import ulfine_fast as uf
from ulfine_fast.augment import build_pipeline
from ulfine_fast.build import load_images
from ulfine_fast.checkpoint import load_checkpoint
from ulfine_fast.cli import app
from ulfine_fast.feature_cache import encoded_features
from ulfine_fast.towers import load_tower

QUICK = {
    "steps": 4,
    "labelled_batch": 4,
    "unlabelled_batch": 8,
    "log_every": 2,
    "workers": 0,
    "progress": False,
}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def images(folder):
    return uf.Images(**{name: f"{folder}/{name}" for name in ("labelled", "unlabelled", "test")})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return uf.Encoder(model=tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))


@pytest.fixture(scope="module")
def run(images, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lora"
    return uf.train(images, encoder, tuning="lora", width=2, out=out, **QUICK)


@pytest.fixture(scope="module")
def paths(folder):
    return sorted(folder.glob("test/*/*.png"))


def test_a_loaded_run_is_the_one_that_was_trained(run, paths):
    loaded = uf.load_run(run.folder)
    assert loaded.configuration == json.loads(json.dumps(run.configuration))
    assert (loaded.metrics, loaded.history) == (run.metrics, run.history)
    assert loaded.steps == run.steps == 4
    # the checkpoint was not yet written
    assert loaded.seconds == pytest.approx(run.seconds, abs=1)
    assert loaded.labelled_counts.tolist() == run.labelled_counts.tolist()
    assert loaded.evaluate() == run.evaluate() == run.metrics
    assert loaded.evaluate("five") != run.metrics
    ours, theirs = (each.classifier.predict(paths) for each in (run, loaded))
    assert torch.equal(ours.confidence, theirs.confidence)


def test_predictions_are_those_that_the_run_wrote(run, paths, folder):
    found = run.classifier.predict(paths, batch_size=3, top=2)
    broken = {row for row, path in enumerate(paths) if path.stem == "broken"}
    assert set(found.unreadable) == broken
    assert all(reason.startswith("not an image in") for reason in found.unreadable.values())
    read = [row for row in range(len(paths)) if row not in broken]
    assert found.label[list(broken)].tolist() == [-1] * len(broken)
    assert [found.name[row] for row in broken] == [None] * len(broken)
    assert not found.confidence[list(broken)].any()
    truth = torch.arange(len(NAMES)).repeat_interleave(TEST)
    accuracy = (found.label[read] == truth).double().mean()
    assert accuracy.item() == pytest.approx(run.metrics["fused"]["overall"])
    assert run.classifier.class_names == NAMES
    assert [found.name[row] for row in read] == [NAMES[label] for label in found.label[read]]
    assert (found.top_confidence[read, 0] >= found.top_confidence[read, 1]).all()
    probabilities = run.classifier.logits(run.classifier.features(paths)[read]).softmax(-1)
    torch.testing.assert_close(found.top_confidence[read], probabilities.topk(2).values)


def test_an_image_is_the_same_as_a_path_a_picture_and_pixels(run, paths):
    good = [path for path in paths if path.stem != "broken"]
    pictures = [Image.open(path) for path in good]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    expected = run.classifier.features(map(str, good))
    assert expected.shape == (len(good), 1, run.classifier.student.tower.dim)
    for given in (good, pictures, pixels, pixels / 255, (pixels / 255).double()):
        torch.testing.assert_close(run.classifier.features(given, batch_size=5), expected)


def test_images_are_drawn_as_they_are_needed(run, paths):
    drawn = []
    size, good = 2, next(path for path in paths if path.stem != "broken")

    def endless():
        while True:
            drawn.append(good)
            yield good

    batches = run.classifier._encoded(endless(), size)
    next(batches)
    batches.close()
    assert len(drawn) <= 3 * size


def test_no_image_and_none_that_can_be_read(run, tmp_path):
    none = run.classifier.predict([], top=2)
    assert (none.label.shape, none.top_label.shape, none.name, none.unreadable) == ((0,), (0, 2), [], {})
    assert run.classifier.predict(torch.zeros(0, 3, 8, 8)).label.shape == (0,)
    closed = Image.new("RGB", (40, 40))
    closed.close()
    missing = run.classifier.predict([tmp_path / "none.png", closed])
    assert missing.label.tolist() == [-1, -1]
    assert missing.unreadable[0] == "No such file or directory"
    assert "closed" in missing.unreadable[1]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("cat.png", {}, "images must be several, got one: 'cat.png'"),
        ([3], {}, "images must be paths or PIL images, got int"),
        (
            torch.zeros(2, 3, 8),
            {},
            r"images must be uint8 or floating, \[n, 3, H, W\], .*, got float32 \[2, 3, 8\]",
        ),
        (torch.full((1, 3, 8, 8), 2.0), {}, r"floating images must be in \[0, 1\], got 2 to 2"),
        ([], {"top": 4}, r"top must be in 1\.\.3, got 4"),
        ([], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_images_that_do_not_fit(run, given, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run.classifier.predict(given, **options)


def test_features_that_do_not_fit(run):
    with pytest.raises(
        ValueError, match=r"features must be floating, \[n, 16\] or \[n, V, 16\], got int64 \[2, 16\]"
    ):
        run.classifier.logits(torch.zeros(2, 16, dtype=torch.int64))


@pytest.mark.parametrize(("method", "crops"), [("ulfine", "single"), ("acr", "five")])
def test_a_frozen_encoder_evaluates_as_it_was_trained(images, encoder, paths, method, crops, tmp_path):
    run = uf.train(images, encoder, method=method, tuning="none", crops=crops, out=tmp_path / "run", **QUICK)
    loaded = uf.load_run(tmp_path / "run")
    assert run.evaluate() == loaded.evaluate() == run.metrics
    found = loaded.classifier.predict(paths)
    read = [row for row in range(len(paths)) if row not in found.unreadable]
    truth = torch.arange(len(NAMES)).repeat_interleave(TEST)
    assert (found.label[read] == truth).double().mean() == pytest.approx(
        next(iter(run.metrics.values()))["overall"]
    )


def test_features_of_ones_own_need_no_encoder_and_no_folder():
    data = small_data()
    run = uf.train(data, method="lift", **{**QUICK, "steps": 30})
    assert (run.folder, run.configuration["images"]) == (None, {})
    assert run.evaluate() == run.metrics
    found = run.classifier.predict(data.test, top=2)
    assert (found.label == data.test_labels).double().mean() == pytest.approx(run.metrics["fused"]["overall"])
    same = run.classifier.predict(3 * data.test.numpy(), batch_size=7)
    assert torch.equal(same.label, found.label)


def test_features_in_memory_are_not_found_again(tmp_path):
    data = small_data()
    run = uf.train(data, out=tmp_path / "run", settings={"eta": 1.0}, **QUICK)
    loaded = uf.load_run(tmp_path / "run")
    assert loaded.metrics == run.metrics
    assert loaded.configuration["method"]["eta"] == 1.0
    with pytest.raises(ValueError, match="expected test images, got a run on features that were in memory"):
        loaded.evaluate()
    longer = uf.train(data, out=tmp_path / "run", settings={"eta": 1.0}, resume=True, **{**QUICK, "steps": 6})
    assert longer.steps == 6


def test_python_and_the_command_are_one(run, images, encoder, tmp_path):
    words = [f"--{name}={getattr(images, name)}" for name in ("labelled", "unlabelled", "test")]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items() if name != "progress"]
    words += ["--model", encoder.model, "--tuning=lora", "--width=2", "--device=cpu", f"--out={tmp_path}/run"]
    done = CliRunner().invoke(app, ["train", *words])
    assert done.exit_code == 0, done.output
    first, second = (
        load_checkpoint(f"{path}/checkpoint.safetensors")[0] for path in (run.folder, tmp_path / "run")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert uf.load_run(tmp_path / "run").configuration == json.loads(json.dumps(run.configuration))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        path.name for path in run.folder.iterdir()
    }


def test_a_run_stands_without_its_images(images, encoder, tmp_path):
    photos(tmp_path / "photos")
    places = {name: f"{tmp_path}/photos/{name}" for name in ("labelled", "unlabelled", "test")}
    run = uf.train(replace(images, **places), encoder, tuning="linear_probe", out=tmp_path / "run", **QUICK)
    with pytest.raises(FileExistsError, match="holds another run"):
        uf.train(images, encoder, method="lift", out=tmp_path / "run", **QUICK)
    shutil.move(tmp_path / "photos", tmp_path / "moved")
    loaded = uf.load_run(tmp_path / "run", at=[f"test={tmp_path}/moved/test"])
    assert loaded.evaluate() == run.metrics
    shutil.rmtree(tmp_path / "moved")
    loaded = uf.load_run(tmp_path / "run")
    loaded.classifier.export(tmp_path / "head.safetensors")
    weight = load_file(tmp_path / "head.safetensors")["weight"]
    features = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(loaded.classifier.logits(features), F.normalize(features, dim=1) @ weight.T)


def test_a_run_that_was_not_finished_has_no_metrics(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    loaded = uf.load_run(tmp_path / "run")
    assert (loaded.metrics, loaded.steps) == ({}, 4)
    (tmp_path / "run/checkpoint.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected checkpoint.safetensors, got none"):
        uf.load_run(tmp_path / "run")


def test_the_space_of_features_is_the_methods_unless_it_is_given(images, encoder):
    def space(method, **options):
        chosen = options.pop("space", None)
        run = uf.train(
            images, replace(encoder, space=chosen), method=method, **{**QUICK, "steps": 1}, **options
        )
        return run.configuration["encoder"]["space"]

    assert space("lift", tuning="linear_probe") == "visual"
    assert space("lift", tuning="linear_probe", space="joint") == space("lift", tuning="none") == "joint"
    assert space("ulfine", tuning="linear_probe") == "joint"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ulfin"}, "method must be one of .*, got 'ulfin'; did you mean ulfine"),
        ({"settings": {"muu": 1}}, "settings must be among the fields of ulfine: one of .*, got 'muu'"),
        ({"stepz": 3}, "training must be one of .*, got 'stepz'; did you mean steps"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"crops": "ten"}, "crops must be single or five, got 'ten'"),
        ({"resume": True}, "resume needs the folder of a run, out"),
        ({"tuning": "lora"}, "tuning must be none with features, got 'lora'"),
    ],
)
def test_choices_that_do_not_fit(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        uf.train(small_data(), **options)


def test_the_example_of_the_readme_runs(folder, encoder, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.partition("## From Python\n")[2].partition("\n## ")[0]
    assert section.count("\n") <= 25
    (example,) = re.findall(r"```python\n(.+?)```", section, re.DOTALL)
    # the model of the example is a download, and its steps take hours here
    given = {
        'model="ViT-B-16-quickgelu", pretrained="openai"': f"model={encoder.model!r}",
        "steps=1000": "steps=2",
    }
    for text, own in given.items():
        assert text in example
        example = example.replace(text, own)
    (tmp_path / "photos").symlink_to(folder)
    (tmp_path / "new").symlink_to(folder / "unlabelled")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "head.safetensors").exists()


def test_features_in_memory_that_know_their_images_are_evaluated(images, encoder):
    pipeline = build_pipeline("finessl")
    tower = load_tower(encoder.model)
    features = encoded_features(tower, load_images(images), pipeline, workers=0, progress=False)
    assert features.images is not None
    run = uf.train(features, **QUICK)
    assert run.evaluate() == run.metrics
