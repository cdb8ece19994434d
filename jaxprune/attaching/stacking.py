"""Adapters of single layers, stacked as a scan stacks their kernels; differentiable, so that each layer gets its own gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.errors import UsageError, shown
from jaxprune.sites import Index, indices, joined, stacked_axes


def stack(module: str, shape: tuple[int, ...], layers: Mapping[Index, tuple[Any, Any]]) -> tuple[Any, Any]:
    """Stack the adapters of a module's layers.

    Ranks are filled up with zeros to the largest, layers without an adapter get one of zeros, and a scale that differs goes
    into the mask. Every leaf has as many axes as the kernel, so that the scan's axis is the same for all.

    Args:
      module: its path.
      shape: of the stacked kernel.
      layers: {index: (adapter, mask)}.

    Raises:
      UsageError: the adapters of the layers are of different kinds or settings.

    Returns:
      ((adapter, mask) stacked, the same pair for one layer with numbers of axes in place of arrays, for `one_layer`).
    """
    axes = stacked_axes(next(iter(layers)))
    first = next(iter(layers.values()))[0]
    scale = getattr(first, "scale", None)
    pairs: dict[Index, Any] = {}
    for index, (adapter, mask) in layers.items():
        own = getattr(adapter, "scale", None)
        if scale is not None and own is not None and own != scale:
            mask = (jnp.ones(adapter.a.shape[-1], jnp.float32) if mask is None else mask) * (own / scale)
            adapter = dataclasses.replace(adapter, scale=scale)
        pairs[index] = (adapter, mask)
    if len(pairs) < len(every := list(indices(shape, axes))) or len({mask is None for _, mask in pairs.values()}) > 1:
        pairs = {index: (adapter, _ones(adapter) if mask is None else mask) for index, (adapter, mask) in pairs.items()}
    like = next(iter(pairs.values()))
    nothing = jax.tree.map(jnp.zeros_like, like)
    pairs = {index: pairs.get(index, nothing) for index in every}
    treedef = jax.tree.structure(like)
    for index, pair in pairs.items():
        if jax.tree.structure(pair) != treedef:
            raise UsageError(
                f"the adapter at {shown(joined(module, index))} differs in kind or settings from those of other layers of its "
                f"scan; give all layers adapters of one kind, with one dropout"
            )
    leaves = zip(*(jax.tree.leaves(pair) for pair in pairs.values()), strict=True)
    stacked = [_stack(every, shape, axes) for every in leaves]
    return jax.tree.unflatten(treedef, stacked), jax.tree.map(jnp.ndim, like)


def one_layer(pair: Any, axes: Any) -> Any:
    """Return the adapter and mask of one layer, as the scan hands them to it, with the axes that they had by themselves."""
    return jax.tree.map(lambda leaf, n: leaf.reshape(leaf.shape[leaf.ndim - n :]), pair, axes)


def _stack(leaves: tuple[Any, ...], shape: tuple[int, ...], axes: tuple[int, ...]) -> Any:
    sizes = tuple(max(leaf.shape[axis] for leaf in leaves) for axis in range(leaves[0].ndim))
    short = lambda leaf: [(0, size - have) for size, have in zip(sizes, leaf.shape, strict=True)]  # noqa: E731
    filled = [leaf if leaf.shape == sizes else jnp.pad(leaf, short(leaf)) for leaf in leaves]
    ones = [1] * (len(shape) - len(axes) - len(sizes))
    return jnp.moveaxis(jnp.stack(filled).reshape(*(shape[a] for a in axes), *ones, *sizes), range(len(axes)), axes)


def _ones(adapter: Any) -> Any:
    """Return the mask of an adapter that came without one; None for a kind without components."""
    ranks = getattr(adapter, "rank_axes", {})
    return next((jnp.ones(getattr(adapter, name).shape[axis], jnp.float32) for name, axis in ranks.items()), None)
