"""Where the rank components lie: which axis of which leaf of an adapter, and the same in an optimizer's state.

Every kind of adapter names the rank axis of its leaves in `rank_axes`; a leaf that is not named there, such as a DoRA
magnitude or a head's weight, has no components. An optimizer's state holds trees shaped like the adapters, and the path of a leaf
says whose it is, so any chain works and none is known by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxprune.adapters import Adapters
from jaxprune.adapters.base import leaves_of
from jaxprune.errors import UsageError


class Place(NamedTuple):
    """The rank axis of one leaf, counted from the end (None: the leaf has no components), and whose leaf it is.

    `keys` is where it lies in an optimizer's state.
    """

    path: str
    field: str
    axis: int | None
    shape: tuple[int, ...]
    keys: tuple[Any, ...] = ()


def places(path: str, adapter: Any) -> dict[str, Place]:
    """Return the place of every leaf of one adapter by field name."""
    axes = getattr(adapter, "rank_axes", {})
    return {name: Place(path, name, axes.get(name), tuple(leaf.shape)) for name, leaf in leaves_of(adapter).items()}


def map_adapters(f: Callable[[Any, Place], Any], adapters: Adapters) -> dict[str, Any]:
    """Apply `f(leaf, place)` to every leaf; settings stay as they are."""
    return {
        path: dataclasses.replace(
            adapter, **{name: f(getattr(adapter, name), at) for name, at in places(path, adapter).items()}
        )
        for path, adapter in adapters.items()
    }


def map_moments(
    f: Callable[[Any, Place], Any], opt_state: Any, adapters: Adapters, cut: Container[str] | None = None
) -> Any:
    """Apply `f(leaf, place)` to every leaf of an optimizer's state that belongs to a leaf of the adapters.

    A leaf belongs to [site path].field where its own path says so. Step counts and other leaves that belong to none are kept. A
    scalar that stands for a whole leaf has no components.

    Args:
      f: what to apply.
      opt_state: the state of an Optax chain.
      adapters: {path: adapter}.
      cut: the sites whose components must be told from each other; None for all. Others may go or stay as a whole.

    Raises:
      UsageError: a leaf of a cut site's state has neither the shape of its adapter's leaf, which has components, nor a single
        entry.
    """
    whose = {
        (jax.tree_util.DictKey(path), jax.tree_util.GetAttrKey(name)): at
        for path, adapter in adapters.items()
        for name, at in places(path, adapter).items()
    }

    def one(keys: tuple[Any, ...], leaf: Any) -> Any:
        # A chain may keep several leaves for one, below its path.
        at = next((whose[pair] for pair in zip(keys, keys[1:], strict=False) if pair in whose), None)
        if at is None:
            return leaf
        at = at._replace(keys=keys)
        if leaf.shape == at.shape:
            return f(leaf, at)
        if np.size(leaf) <= 1 or at.axis is None or (cut is not None and at.path not in cut):
            return f(leaf, at._replace(axis=None))
        raise UsageError(
            f"the optimizer keeps a leaf of shape {leaf.shape} for {at.field} of {at.path!r}, which has shape {at.shape}, so its "
            f"components cannot be told; use an optimizer whose moments are not factored"
        )

    return jax.tree_util.tree_map_with_path(one, opt_state)


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
    """Reshape values of the components (r,) so that they broadcast along `axis` of a leaf.

    The leaf has one axis or two.
    """
    return components[:, None] if leaf.ndim == 2 and axis == -2 else components


def host(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Bring a flat mapping of arrays to the host."""
    return {path: np.asarray(leaf) for path, leaf in jax.device_get(dict(tree)).items()}


def like(value: Any, leaf: Any) -> jax.Array:
    """Put an array where `leaf` lies, in its dtype."""
    value = jax.numpy.asarray(value, leaf.dtype)
    return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value
