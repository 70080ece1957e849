"""Names of detectors and methods: the name is the name of the class or function behind it."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

from annotated_types import Ge, Le

from detdistill.errors import UserError

T = TypeVar("T")
AtLeastOne = Annotated[int, Ge(1)]
"""A count."""
Width = Annotated[int, Ge(1), Le(8192)]
"""Channels or bins; with more of them a network does not fit into any memory."""
Depth = Annotated[int, Ge(0), Le(64)]
"""Blocks, one after the other."""
SHOWN = 30  # names in a message
REQUIRED = inspect.Parameter.empty
"""Stands for the default of a keyword that has none."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"did you mean X?"` when a known name is close, else the known names, or some of many."""
    known = sorted(known)
    lowered = {entry.lower(): entry for entry in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f"did you mean {lowered[close[0]]!r}?"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"known: {', '.join(known[:SHOWN])}{more}"


class Registry(Generic[T]):
    """A table of names that answers a wrong one with the nearest."""

    def __init__(self, kind: str) -> None:
        """`kind` is the noun used in messages, e.g. "detector"."""
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the object under `name`; defined again, it replaces itself.

        Raises:
            UserError: another object has the name.
        """

        def add(entry: T) -> T:
            held = self._entries.get(name, entry)
            if _home(held) != _home(entry):
                raise UserError(
                    f"the {self.kind} {name!r} is {_home(held)} already, so {_home(entry)} needs "
                    f"another name"
                )
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`; `UserError` with the nearest name otherwise."""
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}; {nearest(name, self._entries)}")
        return self._entries[name]

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names that match a shell pattern."""
        return sorted(name for name in self._entries if fnmatch(name, pattern))


def _home(entry: Any) -> str:
    """Where an entry was defined: the same for a class before and after its module is reloaded."""
    return f"{entry.__module__}.{entry.__qualname__}"


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """`UserError` when a value is none of its choices; `what` names it, e.g. "rm: score"."""
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise UserError(f"{what} is {value!r}; expected {expected}")


def check_positive(what: str, value: float) -> None:
    """`UserError` when a number is not above 0 and finite; `what` names it, e.g. "rm: weight"."""
    if not 0 < value < math.inf:
        raise UserError(f"{what} is {value}; expected a number above 0")


def keywords_of(entry: type) -> dict[str, Any]:
    """What a constructor takes by keyword, with the defaults; `REQUIRED` where there is none."""
    constructor = entry.__init__  # type: ignore[misc]
    _, *parameters = inspect.signature(constructor).parameters.values()  # without `self`
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def checked_keywords(
    what: str,
    entry: type,
    options: dict[str, Any],
    beside: Iterable[str] = (),
    given: Iterable[str] = (),
) -> dict[str, Any]:
    """All keyword values of a constructor, defaults filled in.

    `beside` are keywords of `what` that go elsewhere; a misspelt one is answered with them, too.
    `given` are those that the caller passes itself; they are no options.

    Raises:
        UserError: for an unknown keyword (with the nearest one), one that is needed and missing, a
            wrong type, a number that is negative or not finite, a width of 0.
    """
    from pydantic import TypeAdapter, ValidationError  # here: names alone must load at once

    known = {key: default for key, default in keywords_of(entry).items() if key not in given}
    hints = get_type_hints(entry.__init__, include_extras=True)  # type: ignore[misc]
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{what} has no option {key!r}; {nearest(key, [*known, *beside])}")
        try:
            TypeAdapter(hints.get(key, Any)).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"{what}, option {key}: {reason} (found {value!r})") from None
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"{what}, option {key} is {value}; expected a number from 0 on")
    settled = {**known, **options}
    missing = [key for key, value in settled.items() if value is REQUIRED]
    if missing:
        raise UserError(f"{what} needs the option {missing[0]!r}, which has no default; give it")
    return settled
