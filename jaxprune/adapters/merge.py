"""Fold adapters into the parameters, and count them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxprune.adapters.base import Adapters, Masks
from jaxprune.adapters.weight import Weight
from jaxprune.errors import UsageError, nearest
from jaxprune.sites import flatten, unflatten


def merge(params: Mapping[str, Any], adapters: Adapters, masks: Masks) -> dict[str, Any]:
    """Return parameters that do without adapters what `params` do with them: W <- W + s (A * m) B, in float32.

    Args:
      params: nested dict of arrays; left as it is.
      adapters: {path: adapter}.
      masks: {path: mask}.

    Raises:
      UsageError: an adapter's path is not in `params`.
    """
    flat = flatten(params)
    for path, adapter in adapters.items():
        leaf = path if isinstance(adapter, Weight) else path + "/kernel"
        if leaf not in flat:
            raise UsageError(f"adapter path {path!r} is not in the parameters; nearest names: {nearest(leaf, flat)}")
        flat[leaf] = adapter.merge(flat[leaf], masks.get(path))
    for path, adapter in adapters.items():  # now that trained biases are in place
        if hasattr(adapter, "merge_bias") and (leaf := f"{path}/bias") in flat:
            flat[leaf] = adapter.merge_bias(flat[leaf], masks.get(path))
    return unflatten(flat)


def count(adapters: Adapters, masks: Masks) -> int:
    """Count the live trainable parameters of `adapters`."""
    return sum(adapter.count(masks.get(path)) for path, adapter in adapters.items())
