"""Fold adapters into the parameters, and count them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxprune.adapters.base import Adapters, Masks, by_leaf, check_mappings, merged
from jaxprune.sites import Index, flatten, layer_of, stacked_axes, with_layers, with_leaves


def merge(params: Mapping[str, Any], adapters: Adapters, masks: Masks) -> dict[str, Any]:
    """Return parameters that do without adapters what `params` do with them: W <- W + s (A * m) B, in float32.

    Args:
      params: nested dict of arrays; left as it is, and its structure is that of the result. Trained weights come first:
        `merge(with_weights(params, weights), adapters, masks)`.
      adapters: {path: adapter}.
      masks: {path: mask}.

    Raises:
      UsageError: an adapter's path is not in `params`, or an adapter or a mask does not fit there.
    """
    flat = flatten(params)
    grouped = by_leaf(flat, adapters, masks)
    for leaf, own in grouped.items():
        kernel = flat[leaf]
        layers = {i: merged(adapter, layer_of(kernel, i), mask) for i, (_, adapter, mask) in own.items()}
        flat[leaf] = with_layers(kernel, layers)
    for leaf, own in grouped.items():
        if (at := f"{leaf.rpartition('/')[0]}/bias") in flat and hasattr(next(iter(own.values()))[1], "merge_bias"):
            bias, sizes = flat[at], flat[leaf].shape
            places = {bias_index(i, sizes, bias.shape): given for i, given in own.items()}
            layers = {i: adapter.merge_bias(layer_of(bias, i), mask) for i, (_, adapter, mask) in places.items()}
            flat[at] = with_layers(bias, layers)
    return with_leaves(params, flat)


def bias_index(index: Index, kernel: tuple[int, ...], bias: tuple[int, ...]) -> Index:
    """Return the index of a layer's bias, given that of its kernel, for one scan: its axis counts from the front or the back."""
    if not index:
        return ()
    (axis,) = stacked_axes(index)
    both = (axis, axis - len(kernel) + len(bias))
    own = next(a for a in both if 0 <= a < len(bias) and bias[a] == kernel[axis])
    return (*(None,) * own, index[axis])


def count(adapters: Adapters, masks: Masks) -> int:
    """Count the live trainable parameters of `adapters`."""
    check_mappings(adapters, masks)
    return sum(adapter.count(masks.get(path)) for path, adapter in adapters.items())
