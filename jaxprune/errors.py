"""The one error for wrong input: a single line that says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Report input that the caller can mend; command lines print it as one line and exit with status 2."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known names closest to `name`, comma-separated, for an error message."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.0)
    return ", ".join(close) if close else "(none)"
