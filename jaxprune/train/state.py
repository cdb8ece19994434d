"""The state of a run, and one jitted step that differentiates what is trained, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.adapters import Adapters, Masks, Weights, joined, parted, with_weights
from jaxprune.adapters.base import check_key, check_mappings, check_mask
from jaxprune.adapters.weight import NONE, check_weights
from jaxprune.errors import UsageError, shown
from jaxprune.inputs import whole
from jaxprune.methods.base import Method
from jaxprune.optim import check_prunable, tailored
from jaxprune.reprs import state_lines
from jaxprune.surgery import zero_dead
from jaxprune.train.placement import place, strong

# Keep what a method's view, and what dropout of adapters draws, apart from what the loss draws.
_VIEW, _DROPOUT = 0x71EF, 0xD909


class TrainState(NamedTuple):
    """Everything a run owns, one pytree: it can be saved, sharded, donated and mapped over seeds."""

    adapters: Adapters
    weights: Weights
    masks: Masks
    opt_state: optax.OptState
    method_state: Any
    step: jax.Array
    key: jax.Array

    @property
    def trained(self) -> dict[str, Any]:
        """Everything that is trained, as the optimizer sees it."""
        return joined(self.adapters, self.weights)

    __repr__ = state_lines


def init_state(
    key: jax.Array,
    adapters: Adapters,
    masks: Masks,
    optimizer: optax.GradientTransformation,
    method: Method | None = None,
    *,
    weights: Weights = NONE,
    mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
    """Make the state of step 0, committed to the devices where it stays.

    Args:
      key: random key; the step folds its number into it, so a run's randomness is a function of (key, step).
      adapters: {site path: adapter}, trained.
      masks: {site path: mask}, never trained.
      optimizer: any Optax chain.
      method: whose own state to make; None for none.
      weights: {leaf path: array} of the model's own leaves that are trained too, such as a head, from `init_weights`.
      mesh: the devices that the parameters lie on, where they are several; by default those that an adapter lies on. Leaves
        that are on one device go to all of them, whole.

    Raises:
      UsageError: an argument is of another kind, a mask does not fit its adapter, or the optimizer cannot do what adapters or
        a method that prunes ask of it (`jaxprune.optim`).
    """
    check_key(key)
    check_mappings(adapters, masks)
    check_weights(weights)
    _check_parts(optimizer, method)
    for path, adapter in adapters.items():
        if not dataclasses.is_dataclass(adapter):
            raise UsageError(
                f"the adapter at {shown(path)} is {shown(adapter)}; expected one that init_lora or a method made"
            )
        check_mask(path, adapter, masks.get(path))
    if method and method.decide and masks:
        check_prunable(optimizer, adapters, masks, method.removes)
    weights = dict(weights)
    method_state = method.init(adapters, masks) if method else ()
    trained = joined(adapters, weights)
    opt_state = tailored(optimizer, trained).init(trained)
    return place(
        TrainState(adapters, weights, masks, opt_state, method_state, jnp.zeros((), jnp.int32), key), mesh=mesh
    )


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

    Only adapters and weights are differentiated: no gradient of a frozen kernel is ever formed. `metrics` holds `loss`,
    `grad_norm` (before clipping) and `nonfinite`: the index among `leaf_names(state.trained)` of the first gradient that is not
    finite, the number of leaves where only the loss is not, -1 where all is well.

    Args:
      forward: from `attach` or `attach_function`.
      loss_fn: `loss_fn(apply, batch, key) -> loss` or `(loss, aux)`: the mean loss of a batch, `apply(*inputs, ...)` being
        the adapted model and `key` this step's random key. Where adapters have dropout and the loss passes no `rngs`, the step
        passes a key for it.
      optimizer: the chain that `init_state` got.
      method: its `view`, `penalty`, `probes`, `observe` and `project` take part in the step.
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

    def loss(trained, zeros, state, params, batch, key):
        (adapters, weights), masks = trained, state.masks
        params = with_weights(params, weights)
        regular = method.penalty(state.method_state, adapters, masks) if method and method.penalty else 0.0
        if method and method.view:
            drawn = jax.random.fold_in(key, _VIEW)
            adapters, masks = method.view(state.method_state, adapters, masks, drawn, state.step + 1)
        if zeros is not None and method and method.probes:
            adapters = method.probes.wrap(adapters, zeros)
        drops = getattr(forward, "takes_rngs", False) and any(getattr(x, "dropout", 0.0) for x in adapters.values())

        def apply(*inputs: Any, **kw: Any) -> Any:
            if drops and kw.get("rngs") is None:
                kw["rngs"] = {"dropout": jax.random.fold_in(key, _DROPOUT)}
            return forward(params, adapters, masks, *inputs, **kw)

        value = loss_fn(apply, batch, key)
        value = value[0] if isinstance(value, tuple) else value
        if jnp.shape(value) != ():
            raise UsageError(
                f"loss_fn returned an array of shape {jnp.shape(value)}; expected a number, such as its mean"
            )
        return value + regular

    def value_and_grads(state, params, batch, key, zeros):
        grad = jax.value_and_grad(loss, argnums=(0, 1))
        trained = (state.adapters, state.weights)
        if accumulate == 1:
            return grad(trained, zeros, state, params, batch, key)

        if any(jnp.shape(leaf)[:1] != (accumulate,) for leaf in jax.tree.leaves(batch)):
            raise UsageError(f"with accumulate={accumulate} each leaf of a batch needs a leading axis of that length")

        def add(total, item):
            index, micro = item
            value = grad(trained, zeros, state, params, micro, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, value), None

        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, (trained, zeros)))
        total, _ = jax.lax.scan(add, start, (jnp.arange(accumulate), batch))
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def observed(state, params, batch, key, zeros):
        value, ((grads, of_weights), measured) = value_and_grads(state, params, batch, key, zeros)
        grads = zero_dead(grads, state.masks)
        if not method:
            return value, grads, of_weights, state.method_state
        seen = method.observe(state.method_state, state.adapters, state.masks, grads, state.step + 1, measured)
        return value, grads, of_weights, seen

    def step(params, state: TrainState, batch):
        key = jax.random.fold_in(state.key, state.step)
        probes = method.probes if method else None
        zeros = probes.zeros(state.adapters) if probes else None
        measuring, plain = (functools.partial(observed, state, params, batch, key, given) for given in (zeros, None))
        if probes and probes.when:
            found = jax.lax.cond(probes.when(state.step + 1), measuring, plain)
        else:
            found = measuring()
        value, grads, of_weights, method_state = found
        chain, every = tailored(optimizer, state.trained), joined(grads, of_weights)
        updates, opt_state = chain.update(every, state.opt_state, state.trained)
        updated: Any = optax.apply_updates(state.trained, updates)
        adapters, weights = parted(updated)
        if method and method.project:
            method_state, adapters = method.project(method_state, adapters, state.masks, grads, state.step + 1)
        adapters = zero_dead(adapters, state.masks)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(every), "nonfinite": _first_nonfinite(value, every)}
        new = TrainState(adapters, weights, state.masks, opt_state, method_state, state.step + 1, state.key)
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

    Trained weights come into the parameters first: `predict(with_weights(params, weights), ...)`.

    Args:
      forward: from `attach` or `attach_function`.
      outputs_fn: `outputs_fn(apply, batch) -> outputs`, with `apply(*inputs, ...)` the adapted model.
    """

    def predict(params, adapters, masks, batch):
        return outputs_fn(lambda *inputs, **kw: forward(params, adapters, masks, *inputs, **kw), batch)

    return jax.jit(predict)
