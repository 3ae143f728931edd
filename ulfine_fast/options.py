"""What a configuration may say: an option is a field of a record with its type, its range, its choices and its help."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable
from dataclasses import field, fields
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, NamedTuple, get_args, get_type_hints

_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
_TEXTS = tuple[str, ...]
_KINDS = {
    int: ("a whole number", Integral),
    float: ("a number", Real),
    bool: ("True or False", bool),
    str: ("a string", str),
    _TEXTS: ("strings in a tuple", (tuple, list)),
}


class Option(NamedTuple):
    """What is known of a field. The command line reads all of it, a record what its values must be.

    help: a sentence. at_least, above, at_most, below: the bounds of a number, which is finite anyhow.
    choices: the values that there are. common: whether it is among the few that most people need.
    metavar: what stands for a value; DIR and FILE are paths. spellings: of the option, in place of its name.
    shown: the default in words. kind, default: type and default of the field.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    common: bool = False
    metavar: str | None = None
    spellings: tuple[str, ...] = ()
    shown: str = ""
    kind: Any = None
    default: Any = None

    @property
    def plain(self) -> Any:
        """The type of a value that is not None."""
        return get_args(self.kind)[0] if isinstance(self.kind, UnionType) else self.kind

    def range(self) -> str:
        """The bounds in words: "at least 0", "in [0, 1)"; empty where there are none."""
        bounds = self._bounds()
        if len(bounds) < 2:
            return "".join(f"{name.replace('_', ' ')} {limit}" for name, limit in bounds.items())
        low, high = bounds.values()
        return f"in {'[' if 'at_least' in bounds else '('}{low}, {high}{']' if 'at_most' in bounds else ')'}"

    def fault(self, value: Any) -> str:
        """What `value` must be and is not, with what it is: "at least 0, got -1"; empty where nothing is wrong."""
        if value is None and self.plain is not self.kind:
            return ""
        name, wanted = _KINDS[self.plain]
        fits = isinstance(value, wanted) and isinstance(value, bool) == (self.plain is bool)
        if not fits or (self.plain == _TEXTS and not all(isinstance(text, str) for text in value)):
            return f"{name}, got {value!r}"
        if self.choices and value not in self.choices:
            return one_of(self.choices, value)
        if self.plain in (int, float):
            bounds = self._bounds()
            # a whole number may be beyond all floats
            if len(bounds) < 2 and not abs(value) <= sys.float_info.max:
                return f"finite, got {value}"
            if not all(_BOUNDS[bound](value, limit) for bound, limit in bounds.items()):
                return f"{self.range()}, got {value}"
        return ""

    def _bounds(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in _BOUNDS if getattr(self, name) is not None}


def option(default: Any, help: str, **details: Any) -> Any:  # noqa: A002
    """A field of a record with its default, its help and what else `Option` has: ranges, choices, spellings."""
    return field(default=default, metadata={"option": Option(help, default=default, **details)})


def share(default: float, help: str, **details: Any) -> Any:  # noqa: A002
    """An option in [0, 1]."""
    return option(default, help, at_least=0, at_most=1, **details)


def redefined(record: type[Record], name: str, default: Any, **details: Any) -> Any:
    """The option `name` of another record with a default of its own, and with other details where they differ."""
    known = options_of(record)[name]
    return field(default=default, metadata={"option": known._replace(default=default, **details)})


@cache
def options_of(record: type[Record]) -> dict[str, Option]:
    """The options of a record by name. Fields that `option` did not make are none."""
    kinds = get_type_hints(record)
    found = {entry.name: entry.metadata.get("option") for entry in fields(record)}
    return {name: each._replace(kind=kinds[name]) for name, each in found.items() if each}


class Record:
    """What all configurations are made from, as frozen dataclasses.

    Raises ValueError for a value that is not of the type, in the range or among the choices of its option.
    """

    def __post_init__(self) -> None:
        for name, each in options_of(type(self)).items():
            fault = each.fault(getattr(self, name))
            if fault:
                raise ValueError(f"{name} must be {fault}")


def one_of(known: Iterable[Any], got: object, where: str = "") -> str:
    """The end of a message about a name that is not known: "one of a, bee, c, got 'be'; did you mean bee?".

    where: what follows the known names, such as " for lite0".
    """
    names = [str(name) for name in known]
    listed = " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
    return f"{listed}{where}, got {got!r}{did_you_mean(got, names)}"


def did_you_mean(got: object, known: Iterable[str]) -> str:
    """The end of such a message where the known names are too many to list; empty where none of them is near."""
    by_letters = {name.lower(): name for name in known}
    near = get_close_matches(str(got).lower(), by_letters, n=1)
    return f"; did you mean {by_letters[near[0]]}?" if near else ""
