"""Checks of settings, shared by the library and the command line: one line says the name, the value and what was expected.

A range stands beside the type of what it is for, as `Annotated[int, Range(1)]`, and `checked` reads it there.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import types
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from jaxprune.errors import UsageError, nearest, shown

P = ParamSpec("P")
R = TypeVar("R")

# The step is counted in 32 bits.
MOST_STEPS = 2**31 - 1
MOST_RANK = 2**16
# Longer lists are a mistake, and would take minutes to look through.
_MOST_ITEMS = 2**17
_FLOAT32 = np.finfo(np.float32)
# Control characters, halves of characters (bytes that are no UTF-8), and separators of lines.
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included, that lie above `above` and below `below`; None for no bound."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f", {self.low} to {self.high}"
        said = (
            (self.low, "{} or more"),
            (self.above, "more than {}"),
            (self.high, "at most {}"),
            (self.below, "below {}"),
        )
        bounds = " and ".join(text.format(bound) for bound, text in said if bound is not None)
        return f", {bounds}" if bounds else ""


@dataclass(frozen=True)
class OneOf:
    """Words that a text may be; `fold` where case does not matter."""

    known: Sequence[str]
    fold: bool = False


class HostOnly:
    """Marks a number that is never computed with in float32, such as seconds."""


# What many settings are.
Count = Annotated[int, Range(1, MOST_STEPS)]
Rank = Annotated[int, Range(1, MOST_RANK)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, below=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]


def whole(name: str, value: object, bounds: Range = Range()) -> int:
    """Return a whole number within `bounds` as an int; anything else, 2.5 or True among them, is a UsageError."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name} {shown(value)} cannot be used; expected a whole number{bounds}")
    number = operator.index(value)
    if number not in bounds:
        raise UsageError(f"{name} {shown(number)} is out of range; expected a whole number{bounds}")
    return number


def number(name: str, value: object, bounds: Range = Range(), *, single: bool = True) -> float:
    """Return a finite number within `bounds` as a float; anything else is a UsageError.

    With `single`, its float32 must be finite and within the bounds too, as that is what JAX computes with; a number that is not
    0 but too small for float32 is refused.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} {shown(value)} cannot be used; expected a number{bounds}")
    try:
        exact = float(value)
    except OverflowError:
        exact = math.inf
    rounded = exact
    if single:
        with np.errstate(over="ignore"):
            rounded = float(np.float32(exact))
    if not math.isfinite(exact) or exact not in bounds:
        raise UsageError(f"{name} {shown(value)} is out of range; expected a finite number{bounds}")
    if single and (not math.isfinite(rounded) or 0 < abs(exact) < _FLOAT32.tiny):
        raise UsageError(
            f"{name} {shown(value)} is out of range; expected a number that float32 holds, of a size between "
            f"{_FLOAT32.tiny:.1e} and {_FLOAT32.max:.1e}"
        )
    if rounded not in bounds:
        raise UsageError(f"{name} {shown(value)} is {rounded:g} in float32; expected a number{bounds}")
    return exact


def one_of(name: str, value: object, known: Iterable[str], *, fold: bool = False) -> str:
    """Return a text that is among the known ones; anything else is a UsageError with the nearest."""
    known = list(known)
    if isinstance(value, str) and (value in known or (fold and value.lower() in [word.lower() for word in known])):
        return value
    close = f"; nearest: {nearest(value[:100], known, 1)}" if isinstance(value, str) else ""
    raise UsageError(f"{name} {shown(value)} is not known; expected one of {', '.join(known)}{close}")


def check(name: str, value: Any, kind: Any) -> Any:
    """Return a value as the type `kind` says it must be, with its range; a UsageError where it is not.

    `kind` is what annotations are made of: int, float, bool, str, Literal, Sequence, tuple, Callable, unions of these, and
    Annotated with `Range`, `OneOf` or `HostOnly`.
    """
    kind, notes = (get_args(kind)[0], get_args(kind)[1:]) if get_origin(kind) is Annotated else (kind, ())
    bounds = next((note for note in notes if isinstance(note, Range)), Range())
    words = next((note for note in notes if isinstance(note, OneOf)), None)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        # Notes on a whole union are for each of its parts.
        return _one_kind(name, value, [Annotated[part, *notes] if notes else part for part in get_args(kind)])
    if origin is Literal:
        return one_of(name, value, get_args(kind))
    if origin is Sequence:
        return [check(f"an item of {name}", item, get_args(kind)[0]) for item in _items(name, value)]
    if origin is tuple:
        return _tuple(name, value, get_args(kind))
    if kind is bool:
        if not isinstance(value, bool | np.bool_):
            raise UsageError(f"{name} {shown(value)} cannot be used; expected true or false")
        return bool(value)
    if kind is int:
        return whole(name, value, bounds)
    if kind is float:
        return number(name, value, bounds, single=not any(isinstance(note, HostOnly) for note in notes))
    if kind is str:
        if words is not None:
            return one_of(name, value, words.known, fold=words.fold)
        if not isinstance(value, str) or not value.strip() or any(unicodedata.category(c) in _UNSEEN for c in value):
            raise UsageError(f"{name} {shown(value)} cannot be used; expected a text, not empty, that can be printed")
        return value
    assert _is_function(kind), f"{name} has the annotation {kind}, which says nothing that could be checked"
    if not callable(value):
        raise UsageError(f"{name} {shown(value)} cannot be used; expected a function")
    return value


def check_all(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as their annotations say they must be."""
    return {name: check(name, value, kinds[name]) for name, value in values.items()}


def checked(factory: Callable[P, R]) -> Callable[P, R]:
    """Check every setting that a factory is given against its annotation, before the factory sees any.

    Raises (by the factory):
      UsageError: a setting is of another type, or out of its range.
    """
    signature, kinds = inspect.signature(factory), get_type_hints(factory, include_extras=True)

    @functools.wraps(factory)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(check_all(bound.arguments, kinds))
        return factory(*bound.args, **bound.kwargs)

    return wrapped


def _one_kind(name: str, value: Any, parts: Sequence[Any]) -> Any:
    """Return the value as the first part of a union that takes it; the last word is that of the part it is most like."""
    plain = {part: get_args(part)[0] if get_origin(part) is Annotated else part for part in parts}
    if value is None and type(None) in plain.values():
        return None
    left = [part for part in parts if plain[part] is not type(None)]
    if any(_is_function(plain[part]) for part in left) and callable(value):
        return value
    left = [part for part in left if not _is_function(plain[part])]
    texts = [part for part in left if plain[part] is str]
    if isinstance(value, str) and texts:
        return check(name, value, texts[0])
    left = [part for part in left if part not in texts or len(left) == 1]
    return check(name, value, left[0])


def _is_function(kind: Any) -> bool:
    return get_origin(kind) is Callable or kind is Callable


def _items(name: str, value: Any) -> list[Any]:
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise UsageError(f"{name} {shown(value)} cannot be used; expected a list")
    if len(value[: _MOST_ITEMS + 1]) > _MOST_ITEMS or not len(value):
        raise UsageError(f"{name} {shown(value)} cannot be used; expected a list of 1 to {_MOST_ITEMS:,} items")
    return list(value)


def _tuple(name: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        raise UsageError(f"{name} {shown(value)} cannot be used; expected a list of {len(kinds)}")
    return tuple(check(f"an item of {name}", item, kind) for item, kind in zip(value, kinds, strict=True))
