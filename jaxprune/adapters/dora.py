"""DoRA (Liu et al. 2024): the columns of W + s (A * m) B give directions, a trained vector gives their lengths.

    y = (x V) * magnitude / |V|,    V = W + s (A * m) B,

where |V| holds the norm of every column (output channel) of V and is a constant to the gradient, as in section 4.3 of the paper.
The magnitude starts as |V|, so a fresh adapter changes nothing.

A site none of whose components is live is as if it had no adapter, whatever its magnitude: rank 0 means the model's own
kernel, whether the site is masked, compacted or was never planned.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array, base, drop, matmul
from jaxprune.adapters.lora import Lora
from jaxprune.errors import UsageError
from jaxprune.sites import flatten, layer_of, leaf_at


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b", "magnitude"],
    meta_fields=["scale", "dropout", "residual"],
)
@dataclass(frozen=True, repr=False)
class Dora(Lora):
    """Hold the factors and the magnitude of one site.

    Attributes:
      magnitude: (d_out,).
    """

    magnitude: Array = field(kw_only=True)

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W + (g - 1) (d W) + g s ((d A) * m) B, with d = dropout(x) and g = magnitude / |V|.

        Without dropout that is g (x V). Dropout leaves x W alone and thins the change, as PEFT does, which costs a
        second product with W.
        """
        base_NxO = base(x_NxI, kernel_IxO)
        dropped_NxI = drop(x_NxI, self.dropout, key)
        changed_NxO = base_NxO if dropped_NxI is x_NxI else matmul(dropped_NxI, kernel_IxO)
        gain = self.gain(kernel_IxO.astype(jnp.float32) + self.delta(mask), mask)
        # In bfloat16 a rounded g near 1 would be off by up to 0.4 % for every token; g - 1 is not.
        shift, gain = (v[None, :].astype(x_NxI.dtype) for v in (gain - 1.0, gain))
        return base_NxO + shift * changed_NxO + gain * self.product(dropped_NxI, mask)

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return V * magnitude / |V|."""
        direction = kernel.astype(jnp.float32) + self.delta(mask)
        return (direction * self.gain(direction, mask)[..., None, :]).astype(kernel.dtype)

    def gain(self, direction: Array, mask: Array | None) -> Array:
        """Return g = magnitude / |V| (..., d_out), in float32, and 1 where no component is live.

        V is formed whole: expanding |W + s A B|^2 into Gram matrices was no faster, and loses all digits where A B comes
        close to -W.
        """
        norm = jnp.linalg.norm(jax.lax.stop_gradient(direction), axis=-2)
        gain = self.magnitude / jnp.where(norm > 0, norm, 1.0)  # a column of zeros stays one
        return gain if mask is None else jnp.where(jnp.any(mask > 0, axis=-1, keepdims=True), gain, 1.0)

    def count(self, mask: Array | None) -> int:
        """Count (d_in + d_out) for every live component, and d_out for the magnitude of every live site."""
        if mask is None:
            return super().count(mask) + self.magnitude.size
        return super().count(mask) + int(jnp.any(mask > 0, axis=-1).sum()) * self.magnitude.shape[-1]


def to_dora(adapters: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Give LoRA adapters a magnitude, magnitude = |W + s A B|, so that they start from the same function.

    Args:
      adapters: {site path: Lora}.
      params: the parameters they belong to; for PiSSA those whose factors were taken out.

    Raises:
      UsageError: an adapter is of another kind, or its path is not in `params`.
    """
    flat = flatten(params)

    def one(path: str, adapter: Any) -> Any:
        if type(adapter) is not Lora:
            raise UsageError(f"adapter {path!r} is a {type(adapter).__name__}; only Lora can become DoRA")
        found, delta = leaf_at(flat, path), adapter.delta(None)
        kernel = None if found is None else layer_of(flat[found[0]], found[1])
        if kernel is None or kernel.size != delta.size:
            raise UsageError(f"adapter path {path!r} is not in the parameters; pass those the adapters were made for")
        norm = jnp.linalg.norm(kernel.astype(jnp.float32).reshape(delta.shape) + delta, axis=-2)
        return Dora(**{f.name: getattr(adapter, f.name) for f in fields(adapter)}, magnitude=norm)

    return {path: one(path, adapter) for path, adapter in adapters.items()}
