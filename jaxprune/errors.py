"""The one error for wrong input: a single line that says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


class UsageError(ValueError):
    """Report input that the caller can mend; command lines print it as one line and exit with status 2.

    It is one line whatever it quotes: line breaks and what else cannot be printed stand as Python escapes them.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def shown(value: object) -> str:
    """Return how Python writes a value, shortened where it is long, for an error message."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"{type(value).__name__} too long to write"


def clipped(text: str, width: int = 200) -> str:
    """Return the start of a long text, for an error message."""
    return text if len(text) <= width else text[: width - 3] + "..."


def reason(error: BaseException) -> str:
    """Return what another library's error says as a part of one line; its type where it says nothing."""
    return clipped(" ".join(str(error).split()) or type(error).__name__)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known names closest to `name`, comma-separated, for an error message."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.0)
    return ", ".join(close) if close else "(none)"
