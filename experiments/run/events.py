"""The pruning events of a run: decide, carry out, compact where it pays, and write down what each cost and saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from experiments.run.clock import Clock
from jaxprune.adapters import Masks, count, with_weights
from jaxprune.allocation import step_time
from jaxprune.methods import Context, Method
from jaxprune.sites import Site
from jaxprune.surgery import live, worth_compacting
from jaxprune.train import TrainState, compactable, compacted, prune


class Pruner:
    """Run a method's events; `events` holds one entry each, as in summary.json."""

    def __init__(
        self,
        method: Method,
        optimizer: optax.GradientTransformation,
        context: Context,
        clock: Clock,
        total_steps: int,
        compact: str,
        events: Sequence[dict[str, Any]] = (),
        losses: bool = False,
    ) -> None:
        self._method, self._optimizer, self._context, self._clock = method, optimizer, context, clock
        self._total, self._mode, self.events = total_steps, compact, list(events)
        self._loss = _loss(context) if losses and context.batches else None
        self._since: tuple[int, float, float, float] | None = None  # step, training, compile and cached seconds
        self._open: dict[str, Any] | None = None  # the compaction whose effect is being measured

    def begin(self, step: int) -> None:
        """Start measuring step time and compilation."""
        self._since = (step, self._clock.training(), self._clock.seconds["compile"], self._clock.cached)

    def after(self, number: int, state: TrainState) -> TrainState:
        """Run the event of a step."""
        pace, compiled = self._measure(number)
        if self._open is not None and pace:
            self._open |= {"step_seconds_after": pace, "compile_seconds": compiled}
            self._open = None
        before, loss = _params(state), self._measured(state)
        with self._clock.timing("prune"):
            start = time.perf_counter()
            state, decision = prune(state, self._method, self._optimizer, self._context)
            if decision is None:
                return state
            entry = {
                "step": number, "params_before": before, "params_after": _params(state), **decision.report,
                "seconds": time.perf_counter() - start, "compacted": False,
            }  # fmt: skip
            if loss is not None:
                entry |= {"loss_before": loss, "loss_after": self._measured(state)}
            self.events.append(entry)
            if self._mode == "never" or not compactable(state.masks):
                return state
            shapes = {path: mask.shape[-1] for path, mask in state.masks.items()}
            ratio = _time(live(state.masks), self._context.sites) / _time(shapes, self._context.sites)
            left = self._total - number
            # A new scale is a new program whatever the shapes, so that compaction comes free with it.
            forced = bool(decision.scales)
            entry |= {"predicted_time_ratio": ratio, "steps_left": left, "compile_estimate": compiled}
            if pace:
                entry["step_seconds_before"] = pace
            pays = forced or (
                pace is not None
                and worth_compacting(step_seconds=pace, time_ratio=ratio, steps_left=left, compile_seconds=compiled)
            )
            if self._mode == "auto" and not pays:
                return state
            start = time.perf_counter()
            state = compacted(state, self._method, self._optimizer)
            entry |= {"compacted": True, "compact_seconds": time.perf_counter() - start}
            self._open = entry
        self.begin(number)
        return state

    def _measured(self, state: TrainState) -> float | None:
        """Return the mean loss of the scoring batches, with nothing dropped."""
        if self._loss is None:
            return None
        with self._clock.timing("eval"):
            seen = self._method.seen(state.method_state, state.adapters, state.masks)
            return float(np.mean([self._loss(state.weights, *seen, batch) for batch in self._context.batches]))

    def finish(self, number: int) -> None:
        """Close the last measurement."""
        pace, compiled = self._measure(number)
        if self._open is not None and pace:
            self._open |= {"step_seconds_after": pace, "compile_seconds": compiled}

    def _measure(self, number: int) -> tuple[float | None, float]:
        """Return seconds a step, and seconds of compilation (had nothing been cached), since the present shapes began."""
        assert self._since is not None
        step, training, compiling, cached = self._since
        compiled = self._clock.seconds["compile"] - compiling + self._clock.cached - cached
        if number <= step:
            return None, compiled
        return (self._clock.training() - training) / (number - step), compiled


def _loss(context: Context) -> Callable[..., jax.Array]:
    @jax.jit
    def loss(weights, adapters, masks, batch, params):
        apply = lambda *inputs, **kw: context.forward(with_weights(params, weights), adapters, masks, *inputs, **kw)  # noqa: E731
        value = context.loss_fn(apply, batch, None)
        return value[0] if isinstance(value, tuple) else value

    return lambda *state: loss(*state, context.params)


def _params(state: TrainState) -> int:
    return count(state.adapters, state.masks)


def _time(ranks: Mapping[str, int], sites: Sequence[Site]) -> float:
    return step_time({site.path: ranks.get(site.path, 0) for site in sites}, sites)


def final_ranks(masks: Masks, sites: Sequence[Site]) -> dict[str, int]:
    """Return the live rank of every site, zeros included."""
    alive = live(masks)
    return {site.path: alive.get(site.path, 0) for site in sites}
