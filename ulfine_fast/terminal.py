"""What the commands of `ulfine-fast` share: failures in a line, common options, the console."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ulfine_fast.checkpoint import CHECKPOINT, Terminated, stop

if TYPE_CHECKING:
    from rich.console import Console

CTRL_C = 128 + signal.SIGINT
FAILURES = (ValueError, TypeError, RuntimeError, OSError, ImportError)
TRAINING, RUN = "Training", "Run"  # panels of the help


def _flag(name: str, says: str) -> Any:
    return Annotated[bool, typer.Option(name, help=says, rich_help_panel=RUN)]


Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="auto takes CUDA if there is a device.", rich_help_panel=RUN),
]
Threads = Annotated[
    int,
    typer.Option(
        min=0,
        help="CPU threads; 0 takes torch's choice (results may differ in the last bit).",
        rich_help_panel=RUN,
    ),
]
CheckpointEvery = Annotated[
    int, typer.Option(min=1, help="Steps between two checkpoints.", rich_help_panel=RUN)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue from the checkpoint in the run folder; --steps may be more.",
        rich_help_panel=RUN,
    ),
]
Overwrite = _flag("--overwrite", "Replace a run folder of another configuration.")
Deterministic = _flag("--deterministic", "Let torch use deterministic algorithms only.")
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change one field of the method; repeat for more. An unknown field lists the known ones.",
        rich_help_panel=TRAINING,
    ),
]


class Commands(TyperGroup):
    """Turns failures into one or two lines and exit code 1, SIGINT and SIGTERM into a line and 130 and 143."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        if threading.current_thread() is threading.main_thread():
            ctx.call_on_close(partial(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop)))
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
        except (KeyboardInterrupt, Terminated, *FAILURES) as error:
            code = _stopped_by(error)
            if code:
                again = "; nothing was half written, run the same command again"
                by = "Ctrl-C" if code == CTRL_C else "SIGTERM"
                say(f"stopped by {by}" + (how_to_resume(ctx) or again))
                raise typer.Exit(code) from None
            if ctx.params.get("traceback"):
                raise
            from ulfine_fast.images import printable

            lines = [printable(line) for line in str(error).split("\n") if line.strip()]
            lines = lines or [type(error).__name__]
            # a full disk, say: what was written before is whole
            how_on = how_to_resume(ctx) if isinstance(error, OSError) else ""
            say("error: " + "\n".join(lines[: 1 if how_on else 2]) + how_on)
        raise typer.Exit(1)


def _stopped_by(error: BaseException | None) -> int:
    """Exit code for the signal that an error comes from, 0 where it comes from none.

    A signal is raised wherever the process is, and some places (`__set_name__`) make another error of it.
    """
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, Terminated)):
            return error.code if isinstance(error, Terminated) else CTRL_C
        error = error.__cause__
    return 0


def say(text: str) -> None:
    """Print a line on standard error."""
    typer.echo(text, err=True)


def how_to_resume(ctx: Any) -> str:
    """How to go on from the checkpoint; empty where there is none."""
    run_dir = ctx.meta.get("run_dir")
    if run_dir is None or not (run_dir / CHECKPOINT).exists():
        return ""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "; continue from the last checkpoint with the same torchrun command and --resume"
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    command = shlex.join(["ulfine-fast", *words, "--resume"])
    return f"; continue from the last checkpoint with:\n  {command}"


@contextmanager
def wrong_usage() -> Iterator[None]:
    """A ValueError of the block is one of the words of the command: exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def shown_log(*, quiet: bool = False) -> Iterator[None]:
    """What the package logs from level INFO on goes to standard error, line by line; with `quiet` nowhere."""
    logger = logging.getLogger("ulfine_fast")
    handler = logging.NullHandler() if quiet else logging.StreamHandler()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    # a library may have given the root a handler of its own
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = True


def make_console(*, quiet: bool = False) -> Console:
    """A console for standard output that prints names as they are; a quiet one prints nothing."""
    from rich.console import Console

    # Piped output keeps its tables whole.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    # a name may have characters that the encoding of the terminal lacks
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(width=width, markup=False, emoji=False, highlight=False, quiet=quiet)


def check_folder_choice(resume: bool, overwrite: bool) -> None:
    """Raise where both --resume and --overwrite are given."""
    if resume and overwrite:
        raise typer.BadParameter("expected --resume or --overwrite, got both")


def set_threads(threads: int) -> None:
    """Let torch use so many threads; 0 leaves them as they are."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def set_deterministic(deterministic: bool) -> None:
    """Let torch use deterministic algorithms only, if that is asked for."""
    if deterministic:
        import torch

        # cuBLAS is deterministic with a fixed workspace only
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def usable_device(name: str) -> str:
    """The device that a name of `Device` stands for; RuntimeError for a CUDA device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: expected a CUDA device, got none; use --device cpu")
    return name


def print_metrics(console: Console, metrics: dict[str, dict[str, Any]], title: str) -> None:
    """Print the table of the branches of a run."""
    from ulfine_fast.report import branch_table

    console.print(branch_table(metrics, title))
