"""Between steps: pruning events and compaction."""

from __future__ import annotations

import optax

from jaxprune.adapters import Masks, parted, with_weights
from jaxprune.methods.base import Context, Method
from jaxprune.optim import tailored
from jaxprune.surgery import Decision, apply, compact, survivors
from jaxprune.train.placement import place
from jaxprune.train.state import TrainState


def prune(
    state: TrainState,
    method: Method,
    optimizer: optax.GradientTransformation,
    context: Context,
) -> tuple[TrainState, Decision | None]:
    """Run the method's pruning event, where there is one after the steps done so far.

    A pure function of the state. Components that die are masked and every value and moment of them becomes zero; shapes and
    places stay, so nothing is compiled again until `compacted` is called. It reads `state.step`, and so waits for the device:
    a loop that must not wait asks `method.triggers(number)` first.

    Args:
      state: not changed.
      method: its `triggers` and `decide`.
      optimizer: the chain that `init_state` got.
      context: what the method's `start` got.

    Returns:
      (state, decision); the decision is None where nothing was to be decided or nothing changes.
    """
    if method.decide is None or not method.triggers(int(state.step)):
        return state, None
    now = context._replace(params=with_weights(context.params, state.weights))
    method_state, decision = method.decide(state.method_state, state.adapters, state.masks, int(state.step), now)
    new = state._replace(method_state=method_state)
    if decision is not None:
        chain = tailored(optimizer, state.trained)
        trained, masks, opt_state = apply(decision, state.trained, state.masks, state.opt_state, chain)
        adapters, weights = parted(trained)
        new = new._replace(adapters=adapters, weights=weights, masks=masks, opt_state=opt_state)
    return place(new, state), decision


def compacted(state: TrainState, method: Method | None, optimizer: optax.GradientTransformation) -> TrainState:
    """Remove what is masked from adapters, masks, moments and the method's state; the next step is compiled anew.

    Args:
      state: not changed.
      method: its `compact` handles its own state.
      optimizer: the chain that `init_state` got.
    """
    chain = tailored(optimizer, state.trained)
    kept = survivors(state.masks)
    trained, masks, opt_state = compact(state.trained, state.masks, state.opt_state, chain)
    adapters, weights = parted(trained)
    method_state = method.compact(state.method_state, kept) if method else state.method_state
    small = TrainState(adapters, weights, masks, opt_state, method_state, state.step, state.key)
    return place(small, state)


def compactable(masks: Masks) -> bool:
    """Tell whether compaction would remove anything."""
    return any(index.shape[-1] < masks[path].shape[-1] for path, index in survivors(masks).items())
