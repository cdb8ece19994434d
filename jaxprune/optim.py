"""What adapters ask of any Optax chain: frozen leaves, leaves without weight decay, rates of their own; and what pruning asks.

A chain is a pair of functions and does not say what it does. What it would do is read from its traced program; nothing is run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal

from jaxprune.adapters import Adapters, Masks
from jaxprune.adapters.base import leaves_of
from jaxprune.adapters.weight import Weight
from jaxprune.errors import UsageError, reason
from jaxprune.surgery import compact, zero_dead
from jaxprune.surgery.components import map_moments

Leaves = frozenset[tuple[str, str]]

# Names of biases and of the weights of normalisation layers.
_PLAIN = ("bias", "scale")


def tailored(optimizer: optax.GradientTransformation, adapters: Adapters) -> optax.GradientTransformation:
    """Return a chain that does what the adapters ask; the chain itself where they ask for nothing.

    - A leaf that its kind names in `frozen` has no moments and no update. Its gradient must be zero, as
      `jax.lax.stop_gradient` in the forward pass makes it.
    - A leaf named in `undecayed`, a bias and a weight of a normalisation layer take no weight decay: a chain that decays them
      sees zeros in their place. So the trust ratio of LAMB and LARS is 1 for them, as usual for such leaves; a chain without
      weight decay sees them as they are. Biases and norms stay decayed by chains whose decay cannot be told from the rest.
    - The update of a leaf in `rate` is multiplied by its factor.

    Args:
      optimizer: any Optax chain.
      adapters: {path: adapter}.

    Raises:
      UsageError: an adapter asks for what the chain cannot do, because it decays and scales steps by the size of what it
        trains (Adafactor), or keeps copies of it (schedule-free).
    """
    bare = frozenset((path, name) for path, adapter in adapters.items() for name in _undecayed(path, adapter))
    rates = {
        (path, name): factor
        for path, adapter in adapters.items()
        for name, factor in getattr(adapter, "rate", {}).items()
    }
    bare = _decayed(optimizer, adapters, bare, frozenset(rates))
    if bare or rates:
        inner = optax.with_extra_args_support(optimizer)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            seen = _by_leaf(params, lambda path, name, x: jnp.zeros_like(x) if (path, name) in bare else x)
            updates, state = inner.update(updates, state, seen, **extra)
            return _by_leaf(updates, lambda path, name, x: x * rates.get((path, name), 1.0)), state

        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, update)
    if any(getattr(adapter, "frozen", ()) for adapter in adapters.values()):
        optimizer = optax.masked(optimizer, _trained)
    return optimizer


def _trained(tree: Adapters) -> dict[str, Any]:
    return {
        path: dataclasses.replace(
            adapter, **{name: name not in getattr(adapter, "frozen", ()) for name in leaves_of(adapter)}
        )
        for path, adapter in tree.items()
    }


def _undecayed(path: str, adapter: Any) -> tuple[str, ...]:
    if isinstance(adapter, Weight):
        return ("value",) if path.rpartition("/")[2] in _PLAIN else ()
    return getattr(adapter, "undecayed", ())


def _by_leaf(tree: Adapters, f: Callable[[str, str, Any], Any]) -> dict[str, Any]:
    return {
        path: dataclasses.replace(adapter, **{name: f(path, name, x) for name, x in leaves_of(adapter).items()})
        for path, adapter in tree.items()
    }


@functools.lru_cache(maxsize=64)
def _found(optimizer: optax.GradientTransformation) -> dict[Any, Any]:
    """Return what has been found out about a chain so far."""
    return {}


def _decayed(optimizer: optax.GradientTransformation, adapters: Adapters, bare: Leaves, rates: Leaves) -> Leaves:
    """Return the leaves among `bare` that the chain decays."""
    found = _found(optimizer)
    if not bare | rates <= found.keys():
        found |= _read(optimizer, adapters, bare | rates)
    decayed = frozenset(leaf for leaf in bare if found[leaf][0])
    for leaf in sorted(decayed | rates):
        _, stalls, copies = found[leaf]
        if copies or (stalls and leaf in decayed):
            if isinstance(adapters[leaf[0]], Weight):
                decayed -= {leaf}
                continue
            why = "keeps copies of what it trains" if copies else "scales steps by the size of what it trains"
            raise UsageError(
                f"{_named(optimizer, adapters)} {why}, so {leaf[1]} of {leaf[0]!r} cannot be kept from its weight decay or "
                f"have a rate of its own; leave its weight decay out, or use another, such as optax.adamw"
            )
    return decayed


def _read(
    optimizer: optax.GradientTransformation, adapters: Adapters, leaves: Leaves
) -> dict[tuple[str, str], tuple[bool, bool, bool]]:
    """Return of every leaf whether it is decayed, would stand still at zero, and is copied.

    Decay is what goes from a leaf's value to its update entry by entry; what goes through a sum, such as a norm, is scaling.
    """
    shapes = _by_leaf(adapters, lambda path, name, x: jax.ShapeDtypeStruct((2,) * x.ndim, x.dtype))
    where = [leaf for leaf in _by_path(shapes) if leaf in leaves]

    def marked(f: Callable[..., Any], *arguments: Any) -> Any:
        """Return a tree like the result of `f`, with the marks that reach each of its leaves from the first argument."""
        traced, shape = jax.make_jaxpr(f, return_shape=True)(*arguments)
        marks = [frozenset({(leaf, True)}) for leaf in _by_path(arguments[0])]
        marks += [frozenset()] * (len(traced.jaxpr.invars) - len(marks))
        return jax.tree.unflatten(jax.tree.structure(shape), _reached(traced.jaxpr, marks))

    state = jax.eval_shape(optimizer.init, shapes)
    updates: Any = marked(lambda params, grads, state: optimizer.update(grads, state, params)[0], shapes, shapes, state)
    reached = {(path, name): getattr(updates[path], name) for path, name in where}
    kept = frozenset().union(
        *jax.tree.leaves(marked(optimizer.init, shapes), is_leaf=lambda x: isinstance(x, frozenset))
    )
    both = [leaf for leaf in where if {(leaf, True), (leaf, False)} <= reached[leaf]]
    stalls = _stalled(optimizer, shapes, both) if both else {}
    return {leaf: ((leaf, True) in reached[leaf], stalls.get(leaf, False), (leaf, True) in kept) for leaf in where}


def _by_path(tree: Adapters) -> list[tuple[str, str]]:
    """Return (site path, field) of every leaf, in the order of the tree's leaves."""
    return [(keys[0].key, keys[1].name) for keys, _ in jax.tree_util.tree_flatten_with_path(dict(tree))[0]]


