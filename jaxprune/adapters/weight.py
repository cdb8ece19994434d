"""Weights: leaves of the model that are trained as they are, beside adapters: the task head, biases, or everything.

A method and a training state hold them as {leaf path: array}, in float32. An optimizer sees adapters and weights as one mapping.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Adapters, Array
from jaxprune.errors import UsageError, nearest, shown
from jaxprune.reprs import one_line
from jaxprune.sites import expression, flatten, with_leaves

Weights = Mapping[str, Array]
NONE: Weights = MappingProxyType({})


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclass(frozen=True, repr=False)
class Weight:
    """A weight among adapters, as an optimizer sees it."""

    value: Array
    __repr__ = one_line


def joined(adapters: Adapters, weights: Weights) -> dict[str, Any]:
    """Return everything that is trained as one mapping; sites and leaves never share a path."""
    return {**adapters, **{path: Weight(value) for path, value in weights.items()}}


def parted(trained: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Undo `joined`: return (adapters, weights)."""
    adapters = {path: x for path, x in trained.items() if not isinstance(x, Weight)}
    return adapters, {path: x.value for path, x in trained.items() if isinstance(x, Weight)}


def init_weights(params: Mapping[str, Any], pattern: str) -> dict[str, Array]:
    """Make the leaves whose path contains a match of a regular expression trainable.

    Args:
      params: nested dict of arrays.
      pattern: regular expression searched in each leaf's path, for example `^head/` or `/bias$`.

    Raises:
      UsageError: nothing matches.

    Returns:
      {leaf path: a float32 copy of the leaf} (copied, because a training step donates its state).
    """
    matches = expression("pattern", pattern).search
    chosen = {path: leaf for path, leaf in flatten(params).items() if matches(path)}
    if not chosen:
        raise UsageError(
            f"pattern {shown(pattern)} matches no parameter; expected a regular expression over paths such as "
            f"{next(iter(flatten(params)), '(empty tree)')!r}"
        )
    return {path: jnp.array(leaf, jnp.float32, copy=True) for path, leaf in chosen.items()}


def with_weights(params: Mapping[str, Any], weights: Weights) -> Any:
    """Return the parameters with trained weights in their places, each in the dtype of the leaf it replaces.

    Args:
      params: nested dict of arrays; left as it is.
      weights: {leaf path: array}.

    Raises:
      UsageError: a path is no leaf of `params`, or a shape differs.
    """
    if not weights:
        return params
    flat = flatten(params)
    check_weights(weights, flat)
    return with_leaves(params, {**flat, **{path: x.astype(flat[path].dtype) for path, x in weights.items()}})


def check_weights(weights: Any, flat: Mapping[str, Any] | None = None) -> None:
    """Raise where weights are no mapping of arrays, or do not fit the leaves that they belong to."""
    if not isinstance(weights, Mapping):
        raise UsageError(f"weights {shown(weights)} cannot be used: expected {{leaf path: array}}, from init_weights")
    for path, value in weights.items():
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise UsageError(f"the weight at {shown(path)} is {shown(value)}; expected an array")
        if flat is None:
            continue
        if path not in flat:
            raise UsageError(
                f"weight path {shown(path)} is not in the parameters; nearest names: {nearest(str(path), flat)}"
            )
        if value.shape != flat[path].shape:
            raise UsageError(
                f"the weight at {shown(path)} has shape {value.shape}, expected {flat[path].shape} as the parameter"
            )
