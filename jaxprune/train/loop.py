"""A training loop that keeps the device busy."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import UsageError, shown
from jaxprune.inputs import whole
from jaxprune.train.placement import leaf_names
from jaxprune.train.state import TrainState


class NonFiniteError(RuntimeError):
    """A loss or a gradient became NaN or infinite; the message names the step and the first such leaf."""


def fit(
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    params: Any,
    state: TrainState,
    batches: Iterable[Any],
    *,
    total_steps: int,
    log: Callable[[int, dict[str, Any]], None] = lambda number, metrics: None,
    pause_at: Callable[[int], bool] = lambda number: False,
    pause: Callable[[int, TrainState], tuple[TrainState, str]] = lambda number, state: (state, ""),
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> TrainState:
    """Run a training loop and return the last state.

    The metrics of a step are read only after the next one has been launched, so the device never waits for the host,
    except after the steps that `pause_at` names.

    Args:
      step: from `make_step`.
      params: the frozen parameters.
      state: where to start; donated. Where a step of several states at once is mapped over their leading axis (all but `step`),
        metrics are lists, and the bar shows the mean loss.
      batches: the batches still to do, one a step.
      total_steps: optimiser steps of the whole run, for the progress bar.
      log: called with every step's number (1, 2, ...) and its metrics as floats.
      pause_at: `pause_at(number)` says whether to pause after a step.
      pause: `pause(number, state) -> (state, note)`: called with the step's number and the state it left, to evaluate, to
        save or to prune; training goes on with the state it returns. The note is shown on the progress bar, and where that is
        no terminal on a line of its own.
      stop: asked after every step; when it says yes the loop ends early, with every step launched so far done.
      progress: show one progress bar with loss, rate and time left, as wide as the terminal. Compiling counts for neither rate
        nor time left.

    Raises:
      NonFiniteError: a loss or gradient is NaN or infinite.
      UsageError: an argument is of another kind, or the state was donated to a step before.
    """
    from tqdm import tqdm

    if (total := whole(total_steps)) is None or total < 0:
        raise UsageError(f"total_steps {shown(total_steps)} cannot be used: expected a whole number, 0 or more")
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
        raise UsageError(f"batches {shown(batches)} cannot be used: expected a list of batches, or an iterator")
    if not isinstance(state, TrainState):
        raise UsageError(f"state {shown(state)} cannot be used: expected what init_state returns")
    if getattr(state.step, "is_deleted", bool)():
        raise UsageError("the state was donated to a step before; go on with the state that the step returned")
    names = [*leaf_names(state.trained), "the loss"]
    number = int(state.step)
    pending: collections.deque = collections.deque()
    # A terminal is redrawn; a log file gets a line every quarter of a minute.
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total,
        initial=number,
        unit="step",
        disable=not progress,
        mininterval=0.2 if terminal else 15.0,
        dynamic_ncols=True,
    )
    shapes = lambda: tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(state.adapters))  # noqa: E731
    ranks, compiled = shapes(), set()

    def settle() -> None:
        done, launched = pending.popleft()
        metrics = {name: np.asarray(value).tolist() for name, value in jax.device_get(launched).items()}
        leaves, losses = np.ravel(metrics.pop("nonfinite")), np.ravel(metrics["loss"])
        for run in np.flatnonzero(leaves >= 0)[:1]:
            leaf = leaves[run]
            what = names[leaf] if leaf == len(names) - 1 else f"the gradient of {names[leaf]}"
            whose = f" in run {run + 1} of {len(leaves)}" if len(leaves) > 1 else ""
            raise NonFiniteError(
                f"step {done}: {what} is not finite{whose} (loss {losses[run]:.4g}); lower the learning rate, clip "
                f"gradients, or look for bad values in the data"
            )
        postfix["loss"] = f"{losses.mean():.4f}"
        bar.set_postfix(postfix, refresh=False)
        bar.update(1)
        log(done, metrics)

    postfix: dict[str, str] = {}
    with bar:
        for batch in batches:
            started = time.time()
            state, metrics = step(params, state, batch)
            number += 1
            pending.append((number, metrics))
            program = (ranks, *(jnp.shape(leaf) for leaf in jax.tree.leaves(batch)))
            if progress and program not in compiled:
                # Its first step waited for the compilation, which says nothing of the steps to come.
                compiled.add(program)
                bar.start_t += time.time() - started
                bar.last_print_t = time.time()
            while len(pending) > (0 if pause_at(number) else 1):
                settle()
            if pause_at(number):
                state, note = pause(number, state)
                names, ranks = [*leaf_names(state.trained), "the loss"], shapes()
                if note:
                    postfix["eval"] = note
                    bar.set_postfix(postfix, refresh=False)
                    if progress and not terminal:
                        bar.write(f"step {number:,} of {total:,}: {note}", file=sys.stderr)
            if stop():
                break
        while pending:
            settle()
    return state
