"""The command `ulfine-fast`: demo, train, finetune, evaluate, export, info.

Exit codes: 0 done, 1 failed, 2 wrong usage. Heavy modules are imported by the command that needs them, so
that help comes at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ulfine_fast.checkpoint import CHECKPOINT
from ulfine_fast.config import METHODS, PRESETS, Data, Encoder, FineTuning, Images, Method, Schedule

if TYPE_CHECKING:
    from rich.console import Console

FAILURES = (ValueError, TypeError, RuntimeError, OSError, ImportError)

Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["auto", "reference", "cpp"]
DATA, SCHEDULE = Data(), Schedule()
IMAGES, TUNING = Images(dataset=""), FineTuning()
PANEL_DATA, PANEL_ENCODER, PANEL_TRAINING, PANEL_RUN = "Data", "Encoder", "Training", "Run"


class _Commands(TyperGroup):
    """Turns failures into one or two lines and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except typer.BadParameter as error:
            # typer's messages on ranges and types say what was expected, its cause knows what came
            for problem in getattr(error.__cause__, "errors", list)()[:1]:
                if repr(problem["input"]) not in error.message:
                    error.message += f", got {problem['input']}"
            raise
        except KeyboardInterrupt:
            again = "; nothing was half written, run the same command again"
            _say("stopped by Ctrl-C" + (_how_to_resume(ctx) or again))
        except FAILURES as error:
            if ctx.params.get("traceback"):
                raise
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            # a full disk, say: what was written before is whole
            how_on = _how_to_resume(ctx) if isinstance(error, OSError) else ""
            _say("error: " + "\n".join(lines[: 1 if how_on else 2]) + how_on)
        raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Long-tailed semi-supervised fine-tuning of vision-language models,\non images (finetune) or on cached features (train).",
)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _how_to_resume(ctx: Any) -> str:
    """How to go on from the checkpoint; empty where there is none."""
    run_dir = ctx.meta.get("run_dir")
    if run_dir is None or not (run_dir / CHECKPOINT).exists():
        return ""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "; continue from the last checkpoint with the same torchrun command and --resume"
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    command = shlex.join(["ulfine-fast", *words, "--resume"])
    return f"; continue from the last checkpoint with:\n  {command}"


def _version(show: bool) -> None:
    if show:
        from ulfine_fast import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from, not only what it says.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


THREADS_HELP = "CPU threads; 0 takes torch's choice (results may differ in the last bit)."
Threads = Annotated[int, typer.Option(min=0, help=THREADS_HELP)]


def _settings(config: Any) -> list[str]:
    return [field.name for field in fields(config) if field.name != "summary"]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _known(name: str) -> str:
    if name not in METHODS:
        raise typer.BadParameter(f"expected one of {', '.join(METHODS)}, got {name!r}")
    return name


def _known_preset(name: str) -> str:
    if name not in PRESETS:
        raise typer.BadParameter(f"expected one of {', '.join(PRESETS)}, got {name!r}")
    return name


def _known_dataset(name: str) -> str:
    from ulfine_fast.datasets import DATASETS

    if name not in DATASETS:
        raise typer.BadParameter(f"expected one of {', '.join(DATASETS)}, got {name!r}")
    return name


def _known_images(name: str | None) -> str | None:
    if name is not None:
        from ulfine_fast.datasets import IMAGE_DATASETS

        if name not in IMAGE_DATASETS:
            raise typer.BadParameter(f"expected one of {', '.join(IMAGE_DATASETS)}, got {name!r}")
    return name


def _known_tuning(name: str | None) -> str | None:
    if name is not None:
        from ulfine_fast.tuning import TUNINGS

        if name not in TUNINGS:
            raise typer.BadParameter(f"expected one of {', '.join(TUNINGS)}, got {name!r}")
    return name


def _known_pipeline(name: str | None) -> str | None:
    if name is not None:
        from ulfine_fast.augment import PIPELINES

        if name not in PIPELINES:
            raise typer.BadParameter(f"expected one of {', '.join(PIPELINES)}, got {name!r}")
    return name


