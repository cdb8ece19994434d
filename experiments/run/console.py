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
    first = f"{f'{word} ':<{_INDENT}}"  # a long word too has a space behind it
    if width is None:
        return f"{first}{text}"
    return textwrap.fill(
        text, max(width, 2 * _INDENT), initial_indent=first, subsequent_indent=" " * _INDENT, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def say(word: str, text: str) -> None:
    """Print what begins now or has happened, above the progress bar: folded in a terminal, one line in a file or a pipe."""
    from tqdm import tqdm

    width = shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else None
    tqdm.write(laid_out(word, text, width), file=sys.stdout)
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
