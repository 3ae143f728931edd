"""The command: what it prints and writes, its exit codes, its errors. Features are synthetic."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photos import photos
from processes import run_together
from synthetic import small_data
from tiny_clip import tiny_clip
from typer.testing import CliRunner

import ulfine_fast
from ulfine_fast import _native, backend, cli, report
from ulfine_fast import run as run_module
from ulfine_fast.batches import FeatureViews, ImageViews
from ulfine_fast.cache import CACHE_VARIABLE
from ulfine_fast.checkpoint import Terminated, load_checkpoint
from ulfine_fast.cli import app
from ulfine_fast.config import METHODS, Images
from ulfine_fast.fastest import FASTEST
from ulfine_fast.terminal import make_console
from ulfine_fast.validation import ETAS

QUICK = ["--features", "mine.npz", "--steps", "30", "--log-every", "10"]
PICTURES = {"class_counts.png", "per_class_accuracy.png", "pseudo_labels.png", "class_distribution.png"}


@pytest.fixture(autouse=True)
def _data(monkeypatch, tmp_path, tmp_path_factory):
    """Synthetic features in a file, of the demonstration too, and a working folder and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
    features = tmp_path_factory.mktemp("features") / "mine.npz"
    data = small_data()
    names = ("labelled", "labels", "weak", "strong", "unlabelled_truth", "test", "test_labels", "prototypes")
    np.savez(features, **{name: getattr(data, name).numpy() for name in names})
    Path("mine.npz").symlink_to(features)
    monkeypatch.setattr(cli, "DEMO_IMAGES", Images(features=str(features)))


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def strict(path):
    def refuse(name):
        pytest.fail(f"{name} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_train_writes_everything_and_shows_the_split_first(tmp_path):
    result = call("train", *QUICK)
    run = tmp_path / "runs" / "ulfine"
    assert {path.name for path in run.iterdir()} == PICTURES | {
        "checkpoint.safetensors",
        "config.json",
        "metrics.json",
        "predictions.csv",
    }
    assert result.output.index("unlabelled") < result.output.index("Training ulfine")
    metrics = strict(run / "metrics.json")
    assert metrics["steps"] == 30
    assert [record["step"] for record in metrics["history"]] == [10, 20, 30]
    assert set(metrics["metrics"]) == {"fused", "linear", "text"}
    assert metrics["configuration"]["method"]["eta"] == METHODS["ulfine"].eta
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["truth"] == row["ulfine_prediction"] for row in rows)
    assert right / len(rows) == pytest.approx(metrics["metrics"]["fused"]["overall"])


def test_evaluate_gives_the_numbers_of_train(tmp_path):
    call("train", *QUICK, "--out", "runs/a")
    before = strict(tmp_path / "runs/a/metrics.json")["metrics"]
    result = call("evaluate", "runs/a")
    assert strict(tmp_path / "runs/a/evaluation.json")["metrics"] == before
    for branch in ("fused", "linear", "text"):
        assert branch in result.output


def test_settings_change_the_preset(tmp_path):
    call("train", *QUICK, "--set", "mu=0.01", "--set", "adjust_unlabelled=kept", "--set", "scale_rows=8")
    method = strict(tmp_path / "runs/ulfine/config.json")["method"]
    assert (method["mu"], method["adjust_unlabelled"], method["scale_rows"]) == (0.01, "kept", 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "mu=high"], "expected float, got 'high'"),
        (["--set", "nu=1"], "expected one of eta"),
        (["--set", "mu"], "expected FIELD=VALUE, got 'mu'"),
        (["--set", "adjust_unlabelled=maybe"], "adjust_unlabelled must be one of"),
        (["--set", "normalize_linear=1"], "expected true or false, got '1'"),
        (["--method", "mixmatch"], "expected one of zero_shot"),
        (["--learning-rate", "0"], "'--learning-rate': expected above 0, got 0.0"),
        (["--dataset", "cifar"], "got 'cifar'; did you mean cifar10?"),
        (["--set", "eta=7"], "eta must be in [0, 1], got 7.0"),
        (["--size", "0"], "'--size': expected at least 1, got 0"),
        (["--tuning", "full", "--parts", "0"], "'--parts': expected at least 1, got 0"),
        (["--backend", "tpu"], "'tpu' is not one of 'auto', 'reference', 'cpp'"),
        (["--resume", "--overwrite"], "expected --resume or --overwrite, got both"),
        (["--distribution", "sideways"], "sideways"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_usage_is_2(words, message):
    result = call("train", "--features", "mine.npz", *words, code=2)
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("option", "given"), [("--steps", "-1"), ("--threads", "-1"), ("--steps", "many")])
def test_a_value_out_of_range_is_named(option, given):
    text = " ".join(call("train", option, given, code=2).output.replace("│", " ").split())
    # The rest of the sentence is typer's.
    assert f"Invalid value for '{option}': " in text
    assert re.search(rf"[ ']{given}\b", text)


def test_another_configuration_is_not_overwritten(tmp_path):
    call("train", *QUICK, "--out", "runs/a")
    before = (tmp_path / "runs/a/metrics.json").read_text()
    result = call("train", *QUICK, "--out", "runs/a", "--seed", "1", code=1)
    assert "runs/a holds another run: images.seed: expected 0, got 1" in result.output
    assert "--overwrite" in result.output
    assert (tmp_path / "runs/a/metrics.json").read_text() == before
    call("train", *QUICK, "--out", "runs/a", "--seed", "1", "--overwrite")
    assert strict(tmp_path / "runs/a/config.json")["images"]["seed"] == 1


