"""The command `ulfine-fast finetune`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ulfine_fast.command_options import changed, known, record, with_options
from ulfine_fast.config import PRESETS, Encoder, FineTuning, Images
from ulfine_fast.options import options_of
from ulfine_fast.terminal import (
    RUN,
    TRAINING,
    CheckpointEvery,
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

EPILOG = (
    "Examples:\n\n"
    "[bold]ulfine-fast finetune --dataset fashion-mnist-subset --size 96 --steps 150[/bold]\n\n"
    "[bold]ulfine-fast finetune --labelled photos/labelled --unlabelled photos/unlabelled --test photos/test"
    " --model ViT-B-16-quickgelu --pretrained openai --precision bf16[/bold]\n\n"
    "[bold]torchrun --nproc-per-node 8 -m ulfine_fast finetune --table images.csv --model ViT-L-14"
    " --pretrained weights.safetensors[/bold]"
)


def _by_method() -> dict[str, str]:
    """What is said of the defaults of `FineTuning` that presets change: "5000, 0 for zero_shot"."""
    said = {}
    for field, option in options_of(FineTuning).items():
        others = [f"{p.tuning[field]} for {name}" for name, p in PRESETS.items() if field in p.tuning]
        if others:
            own = others[0] if len(others) == 1 else "or the method's"
            said[field] = f"{option.default}, {own}"
    return said


@with_options({"Data": Images, "Encoder": Encoder, TRAINING: FineTuning}, _by_method())
def finetune(
    ctx: typer.Context,
    *,
    method: Annotated[
        str, typer.Option(callback=known(PRESETS), metavar="NAME", help=f"Preset: {', '.join(PRESETS)}.")
    ] = "ulfine",
    given: dict[str, Any],
    setting: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/METHOD-finetuned")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    checkpoint_every: CheckpointEvery = 500,
    crops: Annotated[
        Literal["single", "five"] | None,
        typer.Option(help="Views of a test image.", show_default="the method's", rich_help_panel=RUN),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Threads that read images.",
            show_default="one for each processor, at most 16",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
    deterministic: Deterministic = False,
) -> None:
    """Fine-tune an encoder with its head on images; write checkpoint, metrics, predictions and pictures.

    Images: --dataset, folders (--labelled, --unlabelled, --test), --table, lists (--train-list, --test-list), --imagenet127.
    Under torchrun several processes share every batch.
    """
    check_folder_choice(resume, overwrite)
    preset = PRESETS[method]
    with wrong_usage():
        images, encoder = record(Images, given), record(Encoder, given)
        schedule = record(FineTuning, {**preset.tuning, **given})

        from ulfine_fast.learners import LEARNERS

        chosen = changed(LEARNERS[preset.learner], setting or ())
    set_threads(threads)
    set_deterministic(deterministic)
    import torch

    from ulfine_fast import image_experiment, report, run_folder
    from ulfine_fast.distributed import process_group, world
    from ulfine_fast.encoder import IMAGE_WEIGHTS

    # other encoders have one space only
    if "space" not in given and encoder.model not in IMAGE_WEIGHTS and not encoder.model.startswith("timm:"):
        encoder = replace(encoder, space=preset.space)
    here, chosen_device = world(), usable_device(device)
    run_dir = out or Path("runs") / f"{method}-finetuned"
    configuration = {
        "images": asdict(images),
        "encoder": asdict(encoder),
        "name": method,
        "method": asdict(chosen),
        "schedule": asdict(schedule),
        "crops": crops or preset.crops,
        # where relative paths begin
        "began_in": str(Path.cwd()),
    }
    if chosen_device == "cuda":
        torch.cuda.set_device(here.local_rank)
    with process_group(here, torch.device(chosen_device)):
        ctx.with_resource(shown_log(quiet=not here.leads))
        if here.leads:
            ctx.with_resource(run_folder.reserve(run_dir, configuration, resume=resume, overwrite=overwrite))
        console = make_console(quiet=not here.leads)
        data = image_experiment.load_images(images)
        rows = image_experiment.class_rows(data)
        console.print(report.split_report(rows, "Training images, as listed", len(data.unlabelled)))
        for note in data.notes:
            console.print(f"Note: {note}")
        console.print(
            f"Fine-tuning {method}: {preset.summary}; {encoder.model}, {schedule.tuning}, {schedule.steps} steps on"
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
    print_metrics(console, outcome.metrics, f"{method} after {outcome.training.steps} steps")
    if data.report.summary():
        console.print(f"Reading: {data.report.summary()}")
    console.print(
        f"Weights {outcome.digest}; wrote metrics.json, predictions.csv, pictures and the checkpoint to {run_dir}"
    )
