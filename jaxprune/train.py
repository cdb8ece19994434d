"""Training: one state, one jitted step that differentiates the adapters alone, and a loop that keeps the device busy."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.adapters import Adapters, Masks
from jaxprune.methods.base import Method
from jaxprune.sites import Site


class TrainState(NamedTuple):
    """Everything a run owns, one pytree: it can be saved, sharded, donated and mapped over seeds."""

    adapters: Adapters
    masks: Masks
    opt_state: optax.OptState
    method_state: Any
    step: jax.Array
    key: jax.Array


class NonFiniteError(RuntimeError):
    """A loss or a gradient became NaN or infinite; the message names the step and the first such leaf."""


def init_state(
    key: jax.Array,
    adapters: Adapters,
    masks: Masks,
    optimizer: optax.GradientTransformation,
    method: Method | None = None,
    sites: Sequence[Site] = (),
) -> TrainState:
    """Make the state of step 0.

    Args:
      key: random key; the step folds its number into it, so a run's randomness is a function of (key, step).
      adapters: what is trained.
      masks: {site path: mask}, never trained.
      optimizer: any Optax chain.
      method: whose own state to make; None for none.
      sites: passed to the method.
    """
    method_state = method.init(adapters, masks, sites) if method else ()
    return TrainState(adapters, masks, optimizer.init(adapters), method_state, jnp.zeros((), jnp.int32), key)


def make_step(
    forward: Callable[..., Any],
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    method: Method | None = None,
    *,
    accumulate: int = 1,
    donate: bool = True,
) -> Callable[[Any, TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the jitted `step(params, state, batch) -> (state, metrics)`.

    Only `state.adapters` are differentiated: no gradient of a frozen kernel is ever formed. `metrics` holds `loss`,
    `grad_norm` (before clipping) and `nonfinite`: the index among `leaf_names` of the first gradient that is not finite,
    the number of leaves where only the loss is not, -1 where all is well.

    Args:
      forward: from `attach` or `attach_function`.
      loss_fn: `loss_fn(apply, batch, key) -> loss` or `(loss, aux)`: the mean loss of a batch, `apply(*inputs, ...)` being
        the adapted model and `key` this step's random key.
      optimizer: the chain that `init_state` got.
      method: its `observe`, `penalty` and `project` take part in the step.
      accumulate: microbatches a step; each leaf of a batch then has a leading axis of that length, and losses and gradients
        are averaged over it.
      donate: let XLA reuse the old state's memory; the state passed in is then gone.
    """

    def loss(adapters, masks, params, batch, key):
        value = loss_fn(lambda *inputs, **kw: forward(params, adapters, masks, *inputs, **kw), batch, key)
        value = value[0] if isinstance(value, tuple) else value
        return value + method.penalty(adapters) if method and method.penalty else value

    def value_and_grad(state, params, batch, key):
        grad = jax.value_and_grad(loss)
        if accumulate == 1:
            return grad(state.adapters, state.masks, params, batch, key)

        def add(total, item):
            index, micro = item
            value = grad(state.adapters, state.masks, params, micro, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, value), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.adapters))
        total, _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), batch))
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def step(params, state: TrainState, batch):
        value, grads = value_and_grad(state, params, batch, jax.random.fold_in(state.key, state.step))
        method_state = state.method_state
        if method:
            method_state = method.observe(method_state, state.adapters, state.masks, grads, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
        adapters: Any = optax.apply_updates(state.adapters, updates)
        if method and method.project:
            adapters = method.project(adapters)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "nonfinite": _first_nonfinite(value, grads)}
        return TrainState(adapters, state.masks, opt_state, method_state, state.step + 1, state.key), metrics

    return jax.jit(step, donate_argnums=(1,) if donate else ())


def _first_nonfinite(loss: jax.Array, grads: Any) -> jax.Array:
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in (*jax.tree.leaves(grads), loss)])
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1)


def leaf_names(tree: Any) -> list[str]:
    """Name the leaves of a pytree, in its own order; `metrics["nonfinite"]` counts those of the adapters so."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path) for path, _ in leaves]


def make_predict(forward: Callable[..., Any], outputs_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return the jitted `predict(params, adapters, masks, batch)`: the model's outputs with nothing dropped.

    Args:
      forward: from `attach` or `attach_function`.
      outputs_fn: `outputs_fn(apply, batch) -> outputs`, with `apply(*inputs, ...)` the adapted model.
    """

    def predict(params, adapters, masks, batch):
        return outputs_fn(lambda *inputs, **kw: forward(params, adapters, masks, *inputs, **kw), batch)

    return jax.jit(predict)


def fit(
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    params: Any,
    state: TrainState,
    batches: Iterable[Any],
    *,
    total_steps: int,
    log: Callable[[int, dict[str, float]], None] = lambda number, metrics: None,
    pause_at: Container[int] = (),
    pause: Callable[[int, TrainState], str] = lambda number, state: "",
    progress: bool = True,
) -> TrainState:
    """Run a training loop and return the last state.

    The metrics of a step are read only after the next one has been launched, so the device never waits for the host,
    except at the steps of `pause_at`.

    Args:
      step: from `make_step`.
      params: the frozen parameters.
      state: where to start; donated.
      batches: the batches still to do, one a step.
      total_steps: optimiser steps of the whole run, for the progress bar.
      log: called with every step's number (1, 2, ...) and its metrics as floats.
      pause_at: numbers of the steps after which to pause.
      pause: called with the step's number and the state it left, to evaluate or to save; what it returns is shown on the
        progress bar.
      progress: show one progress bar with loss, rate and time left.

    Raises:
      NonFiniteError: a loss or gradient is NaN or infinite.
    """
    from tqdm import tqdm

    names = [*leaf_names(state.adapters), "the loss"]
    number = int(state.step)
    pending: collections.deque = collections.deque()
    # A terminal is redrawn; a log file gets a line every quarter of a minute.
    interval = 0.2 if sys.stderr.isatty() else 15.0
    bar = tqdm(total=total_steps, initial=number, unit="step", disable=not progress, mininterval=interval, ncols=100)

    def settle() -> None:
        done, launched = pending.popleft()
        metrics = {name: float(value) for name, value in jax.device_get(launched).items()}
        leaf = int(metrics.pop("nonfinite"))
        if leaf >= 0:
            what = names[leaf] if leaf == len(names) - 1 else f"the gradient of {names[leaf]}"
            raise NonFiniteError(
                f"step {done}: {what} is not finite (loss {metrics['loss']:.4g}); lower the learning rate, clip "
                f"gradients, or look for bad values in the data"
            )
        shown["loss"] = f"{metrics['loss']:.4f}"
        bar.set_postfix(shown, refresh=False)
        bar.update(1)
        log(done, metrics)

    shown: dict[str, str] = {}
    with bar:
        for batch in batches:
            state, metrics = step(params, state, batch)
            number += 1
            pending.append((number, metrics))
            while len(pending) > (0 if number in pause_at else 1):
                settle()
            if number in pause_at and (note := pause(number, state)):
                shown["eval"] = note
        while pending:
            settle()
    return state
