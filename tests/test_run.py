"""Runs from their configuration to their metrics, on a CLIP of a few thousand weights."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from photos import LABELLED, NAMES, TEST, UNLABELLED, photos
from safetensors import safe_open
from safetensors.torch import save_file
from synthetic import small_data
from tiny_clip import tiny_clip
from torch.nn import functional as F

from ulfine_fast import build, towers
from ulfine_fast import run as run_module
from ulfine_fast.augment import build_pipeline, five_crops
from ulfine_fast.batches import FeatureViews, ImageViews
from ulfine_fast.build import Builder, class_rows, load_images
from ulfine_fast.checkpoint import CheckpointError, load_checkpoint
from ulfine_fast.classifier import stored_run
from ulfine_fast.config import PRESETS, Encoder, Images, Training
from ulfine_fast.evaluation import metrics, predict
from ulfine_fast.images import ReadReport
from ulfine_fast.learners import LEARNERS
from ulfine_fast.towers import load_tower
from ulfine_fast.tuning import TUNINGS
from ulfine_fast.validation import ETAS

CPU = torch.device("cpu")
STEPS = 3
# of modules: a single unit that is never active would learn nothing
WIDTH = 4
WITHOUT_WIDTH = ("none", "linear_probe", "full", "partial", "bitfit", "ln_tune", "ssf")


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def images(folder):
    return Images(labelled=f"{folder}/labelled", unlabelled=f"{folder}/unlabelled", test=f"{folder}/test")


class Run:
    """A run of a preset with what it began from; `options` are fields of `Training`."""

    def __init__(self, images, encoder, preset="ulfine", method=None, **options):
        sizes = {"labelled_batch": 4, "unlabelled_batch": 8, "log_every": 1, "learning_rate": 0.1}
        self.preset = PRESETS[preset]
        steps = self.preset.training.get("steps", STEPS)
        training = Training(**{**self.preset.training, **sizes, "steps": steps, **options})
        self.training = replace(training, width=None if training.tuning in WITHOUT_WIDTH else WIDTH)
        self.method = method or LEARNERS[self.preset.learner]
        self.encoder = encoder
        self.images = images
        self.name = preset

    @property
    def configuration(self):
        return {
            "images": vars(self.images),
            "encoder": vars(self.encoder),
            "name": self.name,
            "method": vars(self.method),
            "training": vars(self.training),
            "crops": self.preset.crops,
        }

    @property
    def builder(self):
        return Builder(self.encoder, self.method, self.training, CPU, workers=0, progress=False)

    @property
    def reader(self):
        return self.builder._reader(self.builder.tower(), ReadReport())

    def start(self):
        with self.builder.setup(load_images(self.images)) as setup:
            return setup.student

    def __call__(self, run_dir=None, data=None, **options):
        options = {"crops": self.preset.crops, "workers": 0, "checkpoint_every": 2, **options}
        data = data or load_images(self.images)
        return run_module.run(data, self.encoder, self.method, self.training, run_dir=run_dir, **options)

    def report(self, run_dir):
        """Run and write what the command writes; the outcome, and metrics.json."""
        data = load_images(self.images)
        outcome = self(run_dir, data)
        run_module.write_run(run_dir, self.configuration, data, outcome)
        return outcome, json.loads((run_dir / "metrics.json").read_text())


def evaluate_run(run_dir, configuration):
    """Steps and metrics of the run in a folder, and what was said of its test images."""
    run, report = stored_run(run_dir, configuration), ReadReport()
    return run.steps, run.evaluate(report=report), report.summary()


def export_run(run_dir, configuration, path):
    stored_run(run_dir, configuration).classifier.export(path)


def readable(outcome, data):
    """Rows of the test images that could be read."""
    names = [data.test.name(row) for row in range(len(data.test))]
    return [names.index(name) for name in outcome.test.names]


def check_training(run):
    before = dict(run.start().named_parameters())
    outcome = run()
    after = dict(outcome.student.named_parameters())
    assert list(before) == list(after)
    assert [record["step"] for record in outcome.training.history] == list(range(1, STEPS + 1))
    assert all(math.isfinite(record["loss"]) for record in outcome.training.history)
    assert outcome.training.skipped == 0
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, p in after.items() if p.requires_grad}
    assert changed <= trained
    return outcome, changed, trained


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "zero_shot"])
def test_every_preset_trains_its_part_of_the_encoder_and_its_heads(images, clip, preset):
    space = PRESETS[preset].space
    run = Run(images, Encoder(model=clip, space=space), preset)
    outcome, changed, trained = check_training(run)
    of_tower = {name for name in trained if name.startswith("tower.")}
    assert bool(of_tower) == (run.training.tuning not in ("none", "linear_probe"))
    assert of_tower <= changed
    assert any(name.startswith("learner.") for name in changed)
    history = outcome.training.history
    assert all(("pseudo_labels" in record) == outcome.student.learner.semi for record in history)
    # of the test images that can be read
    assert len(outcome.test.labels) == len(NAMES) * TEST
    for found in outcome.metrics.values():
        assert 0 <= found["overall"] <= 1
        assert len(found["per_class"]) == len(NAMES)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_changes_all_that_it_trains(images, clip, tuning):
    blocks = 1 if tuning == "partial" else None
    _, changed, trained = check_training(Run(images, Encoder(model=clip), tuning=tuning, blocks=blocks))
    assert {name for name in trained if name.startswith("tower.")} <= changed


@pytest.fixture
def embedded(monkeypatch):
    """Texts have embeddings without the weights of their extra."""

    def embed(texts):
        return F.normalize(torch.randn(len(texts), 384, generator=torch.Generator().manual_seed(0)), dim=1)

    monkeypatch.setattr(towers, "text_embeddings", embed)


@pytest.mark.usefixtures("embedded")
def test_the_offline_encoder_is_centred_on_the_training_images(images):
    run = Run(images, Encoder(size=32))
    outcome, changed, _ = check_training(run)
    start = run.start().tower
    data = load_images(images)
    features, readable = run.reader.features(load_tower(size=32), data.train, np.arange(len(data.train)))
    centre = features[readable].mean((0, 1))
    assert torch.allclose(start.centre, centre, atol=1e-6)
    assert torch.equal(outcome.student.tower.centre, start.centre)
    assert any(name.startswith("tower.") for name in changed)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A small network without text, its weights in a file."""
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return Encoder(model="timm:test_vit", pretrained=str(path), size=160)