def test_a_foreign_folder_is_not_written_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    result = call("train", *QUICK, "--out", "mine", code=1)
    assert "expected a run folder or an empty one" in result.output
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_damaged_configuration_can_be_overwritten(tmp_path):
    call("train", *QUICK, "--out", "runs/a")
    call("evaluate", "runs/a")
    (tmp_path / "runs/a/config.json").write_text("[1]")
    result = call("train", *QUICK, "--out", "runs/a", code=1)
    assert "config.json: expected an object, got list" in result.output
    call("train", *QUICK, "--out", "runs/a", "--overwrite")
    assert strict(tmp_path / "runs/a/config.json")["name"] == "ulfine"
    # it was of the run before
    assert not (tmp_path / "runs/a/evaluation.json").exists()


def test_a_place_that_cannot_be_written_is_found_before_any_work(monkeypatch):
    monkeypatch.setattr(run_module, "load_images", lambda choice: pytest.fail("too late"))
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    for words in (["train", *QUICK], ["demo"], ["compare", *QUICK]):
        result = call(*words, "--out", "runs/a", code=1)
        assert "runs/a: expected a folder that can be written, got" in " ".join(result.output.split())


def test_a_full_disk_says_which_file_and_how_to_go_on(tmp_path, monkeypatch):
    def full(path, *arguments, **options):
        raise OSError(f"{path}: expected to write it, got: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_predictions", full)
        result = call("train", *QUICK, "--out", "runs/a", code=1)
    assert "runs/a/predictions.csv: expected to write it, got: No space left" in result.output
    assert "--resume" in result.output.splitlines()[-1]
    call("train", *QUICK, "--out", "runs/a", "--resume")
    assert (tmp_path / "runs/a/predictions.csv").exists()


@pytest.mark.parametrize("name", ["auto", "cpp", "reference"])
def test_train_runs_on_the_named_back_end_and_says_so(monkeypatch, name):
    chosen = []
    choose = backend.choose

    def record(*arguments):
        chosen.append(choose(*arguments))
        return chosen[-1]

    for op in ("head_loss", "ops.pseudo_label"):
        # by name: the package has functions of the same name as its rooms
        monkeypatch.setattr(sys.modules[f"ulfine_fast.{op}"], "choose", record)
    result = call("train", *QUICK, "--backend", name)
    expected = "reference" if name == "reference" else "cpp"
    assert set(chosen) == {expected}
    says = f"Back end: {expected}" + (f" ({_native.isa()})" if expected == "cpp" else "")
    assert says in result.output.splitlines()


def test_resume_continues_an_interrupted_run(tmp_path, monkeypatch):
    call("train", *QUICK, "--out", "runs/whole")
    batch = FeatureViews.batch

    def interrupt(self, step, *slots):
        if step == 25:
            raise KeyboardInterrupt
        return batch(self, step, *slots)

    words = ["train", *QUICK, "--out", "runs/cut", "--checkpoint-every", "10"]
    with monkeypatch.context() as patch:
        patch.setattr(FeatureViews, "batch", interrupt)
        patch.setattr(sys, "argv", ["ulfine-fast", *words])
        result = call(*words, code=130)
    command = "ulfine-fast train --features mine.npz --steps 30 --log-every 10 --out runs/cut --checkpoint-every 10 --resume"
    assert command in result.output
    call(*words, "--resume")
    whole, cut = (strict(tmp_path / f"runs/{name}/metrics.json") for name in ("whole", "cut"))
    assert whole["metrics"] == cut["metrics"]
    for record in (*whole["history"], *cut["history"]):
        assert record.pop("images_per_second") > 0
    assert whole["history"] == cut["history"]


def test_resume_needs_a_run():
    result = call("train", *QUICK, "--resume", code=1)
    assert "--resume: expected a run in runs/ulfine, got no config.json" in result.output


def test_without_resume_a_run_starts_again(tmp_path):
    call("train", *QUICK)
    checkpoint = tmp_path / "runs/ulfine/checkpoint.safetensors"
    checkpoint.write_bytes(b"damaged")
    result = call("train", *QUICK, "--resume", code=1)
    assert "checkpoint.safetensors: damaged" in result.output
    call("train", *QUICK)
    assert checkpoint.stat().st_size > 1000


@pytest.mark.parametrize("missing", ["folder", "checkpoint", "damaged configuration", "field"])
def test_evaluate_says_what_is_missing(tmp_path, missing):
    call("train", *QUICK, "--out", "runs/a")
    run = tmp_path / "runs/a"
    if missing == "folder":
        run = tmp_path / "runs/b"
        message = "expected the folder of a run"
    elif missing == "checkpoint":
        (run / "checkpoint.safetensors").unlink()
        message = "expected checkpoint.safetensors, got none"
    elif missing == "damaged configuration":
        (run / "config.json").write_text("{")
        message = "config.json: damaged"
    else:
        (run / "config.json").write_text('{"images": {}, "encoder": {}, "name": "x", "method": {}}')
        message = "config.json: expected training, got none"
    result = call("evaluate", run, code=1)
    assert message in result.output
    assert len(result.output.strip().splitlines()) <= 2