def _reached(jaxpr: Any, marks: list[Any]) -> list[Any]:
    """Follow marks (what, entry by entry?) from the inputs of a traced program to its outputs."""
    none = frozenset()
    reach = dict(zip(jaxpr.invars, marks, strict=True))
    at = lambda var: none if isinstance(var, Literal) else reach.get(var, none)  # noqa: E731
    for eqn in jaxpr.eqns:
        given = [at(var) for var in eqn.invars]
        inner = [sub for value in eqn.params.values() for sub in _programs(value)]
        operands = given[1:] if eqn.primitive.name == "cond" else given
        if inner and all(len(sub.invars) == len(operands) and len(sub.outvars) == len(eqn.outvars) for sub in inner):
            results = [_reached(sub, operands) for sub in inner]
            found = [frozenset().union(*each) for each in zip(*results, strict=True)]
        else:
            together = frozenset().union(*given)
            if eqn.primitive.name.startswith(("reduce", "dot_general", "arg", "cum", "sort")):
                together = frozenset((what, False) for what, _ in together)
            found = [together] * len(eqn.outvars)
        reach |= dict(zip(eqn.outvars, found, strict=True))
    return [at(var) for var in jaxpr.outvars]


def _programs(value: Any) -> list[Any]:
    """Return the traced programs inside a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [program for item in value for program in _programs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def _stalled(optimizer: optax.GradientTransformation, shapes: Any, leaves: list[Any]) -> dict[Any, bool]:
    """Tell whether a chain hardly moves a leaf that is zero, whose size it scales steps by; tried on small arrays."""
    filled = lambda value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)  # noqa: E731

    @jax.jit
    def moved(params: Any) -> list[jax.Array]:
        state, found = optimizer.init(params), []
        for _ in range(2):  # a schedule may begin at 0
            updates, state = optimizer.update(filled(1.0), state, params)
            found = [jnp.max(jnp.abs(getattr(dict(updates)[path], name))) for path, name in leaves]  # type: ignore[arg-type]
        return found

    with jax.ensure_compile_time_eval():
        return {
            leaf: bool(b < 0.1 * a) for leaf, a, b in zip(leaves, moved(filled(1.0)), moved(filled(0.0)), strict=True)
        }


def check_prunable(
    optimizer: optax.GradientTransformation, adapters: Adapters, masks: Masks, removes: str = "components"
) -> None:
    """Refuse a chain that would stop, or train otherwise, when what a method masks is removed.

    Args:
      optimizer: any Optax chain.
      adapters: {path: adapter}.
      masks: {site path: mask}.
      removes: what the method masks, `Method.removes`.

    Raises:
      UsageError: its moments have no components, it knows all the sites by name, or its steps depend on how many components
        there are, as Adafactor's do, and Muon's without `consistent_rms`; where whole sites go, on how many sites there are.
    """
    if removes == "nothing":
        return
    chain = tailored(optimizer, adapters)
    thin = removes == "components"
    map_moments(lambda leaf, at: leaf, jax.eval_shape(chain.init, dict(adapters)), adapters, None if thin else ())
    wide = {path for path, adapter in adapters.items() if path in masks and _wide(adapter)}
    found, key = _found(optimizer), ("prunable", removes, *sorted(adapters), "wide", *sorted(wide))
    if key not in found:
        try:
            found[key] = _follows(chain, adapters, masks, wide, thin) or (not thin and _spares(chain, adapters, masks))
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{_named(optimizer, adapters)} cannot go on when sites or components are removed ({reason(error)}); give "
                f"masks and labels as functions of the tree, or use another, such as optax.adamw"
            ) from error
    if not found[key]:
        raise UsageError(
            f"{_named(optimizer, adapters)} makes steps that depend on how many {removes} there are, so training would change "
            f"when masked ones are removed; use another, such as optax.adamw, or a method that does not prune"
        )


def _wide(adapter: Any) -> bool:
    """Tell whether there are as many components as a side has entries, or more."""
    axes = getattr(adapter, "rank_axes", {})
    leaves = {name: leaf.shape for name, leaf in leaves_of(adapter).items() if name in axes and leaf.ndim > 1}
    return any(shape[axes[name]] >= shape[-3 - axes[name]] for name, shape in leaves.items())


def _small(
    adapters: Adapters, masks: Masks, rank: int, wide: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return shapes like the adapters', of another rank, and masks of ones.

    A side has more entries than there are components, and less at a wide site.
    """
    ranks = {path: np.ones(rank, np.float32) for path in masks}

    def shape(path: str, name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        sides, axes = [2 if path in wide else 5] * leaf.ndim, getattr(adapters[path], "rank_axes", {})
        if path in masks and name in axes:
            sides[axes[name]] = rank
        return jax.ShapeDtypeStruct(tuple(sides), leaf.dtype)

    return _by_leaf(adapters, shape), ranks


def _follows(
    chain: optax.GradientTransformation, adapters: Adapters, masks: Masks, wide: Collection[str], thin: bool
) -> bool:
    """Tell whether a chain computes the same with components removed: the same program, but for shapes, without noise.

    The program with fewer components has one site less too, so that a chain which knows sites by name fails here. `thin`:
    the others have fewer components than they had.
    """

    def update(adapters: Any, state: Any) -> Any:
        return chain.update(adapters, state, adapters)

    def compacted(masks: Any) -> Callable[..., Any]:
        def run(adapters: Any) -> Any:
            less, _, state = compact(adapters, masks, chain.init(adapters), chain)
            return chain.update(less, state, less)

        return run

    programs = []
    for rank in (4, 3):
        shapes, ranks = _small(adapters, masks, rank, wide)
        state = jax.eval_shape(chain.init, shapes)
        traced = jax.make_jaxpr(update)(shapes, state)
        with jax.ensure_compile_time_eval():
            programs.append(_operations(traced.jaxpr)[0])
        if rank == 4:
            if thin:
                ranks = {path: mask * np.array([1, 0, 1, 1], np.float32) for path, mask in ranks.items()}
            if len(ranks) > 1:
                ranks[next(iter(ranks))][:] = 0
            jax.eval_shape(compacted(ranks), shapes)
    return programs[0] == programs[1] and not any("random" in name or "threefry" in name for name, *_ in programs[0])


def _spares(chain: optax.GradientTransformation, adapters: Adapters, masks: Masks) -> bool:
    """Tell whether a chain moves the other sites the same after a site was removed; tried on small arrays."""
    if len(masks) < 2:
        return True
    shapes, masks_of_ones = _small(adapters, masks, 3)
    ranks: Any = masks_of_ones
    ranks[next(iter(ranks))][:] = 0
    draw = np.random.default_rng(0)
    given, *slopes = (
        jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), shapes) for _ in range(4)
    )

    def moved_by(tree: Any, updates: Any) -> Any:
        return optax.apply_updates(tree, updates)

    @jax.jit
    def distance(given: Any, slopes: Any) -> jax.Array:
        full = zero_dead(given, ranks)
        state = chain.init(full)
        less, _, small = compact(full, ranks, state, chain)
        for slope in slopes:
            slope = zero_dead(slope, ranks)
            updates, state = chain.update(slope, state, full)
            moved, small = chain.update({path: slope[path] for path in less}, small, less)
            full, less = zero_dead(moved_by(full, updates), ranks), moved_by(less, moved)
        apart = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), {path: full[path] for path in less}, less)
        return jnp.max(jnp.stack(jax.tree.leaves(apart)))

    with jax.ensure_compile_time_eval():
        return bool(distance(given, slopes) < 1e-5)