def test_without_a_text_tower_prototypes_are_class_means(images, backbone):
    run = Run(images, backbone, "lift")
    check_training(run)
    data = load_images(images)
    tower = load_tower(backbone.model, backbone.pretrained, size=backbone.size)
    features, readable = run.reader.features(tower, data.train, data.labelled)
    rows, labels = F.normalize(features[readable, 0], dim=-1), data.labels[readable]
    means = torch.stack([rows[labels == k].mean(0) for k in range(len(NAMES))])
    assert torch.allclose(run.start().learner.head.linear, F.normalize(means, dim=-1), atol=1e-6)


def test_zero_shot_predicts_from_the_text(images, clip, tmp_path):
    run = Run(images, Encoder(model=clip), "zero_shot")
    outcome = run(tmp_path / "run")
    tower = load_tower(clip)
    data = load_images(images)
    features, readable = run.reader.features(tower, data.test, np.arange(len(data.test)))
    rows = F.normalize(features[readable, 0], dim=-1)
    expected = (rows @ tower.text_prototypes(data.class_names).T).argmax(1)
    assert torch.equal(outcome.predictions["fused"].label, expected)
    assert (outcome.training.steps, outcome.training.history) == (0, [])
    steps, metrics, _ = evaluate_run(tmp_path / "run", run.configuration)
    assert (steps, metrics) == (0, outcome.metrics)


def test_zero_shot_takes_no_step(images, clip):
    with pytest.raises(ValueError, match="steps must be 0 for a method that is not trained, got 2"):
        Run(images, Encoder(model=clip), "zero_shot", steps=2)()


