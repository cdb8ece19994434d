"""The one error for wrong input: a single line that says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

import numpy as np


class UsageError(ValueError):
    """Report input that the caller can mend; command lines print it as one line and exit with status 2.

    It is one line whatever it quotes: line breaks and what else cannot be printed stand as Python escapes them.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def shown(value: object) -> str:
    """Return how Python writes a value, shortened where it is long, for an error message."""
    value = value.item() if isinstance(value, np.generic) else value
    return clipped(" ".join(_SHORT.repr(value).split()))


def clipped(text: str, width: int = 200) -> str:
    """Return the start of a long text, for an error message."""
    return text if len(text) <= width else text[: width - 3] + "..."


def reason(error: BaseException) -> str:
    """Return what another's error says as a part of one line, without names of files; its type where it says nothing."""
    return clipped(" ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known names closest to `name`, comma-separated, for an error message."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name[:200], known, n=count, cutoff=0.0)
    return ", ".join(shown(one)[1:-1] for one in close) if close else "(none)"


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write integers of thousands of digits.
        digits = int(x.bit_length() * 0.30103)
        return super().repr_int(x, level) if digits < 1000 else f"<a whole number of about {digits} digits>"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlong = 40
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = 6
_SHORT.maxlevel = 2