def test_failures_before_training_leave_no_folder(tmp_path, monkeypatch):
    def fail(choice):
        raise ValueError("class 2 needs 750 images, got 400\nmore\nand more")

    monkeypatch.setattr(run_module, "load_images", fail)
    result = call("train", *QUICK, code=1)
    assert "error: class 2 needs 750 images, got 400" in result.output
    assert "and more" not in result.output
    assert not (tmp_path / "runs").exists()
    shown = CliRunner().invoke(app, ["--traceback", "train", *QUICK])
    assert shown.exit_code == 1
    assert isinstance(shown.exception, ValueError)


def test_methods_without_unlabelled_data_have_fewer_pictures(tmp_path):
    call("train", *QUICK, "--method", "lift")
    names = {path.name for path in (tmp_path / "runs/lift").iterdir()}
    assert names & PICTURES == {"class_counts.png", "per_class_accuracy.png"}
    call("train", "--features", "mine.npz", "--method", "zero_shot")
    assert strict(tmp_path / "runs/zero_shot/metrics.json")["steps"] == 0


def test_demo_compares_every_method(tmp_path):
    result = call("demo", "--seeds", "2", "--steps", "20", "--out", "runs/demo", "--jobs", "1")
    folder = tmp_path / "runs/demo"
    runs = {f"{name}-{seed}" for name in METHODS for seed in range(2)}
    assert {path.name for path in folder.iterdir()} == PICTURES | {"metrics.json"} | runs
    record = strict(folder / "metrics.json")
    assert list(record["methods"]) == list(METHODS)
    for summary in record["methods"].values():
        for name in ("overall", "many", "medium", "few", "seconds"):
            assert set(summary[name]) == {"mean", "std"}
        found = [run["metrics"]["fused"]["overall"] for run in summary["runs"]]
        assert summary["overall"]["mean"] == pytest.approx(sum(found) / 2)
        assert set(summary["by_count"]) == {"many", "medium", "few"}
    training = record["methods"]["lift"]["runs"][1]["configuration"]["training"]
    assert (training["steps"], training["seed"], training["tuning"]) == (20, 1, "none")
    assert record["versions"]["ulfine_fast"] == ulfine_fast.__version__
    assert "runs/demo" in result.output
    assert "±" in result.output
    assert {path.name for path in (folder / "lift-0").iterdir()} == {
        "checkpoint.safetensors", "config.json", "metrics.json", "predictions.csv",
    }  # fmt: skip


def test_demo_of_chosen_methods_and_one_seed(tmp_path):
    words = ["--seeds", "1", "--steps", "5", "--method", "lift", "--method", "zero_shot", "--jobs", "1"]
    call("demo", *words)
    record = strict(tmp_path / "runs/demo/metrics.json")
    assert list(record["methods"]) == ["lift", "zero_shot"]
    assert record["methods"]["lift"]["overall"]["std"] is None
    # what is there is not trained again
    checkpoint = tmp_path / "runs/demo/lift-0/checkpoint.safetensors"
    before = checkpoint.stat().st_mtime_ns
    assert "2 of 2 runs are there already" in call("demo", *words).output
    assert checkpoint.stat().st_mtime_ns == before
    assert "mixmatch" in call("demo", "--method", "mixmatch", code=2).output


def test_a_comparison_that_was_cut_goes_on(tmp_path, monkeypatch):
    words = ["compare", *QUICK, "--method", "lift", "--method", "acr", "--seeds", "2", "--jobs", "1"]
    call(*words, "--out", "runs/whole")
    whole = strict(tmp_path / "runs/whole/metrics.json")["methods"]
    batch, count = FeatureViews.batch, []

    def interrupt(self, step, *slots):
        count.append(step)
        if len(count) == 75:
            raise KeyboardInterrupt
        return batch(self, step, *slots)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureViews, "batch", interrupt)
        call(*words, "--out", "runs/cut", code=130)
    assert "2 of 4 runs are there already" in call(*words, "--out", "runs/cut").output
    cut = strict(tmp_path / "runs/cut/metrics.json")["methods"]
    assert [run["digest"] for run in cut["acr"]["runs"]] == [run["digest"] for run in whole["acr"]["runs"]]
    # in processes of their own: the same on one thread
    call(*words[:-2], "--jobs", "2", "--out", "runs/two")
    two = strict(tmp_path / "runs/two/metrics.json")["methods"]
    assert [run["digest"] for run in two["lift"]["runs"]] == [run["digest"] for run in whole["lift"]["runs"]]


def test_a_comparison_takes_up_no_run_that_would_end_otherwise(tmp_path):
    words = ["compare", *QUICK, "--seeds", "1", "--jobs", "1", "--method", "lift", "--method", "lift"]
    # one that is named twice is trained once
    assert "1 runs: lift; seed 0" in call(*words).output
    before = (tmp_path / "runs/compare/lift-0/config.json").read_bytes()
    result = call(*words, "--steps", "40", code=1)
    assert "runs/compare/lift-0 holds another run: training.steps: expected 30, got 40" in result.output
    assert "choose another --out, or remove that folder" in result.output
    assert (tmp_path / "runs/compare/lift-0/config.json").read_bytes() == before