def _known_or_all(names: list[str] | None) -> list[str]:
    return [_known(name) for name in names or METHODS]


@app.command(
    epilog="Example: [bold]ulfine-fast demo --seeds 1[/bold]",
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    method: Annotated[
        list[str] | None,
        typer.Option(
            callback=_known_or_all,
            metavar="NAME",
            help="Only this method; repeat for more.",
            show_default="all",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = SCHEDULE.steps,
    threads: Threads = 0,
) -> None:
    """Train every method on the data that ships with the package, and compare them.

    The first run encodes 18,000 views (about 3 minutes on one core), later runs read them from the cache.
    """
    _check_demo_folder(out)
    _set_threads(threads)
    from ulfine_fast.demo import run_demo

    chosen = {name: METHODS[name] for name in method}
    run_demo(
        out, seeds=range(seeds), methods=chosen, schedule=replace(SCHEDULE, steps=steps), console=_console()
    )


@app.command(
    epilog="Examples:\n\n[bold]ulfine-fast train --method ulfine --seed 1 --out runs/first[/bold]\n\n"
    "[bold]ulfine-fast train --method ulfine --set mu=0.01 --set adjust_unlabelled=kept[/bold]\n\n"
    "[bold]ulfine-fast train --method fixmatch --unlabelled reversed --steps 2000 --resume[/bold]",
)
def train(
    ctx: typer.Context,
    method: Annotated[
        str, typer.Option(callback=_known, metavar="NAME", help=f"Preset: {', '.join(METHODS)}.")
    ] = "ulfine",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help=f"Change one field of the preset; repeat for more. Fields: {', '.join(_settings(Method))}.",
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            callback=_known_dataset,
            metavar="NAME",
            help="fashion-mnist-subset or fashion-mnist.",
            rich_help_panel=PANEL_DATA,
        ),
    ] = DATA.dataset,
    protocol: Annotated[
        Literal["acr", "daso", "usb"],
        typer.Option(
            help="How the split is drawn; in acr every labelled image is an unlabelled one too.",
            rich_help_panel=PANEL_DATA,
        ),
    ] = DATA.protocol,
    labelled_largest: Annotated[
        int, typer.Option(min=1, help="Labelled images of the largest class.", rich_help_panel=PANEL_DATA)
    ] = DATA.labelled_largest,
    unlabelled_largest: Annotated[
        int, typer.Option(min=0, help="Unlabelled images of the largest class.", rich_help_panel=PANEL_DATA)
    ] = DATA.unlabelled_largest,
    imbalance: Annotated[
        float, typer.Option(min=1, help="Largest class / smallest class.", rich_help_panel=PANEL_DATA)
    ] = DATA.imbalance,
    unlabelled: Annotated[
        Literal["consistent", "uniform", "reversed"],
        typer.Option(
            help="Order of the unlabelled class sizes against the labelled ones.", rich_help_panel=PANEL_DATA
        ),
    ] = DATA.unlabelled,
    class_order: Annotated[
        Literal["index", "shuffled"],
        typer.Option(help="Head to tail by class index, or drawn from the seed.", rich_help_panel=PANEL_DATA),
    ] = DATA.class_order,
    size: Annotated[
        int,
        typer.Option(
            min=32,
            help="Side of the encoder's input in pixels, a multiple of 32.",
            rich_help_panel=PANEL_DATA,
        ),
    ] = DATA.size,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split and of the training.")] = DATA.seed,
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps.", rich_help_panel=PANEL_TRAINING)
    ] = SCHEDULE.steps,
    labelled_batch: Annotated[
        int, typer.Option(min=1, help="Labelled images per step.", rich_help_panel=PANEL_TRAINING)
    ] = SCHEDULE.labelled_batch,
    unlabelled_batch: Annotated[
        int, typer.Option(min=0, help="Unlabelled images per step.", rich_help_panel=PANEL_TRAINING)
    ] = SCHEDULE.unlabelled_batch,
    optimizer: Annotated[
        Literal["sgd", "adamw"], typer.Option(help="sgd has momentum 0.9.", rich_help_panel=PANEL_TRAINING)
    ] = SCHEDULE.optimizer,
    learning_rate: Annotated[
        float,
        typer.Option(
            help="Learning rate at the start; a cosine takes it to 0.", rich_help_panel=PANEL_TRAINING
        ),
    ] = SCHEDULE.learning_rate,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="Weight decay of the linear probe.", rich_help_panel=PANEL_TRAINING)
    ] = SCHEDULE.weight_decay,
    log_every: Annotated[
        int,
        typer.Option(min=1, help="Steps between two records of the history.", rich_help_panel=PANEL_TRAINING),
    ] = SCHEDULE.log_every,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/METHOD")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint in the run folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run folder of another configuration.")
    ] = False,
    device: Annotated[Device, typer.Option(help="auto takes CUDA if there is a device.")] = "auto",
    backend: Annotated[
        Backend,
        typer.Option(help="Implementation of the ops; auto takes the fastest, a name runs or fails."),
    ] = "auto",
    capture: Annotated[
        bool,
        typer.Option(help="Run the steps as one CUDA graph; the result is the same. Needs a CUDA device."),
    ] = False,
    threads: Threads = 0,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Let torch use deterministic algorithms only.")
    ] = False,
) -> None:
    """Train one method on one split; write checkpoint, metrics, predictions and pictures."""
    if resume and overwrite:
        raise typer.BadParameter("expected --resume or --overwrite, got both")
    try:
        data = Data(
            dataset=dataset,
            protocol=protocol,
            labelled_largest=labelled_largest,
            unlabelled_largest=unlabelled_largest,
            imbalance=imbalance,
            unlabelled=unlabelled,
            class_order=class_order,
            seed=seed,
            size=size,
        )
        chosen = _changed(METHODS[method], setting or [])
        schedule = Schedule(
            steps=steps,
            labelled_batch=labelled_batch,
            unlabelled_batch=unlabelled_batch,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            seed=seed,
            log_every=log_every,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    run_dir = out or Path("runs") / method
    configuration = {
        "data": asdict(data),
        "name": method,
        "method": asdict(chosen),
        "schedule": asdict(schedule),
    }
    _set_threads(threads)
    _set_deterministic(deterministic)
    from ulfine_fast import experiment, report, run_folder
    from ulfine_fast.backend import use_backend

    run_folder.check_claim(run_dir, configuration, resume=resume, overwrite=overwrite)
    chosen_device = _device(device)
    console = _console()
    console.print(f"Back end: {_backend(backend, chosen_device)}")
    console.print(f"Data: {data.dataset} at {data.size} px, encoded the first time, then read from the cache")
    features = experiment.load_data(data)
    console.print(
        report.split_report(
            experiment.split_rows(features), f"Split of seed {seed} ({protocol}, {unlabelled})"
        )
    )
    console.print(f"Training {method}: {chosen.summary}; {steps if chosen.trained else 0} steps")
    ctx.meta["run_dir"] = run_dir
    with use_backend(backend), run_folder.claim(run_dir, configuration, resume=resume):
        outcome = experiment.run(
            features,
            chosen,
            schedule,
            device=chosen_device,
            run_dir=run_dir,
            resume=resume,
            checkpoint_every=checkpoint_every,
            capture=capture,
        )
    experiment.write_run(run_dir, configuration, features, outcome)
    if chosen.eta_folds:
        console.print(f"eta {outcome.head.eta:g}, chosen on {chosen.eta_folds} folds of the labelled images")
    _print_metrics(console, outcome.metrics, f"{method}, {outcome.seconds:.1f} s of training")
    console.print(f"Wrote metrics.json, predictions.csv, pictures and the checkpoint to {run_dir}")


@app.command(
    epilog="Examples:\n\n"
    "[bold]ulfine-fast finetune --dataset fashion-mnist-subset --size 96 --steps 150[/bold]\n\n"
    "[bold]ulfine-fast finetune --labelled photos/labelled --unlabelled photos/unlabelled --test photos/test"
    " --model ViT-B-16-quickgelu --pretrained openai --precision bf16[/bold]\n\n"
    "[bold]torchrun --nproc-per-node 8 -m ulfine_fast finetune --table images.csv --model ViT-L-14"
    " --pretrained weights.safetensors[/bold]",
)
def finetune(
    ctx: typer.Context,
    method: Annotated[
        str, typer.Option(callback=_known_preset, metavar="NAME", help=f"Preset: {', '.join(PRESETS)}.")
    ] = "ulfine",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change one field of the method; repeat for more. An unknown field lists the known ones.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            callback=_known_images,
            metavar="NAME",
            help="Draw a long-tailed split of fashion-mnist-subset, fashion-mnist, cifar10, cifar100, svhn, stl10 or"
            " food101.",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            "--labelled",
            "--labeled",
            metavar="DIR",
            help="Labelled images, a folder for each class.",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    unlabelled: Annotated[
        Path | None,
        typer.Option(
            "--unlabelled",
            "--unlabeled",
            metavar="DIR",
            help="Unlabelled images, in whatever folders.",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Test images, a folder for each class.", rich_help_panel=PANEL_DATA),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV, TSV or Parquet file with columns path, label, split (train, unlabelled, test).",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    train_list: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Text file with a line "path label" for each training image (ImageNet-LT, Places-LT, iNaturalist).',
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    test_list: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The same of the test images.", rich_help_panel=PANEL_DATA),
    ] = None,
    imagenet127: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Pickles of downsampled ImageNet, for ImageNet-127.",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that the paths of the table or of the lists start from.",
            show_default="that of the table or of the training list",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A name in each line, for lists and for ImageNet-127.",
            show_default="numbers",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    superclasses: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The superclass of each class of ImageNet, where the pickles have these.",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    labelled_share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Labelled share of each class, for lists and for ImageNet-127.",
            show_default="0.25 and 0.1",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    protocol: Annotated[
        Literal["acr", "daso", "usb"],
        typer.Option(
            help="How the split is drawn; in acr every labelled image is an unlabelled one too.",
            rich_help_panel=PANEL_DATA,
        ),
    ] = IMAGES.protocol,
    labelled_largest: Annotated[
        int, typer.Option(min=1, help="Labelled images of the largest class.", rich_help_panel=PANEL_DATA)
    ] = IMAGES.labelled_largest,
    unlabelled_largest: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Unlabelled images of the largest class.",
            show_default="twice the labelled ones",
            rich_help_panel=PANEL_DATA,
        ),
    ] = None,
    imbalance: Annotated[
        float, typer.Option(min=1, help="Largest class / smallest class.", rich_help_panel=PANEL_DATA)
    ] = IMAGES.imbalance,
    distribution: Annotated[
        Literal["consistent", "uniform", "reversed"],
        typer.Option(
            help="Order of the unlabelled class sizes against the labelled ones.", rich_help_panel=PANEL_DATA
        ),
    ] = IMAGES.distribution,
    class_order: Annotated[
        Literal["index", "shuffled"],
        typer.Option(help="Head to tail by class index, or drawn from the seed.", rich_help_panel=PANEL_DATA),
    ] = IMAGES.class_order,
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="lite0, lite2 (offline), a model of open_clip, timm:NAME, or a folder with a model of open_clip.",
            rich_help_panel=PANEL_ENCODER,
        ),
    ] = "lite0",
    pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="TAG|FILE",
            help="Its weights: a tag of open_clip or timm, or a checkpoint file.",
            rich_help_panel=PANEL_ENCODER,
        ),
    ] = None,
    space: Annotated[
        Literal["joint", "visual"] | None,
        typer.Option(
            help="Features of CLIP: after its projection, or before it.",
            show_default="the method's",
            rich_help_panel=PANEL_ENCODER,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side of the input in pixels.",
            show_default="the model's",
            rich_help_panel=PANEL_ENCODER,
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Prompt with {} for the class name; repeat for an ensemble.",
            show_default="the model's",
            rich_help_panel=PANEL_ENCODER,
        ),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the encoder.", rich_help_panel=PANEL_ENCODER)
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Less memory: compute activations again in the backward pass.",
            rich_help_panel=PANEL_ENCODER,
        ),
    ] = False,
    tuning: Annotated[
        str | None,
        typer.Option(
            callback=_known_tuning,
            metavar="NAME",
            help="What of the encoder is trained: linear_probe (nothing), full, partial, adaptformer, adapter, lora,"
            " lora_mlp, ssf, bitfit, ln_tune, vpt_shallow, vpt_deep.",
            show_default="the method's",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Width or rank of the modules, or number of prompts.",
            show_default="LIFT's rule",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tune only so many of the last blocks.",
            show_default="all",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            callback=_known_pipeline,
            metavar="NAME",
            help="Augmentation: lift, lift_plus, finessl, loft, small (32 px).",
            show_default="the method's",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Training steps.",
            show_default=f"{TUNING.steps}, 0 for zero_shot",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = None,
    labelled_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Labelled images per step, of all processes.",
            show_default=str(TUNING.labelled_batch),
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = None,
    unlabelled_batch: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Unlabelled images per step, of all processes.",
            show_default=f"{TUNING.unlabelled_batch}, 32 for finessl",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = None,
    parts: Annotated[
        int,
        typer.Option(
            min=1, help="Encode a batch in so many parts: less memory.", rich_help_panel=PANEL_TRAINING
        ),
    ] = TUNING.parts,
    optimizer: Annotated[
        Literal["sgd", "adamw"], typer.Option(help="sgd has momentum 0.9.", rich_help_panel=PANEL_TRAINING)
    ] = TUNING.optimizer,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Learning rate at the start; a cosine takes it to 0.",
            show_default="the method's",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="Weight decay.", rich_help_panel=PANEL_TRAINING)
    ] = TUNING.weight_decay,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(
            help="Of the encoder's products; weights and head stay float32.", rich_help_panel=PANEL_TRAINING
        ),
    ] = TUNING.precision,
    ema: Annotated[
        float,
        typer.Option(
            min=0,
            help="Evaluate a running mean of the weights that keeps this share per step; 0: the last weights.",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = TUNING.ema,
    augment_on_device: Annotated[
        bool,
        typer.Option(
            "--augment-on-device",
            help="RandAugment on the device, where the processors cannot keep up with it.",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = TUNING.augment_on_device,
    look_ahead: Annotated[
        bool,
        typer.Option(
            "--look-ahead",
            help="Pseudo-labels from the weights of the step before: strong views are made while a step runs.",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = TUNING.look_ahead,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Split encoder, gradients and optimizer over the processes (FSDP): less memory in each.",
            rich_help_panel=PANEL_TRAINING,
        ),
    ] = TUNING.shard,
    log_every: Annotated[
        int,
        typer.Option(min=1, help="Steps between two records of the history.", rich_help_panel=PANEL_TRAINING),
    ] = TUNING.log_every,
    crops: Annotated[
        Literal["single", "five"] | None,
        typer.Option(help="Views of a test image.", show_default="the method's", rich_help_panel=PANEL_RUN),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the split and of the training.", rich_help_panel=PANEL_RUN)
    ] = TUNING.seed,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Threads that read images.",
            show_default="one for each processor, at most 16",
            rich_help_panel=PANEL_RUN,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between two checkpoints.", rich_help_panel=PANEL_RUN)
    ] = 500,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder.", show_default="runs/METHOD-finetuned", rich_help_panel=PANEL_RUN),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the checkpoint in the run folder.", rich_help_panel=PANEL_RUN
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace a run folder of another configuration.", rich_help_panel=PANEL_RUN
        ),
    ] = False,
    device: Annotated[
        Device, typer.Option(help="auto takes CUDA if there is a device.", rich_help_panel=PANEL_RUN)
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help=THREADS_HELP, rich_help_panel=PANEL_RUN)] = 0,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="Let torch use deterministic algorithms only.", rich_help_panel=PANEL_RUN
        ),
    ] = False,
) -> None:
    """Fine-tune an encoder with its head on images; write checkpoint, metrics, predictions and pictures.

    Images come from a data set (--dataset), from folders (--labelled, --unlabelled, --test), from a table (--table), from
    lists (--train-list, --test-list) or from ImageNet's pickles (--imagenet127).
    Under torchrun several processes share every batch.
    """
    if resume and overwrite:
        raise typer.BadParameter("expected --resume or --overwrite, got both")
    preset = PRESETS[method]
    given = {
        "tuning": tuning,
        "pipeline": pipeline,
        "steps": steps,
        "labelled_batch": labelled_batch,
        "unlabelled_batch": unlabelled_batch,
        "learning_rate": learning_rate,
    }
    given = {name: value for name, value in given.items() if value is not None}
    try:
        images = Images(
            dataset=dataset,
            protocol=protocol,
            labelled_largest=labelled_largest,
            unlabelled_largest=unlabelled_largest,
            imbalance=imbalance,
            distribution=distribution,
            class_order=class_order,
            labelled=_text(labelled),
            unlabelled=_text(unlabelled),
            test=_text(test),
            table=_text(table),
            root=_text(root),
            train_list=_text(train_list),
            test_list=_text(test_list),
            imagenet127=_text(imagenet127),
            superclasses=_text(superclasses),
            class_names=_text(class_names),
            labelled_share=labelled_share,
            seed=seed,
        )
        of_clip = model not in ("lite0", "lite2") and not model.startswith("timm:")
        encoder = Encoder(
            model=model,
            pretrained=pretrained,
            space=space or (preset.space if of_clip else "joint"),
            size=size,
            templates=tuple(template) if template else None,
            compile=compile_,
            gradient_checkpointing=gradient_checkpointing,
        )
        schedule = FineTuning(
            **{**preset.tuning, **given},
            width=width,
            blocks=blocks,
            parts=parts,
            optimizer=optimizer,
            weight_decay=weight_decay,
            precision=precision,
            ema=ema,
            augment_on_device=augment_on_device,
            look_ahead=look_ahead,
            shard=shard,
            seed=seed,
            log_every=log_every,
        )
        _set_threads(threads)
        _set_deterministic(deterministic)
        from ulfine_fast.learners import LEARNERS

        chosen = _changed(LEARNERS[preset.learner], setting or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    import torch

    from ulfine_fast import image_experiment, report, run_folder
    from ulfine_fast.distributed import process_group, world

    here, chosen_device = world(), _device(device)
    run_dir = out or Path("runs") / f"{method}-finetuned"
    configuration = {
        "images": asdict(images),
        "encoder": asdict(encoder),
        "name": method,
        "method": asdict(chosen),
        "schedule": schedule.identity(),
        "crops": crops or preset.crops,
    }
    if chosen_device == "cuda":
        torch.cuda.set_device(here.local_rank)
    with process_group(here, torch.device(chosen_device)):
        if here.leads:
            run_folder.check_claim(run_dir, configuration, resume=resume, overwrite=overwrite)
        console = _console(quiet=not here.leads)
        data = image_experiment.load_images(images)
        rows = image_experiment.class_rows(data)
        console.print(report.split_report(rows, "Training images", len(data.unlabelled)))
        for note in data.notes:
            console.print(f"Note: {note}")
        console.print(
            f"Fine-tuning {method}: {preset.summary}; {model}, {schedule.tuning}, {schedule.steps} steps on"
            f" {here.size} x {chosen_device}"
        )
        ctx.meta["run_dir"] = run_dir
        outcome = image_experiment.run(
            data,
            encoder,
            chosen,
            schedule,
            device=chosen_device,
            world=here,
            crops=configuration["crops"],
            workers=workers,
            run_dir=run_dir,
            resume=resume,
            checkpoint_every=checkpoint_every,
            claim=run_folder.claim(run_dir, configuration, resume=resume) if here.leads else None,
        )
        if here.leads:
            image_experiment.write_run(run_dir, configuration, data, outcome)
    if getattr(chosen, "eta_folds", 0):
        eta = image_experiment.chosen_eta(outcome.student)
        console.print(f"eta {eta:g}, chosen on {chosen.eta_folds} folds of the labelled images")
    cost = f"{outcome.training.seconds:.1f} s of training"
    if outcome.training.history:
        cost += f", {outcome.training.history[-1]['images_per_second']:,.0f} images/s"
    if chosen_device == "cuda":
        cost += f", at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of device memory"
    console.print(f"Cost: {cost}")
    _print_metrics(console, outcome.metrics, f"{method} after {outcome.training.steps} steps")
    if data.report.summary():
        console.print(f"Reading: {data.report.summary()}")
    console.print(
        f"Weights {outcome.digest}; wrote metrics.json, predictions.csv, pictures and the checkpoint to {run_dir}"
    )


@app.command(
    epilog="Examples:\n\n[bold]ulfine-fast evaluate runs/first[/bold]\n\n"
    "[bold]ulfine-fast evaluate runs/ulfine-finetuned --crops five[/bold]"
)
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="Folder that train or finetune wrote.", metavar="RUN_DIR")],
    device: Annotated[Device, typer.Option(help="auto takes CUDA if there is a device.")] = "auto",
    crops: Annotated[
        Literal["single", "five"] | None,
        typer.Option(help="Views of a test image, for a run of finetune.", show_default="those of the run"),
    ] = None,
    threads: Threads = 0,
) -> None:
    """Load the checkpoint of a run, evaluate it on the test set, write evaluation.json."""
    _set_threads(threads)
    from ulfine_fast import experiment, report, run_folder

    configuration = run_folder.read_configuration(run_dir)
    chosen_device = _device(device)
    if "images" in configuration:
        from ulfine_fast import image_experiment

        steps, metrics = image_experiment.evaluate_run(
            run_dir, configuration, device=chosen_device, crops=crops
        )
    elif crops:
        raise ValueError(f"--crops: expected a run of finetune, got {run_dir}, whose features are cached")
    else:
        steps, metrics = experiment.evaluate_run(run_dir, configuration, device=chosen_device)
    report.write_json(
        run_dir / run_folder.EVALUATION,
        {**experiment.surroundings(), "units": experiment.UNITS, "steps": steps, "metrics": metrics},
    )
    console = _console()
    _print_metrics(console, metrics, f"{configuration['name']} after {steps} steps")
    console.print(f"Wrote {run_folder.EVALUATION} to {run_dir}")


