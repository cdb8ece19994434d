"""What every kind of adapter is: a small pytree that knows its own forward, merge and count.

Adapters of a model are one flat dict, {site path: adapter}; masks lie beside them, {site path: (r,)}. A kind is a frozen
dataclass registered as a pytree: arrays are its leaves and are trained, settings (the scale, the dropout rate) are
static and are not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class Adapter(Protocol):
    """The adapter of one site; `x_NxI` are flattened tokens, `mask` is (r,) or None, `key` is None outside training."""

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return the adapted product (N, d_out), without the bias."""
        ...

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return the kernel that does the same without the adapter, in the kernel's dtype, added up in float32."""
        ...

    def count(self, mask: Array | None) -> int:
        """Count the live trainable parameters."""
        ...


Adapters = Mapping[str, Any]
Masks = Mapping[str, Array]


def key_for(key: Array, path: str) -> Array:
    """Derive a site's random key from its path, so that adding or removing a site leaves every other one unchanged."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def matmul(x_NxI: Array, kernel_IxO: Array) -> Array:
    """Multiply flattened tokens by a kernel in the dtype of `x`."""
    return jnp.dot(x_NxI, kernel_IxO.astype(x_NxI.dtype))