def test_finished_runs_are_compared(tmp_path):
    for name, words in {"a": ["--set", "mu=0.1"], "b": ["--set", "mu=0.3"], "c": ["--method", "acr"]}.items():
        call("train", *QUICK, *words, "--out", f"runs/{name}")
    result = call("compare", "runs/a", "runs/b", "runs/c", "--out", "runs/all")
    # two of one method that differ have the names of their folders
    assert list(strict(tmp_path / "runs/all/metrics.json")["methods"]) == ["a", "b", "acr"]
    assert "Wrote metrics.json and 4 pictures to runs/all" in result.output
    assert "got no metrics.json in it" in call("compare", "runs/nowhere", code=1).output
    assert "got both: steps" in call("compare", "runs/a", "--steps", "3", code=2).output


def test_compared_runs_are_never_taken_for_seeds_of_each_other(tmp_path):
    for name, seed in {"x/r": 0, "y/r": 1, "z": 1}.items():
        call("train", *QUICK, "--seed", seed, "--out", f"runs/{name}")

    def methods(*names):
        call("compare", *(f"runs/{name}" for name in names), "--out", "runs/all")
        found = strict(tmp_path / "runs/all/metrics.json")["methods"]
        return {name: len(summary["runs"]) for name, summary in found.items()}

    assert methods("x/r", "y/r") == {"ulfine": 2}
    # given twice, and the same seed twice
    assert methods("z", "../runs/z") == {"ulfine": 1}
    assert methods("x/r", "y/r", "z") == {"runs/x/r": 1, "runs/y/r": 1, "z": 1}


def test_finetune_is_train_and_says_so(tmp_path):
    result = call("finetune", *QUICK, "--out", "runs/a")
    assert "finetune is now called train" in result.output
    assert strict(tmp_path / "runs/a/metrics.json")["steps"] == 30


def test_info_json_names_every_back_end():
    record = json.loads(call("info", "--json").output)
    assert record["version"] == ulfine_fast.__version__
    assert set(record["backends"]) == {"reference", "cpp", "triton", "cuda"}
    for state in record["backends"].values():
        assert isinstance(state["built"], bool)
        assert isinstance(state["available"], bool)
        assert isinstance(state["reason"], str)
    assert record["backends"]["reference"]["available"]
    assert record["threads"] == torch.get_num_threads()


def test_info_says_what_auto_takes():
    record = json.loads(call("info", "--json").output)["auto"]
    assert record["takes"] == f"cpp ({_native.isa()})"
    assert {name for choice in record["by_classes"].values() for name in choice.values()} == {"cpp"}
    lines = call("info").output.splitlines()
    assert f"auto takes: cpp ({_native.isa()})" in lines
    assert not any(line.startswith("classes") for line in lines)


def test_info_says_what_auto_takes_on_a_gpu(monkeypatch):
    def lines():
        return [line.split() for line in call("info").output.splitlines()]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Some GPU")
    empty = torch.empty
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch, "empty", lambda *a, device=None: on_gpu if device == "cuda" else empty(*a))
    monkeypatch.setattr(_native, "has_cuda", lambda: True)
    nothing = lines()
    assert ["auto", "takes:", "reference", "(nothing", "was", "measured", "on", "Some", "GPU)"] in nothing
    assert not any(line[:1] == ["classes"] for line in nothing)
    names = ["cuda", "cuda", "triton", "reference"]
    monkeypatch.setitem(FASTEST, "Some GPU", {"proto_fit": tuple(names)})
    some = lines()
    assert ["proto_fit", *names] in some
    assert ["proto_logits", *["reference"] * 4] in some
    monkeypatch.setattr(_native, "has_cuda", lambda: False)
    assert ["proto_fit", "reference", "reference", "triton", "reference"] in lines()
    assert ["classes", "up", "to", "300", "up", "to", "3000", "up", "to", "13000", "more"] in some


def test_info_counts_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ULFINE_CACHE", str(tmp_path / "cache"))
    assert json.loads(call("info", "--json").output)["cache"]["bytes"] == 0
    (tmp_path / "cache" / "entry").mkdir(parents=True)
    (tmp_path / "cache" / "entry" / "features.npy").write_bytes(b"x" * 2_000_000)
    assert json.loads(call("info", "--json").output)["cache"]["bytes"] == 2_000_000
    assert "2.0 MB" in call("info").output


def test_info_works_without_a_place_for_the_cache(monkeypatch):
    monkeypatch.setenv("ULFINE_CACHE", "~/cache")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    said = call("info").output
    assert "Feature cache: ULFINE_CACHE: expected a folder, got ~/cache: Could not determine home" in said
    assert json.loads(call("info", "--json").output)["cache"]["folder"] is None


def test_every_option_is_explained():
    for command in ("demo", "train", "compare", "evaluate", "export", "info"):
        text = call(command, "--help").output
        assert "Example" in text
    assert "[default: (0.01, 0.001 for full_fine_tune" in " ".join(
        call("train", "--help").output.replace("│", " ").split()
    )
    assert call("--version").output.strip() == ulfine_fast.__version__


def test_threads_and_determinism_are_set(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: calls.append(("threads", n)))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: calls.append(("deterministic", on)))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    call("train", *QUICK, "--threads", "1", "--deterministic")
    assert calls == [("threads", 1), ("deterministic", True)]


