"""Training: one state, one jitted step that differentiates the adapters alone, and a loop that keeps the device busy."""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.adapters import Adapters, Masks
from jaxprune.adapters.base import check_key, check_mappings, check_mask
from jaxprune.errors import UsageError, shown
from jaxprune.inputs import whole
from jaxprune.methods.base import Context, Method
from jaxprune.optim import check_prunable, tailored
from jaxprune.prune import Decision, apply, compact, survivors, zero_dead
from jaxprune.sites import Site

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


class NonFiniteError(RuntimeError):
    """A loss or a gradient became NaN or infinite; the message names the step and the first such leaf."""


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
        check_prunable(optimizer, adapters, masks)
    method_state = method.init(adapters, masks, sites) if method else ()
    opt_state = tailored(optimizer, adapters).init(adapters)
    return place(TrainState(adapters, masks, opt_state, method_state, jnp.zeros((), jnp.int32), key), mesh=mesh)


def place(state: TrainState, where: TrainState | None = None, *, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """Commit every leaf of a state, so that a step which was compiled for `where` need not be compiled again.

    A leaf goes where the leaf of the same name lies in `where`. One without a namesake stays where it is on the mesh, and goes
    to every device of it from elsewhere; without a mesh, to the one device. No leaf stays weakly typed.

    Args:
      state: not changed.
      where: the state before an event, or one that `init_state` made; None for a first one.
      mesh: by default the one that leaves of `where`, or of `state`, lie on.

    Raises:
      UsageError: a leaf cannot be divided as the one of the same name is.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):  # which lies nowhere yet
        return jax.tree.map(_strong, state)
    names, leaves = leaf_names(state), [x if isinstance(x, jax.Array) else jnp.array(x) for x in jax.tree.leaves(state)]
    known = {}
    if where is not None:
        known = {name: leaf.sharding for name, leaf in zip(leaf_names(where), jax.tree.leaves(where), strict=True)}
    shardings = known.values() or [leaf.sharding for leaf in leaves]
    home = _home(shardings, mesh)

    def target(name: str, leaf: jax.Array) -> jax.sharding.Sharding:
        sharding = known.get(name, leaf.sharding if leaf.sharding.device_set == home.device_set else home)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            raise UsageError(
                f"{name} of shape {leaf.shape} cannot be divided as {shown(sharding)}; do not divide the axis of components"
            ) from None
        return sharding

    targets = [target(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(state), jax.device_put([_strong(leaf) for leaf in leaves], targets))


def _home(shardings: Iterable[jax.sharding.Sharding], mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
    """Return where leaves go that lie nowhere in particular: whole on every device of the mesh, or on the one device."""
    shardings = list(shardings)
    meshes = [mesh] if mesh else [s.mesh for s in shardings if isinstance(s, NamedSharding) and s.mesh.size > 1]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else shardings[0]


def _strong(leaf: jax.Array) -> jax.Array:
    """Return a leaf that is not weakly typed, as what was computed with Python numbers is."""
    return jax.lax.convert_element_type(leaf, leaf.dtype) if jax.typeof(leaf).weak_type else leaf


def _check_parts(optimizer: Any, method: Any) -> None:
    if not isinstance(optimizer, optax.GradientTransformation):
        raise UsageError(
            f"optimizer {shown(optimizer)} cannot be used: expected an Optax chain, such as optax.adamw(1e-3)"
        )
    if method is not None and not isinstance(method, Method):
        raise UsageError(
            f"method {shown(method)} cannot be used: expected what a factory returns, such as jaxprune.lora()"
        )


def prune(
    state: TrainState,
    method: Method,
    optimizer: optax.GradientTransformation,
    context: Context | None = None,
) -> tuple[TrainState, Decision | None]:
    """Run the method's pruning event, where there is one after the steps done so far.

    A pure function of the state. Components that die are masked and every value and moment of them becomes zero; shapes and
    places stay, so nothing is compiled again until `compacted` is called. It reads `state.step`, and so waits for the device:
    a loop that must not wait asks `method.triggers(number)` first.

    Args:
      state: not changed.
      method: its `triggers` and `decide`.
      optimizer: the chain that `init_state` got.
      context: what the method's `start` got, for methods that measure on data of their own.

    Returns:
      (state, decision); the decision is None where nothing was to be decided or nothing changes.
    """
    if method.decide is None or not method.triggers(int(state.step)):
        return state, None
    method_state, decision = method.decide(state.method_state, state.adapters, state.masks, int(state.step), context)
    new = state._replace(method_state=method_state)
    if decision is not None:
        chain = tailored(optimizer, state.adapters)
        adapters, masks, opt_state = apply(decision, state.adapters, state.masks, state.opt_state, chain)
        new = new._replace(adapters=adapters, masks=masks, opt_state=opt_state)
    return place(new, state), decision


def compacted(state: TrainState, method: Method | None, optimizer: optax.GradientTransformation) -> TrainState:
    """Remove what is masked from adapters, masks, moments and the method's state; the next step is compiled anew.

    Args:
      state: not changed.
      method: its `compact` handles its own state.
      optimizer: the chain that `init_state` got.
    """
    chain = tailored(optimizer, state.adapters)
    kept = survivors(state.masks)
    adapters, masks, opt_state = compact(state.adapters, state.masks, state.opt_state, chain)
    method_state = method.compact(state.method_state, kept) if method else state.method_state
    small = state._replace(adapters=adapters, masks=masks, opt_state=opt_state, method_state=method_state)
    return place(small, state)


def compactable(masks: Masks) -> bool:
    """Tell whether compaction would remove anything."""
    return any(index.shape[-1] < masks[path].shape[-1] for path, index in survivors(masks).items())


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
        return jax.tree.map(_strong, new), metrics

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
      state: where to start; donated.
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
    names = [*leaf_names(state.adapters), "the loss"]
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
        metrics = {name: float(value) for name, value in jax.device_get(launched).items()}
        leaf = int(metrics.pop("nonfinite"))
        if leaf >= 0:
            what = names[leaf] if leaf == len(names) - 1 else f"the gradient of {names[leaf]}"
            raise NonFiniteError(
                f"step {done}: {what} is not finite (loss {metrics['loss']:.4g}); lower the learning rate, clip "
                f"gradients, or look for bad values in the data"
            )
        postfix["loss"] = f"{metrics['loss']:.4f}"
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
                names, ranks = [*leaf_names(state.adapters), "the loss"], shapes()
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
