"""The command `ulfine-fast`: demo, train, compare, evaluate, export, info.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 and 143 stopped by SIGINT and SIGTERM. Heavy modules are imported
by the command that needs them, so that help comes at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ulfine_fast.command_options import known, record, settings_of, with_options
from ulfine_fast.config import CACHED, DEMO_IMAGES, METHODS, PRESETS, Encoder, Images, Training
from ulfine_fast.options import options_of
from ulfine_fast.terminal import (
    RUN,
    TRAINING,
    CheckpointEvery,
    Commands,
    Deterministic,
    Device,
    Overwrite,
    Resume,
    Settings,
    Threads,
    check_folder_choice,
    make_console,
    print_metrics,
    say,
    set_deterministic,
    set_threads,
    shown_log,
    usable_device,
    wrong_usage,
)

Backend = Annotated[
    Literal["auto", "reference", "cpp"],
    typer.Option(
        help="Implementation of the ops; auto takes the fastest, a name runs or fails.", rich_help_panel=RUN
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Threads that read images.",
        show_default="one for each processor, at most 16",
        rich_help_panel=RUN,
    ),
]
Crops = Annotated[
    Literal["single", "five"] | None,
    typer.Option(help="Views of a test image.", show_default="the method's", rich_help_panel=RUN),
]
DEMO_TRAINING = {"tuning": "none", "pipeline": "small"}
At = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="Where images or weights of a run lie, if they were moved: test, table, root, pretrained ..."
        " Repeat for more.",
        show_default="where they were; relative paths begin where the run began",
    ),
]


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Long-tailed semi-supervised fine-tuning of vision-language models.",
)


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


def _known_or_all(names: list[str] | None) -> list[str]:
    # one that is named twice is trained once
    return [known(PRESETS)(name) for name in dict.fromkeys(names or METHODS)]


Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        callback=_known_or_all,
        metavar="NAME",
        help=f"Only this method; repeat for more: {', '.join(PRESETS)}.",
        show_default=", ".join(METHODS),
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.", rich_help_panel=RUN)]
Jobs = Annotated[
    int,
    typer.Option(
        min=0,
        help="Runs side by side, each on one thread; 0: one for each processor, on a GPU one.",
        rich_help_panel=RUN,
    ),
]


def _by_method() -> dict[str, str]:
    """What is said of the defaults of `Training` that presets change: "5000, 0 for zero_shot"."""
    said = {}
    for field, option in options_of(Training).items():
        others = [f"{p.training[field]} for {name}" for name, p in PRESETS.items() if field in p.training]
        if field in CACHED and field != "tuning":
            others.append(f"{CACHED[field]} with tuning none")
        if others:
            own = ", ".join(others) if len(others) < 3 else "or the method's"
            said[field] = f"{option.default}, {own}"
    return said


OPTIONS = {"Data": Images, "Encoder": Encoder, TRAINING: Training}
EPILOG = (
    "Examples:\n\n"
    "[bold]ulfine-fast train --dataset fashion-mnist-subset --tuning none[/bold]\n\n"
    "[bold]ulfine-fast train --labelled photos/labelled --unlabelled photos/unlabelled --test photos/test"
    " --model ViT-B-16-quickgelu --pretrained openai --tuning none[/bold]\n\n"
    "[bold]ulfine-fast train --features mine.npz --tuning none --method ulfine --set mu=0.01[/bold]\n\n"
    "[bold]torchrun --nproc-per-node 8 -m ulfine_fast train --table images.csv --model ViT-L-14"
    " --pretrained weights.safetensors --precision bf16[/bold]"
)


@app.command(epilog=EPILOG)
@app.command("finetune", hidden=True)
@with_options(OPTIONS, _by_method())
def train(
    ctx: typer.Context,
    *,
    method: Annotated[
        str, typer.Option(callback=known(PRESETS), metavar="NAME", help=f"Preset: {', '.join(PRESETS)}.")
    ] = "ulfine",
    given: dict[str, Any],
    setting: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/METHOD")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    checkpoint_every: CheckpointEvery = 500,
    crops: Crops = None,
    workers: Workers = None,
    device: Device = "auto",
    backend: Backend = "auto",
    capture: Annotated[
        bool,
        typer.Option(
            help="With tuning none: run the steps as one CUDA graph; the result is the same. Needs a CUDA device.",
            rich_help_panel=RUN,
        ),
    ] = False,
    threads: Threads = 0,
    deterministic: Deterministic = False,
) -> None:
    """Train one method: a head, and with most tunings the encoder too; write checkpoint, metrics and pictures.

    Images come from --dataset, folders (--labelled, --unlabelled, --test), --table, lists or --imagenet127.

    With --tuning none, or with --features of your own, training takes seconds.

    Under torchrun several processes share every batch.
    """
    if ctx.info_name == "finetune":
        say("finetune is now called train; this name goes with the next release")
    check_folder_choice(resume, overwrite)
    with wrong_usage():
        from ulfine_fast import run as runs
        from ulfine_fast.learners import LEARNERS

        settings = settings_of(type(LEARNERS[PRESETS[method].learner]), setting or ())
        recipe = runs.recipe(
            record(Images, given), record(Encoder, given), method=method, settings=settings, crops=crops,
            **_training(given),
        )  # fmt: skip
    set_threads(threads)
    set_deterministic(deterministic)
    import torch

    from ulfine_fast import report
    from ulfine_fast.backend import use_backend
    from ulfine_fast.build import AnyData, class_rows
    from ulfine_fast.distributed import process_group, world
    from ulfine_fast.features import FeatureData

    here, chosen_device = world(), usable_device(device)
    run_dir = out or Path("runs") / method
    if chosen_device == "cuda":
        torch.cuda.set_device(here.local_rank)
    console = make_console(quiet=not here.leads)

    def begun(data: AnyData) -> None:
        count = len(data.unlabelled_truth)
        console.print(report.split_report(class_rows(data), "Training images, as listed", count))
        for note in () if isinstance(data, FeatureData) else data.notes:
            console.print(f"Note: {note}")
        features = "own features" if recipe.images.features else recipe.encoder.model
        console.print(
            f"Training {method}: {PRESETS[method].summary}; {features},"
            f" tuning {recipe.training.tuning}, {recipe.training.steps} steps on {here.size} x {chosen_device}"
        )
        ctx.meta["run_dir"] = run_dir

    with process_group(here, torch.device(chosen_device)):
        ctx.with_resource(shown_log(quiet=not here.leads))
        console.print(f"Back end: {_backend(backend, chosen_device)}")
        with use_backend(backend):
            data, outcome = recipe.do(
                run_dir,
                device=chosen_device,
                world=here,
                workers=workers,
                resume=resume,
                overwrite=overwrite,
                checkpoint_every=checkpoint_every,
                capture=capture,
                begun=begun,
            )
    folds = getattr(recipe.method, "eta_folds", 0)
    if folds:
        eta = runs.chosen_eta(outcome.student)
        console.print(f"eta {eta:g}, chosen on {folds} folds of the labelled images")
    cost = f"{outcome.training.seconds:.1f} s of training"
    if outcome.training.history:
        cost += f", {outcome.training.history[-1]['images_per_second']:,.0f} images/s"
    if chosen_device == "cuda":
        cost += f", at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of device memory"
    console.print(f"Cost: {cost}")
    print_metrics(console, outcome.metrics, f"{method} after {outcome.training.steps} steps")
    reading = "" if isinstance(data, FeatureData) else data.report.summary()
    if reading:
        console.print(f"Reading: {reading}")
    console.print(
        f"Weights {outcome.digest}; wrote metrics.json, predictions.csv, pictures and the checkpoint to {run_dir}"
    )


def _training(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of `Training`."""
    return {name: given[name] for name in options_of(Training) if name in given}