@pytest.mark.parametrize("preset", ["lift_plus", "acr"])
def test_five_crops_are_the_mean_of_logits(images, clip, preset):
    run = Run(images, Encoder(model=clip), preset)
    outcome = run(crops="five")
    data, student = load_images(images), outcome.student
    pipeline = build_pipeline(run.training.pipeline)
    crops = partial(five_crops, size=student.tower.size, patch=8, resampling=pipeline.resampling)
    pictures = [data.test.read(row) for row in readable(outcome, data)]
    with torch.no_grad():
        logits = [student.learner.logits(student.tower(crops(picture))).mean(0) for picture in pictures]
    confidence, label = torch.stack(logits).softmax(-1).max(-1)
    found = next(iter(outcome.predictions.values()))
    assert torch.equal(found.label, label)
    assert torch.allclose(found.confidence, confidence, atol=1e-6)
    single = run.builder.test_set(student, data.test, data.test_labels, ReadReport())
    one_view = metrics(predict(student.learner, single.features), single.labels, data.labelled_counts)
    assert one_view != outcome.metrics


@pytest.mark.parametrize(
    ("preset", "ema"), [("ulfine", 0.0), ("ulfine", 0.9), ("acr", 0.9), ("ccl", 0.0), ("lift_plus", 0.9)]
)
def test_evaluation_gives_the_metrics_of_the_run(images, clip, tmp_path, preset, ema):
    run = Run(images, Encoder(model=clip), preset, ema=ema)
    outcome = run(tmp_path)
    steps, metrics, reading = evaluate_run(tmp_path, run.configuration)
    assert steps == STEPS
    assert metrics == outcome.metrics
    assert reading.startswith("unreadable images: 2 not an image in JPEG")


@pytest.mark.parametrize(("preset", "crops"), [("ulfine", "single"), ("acr", "five")])
def test_evaluation_of_a_frozen_encoder_gives_the_metrics_of_the_run(images, clip, tmp_path, preset, crops):
    run = Run(images, Encoder(model=clip), preset, tuning="none")
    outcome = run(tmp_path, crops=crops)
    steps, found, reading = evaluate_run(tmp_path, run.configuration | {"crops": crops})
    assert (steps, found) == (STEPS, outcome.metrics)
    assert "2 not an image in JPEG" in reading


def test_a_frozen_encoder_is_the_same_with_views_that_are_encoded_once_or_anew(images, clip):
    """Without a step: the first prototypes, and what the text makes of the test images."""
    once, anew = (Run(images, Encoder(model=clip), "zero_shot", tuning=t)() for t in ("none", "linear_probe"))
    assert once.metrics["fused"]["overall"] == anew.metrics["fused"]["overall"]
    heads = [outcome.student.learner.head.state_dict() for outcome in (once, anew)]
    for name, tensor in heads[0].items():
        torch.testing.assert_close(tensor, heads[1][name], msg=name)


@pytest.mark.usefixtures("embedded")
def test_features_of_a_centred_tower_are_those_of_further_images(images):
    run = Run(images, Encoder(size=32), tuning="none")
    outcome = run()
    data, student = load_images(images), outcome.student
    assert student.tower.centre.any()
    views = [run.reader.views(data.test.read(row))[0] for row in readable(outcome, data)]
    with torch.no_grad():
        rows = F.normalize(student.tower(torch.stack(views)), dim=-1)
    torch.testing.assert_close(outcome.test.features[:, 0], rows, atol=2e-3, rtol=0)


def test_a_method_that_reads_no_unlabelled_image_encodes_none(images, clip):
    run = Run(images, Encoder(model=clip), "lift", tuning="none")
    with run.builder.setup(load_images(images)) as setup:
        assert len(setup.views.unlabelled_truth) == 0
    assert Run(images, Encoder(model=clip), "lift", tuning="none")().training.steps == STEPS


