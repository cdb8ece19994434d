"""The one error for wrong input: a single line that says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

import numpy as np


class UsageError(ValueError):
    """Report input that the caller can mend; command lines print it as one line and exit with status 2."""

    def __init__(self, message: str) -> None:
        # Names of files and of parameters may hold line breaks and control characters, and are quoted in messages.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known names closest to `name`, comma-separated, for an error message."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name[:200], known, n=count, cutoff=0.0)
    return ", ".join(shown(one)[1:-1] for one in close) if close else "(none)"


def shown(value: object) -> str:
    """Return what a user gave as one short line for an error message: its repr, the middle of a long one left out."""
    value = value.item() if isinstance(value, np.generic) else value
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"


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