@app.command(
    epilog="Examples:\n\n[bold]ulfine-fast compare --dataset fashion-mnist-subset --tuning none --seeds 5[/bold]\n\n"
    "[bold]ulfine-fast compare --features mine.npz --method lift --method ulfine_plus[/bold]\n\n"
    "[bold]ulfine-fast compare runs/first runs/second --out runs/both[/bold]"
)
@with_options(OPTIONS, _by_method())
def compare(
    ctx: typer.Context,
    *,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Finished runs: put them into one table, and train nothing."),
    ] = None,
    method: Methods = None,
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder for the runs and the table.")] = Path("runs/compare"),
    seeds: Seeds = 3,
    jobs: Jobs = 0,
    device: Device = "auto",
) -> None:
    """Train methods on the same data with several seeds, side by side, and compare them in one table.

    Every run has a folder in --out: what is done is not done again, what was interrupted goes on.

    With --tuning none the encoder sees every view once, whatever the number of methods.
    """
    if runs:
        if given:
            raise typer.BadParameter(f"expected runs or what to train on, got both: {', '.join(given)}")
        from ulfine_fast import run_folder
        from ulfine_fast.compare import by_method, write_comparison

        found = by_method(runs)
        ctx.with_resource(run_folder.hold(out))
        write_comparison(out, found, make_console())
        return
    with wrong_usage():
        images, training = record(Images, given), _training(given)
        encoder = record(Encoder, given)
    _compare(ctx, out, images, encoder, training, method, seeds, jobs, device)


def _compare(
    ctx: typer.Context,
    out: Path,
    images: Images,
    encoder: Encoder,
    training: Mapping[str, Any],
    methods: list[str],
    seeds: int,
    jobs: int,
    device: str,
) -> None:
    from ulfine_fast import run_folder
    from ulfine_fast.compare import by_method, do_all, tasks, write_comparison

    chosen_device = usable_device(device)
    jobs = jobs or (1 if chosen_device == "cuda" else len(os.sched_getaffinity(0)))
    ctx.with_resource(shown_log())
    ctx.with_resource(run_folder.hold(out))
    console = make_console()
    with wrong_usage():
        todo = tasks(
            out, images, encoder, training, methods, range(seeds), device=chosen_device,
            threads=0 if chosen_device == "cuda" else 1,
        )  # fmt: skip
    console.print(
        f"{len(todo)} runs: {', '.join(methods)}; seeds 0 to {seeds - 1}; {jobs} at a time"
        if seeds > 1
        else f"{len(todo)} runs: {', '.join(methods)}; seed 0; {jobs} at a time"
    )
    do_all(todo, jobs, console)
    write_comparison(out, by_method([task.run_dir for task in todo]), console)