def test_features_of_ones_own_train_without_an_encoder(tmp_path):
    data = small_data()
    np.savez(
        tmp_path / "mine.npz",
        **{name: getattr(data, name).numpy() for name in ("labelled", "labels", "weak", "strong", "test")},
        test_labels=data.test_labels.numpy(),
        prototypes=data.prototypes.numpy(),
    )
    images = Images(features=f"{tmp_path}/mine.npz")
    run = Run(images, Encoder(), tuning="none", steps=30)
    outcome, _ = run.report(tmp_path / "run")
    assert outcome.metrics["fused"]["overall"] > 0.8
    assert evaluate_run(tmp_path / "run", run.configuration)[1] == outcome.metrics
    assert {path.name for path in (tmp_path / "run").glob("*.png")} >= {"pseudo_labels.png"}
    export_run(tmp_path / "run", run.configuration, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="tuning must be none with features, got 'lora'"):
        Run(images, Encoder(), tuning="lora")()


def test_a_frozen_run_that_was_cut_goes_on_bit_by_bit(images, clip, tmp_path, monkeypatch):
    run = Run(images, Encoder(model=clip), "daso", tuning="none", steps=6)
    whole = run(tmp_path / "whole")
    batch = FeatureViews.batch

    def stop(self, step, *slots):
        if step == 5:
            raise KeyboardInterrupt
        return batch(self, step, *slots)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureViews, "batch", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    assert run(tmp_path / "cut", resume=True).digest == whole.digest


def test_a_run_from_random_weights_is_evaluated_with_them(images, tmp_path):
    run = Run(images, Encoder(model="timm:test_vit", size=32), "lift", tuning="full", seed=5)
    outcome = run(tmp_path)
    torch.rand(1)
    assert evaluate_run(tmp_path, run.configuration)[1] == outcome.metrics


def test_mean_weights_are_what_is_evaluated(images, clip):
    plain, averaged = (Run(images, Encoder(model=clip), ema=ema)() for ema in (0.0, 0.9))
    assert plain.training.history[-1]["loss"] == averaged.training.history[-1]["loss"]
    assert plain.digest != averaged.digest


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("encoder", ["clip", "lite0"])
def test_an_exported_head_gives_the_logits(images, clip, tmp_path, encoder):
    run = Run(images, Encoder(model=clip) if encoder == "clip" else Encoder(size=32))
    outcome = run(tmp_path / "run")
    export_run(tmp_path / "run", run.configuration, tmp_path / "head.safetensors")
    with safe_open(tmp_path / "head.safetensors", framework="pt") as file:
        head = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        assert json.loads(file.metadata()["class_names"]) == list(NAMES)
    student, data = outcome.student, load_images(images)
    raw = torch.stack([run.reader.views(data.test.read(row))[0] for row in readable(outcome, data)])
    with torch.no_grad():
        features = student.tower(raw) + student.tower.centre
        if encoder == "clip":
            assert set(head) == {"weight"}
        rows = F.normalize(features - head.get("centre", 0.0), dim=-1)
        assert torch.allclose(rows @ head["weight"].T, student.learner.logits(student.tower(raw)), atol=1e-5)


def test_a_head_that_is_no_layer_is_not_exported(images, clip, tmp_path):
    run = Run(images, Encoder(model=clip), "ccl")
    run(tmp_path / "run")
    with pytest.raises(ValueError, match="must be one linear map of the unit feature, got Ccl"):
        export_run(tmp_path / "run", run.configuration, tmp_path / "head.safetensors")
    assert not (tmp_path / "head.safetensors").exists()


