"""Options of a command from the fields of records, so that a field says its range, its choices and its help once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ulfine_fast.options import Option, Record, one_of, options_of

R = TypeVar("R", bound=Record)
# Longer choices are listed in the help and not beside the name.
_NARROW = 20


def record(kind: type[R], values: Mapping[str, Any]) -> R:
    """The record of `kind` from those of `values` that are fields of it; the others have their defaults."""
    return kind(**{entry.name: values[entry.name] for entry in fields(kind) if entry.name in values})


def settings_of(kind: type[Record], settings: Iterable[str]) -> dict[str, Any]:
    """Values by field of settings FIELD=VALUE; ValueError for an unknown field or a value of another type."""
    options, found = options_of(kind), {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set: expected FIELD=VALUE, got {setting!r}")
        if name not in options:
            raise ValueError(f"--set: expected {one_of(options, name)}")
        kind = options[name].plain
        if kind is bool and text not in ("true", "false"):
            raise ValueError(f"--set {name}: expected true or false, got {text!r}")
        try:
            found[name] = text == "true" if kind is bool else kind(text)
        except ValueError as error:
            raise ValueError(f"--set {name}: expected {kind.__name__}, got {text!r}") from error
    return found


def known(names: Iterable[str]) -> Callable[[str], str]:
    """A callback of an option that must be one of `names`."""

    def check(name: str) -> str:
        if name not in names:
            raise typer.BadParameter(f"expected {one_of(names, name)}")
        return name

    return check


def with_options(
    panels: Mapping[str, type[Record]], defaults: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of records in the place of its parameter `given`.

    The command gets in `given` the values by field that were given, be they equal to the defaults or not: for others
    it may have defaults of its own. It takes all but `ctx` by keyword.

    panels: records by the panel of the help that their options are in, unless they are common ones. Of a field that
    several have there is one option, that of the last. defaults: what the help says in place of some defaults.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for panel, kind in panels.items():
        for name, option in options_of(kind).items():
            # also its place is that of the last
            parameters.pop(name, None)
            parameters[name] = _parameter(name, option, panel, (defaults or {}).get(name) or option.shown)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(ctx: typer.Context, **values: Any) -> None:
            read = {name: values.pop(name) for name in parameters}
            given = {
                name: _plain(value)
                for name, value in read.items()
                if not ctx.get_parameter_source(name).name.startswith("DEFAULT")
            }
            command(ctx, given=given, **values)

        signature, shown = inspect.signature(command, eval_str=True), []
        for own in signature.parameters.values():
            shown += parameters.values() if own.name == "given" else [own]
        run.__signature__ = signature.replace(parameters=shown)
        return run

    return decorate


def _parameter(name: str, option: Option, panel: str, default: str) -> inspect.Parameter:
    """What typer makes an option of."""
    kind, choices = option.plain, [str(choice) for choice in option.choices]
    says, metavar = option.help.removesuffix("."), option.metavar
    if choices:
        metavar = f"<{'|'.join(choices)}>"
        if len(metavar) > _NARROW:
            says, metavar = f"{says}: {', '.join(choices)}", "NAME"
    elif option.range().startswith("in "):
        # a single bound, such as 0 for a number of steps, is what everyone expects
        says = f"{says} ({option.range()})"
    if metavar in ("DIR", "FILE"):
        kind = Path
    elif kind == tuple[str, ...]:
        kind = list[str]
    spellings = option.spellings or ((f"--{name.replace('_', '-')}",) if kind is bool else ())

    def check(value: Any) -> Any:
        fault = option.fault(_plain(value))
        if fault and value is not None:
            raise typer.BadParameter(f"expected {fault}")
        return value

    info = typer.Option(
        *spellings,
        metavar=metavar,
        help=f"{says}.",
        show_default=default or True,
        rich_help_panel=None if option.common else panel,
        callback=check,
        autocompletion=(lambda: choices) if choices else None,
    )
    annotation = Annotated[kind if option.default is not None else kind | None, info]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation
    )


def _plain(value: Any) -> Any:
    """A value of the command line as a record has it."""
    if isinstance(value, Path):
        return str(value)
    return tuple(value) if isinstance(value, list) else value
