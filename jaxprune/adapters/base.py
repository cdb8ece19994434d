"""What every kind of adapter is: a small pytree that knows its own forward, merge and count.

Adapters of a model are one flat dict, {site path: adapter}; masks lie beside them, {site path: (r,)}. A kind is a frozen
dataclass registered as a pytree: arrays are its leaves and are trained, settings (the scale, the dropout rate) are
static and are not.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Adapter(Protocol):
    """The adapter of one site; `x_NxI` are flattened tokens, `mask` is (r,) or None, `key` is None outside training.

    A kind may further have
    - `rank_axes`: {leaf: its axis of rank components, -1 or -2}, which pruning needs;
    - `frozen`: names of leaves that are not trained; its forward pass stops their gradients;
    - `finish(y_NxO, mask) -> y_NxO`: what comes after the bias;
    - `merge_bias(bias, mask) -> bias`: the bias that goes with a merged kernel, where it changes too;
    - `undecayed`: names of leaves that take no weight decay, and `rate`: {leaf: factor on the learning rate};
    - `as_lora(mask) -> Lora`: the same product as plain LoRA, where there is one, for export.
    """

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


def leaves_of(adapter: Any) -> dict[str, Any]:
    """Return the leaves of one adapter by field name, without its settings (which may be NumPy scalars)."""
    fields = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}
    return {name: leaf for name, leaf in fields.items() if hasattr(leaf, "shape") and not isinstance(leaf, np.generic)}


def key_for(key: Array, path: str) -> Array:
    """Derive a site's random key from its path, so that adding or removing a site leaves every other one unchanged."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def matmul(x_NxI: Array, kernel_IxO: Array) -> Array:
    """Multiply flattened tokens by a kernel in the dtype of `x`."""
    return jnp.dot(x_NxI, kernel_IxO.astype(x_NxI.dtype))


def drop(x_NxI: Array, rate: float, key: Array | None) -> Array:
    """Zero entries with probability `rate` and scale the rest by 1 / (1 - rate); without a key, return `x` itself."""
    if key is None or rate == 0.0:
        return x_NxI
    keep = jax.random.bernoulli(key, 1.0 - rate, x_NxI.shape)
    return jnp.where(keep, x_NxI / (1.0 - rate), 0).astype(x_NxI.dtype)
