"""The command `ulfine-fast`: demo, train, finetune, evaluate, export, info.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 and 143 stopped by SIGINT and SIGTERM. Heavy modules are imported
by the command that needs them, so that help comes at once.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ulfine_fast import finetune_command
from ulfine_fast.command_options import changed, known, record, with_options
from ulfine_fast.config import METHODS, Data, FineTuning, Schedule
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
    set_deterministic,
    set_threads,
    shown_log,
    usable_device,
    wrong_usage,
)

Backend = Literal["auto", "reference", "cpp"]
SCHEDULE = Schedule()
At = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="Where images or weights of a run of finetune lie, if they were moved: test, table, root, pretrained ..."
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
    help="Long-tailed semi-supervised fine-tuning of vision-language models,\non images (finetune) or on cached features (train).",
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
    return [known(METHODS)(name) for name in names or METHODS]


@app.command(
    epilog="Example: [bold]ulfine-fast demo --seeds 1[/bold]",
)
def demo(
    ctx: typer.Context,
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
    from ulfine_fast import run_folder
    from ulfine_fast.demo import run_demo

    ctx.with_resource(run_folder.hold(out))
    _check_demo_folder(out)
    set_threads(threads)

    chosen = {name: METHODS[name] for name in method}
    run_demo(
        out,
        seeds=range(seeds),
        methods=chosen,
        schedule=replace(SCHEDULE, steps=steps),
        console=make_console(),
    )


@app.command(
    epilog="Examples:\n\n[bold]ulfine-fast train --method ulfine --seed 1 --out runs/first[/bold]\n\n"
    "[bold]ulfine-fast train --method ulfine --set mu=0.01 --set adjust_unlabelled=kept[/bold]\n\n"
    "[bold]ulfine-fast train --method fixmatch --unlabelled reversed --steps 2000 --resume[/bold]",
)
@with_options({"Data": Data, TRAINING: Schedule})
def train(
    ctx: typer.Context,
    *,
    method: Annotated[
        str, typer.Option(callback=known(METHODS), metavar="NAME", help=f"Preset: {', '.join(METHODS)}.")
    ] = "ulfine",
    given: dict[str, Any],
    setting: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/METHOD")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    checkpoint_every: CheckpointEvery = 100,
    device: Device = "auto",
    backend: Annotated[
        Backend,
        typer.Option(
            help="Implementation of the ops; auto takes the fastest, a name runs or fails.",
            rich_help_panel=RUN,
        ),
    ] = "auto",
    capture: Annotated[
        bool,
        typer.Option(
            help="Run the steps as one CUDA graph; the result is the same. Needs a CUDA device.",
            rich_help_panel=RUN,
        ),
    ] = False,
    threads: Threads = 0,
    deterministic: Deterministic = False,
) -> None:
    """Train one method on one split; write checkpoint, metrics, predictions and pictures."""
    check_folder_choice(resume, overwrite)
    with wrong_usage():
        data, schedule = record(Data, given), record(Schedule, given)
        chosen = changed(METHODS[method], setting or ())
    if schedule.steps == 0:
        raise typer.BadParameter("expected at least 1, got 0; zero_shot takes none", param_hint="'--steps'")
    run_dir = out or Path("runs") / method
    configuration = {
        "data": asdict(data),
        "name": method,
        "method": asdict(chosen),
        "schedule": asdict(FineTuning(**asdict(schedule))),
    }
    set_threads(threads)
    set_deterministic(deterministic)
    from ulfine_fast import experiment, report, run_folder
    from ulfine_fast.backend import use_backend

    ctx.with_resource(shown_log())
    ctx.with_resource(run_folder.reserve(run_dir, configuration, resume=resume, overwrite=overwrite))
    chosen_device = usable_device(device)
    console = make_console()
    console.print(f"Back end: {_backend(backend, chosen_device)}")
    console.print(f"Data: {data.dataset} at {data.size} px, encoded the first time, then read from the cache")
    features = experiment.load_data(data)
    console.print(
        report.split_report(
            experiment.split_rows(features), f"Split of seed {data.seed} ({data.protocol}, {data.unlabelled})"
        )
    )
    console.print(f"Training {method}: {chosen.summary}; {schedule.steps if chosen.trained else 0} steps")
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
        console.print(
            f"eta {outcome.learner.config.eta:g}, chosen on {chosen.eta_folds} folds of the labelled images"
        )
    print_metrics(console, outcome.metrics, f"{method}, {outcome.seconds:.1f} s of training")
    console.print(f"Wrote metrics.json, predictions.csv, pictures and the checkpoint to {run_dir}")


app.command(epilog=finetune_command.EPILOG)(finetune_command.finetune)


@app.command(
    epilog="Examples:\n\n[bold]ulfine-fast evaluate runs/first[/bold]\n\n"
    "[bold]ulfine-fast evaluate runs/ulfine-finetuned --crops five[/bold]"
)
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="Folder that train or finetune wrote.", metavar="RUN_DIR")],
    device: Device = "auto",
    crops: Annotated[
        Literal["single", "five"] | None,
        typer.Option(help="Views of a test image, for a run of finetune.", show_default="those of the run"),
    ] = None,
    at: At = None,
    threads: Threads = 0,
) -> None:
    """Load the checkpoint of a run, evaluate it on the test set, write evaluation.json."""
    set_threads(threads)
    from ulfine_fast import experiment, report, run_folder

    configuration = run_folder.located(run_folder.read_configuration(run_dir), at or ())
    chosen_device = usable_device(device)
    reading = ""
    if "images" in configuration:
        from ulfine_fast import image_experiment

        steps, metrics, reading = image_experiment.evaluate_run(
            run_dir, configuration, device=chosen_device, crops=crops
        )
    elif crops:
        raise ValueError(f"--crops: expected a run of finetune, got {run_dir}, whose features are cached")
    else:
        steps, metrics = experiment.evaluate_run(run_dir, configuration, device=chosen_device)
    report.write_json(
        run_dir / run_folder.EVALUATION,
        {
            **experiment.surroundings(),
            "units": experiment.UNITS,
            "steps": steps,
            "reading": reading,
            "metrics": metrics,
        },
    )
    console = make_console()
    print_metrics(console, metrics, f"{configuration['name']} after {steps} steps")
    if reading:
        console.print(f"Reading: {reading}", markup=False)
    console.print(f"Wrote {run_folder.EVALUATION} to {run_dir}")


@app.command(epilog="Example: [bold]ulfine-fast export runs/ulfine-finetuned head.safetensors[/bold]")
def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder that finetune wrote.", metavar="RUN_DIR")],
    out: Annotated[Path, typer.Argument(help="The file to write, .safetensors.", metavar="FILE")],
    at: At = None,
) -> None:
    """Write the head of a run as one linear layer: logits = weight @ unit(feature).

    The file has weight [C, D], centre [D] for an encoder that has one, and the class names; not the encoder, tuned
    or not.
    """
    from ulfine_fast import image_experiment, run_folder

    configuration = run_folder.located(run_folder.read_configuration(run_dir), at or ())
    if "images" not in configuration:
        raise ValueError(f"{run_dir}: expected a run of finetune, got one on cached features")
    image_experiment.export_run(run_dir, configuration, out)
    console, tuning = make_console(), configuration["schedule"]["tuning"]
    console.print(f"Wrote {out}")
    if tuning != "linear_probe":
        console.print(
            f"Note: the encoder was tuned, too ({tuning}), and is not in the file. This head fits the features of the"
            f" tuned encoder, which {run_dir} has, and not those of {configuration['encoder']['model']} as it comes."
        )


@app.command(epilog="Example: [bold]ulfine-fast info --json[/bold]")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, threads, the back ends that can run here, and the cache."""
    import torch

    from ulfine_fast.backend import automatic, availability
    from ulfine_fast.cache import CacheError, default_cache_dir
    from ulfine_fast.experiment import versions

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


def _check_demo_folder(out: Path) -> None:
    """Raise unless `out`, which is held, has nothing in it but what an earlier demo left."""
    from ulfine_fast.run_folder import LOCK, REPORTS

    others = sorted(path.name for path in out.iterdir() if path.name not in (LOCK, *REPORTS))
    if others:
        raise FileExistsError(f"{out}: expected an empty folder or that of a demo, got {others[0]} in it")


def main() -> None:
    """Entry point of the command."""
    # a service may have no standard streams
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (open to the end)
    app(prog_name="ulfine-fast")