def test_an_absent_device_is_an_error():
    result = call("train", *QUICK, "--device", "cuda", code=1)
    assert "--device cuda: expected a CUDA device, got none" in result.output


def test_the_command_starts_without_heavy_modules():
    code = (
        "import sys, ulfine_fast.cli;"
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'rich', 'safetensors', 'PIL') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "ulfine_fast", "--version"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.strip() == ulfine_fast.__version__


def test_an_eta_that_is_set_is_not_chosen_again(tmp_path):
    call("train", *QUICK, "--method", "ulfine_plus", "--set", "eta=0.6", "--out", "runs/set")
    metrics = strict(tmp_path / "runs/set/metrics.json")
    assert metrics["eta"] == 0.6
    assert metrics["configuration"]["method"]["eta_folds"] == 0


def test_a_chosen_eta_is_said_and_evaluated(tmp_path):
    result = call("train", *QUICK, "--method", "ulfine_plus", "--out", "runs/chosen")
    metrics = strict(tmp_path / "runs/chosen/metrics.json")
    assert f"eta {metrics['eta']:g}, chosen on 3 folds of the labelled images" in result.output
    assert metrics["eta"] in ETAS
    call("evaluate", "runs/chosen")
    assert strict(tmp_path / "runs/chosen/evaluation.json")["metrics"] == metrics["metrics"]


def test_capture_needs_a_device_and_says_so_before_the_first_step(monkeypatch):
    monkeypatch.setattr("ulfine_fast.batches.FeatureViews.batch", lambda *a: pytest.fail("too late"))
    result = call("train", *QUICK, "--capture", "--device", "cpu", "--out", "runs/captured", code=1)
    assert "capture needs a CUDA device, got cpu" in result.output


TINY = (
    "--steps",
    "6",
    "--labelled-batch",
    "4",
    "--unlabelled-batch",
    "8",
    "--log-every",
    "2",
    "--workers",
    "0",
)


@pytest.fixture
def pictures(tmp_path):
    """Arguments of `train` for folders of photographs and a small CLIP; the working folder holds both."""
    photos(tmp_path)
    tiny_clip(tmp_path / "clip")
    return [
        "--labelled",
        "labelled",
        "--unlabelled",
        "unlabelled",
        "--test",
        "test",
        "--model",
        "clip",
        *TINY,
    ]


def test_a_run_on_images_writes_everything_and_says_what_it_did(tmp_path, pictures):
    result = call("train", *pictures, "--out", "runs/a")
    run = tmp_path / "runs/a"
    assert {path.name for path in run.iterdir()} == PICTURES | {
        "checkpoint.safetensors",
        "config.json",
        "metrics.json",
        "predictions.csv",
    }
    metrics = strict(run / "metrics.json")
    assert [record["step"] for record in metrics["history"]] == [2, 4, 6]
    said = " ".join(result.output.split())
    assert f"Weights {metrics['digest']}" in said
    # one among the labelled, one among the unlabelled, two among the test images
    assert "unreadable images: 4 not an image in JPEG" in said
    assert "│ all │ 17 │ 19 │" in said
    assert f", {metrics['history'][-1]['images_per_second']:,.0f} images/s" in said
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["truth"] == row["ulfine_prediction"] for row in rows)
    assert right / len(rows) == pytest.approx(metrics["metrics"]["fused"]["overall"])
    assert rows[0]["image"] == "test/red_fox/0.png"
    # one order of classes in both files, each with number and name
    names = [row["name"] for row in metrics["classes"]]
    assert [row["id"] for row in metrics["classes"]] == [0, 1, 2]
    for column in ("truth", "ulfine_prediction"):
        assert all(row[f"{column}_name"] == names[int(row[column])] for row in rows)
    of_fox = [row for row in rows if row["truth_name"] == "red fox"]
    right = sum(row["ulfine_prediction_name"] == "red fox" for row in of_fox)
    assert right / len(of_fox) == metrics["metrics"]["fused"]["per_class"][names.index("red fox")]

    result = call("evaluate", "runs/a")
    assert strict(run / "evaluation.json")["metrics"] == metrics["metrics"]
    for said in (strict(run / "evaluation.json")["reading"], " ".join(result.output.split())):
        assert "unreadable images: 2 not an image in JPEG" in said
    call("export", "runs/a", "head.safetensors")
    assert (tmp_path / "head.safetensors").stat().st_size > 0


HOSTILE = (
    b"[red]",
    b"[bold",
    b":smile:",
    b"$",
    b"$$",
    b"$x^$ {place} {}",
    b"-1",
    b"nan",
    b'a,b;"c"',
    b"two\nlines",
    "line\u2028separator".encode(),
    b"\x1b[31mescape",
    b"caf\xe9 latin",
    "\u732b".encode(),
)


