"""Fold adapters into the parameters, and count them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxprune.adapters.base import Adapters, Masks, check_mappings, merged, place
from jaxprune.sites import flatten, with_leaves


def merge(params: Mapping[str, Any], adapters: Adapters, masks: Masks) -> dict[str, Any]:
    """Return parameters that do without adapters what `params` do with them: W <- W + s (A * m) B, in float32.

    Args:
      params: nested dict of arrays; left as it is, and its structure is that of the result.
      adapters: {path: adapter}.
      masks: {path: mask}.

    Raises:
      UsageError: an adapter's path is not in `params`, or an adapter or a mask does not fit there.
    """
    check_mappings(adapters, masks)
    flat = flatten(params)
    for path, adapter in adapters.items():
        leaf = place(flat, path, adapter, masks.get(path))
        flat[leaf] = merged(adapter, flat[leaf], masks.get(path))
    for path, adapter in adapters.items():  # now that trained biases are in place
        if hasattr(adapter, "merge_bias") and (leaf := f"{path}/bias") in flat:
            flat[leaf] = adapter.merge_bias(flat[leaf], masks.get(path))
    return with_leaves(params, flat)


def count(adapters: Adapters, masks: Masks) -> int:
    """Count the live trainable parameters of `adapters`."""
    check_mappings(adapters, masks)
    return sum(adapter.count(masks.get(path)) for path, adapter in adapters.items())
