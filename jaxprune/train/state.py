"""The state of a run, and one jitted step that differentiates what is trained, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.adapters import Adapters, Masks
from jaxprune.adapters.base import check_key, check_mappings, check_mask
from jaxprune.errors import UsageError, shown
from jaxprune.inputs import whole
from jaxprune.methods.base import Method
from jaxprune.optim import check_prunable, tailored
from jaxprune.reprs import state_lines
from jaxprune.sites import Site
from jaxprune.surgery import zero_dead
from jaxprune.train.placement import place, strong

# Keeps what a method's view draws apart from what the loss draws.
_VIEW = 0x71EF


class TrainState(NamedTuple):
    """Everything a run owns, one pytree: it can be saved, sharded, donated and mapped over seeds."""

    adapters: Adapters
    masks: Masks
    opt_state: optax.OptState
    method_state: Any
    step: jax.Array
    key: jax.Array

    __repr__ = state_lines


def init_state(
    key: jax.Array,
    adapters: Adapters,
    masks: Masks,
    optimizer: optax.GradientTransformation,
    method: Method | None = None,
    sites: Sequence[Site] = (),
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
    """Make the state of step 0, committed to the devices where it stays.

    Args:
      key: random key; the step folds its number into it, so a run's randomness is a function of (key, step).
      adapters: what is trained.
      masks: {site path: mask}, never trained.
      optimizer: any Optax chain.
      method: whose own state to make; None for none.
      sites: passed to the method.
      mesh: the devices that the parameters lie on, where they are several; by default those that an adapter lies on. Leaves
        that are on one device go to all of them, whole.

    Raises:
      UsageError: an argument is of another kind, a mask does not fit its adapter, or the optimizer cannot do what adapters or
        a method that prunes ask of it (`jaxprune.optim`).
    """
    check_key(key)
    check_mappings(adapters, masks)
    _check_parts(optimizer, method)
    for path, adapter in adapters.items():
        if not dataclasses.is_dataclass(adapter):
            raise UsageError(
                f"the adapter at {shown(path)} is {shown(adapter)}; expected one that init_lora or a method made"
            )
        check_mask(path, adapter, masks.get(path))
    if method and method.decide and masks:
        check_prunable(optimizer, adapters, masks, method.removes)
    method_state = method.init(adapters, masks, sites) if method else ()
    opt_state = tailored(optimizer, adapters).init(adapters)
    return place(TrainState(adapters, masks, opt_state, method_state, jnp.zeros((), jnp.int32), key), mesh=mesh)


def _check_parts(optimizer: Any, method: Any) -> None:
    if not isinstance(optimizer, optax.GradientTransformation):
        raise UsageError(
            f"optimizer {shown(optimizer)} cannot be used: expected an Optax chain, such as optax.adamw(1e-3)"
        )
    if method is not None and not isinstance(method, Method):
        raise UsageError(
            f"method {shown(method)} cannot be used: expected what a factory returns, such as jaxprune.lora()"
        )


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
      donate: let XLA reuse the old state's memory; the state passed in is then gone, and JAX raises an error ("Array has
        been deleted") where it is used again.

    Raises:
      UsageError: an argument is of another kind; by the step, when it is traced: the loss is no single number, or a batch has
        no axis of microbatches.
    """
    _check_parts(optimizer, method)
    for name, function in (("forward", forward), ("loss_fn", loss_fn)):
        if not callable(function):
            raise UsageError(f"{name} {shown(function)} cannot be called; expected a function")
    if (micro := whole(accumulate)) is None or micro < 1:
        raise UsageError(
            f"accumulate {shown(accumulate)} cannot be used: expected a whole number of microbatches, 1 or more"
        )
    accumulate = micro

    def loss(adapters, zeros, masks, params, batch, key, step):
        regular = method.penalty(adapters) if method and method.penalty else 0.0
        if method and method.view:
            adapters, masks = method.view(adapters, masks, jax.random.fold_in(key, _VIEW), step)
        if zeros is not None and method and method.probes:
            adapters = method.probes.wrap(adapters, zeros)
        value = loss_fn(lambda *inputs, **kw: forward(params, adapters, masks, *inputs, **kw), batch, key)
        value = value[0] if isinstance(value, tuple) else value
        if jnp.shape(value) != ():
            raise UsageError(
                f"loss_fn returned an array of shape {jnp.shape(value)}; expected a number, such as its mean"
            )
        return value + regular

    def value_and_grads(state, params, batch, key, zeros):
        grad = jax.value_and_grad(loss, argnums=(0, 1))
        if accumulate == 1:
            return grad(state.adapters, zeros, state.masks, params, batch, key, state.step)

        if any(jnp.shape(leaf)[:1] != (accumulate,) for leaf in jax.tree.leaves(batch)):
            raise UsageError(f"with accumulate={accumulate} each leaf of a batch needs a leading axis of that length")

        def add(total, item):
            index, micro = item
            value = grad(state.adapters, zeros, state.masks, params, micro, jax.random.fold_in(key, index), state.step)
            return jax.tree.map(jnp.add, total, value), None

        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, (state.adapters, zeros)))
        total, _ = jax.lax.scan(add, start, (jnp.arange(accumulate), batch))
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def observed(state, params, batch, key, zeros):
        value, (grads, measured) = value_and_grads(state, params, batch, key, zeros)
        grads = zero_dead(grads, state.masks)
        if not method:
            return value, grads, state.method_state
        seen = method.observe(state.method_state, state.adapters, state.masks, grads, state.step, measured)
        return value, grads, seen

    def step(params, state: TrainState, batch):
        key = jax.random.fold_in(state.key, state.step)
        if method and method.probes:
            zeros = method.probes.zeros(state.adapters)
            value, grads, method_state = jax.lax.cond(
                method.probes.when(state.step),
                lambda: observed(state, params, batch, key, zeros),
                lambda: observed(state, params, batch, key, None),
            )
        else:
            value, grads, method_state = observed(state, params, batch, key, None)
        chain = tailored(optimizer, state.adapters)
        updates, opt_state = chain.update(grads, state.opt_state, state.adapters)
        adapters: Any = optax.apply_updates(state.adapters, updates)
        if method and method.project:
            adapters = method.project(method_state, adapters, state.masks, state.step)
        adapters = zero_dead(adapters, state.masks)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "nonfinite": _first_nonfinite(value, grads)}
        new = TrainState(adapters, state.masks, opt_state, method_state, state.step + 1, state.key)
        return jax.tree.map(strong, new), metrics

    return _Step(step, donate)


