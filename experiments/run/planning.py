"""What a method does before training: measuring on data, and solving for ranks, each announced and timed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments.run.clock import Clock
from experiments.run.console import say
from jaxprune.methods import Context, Method, Start

# A wait that is longer is announced.
_SECONDS = 2.0


def planned(method: Method, context: Context, clock: Clock, name: str) -> Start:
    """Start a method; what it spends on data counts as scoring, and what it spends afterwards as allocating.

    Args:
      method: what begins.
      context: what it may look at.
      clock: counts the seconds.
      name: of the method, for people.
    """
    sites = len(context.sites)
    say("planning", f"{name} on {sites} kernels")
    phase = _Phase(sites)
    watched = context._replace(
        batches=_Watched(context.batches, "batches", phase), samples=_Watched(context.samples, "samples", phase)
    )
    with clock.timing("allocate"), phase:
        start = method.start(watched)
    solving = start.plan.seconds if start.plan else 0.0
    if phase.scored:
        clock.move("allocate", "score", keep=solving)
    return start


class _Phase:
    """Says what is being done, the solving only where it takes long."""

    def __init__(self, sites: int) -> None:
        self._sites, self._timer = sites, threading.Timer(0, lambda: None)
        self.scored = False

    def scoring(self, what: str) -> None:
        self.scored = True
        say("scoring", f"{self._sites} kernels on {what}")

    def after(self) -> None:
        """Hear that the data are read: once all is computed, what comes now is solving."""
        jax.block_until_ready(jax.live_arrays())
        self._timer.cancel()
        self._timer = threading.Timer(_SECONDS, lambda: say("solving", f"for the ranks of {self._sites} kernels"))
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> _Phase:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._timer.cancel()


class _Watched(Sequence[Any]):
    """Data that a method measures on, and that tell when they are read from the beginning and to the end."""

    def __init__(self, items: Sequence[Any], name: str, phase: _Phase) -> None:
        self._items, self._name, self._phase = items, name, phase

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[Any]:
        self._phase.scoring(f"{len(self)} {self._name}")
        yield from self._items
        self._phase.after()
