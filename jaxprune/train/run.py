"""A whole run as one tuple of functions, for a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from jaxprune.adapters import Adapters, Masks, Weights, with_weights
from jaxprune.adapters.weight import NONE
from jaxprune.allocation import Plan
from jaxprune.errors import UsageError
from jaxprune.methods.base import Context, Method
from jaxprune.sites import Site
from jaxprune.surgery import Decision
from jaxprune.train.events import compacted, prune
from jaxprune.train.state import TrainState, init_state, make_step


class Training(NamedTuple):
    """What a loop needs; every function exists by itself too, and none changes its arguments.

    Attributes:
      start: `start(key, params, sites, batches=(), samples=(), weights={}) -> (state, params, plan)`: scores, plans and makes
        the state of step 0. The parameters are those that the step must use. `batches` are a few batches to score on, `samples`
        the same with one more leading axis over single samples, `weights` what is trained beside, from `init_weights`.
      step: `step(params, state, batch) -> (state, metrics)`, jitted; see `make_step`.
      prune: `prune(state) -> (state, decision)`: the pruning event, where there is one after the steps done so far; None
        otherwise.
      compact: `compact(state) -> state`: really remove what is masked.
      seen: `seen(state) -> (adapters, masks)` to merge and to export.
      predict: `predict(params, state, *inputs, **kwargs)`: the model's outputs, with nothing dropped.
    """

    start: Callable[..., tuple[TrainState, Any, Plan | None]]
    step: Callable[[Any, TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    prune: Callable[[TrainState], tuple[TrainState, Decision | None]]
    compact: Callable[[TrainState], TrainState]
    seen: Callable[[TrainState], tuple[Adapters, Masks]]
    predict: Callable[..., Any]


def training(
    forward: Callable[..., Any],
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    method: Method,
    *,
    accumulate: int = 1,
    donate: bool = True,
) -> Training:
    """Join a model, a loss, an optimizer and a method.

        run = jp.training(jp.attach(model), loss_fn, optax.adamw(1e-3), jp.dplora(total_steps=n))
        state, params, plan = run.start(key, params, sites, batches)
        for batch in data:
            state, metrics = run.step(params, state, batch)
            state, decision = run.prune(state)

    Args:
      forward: from `attach` or `attach_function`.
      loss_fn: `loss_fn(apply, batch, key) -> loss`, as for `make_step`.
      optimizer: any Optax chain.
      method: what a factory such as `dplora` returns.
      accumulate: microbatches a step.
      donate: let XLA reuse the old state's memory; the state passed to `step` is then gone.

    Raises:
      UsageError: an argument is of another kind.
    """
    step = make_step(forward, loss_fn, optimizer, method, accumulate=accumulate, donate=donate)
    begun: list[Context] = []  # events measure on what the run started with

    def start(
        key: jax.Array,
        params: Mapping[str, Any],
        sites: Sequence[Site],
        batches: Sequence[Any] = (),
        samples: Sequence[Any] = (),
        *,
        weights: Weights = NONE,
    ) -> tuple[TrainState, Any, Plan | None]:
        first, second = jax.random.split(key)
        context = Context(first, params, sites, forward, loss_fn, batches, samples)
        made = method.start(context)
        state = init_state(second, made.adapters, made.masks, optimizer, method, weights={**made.weights, **weights})
        begun[:] = [context._replace(params=made.params)]
        return state, made.params, made.plan

    def event(state: TrainState) -> tuple[TrainState, Decision | None]:
        if not begun:
            raise UsageError("prune came before start, and events measure on what start got; call start first")
        return prune(state, method, optimizer, begun[0])

    def seen(state: TrainState) -> tuple[Adapters, Masks]:
        return method.seen(state.method_state, state.adapters, state.masks)

    def predict(params: Mapping[str, Any], state: TrainState, *inputs: Any, **kwargs: Any) -> Any:
        return forward(with_weights(params, state.weights), *seen(state), *inputs, **kwargs)

    return Training(start, step, event, lambda state: compacted(state, method, optimizer), seen, predict)