@app.command(epilog="Example: [bold]ulfine-fast export runs/ulfine-finetuned head.safetensors[/bold]")
def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder that finetune wrote.", metavar="RUN_DIR")],
    out: Annotated[Path, typer.Argument(help="The file to write, .safetensors.", metavar="FILE")],
) -> None:
    """Write the head of a run as one linear layer: logits = weight @ unit(feature).

    The file has weight [C, D], centre [D] for an encoder that has one, and the class names.
    """
    from ulfine_fast import image_experiment, run_folder

    configuration = run_folder.read_configuration(run_dir)
    if "images" not in configuration:
        raise ValueError(f"{run_dir}: expected a run of finetune, got one on cached features")
    image_experiment.export_run(run_dir, configuration, out)
    _console().print(f"Wrote {out}")


@app.command(epilog="Example: [bold]ulfine-fast info --json[/bold]")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, threads, the back ends that can run here, and the cache."""
    import torch

    from ulfine_fast.backend import automatic, availability
    from ulfine_fast.cache import default_cache_dir
    from ulfine_fast.experiment import versions

    folder = default_cache_dir()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    known = versions()
    device = _device("auto")
    record = {
        "version": known["ulfine_fast"],
        "versions": known,
        "threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {name: state._asdict() for name, state in availability().items()},
        "auto": {"takes": automatic(device), "by_classes": _choices(device)},
        "cache": {"folder": str(folder), "bytes": size},
    }
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        _print_info(record)


def _choices(device: str) -> dict[str, dict[str, str]]:
    """Back end that `auto` takes for float32: by op, then by range of the number of classes."""
    import torch

    from ulfine_fast.backend import COMPOSED, OPS, choose
    from ulfine_fast.fastest import RANGES

    features = torch.empty(0, device=device)
    ranges = {**{f"up to {most}": most for most in RANGES}, "more": RANGES[-1] + 1}
    return {
        op: {name: choose(op, features, classes, torch.float32, "auto") for name, classes in ranges.items()}
        for op in (*OPS, *COMPOSED)
    }


def _print_info(record: dict[str, Any]) -> None:
    from rich.table import Table

    from ulfine_fast.fastest import FASTEST

    console = _console()
    versions = ", ".join(
        f"{name} {value}" for name, value in record["versions"].items() if name != "ulfine_fast"
    )
    console.print(f"ulfine-fast {record['version']} ({versions})")
    console.print(f"CPU threads: {record['threads']}; CUDA device: {record['cuda_device'] or 'none'}")
    table = Table(box=None, pad_edge=False)
    for column in ("back end", "runs here", "note"):
        table.add_column(column, overflow="fold")
    for name, state in record["backends"].items():
        table.add_row(name, "yes" if state["available"] else "no", state["reason"])
    console.print(table)
    auto = record["auto"]
    console.print(f"auto takes: {auto['takes']}", soft_wrap=True)
    if record["cuda_device"] in FASTEST:
        columns = list(next(iter(auto["by_classes"].values())))
        table = Table("classes", *columns, box=None, pad_edge=False)
        for op, choice in auto["by_classes"].items():
            table.add_row(op, *choice.values())
        console.print(table)
    console.print(
        f"Feature cache: {record['cache']['folder']}, {record['cache']['bytes'] / 1e6:.1f} MB", soft_wrap=True
    )


def _console(*, quiet: bool = False) -> Console:
    from rich.console import Console

    # Piped output keeps its tables whole.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(width=width, highlight=False, quiet=quiet)


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _set_deterministic(deterministic: bool) -> None:
    if deterministic:
        import torch

        # cuBLAS is deterministic with a fixed workspace only
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: expected a CUDA device, got none; use --device cpu")
    return name


def _backend(requested: str, device: str) -> str:
    """What runs the ops, for people; raises if `requested` cannot run on `device`."""
    import torch

    from ulfine_fast import _native
    from ulfine_fast.backend import automatic, choose

    if requested == "auto":
        return automatic(device)
    name = choose("head_loss", torch.empty(0, device=device), 1, torch.float32, requested)
    return f"cpp ({_native.isa()})" if name == "cpp" else name


def _changed(method: Any, settings: list[str]) -> Any:
    """The config `method` with FIELD=VALUE settings; ValueError for an unknown field or a value of another type."""
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set: expected FIELD=VALUE, got {setting!r}")
        if name not in _settings(method):
            raise ValueError(f"--set: expected one of {', '.join(_settings(method))}, got {name!r}")
        kind = type(getattr(method, name))
        if kind is bool:
            if text not in ("true", "false"):
                raise ValueError(f"--set {name}: expected true or false, got {text!r}")
            changes[name] = text == "true"
        else:
            try:
                changes[name] = kind(text)
            except ValueError as error:
                raise ValueError(f"--set {name}: expected {kind.__name__}, got {text!r}") from error
    if "eta" in changes and hasattr(method, "eta_folds"):
        # A preset that would choose it takes the one that is given.
        changes.setdefault("eta_folds", 0)
    return replace(method, **changes)


def _check_demo_folder(out: Path) -> None:
    """Raise unless `out` holds nothing but what an earlier demo left, and can be written."""
    from ulfine_fast import run_folder
    from ulfine_fast.report import PICTURES

    own = {"metrics.json", "predictions.csv", *PICTURES}
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a folder, got a file")
    others = sorted(path.name for path in out.iterdir() if path.name not in own) if out.exists() else []
    if others:
        raise FileExistsError(f"{out}: expected an empty folder or that of a demo, got {others[0]} in it")
    run_folder.check_writable(out)


def _print_metrics(console: Console, metrics: dict[str, dict[str, Any]], title: str) -> None:
    from ulfine_fast.report import branch_table

    console.print(branch_table(metrics, title))


def main() -> None:
    """Entry point of the command."""
    app(prog_name="ulfine-fast")
