"""The command `ulfine-fast finetune`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from ulfine_fast.config import PRESETS, Encoder, FineTuning, Images
from ulfine_fast.terminal import (
    PANEL_DATA,
    PANEL_ENCODER,
    PANEL_RUN,
    PANEL_TRAINING,
    THREADS_HELP,
    Device,
    changed,
    make_console,
    print_metrics,
    set_deterministic,
    set_threads,
    shown_log,
    usable_device,
)

IMAGES, TUNING = Images(dataset=""), FineTuning()
EPILOG = (
    "Examples:\n\n"
    "[bold]ulfine-fast finetune --dataset fashion-mnist-subset --size 96 --steps 150[/bold]\n\n"
    "[bold]ulfine-fast finetune --labelled photos/labelled --unlabelled photos/unlabelled --test photos/test"
    " --model ViT-B-16-quickgelu --pretrained openai --precision bf16[/bold]\n\n"
    "[bold]torchrun --nproc-per-node 8 -m ulfine_fast finetune --table images.csv --model ViT-L-14"
    " --pretrained weights.safetensors[/bold]"
)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _known_preset(name: str) -> str:
    if name not in PRESETS:
        raise typer.BadParameter(f"expected one of {', '.join(PRESETS)}, got {name!r}")
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
            "--resume",
            help="Continue from the checkpoint in the run folder; --steps may be more.",
            rich_help_panel=PANEL_RUN,
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

    Images: --dataset, folders (--labelled, --unlabelled, --test), --table, lists (--train-list, --test-list), --imagenet127.
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
    from ulfine_fast.encoder import IMAGE_WEIGHTS

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
        of_clip = model not in IMAGE_WEIGHTS and not model.startswith("timm:")
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
        set_threads(threads)
        set_deterministic(deterministic)
        from ulfine_fast.learners import LEARNERS

        chosen = changed(LEARNERS[preset.learner], setting or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    import torch

    from ulfine_fast import image_experiment, report, run_folder
    from ulfine_fast.distributed import process_group, world

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
    print_metrics(console, outcome.metrics, f"{method} after {outcome.training.steps} steps")
    if data.report.summary():
        console.print(f"Reading: {data.report.summary()}")
    console.print(
        f"Weights {outcome.digest}; wrote metrics.json, predictions.csv, pictures and the checkpoint to {run_dir}"
    )
