"""Where the rank components lie: which axis of which leaf of an adapter, and the same in an optimizer's state.

Every kind of adapter names the rank axis of its leaves in `rank_axes`; a leaf that is not named there, such as a DoRA
magnitude or a head's weight, has no components. An optimizer's state is walked with Optax's own `tree_map_params`, so any chain
works and none is known by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxprune.adapters import Adapters
from jaxprune.adapters.base import leaves_of
from jaxprune.errors import UsageError


class Place(NamedTuple):
    """The rank axis of one leaf, counted from the end (None: the leaf has no components), and whose leaf it is."""

    path: str
    field: str
    axis: int | None
    shape: tuple[int, ...]


class _Leaf:
    """Carry a place through tree maps, which would take a tuple apart."""

    def __init__(self, place: Place) -> None:
        self.place = place


def places(adapters: Adapters) -> dict[str, Any]:
    """Return a tree like `adapters` whose leaves are opaque and hold a `Place`."""

    def of(path: str, adapter: Any) -> Any:
        axes = getattr(adapter, "rank_axes", {})
        # Only arrays are leaves; settings stay what they are, or the two trees would not match.
        leaves = {
            name: _Leaf(Place(path, name, axes.get(name), tuple(leaf.shape)))
            for name, leaf in leaves_of(adapter).items()
        }
        return dataclasses.replace(adapter, **leaves)

    return {path: of(path, adapter) for path, adapter in adapters.items()}


def map_adapters(f: Callable[[Any, Place], Any], adapters: Adapters) -> dict[str, Any]:
    """Apply `f(leaf, place)` to every leaf."""
    return jax.tree.map(lambda leaf, at: f(leaf, at.place), dict(adapters), places(adapters))


def map_moments(
    f: Callable[[Any, Place], Any], opt_state: Any, adapters: Adapters, optimizer: optax.GradientTransformation
) -> Any:
    """Apply `f(leaf, place)` to every leaf of an optimizer's state that belongs to a leaf of the adapters.

    Step counts and other leaves that belong to none are kept. A scalar that stands for a whole leaf is kept too.

    Raises:
      UsageError: a leaf of the state has neither the shape of its adapter's leaf nor a single entry.
    """

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def one(leaf: Any, at: _Leaf) -> Any:
        if masked(leaf):  # an optax.masked chain keeps nothing here
            return leaf
        if np.size(leaf) <= 1 and leaf.shape != at.place.shape:
            return f(leaf, at.place._replace(axis=None))
        if leaf.shape != at.place.shape:
            raise UsageError(
                f"the optimizer keeps a leaf of shape {leaf.shape} for {at.place.field} of {at.place.path!r}, which has shape "
                f"{at.place.shape}, so its components cannot be told; use an optimizer whose moments are not factored"
            )
        return f(leaf, at.place)

    return optax.tree_utils.tree_map_params(optimizer, one, opt_state, places(adapters), is_leaf=masked)


class _Dropped:
    """Stand in for a leaf that goes."""


DROPPED = _Dropped()


def rebuild(moments: Any, adapters: Adapters, optimizer: optax.GradientTransformation) -> Any:
    """Put a mapped state into the containers that the optimizer makes for `adapters`, without the dropped leaves.

    Containers know their adapters' paths and settings, so those of the old state do not fit after sites went or scales
    changed.
    """
    structure = jax.tree.structure(jax.eval_shape(optimizer.init, adapters))
    return jax.tree.unflatten(structure, [leaf for leaf in jax.tree.leaves(moments) if leaf is not DROPPED])


def along(components: Any, leaf: Any, axis: int) -> Any:
    """Reshape values of the components (..., r) so that they broadcast along `axis` of a leaf.

    `components` has the stacked axes of the leaf in front and the rank axis last; the leaf may have one more axis.
    """
    if leaf.ndim == components.ndim:
        return components
    return components[..., None, :] if axis == -1 else components[..., :, None]


def host(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Bring a flat mapping of arrays to the host."""
    return {path: np.asarray(leaf) for path, leaf in jax.device_get(dict(tree)).items()}


def like(value: np.ndarray, leaf: Any) -> jax.Array:
    """Put a host array where `leaf` lies, in its dtype."""
    value = np.ascontiguousarray(value, leaf.dtype)
    return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else jax.numpy.asarray(value)