def test_ulfine_plus_keeps_the_eta_that_it_chose(images, clip, tmp_path, monkeypatch):
    run = Run(images, Encoder(model=clip), "ulfine_plus")
    whole, record = run.report(tmp_path / "whole")
    eta = record["eta"]
    assert eta in ETAS
    assert eta == whole.student.learner.head.eta
    assert load_checkpoint(tmp_path / "whole/checkpoint.safetensors")[1]["eta"] == eta
    assert evaluate_run(tmp_path / "whole", run.configuration)[1] == whole.metrics

    step = ImageViews.labelled

    def stop(self, number, slots):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number, slots)

    with monkeypatch.context() as patch:
        patch.setattr(ImageViews, "labelled", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", checkpoint_every=1)
    resumed = run(tmp_path / "cut", resume=True, checkpoint_every=1)
    assert resumed.digest == whole.digest
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("known", [True, False])
def test_unknown_classes_are_not_counted(images, folder, clip, tmp_path, known):
    images = replace(images, unlabelled=f"{folder}/known") if known else images
    outcome, record = Run(images, Encoder(model=clip)).report(tmp_path)
    counts = [UNLABELLED, UNLABELLED, UNLABELLED + 1] if known else [None] * 3
    rows = class_rows(load_images(images))
    assert [row.unlabelled for row in rows] == counts
    assert [row.labelled for row in rows] == [*LABELLED[:2], LABELLED[2] + 1]
    assert [row["unlabelled"] for row in record["classes"]] == counts
    quality = outcome.training.history[-1]["pseudo_labels"]["fused"]
    assert (quality["precision"] is not None) == (known and quality["acceptance"] > 0)
    assert "unreadable images" in record["reading"]
    assert (tmp_path / "pseudo_labels.png").exists()


def test_one_unknown_class_leaves_no_counts(images, folder):
    data = load_images(replace(images, unlabelled=f"{folder}/known"))
    truth = data.unlabelled_truth.copy()
    truth[0] = -1
    rows = class_rows(replace(data, unlabelled_truth=truth))
    assert [row.unlabelled for row in rows] == [None] * 3


@pytest.mark.parametrize("preset", ["ulfine", "daso"])
def test_without_unlabelled_images_the_labelled_ones_train_alone(images, clip, tmp_path, preset):
    outcome, _ = Run(replace(images, unlabelled=None), Encoder(model=clip), preset).report(tmp_path)
    assert all("pseudo_labels" not in record for record in outcome.training.history)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "class_counts.png",
        "per_class_accuracy.png",
    ]


def test_a_class_without_labelled_images_has_its_text_alone(images, folder, clip, backbone, tmp_path):
    (tmp_path / "labelled").mkdir()
    for name in ("red_fox", "sea_lion"):
        (tmp_path / "labelled" / name).symlink_to(folder / "labelled" / name)
    fewer = replace(images, labelled=f"{tmp_path}/labelled")
    outcome = Run(fewer, Encoder(model=clip))()
    assert math.isfinite(outcome.training.history[-1]["loss"])
    with pytest.raises(ValueError, match="expected labelled images of every class, got none of 'tree'"):
        Run(fewer, backbone, "lift").start()