def test_names_of_any_bytes_reach_the_last_report(tmp_path, pictures, recwarn):
    composed, combining = "caf\u00e9".encode(), "cafe\u0301".encode()
    for part, last in (("labelled", composed), ("test", combining)):
        for name in map(os.fsdecode, (*HOSTILE, last)):
            folder = tmp_path / "hostile" / part / name
            folder.mkdir(parents=True)
            shutil.copy(tmp_path / "test/tree/0.png", folder / f"{name}.png")
    (tmp_path / "hostile/test/[red]/[red] broken.png").write_bytes(b"none")
    words = [*pictures, "--labelled", "hostile/labelled", "--test", "hostile/test", "--out", "runs/[old] run"]
    result = call("train", *words)
    metrics = strict(tmp_path / "runs/[old] run/metrics.json")
    names = [row["name"] for row in metrics["classes"]]
    assert len(names) == len(HOSTILE) + 1
    assert {"[red]", ":smile:", "$$", "$x^$ {place} {}", "nan", "two\\nlines", "line\\u2028separator"} <= {
        *names
    }
    assert {"\\x1b[31mescape", "caf\\xe9 latin", "\u732b", "caf\u00e9"} <= {*names}
    said = " ".join(result.output.split())
    for name in names:
        assert f"│ {name} │ " in said
    assert "[red]/[red] broken.png" in said
    assert "[red]/[red] broken.png" in metrics["reading"]
    assert said.endswith("to runs/[old] run")
    with (tmp_path / "runs/[old] run/predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["truth_name"] for row in rows} == {*names}
    assert all(len(row["image"].splitlines()) == 1 for row in rows)
    assert {path.name for path in (tmp_path / "runs/[old] run").glob("*.png")} == PICTURES
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]
    call("evaluate", "runs/[old] run")
    call("export", "runs/[old] run", "head.safetensors")


def test_pictures_of_a_run_do_not_become_its_data(tmp_path, pictures):
    words = [*pictures, "--unlabelled", "."]
    call("train", *words, "--out", "runs/a")
    call("train", *words, "--seed", "1", "--out", "runs/b")
    one, two = (strict(tmp_path / f"runs/{name}/metrics.json") for name in "ab")
    assert any(note.endswith("folder of a run 1") for note in two["notes"])
    call("evaluate", "runs/a")
    assert strict(tmp_path / "runs/a/evaluation.json")["metrics"] == one["metrics"]


def test_a_console_of_another_encoding_shows_what_it_lacks(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    make_console().print("\u732b caf\u00e9 \udcff")
    stream.flush()
    assert stream.buffer.getvalue().decode("latin-1") == "\\u732b caf\u00e9 \\udcff\n"


def test_a_run_on_images_says_which_eta_it_chose(tmp_path, pictures):
    result = call("train", *pictures, "--method", "ulfine_plus", "--out", "runs/a")
    eta = strict(tmp_path / "runs/a/metrics.json")["eta"]
    assert f"eta {eta:g}, chosen on 3 folds of the labelled images" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one of a data set, folders, a table, lists, ImageNet-127 and features, got none"),
        (["--dataset", "cifar10", "--labelled", "a", "--test", "b"], "got a data set and folders"),
        (["--labelled", "labelled"], "folders need labelled and test images, got no test folder"),
        (["--table", "t.csv", "--test", "test"], "test must be None with a table, got 'test'"),
        (["--labelled", "a", "--test", "b", "--root", "c"], "root must be None with folders, got 'c'"),
        (["--table", "t.csv", "--imbalance", "3"], "imbalance must be 100.0 with a table, got 3.0"),
        (["--train-list", "a.txt"], "lists need training and test images, got no test list"),
        (
            ["--test", "b"],
            "expected one of a data set, folders, a table, lists, ImageNet-127 and features, got none",
        ),
        (["--dataset", "imagenet"], "expected one of fashion-mnist-subset, "),
        (["--dataset", "cifar10", "--tuning", "prompts"], "expected one of none, linear_probe, full, "),
        (["--dataset", "cifar10", "--pipeline", "none"], "expected one of lift, lift_plus, "),
        (["--dataset", "cifar10", "--method", "mixmatch"], "expected one of zero_shot, "),
        (["--dataset", "cifar10", "--set", "nu=1"], "expected one of eta, "),
        (["--dataset", "cifar10", "--set", "views=two"], "--set views: expected int, got 'two'"),
        (["--dataset", "cifar10", "--ema", "1"], "'--ema': expected in [0, 1), got 1.0"),
        (["--dataset", "cifar10", "--resume", "--overwrite"], "expected --resume or --overwrite, got both"),
        *(
            (["--dataset", "cifar10", "--template", text], f"and no other brace, got '{text}'")
            for text in ("a photo", "a {} of {place}", "{}}", "{} or {}", "{0}")
        ),
    ],
)
def test_wrong_usage_with_images_is_2(tmp_path, words, message):
    result = call("train", *words, code=2)
    assert message in " ".join(result.output.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npz"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labelled", "nowhere"], "labelled must be a readable folder, got nowhere: No such file"),
        (["--test", "no\x1b[2J\u2028where"], "folder, got no\\x1b[2J\\u2028where: No such file"),
        (["--test", "empty"], "test must have class folders with images, got none in empty"),
        (["--unlabelled", "empty"], "unlabelled must have images, got none in empty"),
        (
            ["--labelled", "broken"],
            "labelled images must be readable, at least one of them, got 2 unreadable",
        ),
        (["--model", "ViT-Z"], "model must be lite0, lite2, timm:NAME, a folder"),
        (["--model", "ViT-B-32", "--pretrained", "mine"], "pretrained must be one of openai, "),
        (["--size", "33"], "size must be a multiple of the patch, 8, got 33"),
        (["--blocks", "9"], "blocks must be in 1..3 for adaptformer, got 9"),
        (["--parts", "3"], "labelled_batch must be a multiple of processes x parts, 1 x 3, got 4"),
        (["--method", "zero_shot"], "steps must be 0 for a method that is not trained, got 6"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(tmp_path, pictures, words, message):
    (tmp_path / "empty").mkdir()
    for name in ("a", "b"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "0.jpg").write_bytes(b"no picture")
    result = call("train", *pictures, *words, "--out", "runs/a", code=1)
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0] == result.output.splitlines()[-1]
    assert message in errors[0]
    assert not (tmp_path / "runs/a").exists()


