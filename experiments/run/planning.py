"""What a method does before training: measuring on data, and solving for ranks, each announced and timed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    say("planning", f"{name} on {len(context.sites)} kernels")
    with clock.timing("allocate"), _Phases(len(context.sites), clock) as phases:
        return method.start(
            context._replace(
                batches=_Watched(context.batches, "batches", phases),
                samples=_Watched(context.samples, "samples", phases),
            )
        )


class _Phases:
    """Says and times what is being done; the solving is said where it takes long."""

    def __init__(self, sites: int, clock: Clock) -> None:
        self._sites, self._clock, self._timer = sites, clock, threading.Timer(0, lambda: None)

    @contextmanager
    def scoring(self, what: str) -> Iterator[None]:
        """Measure on data for the length of the block; what comes after it is solving."""
        say("scoring", f"{self._sites} kernels on {what}")
        self._timer.cancel()
        with self._clock.timing("score"):
            yield
            jax.block_until_ready(jax.live_arrays())  # a backward pass is still under way when its call returns
        self._timer = threading.Timer(_SECONDS, lambda: say("solving", f"for the ranks of {self._sites} kernels"))
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> _Phases:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._timer.cancel()


class _Watched(Sequence[Any]):
    """Data that a method measures on, and that tell when they are read from the beginning and to the end."""

    def __init__(self, items: Sequence[Any], name: str, phases: _Phases) -> None:
        self._items, self._name, self._phases = items, name, phases

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[Any]:
        with self._phases.scoring(f"{len(self)} {self._name}"):
            yield from self._items
