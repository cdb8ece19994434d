"""Where the seconds of a run go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax


class Clock:
    """Add up the seconds spent under each name; compilation is what JAX itself reports.

    Args:
      runs: that go on at the same time; `total` is the share of each.
    """

    def __init__(self, runs: int = 1) -> None:
        self.runs = runs
        self.seconds = {
            name: 0.0 for name in ("load", "train", "compile", "score", "allocate", "eval", "prune", "save")
        }
        self.cached = 0.0  # what compilations found in the cache would have taken
        self._open: list[str] = []  # names being timed, the innermost last
        self._start = self._mark = time.perf_counter()
        self._compiled = 0.0  # seconds of compiling at the last mark
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds["compile"] += duration_secs
        elif event == "/jax/compilation_cache/compile_time_saved_sec":
            self.cached += max(duration_secs, 0.0)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Count the time of a block under `name`, less what is counted under other names inside it."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        """Count the time since the last mark, less compiling, under the innermost name."""
        now, compiled = time.perf_counter(), self.seconds["compile"]
        if self._open:
            self.seconds[self._open[-1]] += now - self._mark - (compiled - self._compiled)
        self._mark, self._compiled = now, compiled

    def training(self) -> float:
        """Return the seconds since the start that are not counted under another name than training."""
        total = self.total()
        return total["total"] - sum(total[name] for name in self.seconds if name != "train")

    def total(self) -> dict[str, float]:
        """Return all seconds so far, the total first."""
        self._count()
        all_ = {"total": self._mark - self._start, **self.seconds}
        return {name: seconds / self.runs for name, seconds in all_.items()}

    def add(self, before: Mapping[str, float]) -> None:
        """Count what a run took before it was resumed, as `total` said then."""
        self._count()
        for name in self.seconds:
            self.seconds[name] += before.get(name, 0.0)  # an earlier version did not count loading
        self._compiled += before["compile"]
        self._start -= before["total"]