def test_weights_that_cannot_be_downloaded_can_be_named(pictures, monkeypatch):
    def unreachable(weights):
        raise OSError("no route to host")

    monkeypatch.setattr("open_clip.download_pretrained", unreachable)
    words = ("--model", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k", "--out", "runs/a")
    result = call("train", *pictures, *words, code=1)
    last = result.output.splitlines()[-1]
    assert "expected to download ViT-B-32 laion2b_s34b_b79k, got: no route to host" in last
    assert last.endswith("without a network, name a checkpoint file as pretrained, or a folder as model")


def test_a_failed_run_keeps_the_run_that_it_was_to_replace(tmp_path, pictures):
    call("train", *pictures, "--out", "runs/a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "runs/a").iterdir()}
    result = call("train", *pictures, "--seed", "1", "--out", "runs/a", code=1)
    assert "runs/a holds another run: images.seed: expected 0, got 1" in result.output
    call("train", *pictures, "--model", "ViT-Z", "--overwrite", "--out", "runs/a", code=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs/a").iterdir()} == before
    call("train", *pictures, "--seed", "1", "--overwrite", "--out", "runs/a")
    assert strict(tmp_path / "runs/a/config.json")["images"]["seed"] == 1


def test_an_interrupted_run_on_images_says_how_to_go_on(tmp_path, pictures, monkeypatch):
    call("train", *pictures, "--out", "runs/whole")
    weak = ImageViews.weak
    words = ["train", *pictures, "--checkpoint-every", "2", "--out", "runs/cut"]

    def interrupt_at(last):
        def interrupt(self, step, slots):
            if step == last:
                raise KeyboardInterrupt
            return weak(self, step, slots)

        with monkeypatch.context() as patch:
            patch.setattr(ImageViews, "weak", interrupt)
            patch.setattr(sys, "argv", ["ulfine-fast", *words])
            return call(*words, code=130).output.splitlines()

    assert interrupt_at(1)[-1] == "stopped by Ctrl-C; nothing was half written, run the same command again"
    *_, stopped, command = interrupt_at(5)
    assert stopped == "stopped by Ctrl-C; continue from the last checkpoint with:"
    assert command == f"  ulfine-fast {' '.join(words)} --resume"
    call(*words, "--resume")
    whole, cut = (strict(tmp_path / f"runs/{name}/metrics.json") for name in ("whole", "cut"))
    assert cut["digest"] == whole["digest"]
    assert cut["metrics"] == whole["metrics"]


def test_a_damaged_checkpoint_is_not_resumed(tmp_path, pictures):
    call("train", *pictures, "--out", "runs/a")
    checkpoint = tmp_path / "runs/a/checkpoint.safetensors"
    content = bytearray(checkpoint.read_bytes())
    content[-1] ^= 1
    checkpoint.write_bytes(content)
    for words in (["train", *pictures, "--out", "runs/a", "--resume"], ["evaluate", "runs/a"]):
        result = call(*words, code=1)
        assert "checkpoint.safetensors: damaged checkpoint" in result.output.splitlines()[-1]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, pictures, monkeypatch):
    from safetensors import torch as files

    call("train", *pictures, "--out", "runs/whole")
    save, saved = files.save, []

    def full(tensors, metadata):
        saved.append(metadata)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        return save(tensors, metadata)

    words = ["train", *pictures, "--checkpoint-every", "2", "--out", "runs/a"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "save", full)
        result = call(*words, code=1)
    assert "No space left on device; continue from the last checkpoint with:" in result.output
    assert sorted(path.name for path in (tmp_path / "runs/a").iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
    ]
    call(*words, "--resume")
    digests = {strict(tmp_path / f"runs/{name}/metrics.json")["digest"] for name in ("whole", "a")}
    assert len(digests) == 1


KILLED = """
import os, signal, sys
from ulfine_fast.batches import ImageViews
from ulfine_fast.cli import main

weak = ImageViews.weak


def kill(self, step, slots):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return weak(self, step, slots)


ImageViews.weak = kill
sys.argv = ["ulfine-fast", *sys.argv[1:]]
main()
"""


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, pictures):
    call("train", *pictures, "--out", "runs/whole")
    words = ["train", *pictures, "--threads", "1", "--checkpoint-every", "2", "--out", "runs/cut"]
    killed = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, *words], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load_checkpoint(tmp_path / "runs/cut/checkpoint.safetensors")[1]["steps"] == 4
    call(*words, "--resume")
    whole, cut = (strict(tmp_path / f"runs/{name}/metrics.json") for name in ("whole", "cut"))
    assert cut["digest"] == whole["digest"]
    assert cut["metrics"] == whole["metrics"]


