"""What people read while a command runs: a word, and what it is about, folded to the width of a terminal."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager

_INDENT = 11


def laid_out(word: str, text: str, width: int | None) -> str:
    """Return a line, or with a width the lines it is folded into, words and paths kept whole."""
    first = f"{word:<{_INDENT}}"
    if width is None:
        return f"{first}{text}"
    return textwrap.fill(
        text, max(width, 2 * _INDENT), initial_indent=first, subsequent_indent=" " * _INDENT, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def said(word: str, text: str) -> str:
    """Lay a line out for standard output: folded in a terminal, one line in a file or a pipe."""
    return laid_out(word, text, shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else None)


def say(word: str, text: str) -> None:
    """Print a line, above the progress bar where there is one: what begins now, or what has happened."""
    from tqdm import tqdm

    tqdm.write(said(word, text), file=sys.stdout)
    sys.stdout.flush()


class Waits:
    """Say what begins before every wait that is the first of its kind, or comes after one of over two seconds."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    @contextmanager
    def announced(self, word: str, text: str) -> Iterator[None]:
        """Run a block that people wait for; `word` is its kind."""
        if self._last.get(word, math.inf) > 2.0:
            say(word, text)
        start = time.perf_counter()
        yield
        self._last[word] = time.perf_counter() - start
