"""Compaction: really remove what is masked, from adapters, masks and every moment."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.adapters import Adapters, Masks
from jaxprune.errors import UsageError
from jaxprune.surgery.components import DROPPED, Place, host, like, map_adapters, map_moments, rebuild

Survivors = dict[str, np.ndarray]


def survivors(masks: Masks) -> Survivors:
    """Return the indices of the components that stay: {site path: (r',)}, empty where a site goes."""
    return {path: np.flatnonzero(mask > 0) for path, mask in host(masks).items()}


def compact(
    adapters: Adapters, masks: Masks, opt_state: Any, optimizer: optax.GradientTransformation
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Gather the survivors of every site and drop the sites that have none.

    A[:, k], B[k, :] and every moment of them, in the order they had; step counts stay. The outputs do not change and neither
    does training, up to rounding; the next step is compiled anew, since shapes change. The host sees masks alone.

    Args:
      adapters: {path: adapter}.
      masks: {path: mask}.
      opt_state: the state of `optimizer`.
      optimizer: the chain that made it; moments of a site that loses some components must have the shape of its leaves.

    Raises:
      UsageError: nothing would be left to train.

    Returns:
      (adapters, masks, opt_state).
    """
    kept = survivors(masks)
    gone = {path for path, index in kept.items() if index.shape[-1] == 0}
    left = {path: adapter for path, adapter in adapters.items() if path not in gone}
    if not left:
        raise UsageError("every component is masked, so compaction would leave nothing to train; raise the budget")
    new_adapters = map_adapters(lambda leaf, place: _take(leaf, place, kept), left)
    new_masks = {path: like(np.asarray(mask)[kept[path]], mask) for path, mask in masks.items() if path not in gone}
    moments = map_moments(
        lambda leaf, place: DROPPED if place.path in gone else _take(leaf, place, kept),
        opt_state,
        adapters,
        {path for path, mask in masks.items() if 0 < kept[path].shape[-1] < mask.shape[-1]},
    )
    return new_adapters, new_masks, rebuild(moments, new_adapters, optimizer)


def gather(tree: Adapters, kept: Survivors) -> dict[str, Any]:
    """Compact a tree shaped like the adapters, for example a method's own statistics of their leaves."""
    left = {path: adapter for path, adapter in tree.items() if path not in kept or kept[path].shape[-1]}
    return map_adapters(lambda leaf, place: _take(leaf, place, kept), left)


def _take(leaf: Any, place: Place, kept: Survivors) -> Any:
    index = kept.get(place.path)
    if place.axis is None or index is None or index.shape[-1] == np.shape(leaf)[place.axis]:
        return leaf
    return take_components(leaf, index, place.axis)


@functools.partial(jax.jit, static_argnames="axis")
def take_components(leaf: Any, index: Any, axis: int) -> jax.Array:
    """Gather components along one axis of a leaf."""
    # The index is never out of range; "clip" saves the comparison with the bounds.
    return jnp.take(leaf, index, axis=axis, mode="clip")