class _Step:
    """A jitted step that leaves a divided state divided as it came; on one device the compiler has no choice."""

    def __init__(self, step: Callable[..., Any], donate: bool) -> None:
        self._jit = functools.partial(jax.jit, step, donate_argnums=(1,) if donate else ())
        self._one, self._divided = self._jit(), {}

    def __call__(self, params: Any, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        return self._program(state)(params, state, batch)

    def lower(self, params: Any, state: TrainState, batch: Any) -> Any:
        """Return the lowered step, as of a jitted function; arrays may be abstract."""
        return self._program(state).lower(params, state, batch)

    def _program(self, state: TrainState) -> Any:
        mesh = getattr(getattr(state.step, "sharding", None), "mesh", None)
        if mesh is None or mesh.size == 1:  # also while a transformation such as vmap traces the step
            return self._one
        leaves, structure = jax.tree.flatten(state)
        key = (structure, *(leaf.sharding for leaf in leaves))
        if key not in self._divided:
            shardings = jax.tree.unflatten(structure, key[1:])
            self._divided[key] = self._jit(out_shardings=(shardings, None))
        return self._divided[key]


def _first_nonfinite(loss: jax.Array, grads: Any) -> jax.Array:
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in (*jax.tree.leaves(grads), loss)])
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1)


def make_predict(forward: Callable[..., Any], outputs_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return the jitted `predict(params, adapters, masks, batch)`: the model's outputs with nothing dropped.

    Args:
      forward: from `attach` or `attach_function`.
      outputs_fn: `outputs_fn(apply, batch) -> outputs`, with `apply(*inputs, ...)` the adapted model.
    """

    def predict(params, adapters, masks, batch):
        return outputs_fn(lambda *inputs, **kw: forward(params, adapters, masks, *inputs, **kw), batch)

    return jax.jit(predict)