def test_a_table_trains_as_its_folders(images, folder, clip, tmp_path):
    data = load_images(images)
    with (tmp_path / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for path in sorted(folder.rglob("*.png")):
            part, *middle, _ = path.relative_to(folder).parts
            if part != "known":
                label = middle[0].replace("_", " ") if middle else ""
                split = {"labelled": "train"}.get(part, part)
                writer.writerow([path.relative_to(folder), label, split])
    table = Images(table=f"{tmp_path}/images.csv", root=str(folder))
    assert load_images(table).class_names == data.class_names
    from_table, from_folders = (Run(choice, Encoder(model=clip))() for choice in (table, images))
    assert from_table.digest == from_folders.digest
    assert from_table.metrics == from_folders.metrics


def test_a_run_is_evaluated_with_its_encoder_only(images, tmp_path):
    run = Run(images, Encoder(model=tiny_clip(tmp_path / "clip")))
    run(tmp_path / "run")
    tiny_clip(tmp_path / "clip", seed=1)
    with pytest.raises(CheckpointError, match="expected the encoder of the run, .*, got another one"):
        evaluate_run(tmp_path / "run", run.configuration)


def test_a_finished_run_stands_without_its_training_images(clip, tmp_path):
    photos(tmp_path / "photos")
    places = {name: f"{tmp_path}/photos/{name}" for name in ("labelled", "unlabelled", "test")}
    run = Run(Images(**places), Encoder(model=clip))
    outcome = run(tmp_path / "run")
    for name in ("labelled", "unlabelled"):
        shutil.rmtree(places[name])
    for name in ("red_fox", "sea_lion"):
        shutil.rmtree(f"{places['test']}/{name}")
    _, metrics, _ = evaluate_run(tmp_path / "run", run.configuration)
    assert metrics["fused"]["per_class"] == [None, None, outcome.metrics["fused"]["per_class"][2]]
    Path(f"{places['test']}/red_fox").mkdir()
    shutil.copytree(f"{places['test']}/tree", f"{places['test']}/shrub")
    with pytest.raises(ValueError, match="test images must be of the classes of the run, got shrub"):
        evaluate_run(tmp_path / "run", run.configuration)
    shutil.rmtree(places["test"])
    with pytest.raises(FileNotFoundError, match="expected test of the run at .*: --at test=PATH"):
        evaluate_run(tmp_path / "run", run.configuration)
    export_run(tmp_path / "run", run.configuration, tmp_path / "head.safetensors")


@pytest.mark.parametrize(("part", "change"), [("training", {"seed": 1}), ("method", {"threshold": 0.1})])
def test_a_checkpoint_of_another_configuration_is_not_evaluated(images, clip, tmp_path, part, change):
    run = Run(images, Encoder(model=clip))
    run(tmp_path / "run")
    other = run.configuration | {part: run.configuration[part] | change}
    for use in (evaluate_run, partial(export_run, path=tmp_path / "head.safetensors")):
        with pytest.raises(
            CheckpointError, match=rf"got another one: {part}\.{next(iter(change))}: expected"
        ):
            use(tmp_path / "run", other)


def test_a_head_is_exported_as_safetensors_only(images, clip, tmp_path):
    run = Run(images, Encoder(model=clip))
    run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got .*head\.onnx"):
        export_run(tmp_path / "run", run.configuration, tmp_path / "head.onnx")


@pytest.mark.parametrize(
    ("name", "given", "asked"), [("cifar10", None, 200), ("cifar10", 7, 7), ("stl10", None, None)]
)
def test_unlabelled_images_are_twice_the_labelled_ones_unless_they_come_along(
    monkeypatch, name, given, asked
):
    calls = []
    monkeypatch.setattr(build, "dataset_data", lambda name, **options: calls.append(options))
    load_images(Images(dataset=name, unlabelled_largest=given))
    assert calls[0]["unlabelled_largest"] == asked


def as_lists(folder, into, class_names):
    """The images of `folder` as list files of ImageNet-LT in the folder `into`."""
    for part in ("labelled", "test"):
        files = sorted((folder / part).rglob("[0-9].png"))
        kinds = sorted({file.parent.name for file in files})
        lines = [f"{file.relative_to(folder)} {kinds.index(file.parent.name)}" for file in files]
        (into / f"{part}.txt").write_text("\n".join(lines))
    (into / "names.txt").write_text("\n".join(class_names))
    return Images(
        train_list=f"{into}/labelled.txt",
        test_list=f"{into}/test.txt",
        root=str(folder),
        class_names=f"{into}/names.txt",
    )


def test_classes_of_one_name_are_evaluated_by_number_or_not_at_all(folder, clip, tmp_path):
    run = Run(as_lists(folder, tmp_path, ["fox", "lion", "fox"]), Encoder(model=clip))
    outcome = run(tmp_path / "run")
    assert evaluate_run(tmp_path / "run", run.configuration)[1] == outcome.metrics
    (tmp_path / "names.txt").write_text("lion\nfox\nfox")
    with pytest.raises(ValueError, match="in its order, for several have one name, got lion, fox, fox"):
        evaluate_run(tmp_path / "run", run.configuration)


def test_lists_and_imagenet127_are_read_as_they_are_named(folder, tmp_path):
    lists = as_lists(folder, tmp_path, ["fox", "sea lion", "tree"])
    data = load_images(lists)
    assert data.class_names == ("fox", "sea lion", "tree")
    assert data.labelled_counts.tolist() == [math.ceil(0.25 * count) for count in LABELLED]
    assert len(data.unlabelled) == sum(LABELLED)
    assert load_images(replace(lists, labelled_share=1.0)).labelled_counts.tolist() == list(LABELLED)

    with pytest.raises(FileNotFoundError, match="val_data"):
        load_images(Images(imagenet127=str(tmp_path)))
    with pytest.raises(ValueError, match="root must be None with ImageNet-127, got 'here'"):
        Images(imagenet127=str(tmp_path), root="here")