def _operations(jaxpr: Any, given: Sequence[Any] = ()) -> tuple[list[Any], list[Any]]:
    """List the operations of a traced program with the numbers they use, without shapes, and the numbers it returns.

    What it computes from numbers alone is a number, such as the square root of a size. `given` are the numbers among its
    inputs, None for arrays.
    """
    known: dict[Any, Any] = {
        var: number for var, number in zip(jaxpr.invars, given, strict=False) if number is not None
    }
    at = lambda var: np.asarray(var.val) if isinstance(var, Literal) else known.get(var)  # noqa: E731
    listed = []
    for eqn in jaxpr.eqns:
        numbers: list[Any] = [at(var) for var in eqn.invars]
        programs = [program for value in eqn.params.values() for program in _programs(value)]
        if eqn.primitive.name in ("jit", "pjit"):
            inner, returned = _operations(programs[0], numbers)
            listed += inner
            known |= {var: number for var, number in zip(eqn.outvars, returned, strict=True) if number is not None}
        elif (
            all(number is not None and number.ndim == 0 for number in numbers)
            and not programs
            and not eqn.primitive.multiple_results
            and eqn.outvars[0].aval.shape == ()
        ):
            found: Any = eqn.primitive.bind(*numbers, **eqn.params)
            known[eqn.outvars[0]] = np.asarray(found)
        else:
            listed.append((eqn.primitive.name, *(number.tolist() for number in numbers if number is not None)))
            for program in programs:
                listed += _operations(program)[0]
    return listed, [at(var) for var in jaxpr.outvars]


def _named(optimizer: optax.GradientTransformation, adapters: Adapters) -> str:
    """Name a chain by what made it and by the states it keeps."""

    def states(node: Any) -> Iterator[str]:
        if hasattr(node, "_fields"):
            yield type(node).__name__
        for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
            yield from states(child)

    names = dict.fromkeys(states(jax.eval_shape(optimizer.init, dict(adapters))))
    made = getattr(optimizer.update, "__qualname__", "chain").split(".")[0]
    kept = ", ".join(name for name in names if name not in ("EmptyState", "MaskedNode"))
    return f"optimizer {made} ({kept})" if kept else f"optimizer {made}"
