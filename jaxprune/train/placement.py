"""Where the leaves of a state lie: committed, so that what was compiled for them fits them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.errors import UsageError, shown

State = TypeVar("State")


def leaf_names(tree: Any) -> list[str]:
    """Name the leaves of a pytree, in its own order; `metrics["nonfinite"]` counts those of the adapters so."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path) for path, _ in leaves]


def place(state: State, where: State | None = None, *, mesh: jax.sharding.Mesh | None = None) -> State:
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
        return jax.tree.map(strong, state)
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
    return jax.tree.unflatten(jax.tree.structure(state), jax.device_put([strong(leaf) for leaf in leaves], targets))


def _home(shardings: Iterable[jax.sharding.Sharding], mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
    """Return where leaves go that lie nowhere in particular: whole on every device of the mesh, or on the one device."""
    shardings = list(shardings)
    meshes = [mesh] if mesh else [s.mesh for s in shardings if isinstance(s, NamedSharding) and s.mesh.size > 1]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else shardings[0]


def strong(leaf: jax.Array) -> jax.Array:
    """Return a leaf that is not weakly typed, as what was computed with Python numbers is."""
    return jax.lax.convert_element_type(leaf, leaf.dtype) if jax.typeof(leaf).weak_type else leaf
