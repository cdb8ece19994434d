"""A trained copy of one parameter leaf: the task head, the biases of BitFit, everything in full fine-tuning."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array
from jaxprune.errors import UsageError, shown
from jaxprune.reprs import one_line
from jaxprune.sites import expression, flatten


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclass(frozen=True, repr=False)
class Weight:
    """Hold the trained value that stands in for the parameter leaf at its path."""

    value: Array
    __repr__ = one_line

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return the trained value in the dtype of the leaf it replaces."""
        return self.value.astype(kernel.dtype)

    def count(self, mask: Array | None) -> int:
        """Count every entry."""
        return self.value.size


def init_weights(params: Mapping[str, Any], pattern: str) -> dict[str, Weight]:
    """Make the leaves whose path contains a match of a regular expression trainable.

    Args:
      params: nested dict of arrays.
      pattern: regular expression searched in each leaf's path, for example `^head/` or `/bias$`.

    Raises:
      UsageError: nothing matches.

    Returns:
      {leaf path: Weight}, a float32 copy of each leaf (copied, because a training step donates its state).
    """
    matches = expression("pattern", pattern).search
    chosen = {path: leaf for path, leaf in flatten(params).items() if matches(path)}
    if not chosen:
        raise UsageError(
            f"pattern {shown(pattern)} matches no parameter; expected a regular expression over paths such as "
            f"{next(iter(flatten(params)), '(empty tree)')!r}"
        )
    return {path: Weight(jnp.array(leaf, jnp.float32, copy=True)) for path, leaf in chosen.items()}
