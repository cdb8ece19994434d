"""Masks: what is dead is exactly zero, in values, gradients and moments, and stays so."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, Masks
from jaxprune.errors import UsageError, nearest
from jaxprune.surgery.components import Place, along, host, map_adapters


def zero_dead(tree: Adapters, masks: Masks) -> dict[str, Any]:
    """Set every dead component of a tree shaped like the adapters to zero; works inside `jax.jit`.

    leaf <- where(m > 0, leaf, 0) along the rank axis; sites without a mask are left alone.

    Args:
      tree: adapters, or their gradients.
      masks: {site path: (r,)}.
    """

    def one(leaf: Any, place: Place) -> Any:
        mask = masks.get(place.path)
        if place.axis is None or mask is None:
            return leaf
        return zero_components(leaf, mask, place.axis)

    return map_adapters(one, tree)


# Jitted a leaf at a time: a model has few shapes of leaves, so an event compiles few programs, and nothing leaves the device.
@functools.partial(jax.jit, static_argnames="axis")
def zero_components(leaf: Any, mask: Any, axis: int) -> jax.Array:
    """Set the dead components along one axis of a leaf to zero."""
    return jnp.where(along(mask, leaf, axis) > 0, leaf, jnp.zeros((), leaf.dtype))


def live(masks: Masks) -> dict[str, int]:
    """Count the live components of every site."""
    return {path: int((mask > 0).sum()) for path, mask in host(masks).items()}


def trim(scores: Mapping[str, Any], masks: Masks, ranks: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Keep the best components of each site.

    Args:
      scores: {site path: (r,)}, larger is better; a NaN counts as the worst.
      masks: {site path: (r,)}; the dead are not chosen again.
      ranks: {site path: components to keep}; sites that are absent keep all.

    Raises:
      UsageError: a path is no site with a mask, or a rank is negative or above the live components.

    Returns:
      New masks of the sites in `ranks`. Of equal scores the lower index is kept.
    """
    new = {}
    for path, rank in ranks.items():
        if path not in masks:
            raise UsageError(f"rank for {path!r}, which has no mask; nearest names: {nearest(path, masks)}")
        mask = np.asarray(masks[path])
        alive = mask > 0
        if not 0 <= rank <= alive.sum():
            raise UsageError(
                f"rank {rank} for {path!r} is out of range; expected 0 to its {alive.sum()} live components"
            )
        score = np.nan_to_num(np.asarray(scores[path], np.float64), nan=-np.inf)
        # Dead components sort behind live ones of any score.
        new[path] = np.zeros_like(mask)
        new[path][np.lexsort((-score, ~alive))[:rank]] = 1
    return new