@app.command(epilog="Example: [bold]ulfine-fast demo --seeds 1[/bold]")
def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the runs and the table.")] = Path("runs/demo"),
    seeds: Seeds = 3,
    method: Methods = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = CACHED["steps"],
    jobs: Jobs = 0,
) -> None:
    """Compare methods on the images that ship with the package: compare, with a frozen encoder and no choices.

    The first time every view is encoded (about 3 minutes on one core), later it is read from the cache.
    """
    training = {**DEMO_TRAINING, "steps": steps}
    _compare(ctx, out, DEMO_IMAGES, Encoder(), training, method, seeds, jobs, "cpu")


@app.command(
    epilog="Examples:\n\n[bold]ulfine-fast evaluate runs/first[/bold]\n\n"
    "[bold]ulfine-fast evaluate runs/ulfine --crops five[/bold]"
)
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="Folder that train wrote.", metavar="RUN_DIR")],
    device: Device = "auto",
    crops: Annotated[
        Literal["single", "five"] | None,
        typer.Option(help="Views of a test image.", show_default="those of the run"),
    ] = None,
    at: At = None,
    threads: Threads = 0,
) -> None:
    """Load the checkpoint of a run, evaluate it on the test set, write evaluation.json."""
    set_threads(threads)
    from ulfine_fast import report, run_folder
    from ulfine_fast import run as runs
    from ulfine_fast.classifier import load_run
    from ulfine_fast.images import ReadReport

    run, reading = load_run(run_dir, usable_device(device), at=at or ()), ReadReport()
    metrics = run.evaluate(crops, reading)
    report.write_json(
        run_dir / run_folder.EVALUATION,
        {
            **runs.surroundings(),
            "units": runs.UNITS,
            "steps": run.steps,
            "reading": reading.summary(),
            "metrics": metrics,
        },
    )
    console = make_console()
    print_metrics(console, metrics, f"{run.configuration['name']} after {run.steps} steps")
    if reading.summary():
        console.print(f"Reading: {reading.summary()}", markup=False)
    console.print(f"Wrote {run_folder.EVALUATION} to {run_dir}")


@app.command(epilog="Example: [bold]ulfine-fast export runs/ulfine head.safetensors[/bold]")
def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder that train wrote.", metavar="RUN_DIR")],
    out: Annotated[Path, typer.Argument(help="The file to write, .safetensors.", metavar="FILE")],
    at: At = None,
) -> None:
    """Write the head of a run as one linear layer: logits = weight @ unit(feature).

    The file has weight [C, D], centre [D] for an encoder that has one, and the class names; not the encoder, tuned
    or not.
    """
    from ulfine_fast.classifier import load_run

    run = load_run(run_dir, at=at or ())
    run.classifier.export(out)
    console, tuning = make_console(), run.configuration["training"]["tuning"]
    console.print(f"Wrote {out}")
    if tuning not in ("none", "linear_probe"):
        console.print(
            f"Note: the encoder was tuned, too ({tuning}), and is not in the file. This head fits the features of the"
            f" tuned encoder, which {run_dir} has, and not those of {run.configuration['encoder']['model']} as it comes."
        )


@app.command(epilog="Example: [bold]ulfine-fast info --json[/bold]")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, threads, the back ends that can run here, and the cache."""
    import torch

    from ulfine_fast.backend import automatic, availability
    from ulfine_fast.cache import CacheError, default_cache_dir
    from ulfine_fast.run import versions

    try:
        folder = default_cache_dir()
        size = (
            sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
        )
        cache = {"folder": str(folder), "bytes": size}
    except CacheError as error:
        cache = {"folder": None, "bytes": 0, "error": str(error)}
    known = versions()
    device = usable_device("auto")
    record = {
        "version": known["ulfine_fast"],
        "versions": known,
        "threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {name: state._asdict() for name, state in availability().items()},
        "auto": {"takes": automatic(device), "by_classes": _choices(device)},
        "cache": cache,
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

    console = make_console()
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
    cache = record["cache"]
    where = cache["error"] if cache["folder"] is None else f"{cache['folder']}, {cache['bytes'] / 1e6:.1f} MB"
    console.print(f"Feature cache: {where}", soft_wrap=True)


def _backend(requested: str, device: str) -> str:
    """What runs the ops, for people; raises if `requested` cannot run on `device`."""
    import torch

    from ulfine_fast import _native
    from ulfine_fast.backend import automatic, choose

    if requested == "auto":
        return automatic(device)
    name = choose("head_loss", torch.empty(0, device=device), 1, torch.float32, requested)
    return f"cpp ({_native.isa()})" if name == "cpp" else name


def main() -> None:
    """Entry point of the command."""
    # a service may have no standard streams
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (open to the end)
    app(prog_name="ulfine-fast")