def test_a_run_says_how_far_it_is_and_where_it_goes_on(tmp_path, pictures):
    lines = call("train", *pictures, "--out", "runs/a").output.splitlines()
    said = [line for line in lines if re.match(r"step \d of 6, .*about \d+ s to go$", line)]
    assert [line.split()[1] for line in said] == ["2", "3", "4", "6"]
    again = call("train", *pictures, "--steps", "8", "--log-every", "4", "--out", "runs/a", "--resume")
    assert "going on after step 6 of 8" in again.output.splitlines()
    assert strict(tmp_path / "runs/a/config.json")["training"]["steps"] == 8
    call("evaluate", "runs/a")


def test_moved_images_are_found(tmp_path, pictures, monkeypatch):
    call("train", *pictures, "--out", "runs/a")
    expected = strict(tmp_path / "runs/a/metrics.json")["metrics"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "runs/a"
    call("evaluate", run)
    assert strict(run / "evaluation.json")["metrics"] == expected
    (tmp_path / "test").rename(tmp_path / "moved")
    result = call("evaluate", run, code=1)
    assert "say where it is: --at test=PATH" in result.output
    call("evaluate", run, "--at", "test=../moved")
    assert strict(run / "evaluation.json")["metrics"] == expected
    call("export", run, "head.safetensors")


def test_a_run_goes_on_with_moved_images(tmp_path, pictures, monkeypatch):
    call("train", *pictures, "--out", "runs/a")
    (tmp_path / "elsewhere").mkdir()
    for name in ("labelled", "unlabelled", "test"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = [*pictures, "--model", "../clip", "--out", "../runs/a", "--resume"]
    assert "going on after step 6 of 6" in call("train", *words).output
    (tmp_path / "elsewhere/unlabelled/tree-0.png").unlink()
    result = call("train", *words, code=1)
    assert re.search(
        r"checkpoint.safetensors belongs to another run: images.unlabelled: expected (\d+), got (?!\1)\d+",
        result.output,
    )


def test_an_exported_head_of_a_tuned_encoder_says_so(pictures):
    call("train", *pictures, "--out", "runs/a")
    said = " ".join(call("export", "runs/a", "head.safetensors").output.split())
    assert "the encoder was tuned, too (adaptformer), and is not in the file" in said
    call("train", *pictures, "--tuning", "linear_probe", "--out", "runs/b")
    assert "tuned" not in call("export", "runs/b", "other.safetensors").output


SIGNALLED = """
import signal, sys
from ulfine_fast.batches import ImageViews
from ulfine_fast.cli import main

weak = ImageViews.weak


def send(self, step, slots):
    if step == 4:
        signal.raise_signal(number)
    return weak(self, step, slots)


ImageViews.weak = send
number = getattr(signal, sys.argv[1])
# a process in the background ignores it
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["ulfine-fast", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, pictures, name, code):
    words = ["train", *pictures, "--out", "runs/cut"]
    command = [sys.executable, "-P", "-c", SIGNALLED, name, *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    *_, stopped, how = ended.stderr.splitlines()
    assert stopped.endswith("; continue from the last checkpoint with:")
    assert how == f"  ulfine-fast {' '.join(words)} --resume"
    assert load_checkpoint(tmp_path / "runs/cut/checkpoint.safetensors")[1]["steps"] == 4


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(143), 143)])
def test_a_signal_in_a_place_that_makes_an_error_of_it_is_a_signal(monkeypatch, stop, code):
    class Raises:
        def __set_name__(self, owner, name):
            raise stop

    monkeypatch.setattr(run_module, "load_images", lambda choice: type("Owner", (), {"name": Raises()}))
    result = call("train", *QUICK, code=code)
    assert "nothing was half written, run the same command again" in result.output


def test_without_standard_streams_the_command_is_quiet(tmp_path):
    script = f"exec {shlex.quote(sys.executable)} -m ulfine_fast info >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], check=False, cwd=tmp_path).returncode == 0


TOGETHER = """
import sys
from ulfine_fast.cli import main

sys.argv = ["ulfine-fast", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("tuning", ["adaptformer", "none"])
def test_two_processes_train_as_one(tmp_path, pictures, tuning):
    pictures = [*pictures, "--tuning", tuning, "--ema", "0.5"]
    call("train", *pictures, "--out", "runs/one")
    words = ["train", *pictures, "--threads", "1", "--out", "runs/two"]
    ended = run_together(TOGETHER, 2, *words, folder=tmp_path)
    assert [process.code for process in ended] == [0, 0], ended
    # the first process alone prints and writes
    assert "Weights" in ended[0].out
    assert ended[1].out == ""
    one, two = (strict(tmp_path / f"runs/{name}/metrics.json") for name in ("one", "two"))
    assert two["metrics"]["fused"]["overall"] == one["metrics"]["fused"]["overall"]
    assert two["metrics"]["fused"]["per_class"] == one["metrics"]["fused"]["per_class"]
    # each process met some of the images that cannot be read
    assert two["reading"] == one["reading"] != ""
    first, second = (
        load_checkpoint(tmp_path / f"runs/{name}/checkpoint.safetensors")[0] for name in ("one", "two")
    )
    assert set(first) == set(second)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)
    call("evaluate", "runs/two")
    assert strict(tmp_path / "runs/two/evaluation.json")["metrics"] == two["metrics"]
