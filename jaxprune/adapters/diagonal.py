"""LoRA with a trained diagonal between its factors, y = x W + s ((x A) * g * m) B: what gated and SVD-shaped adapters do."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from jaxprune.adapters.base import Array
from jaxprune.adapters.lora import Lora
from jaxprune.reprs import one_line


class Diagonal:
    """Compute what the fields a (d_in, r), b (r, d_out), scale, dropout and the one that `diagonal` names (r,) say."""

    a: Array
    b: Array
    scale: float
    dropout: float
    diagonal: ClassVar[str]
    __repr__ = one_line

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W + s ((dropout(x) A) * g * m) B."""
        return self.as_lora(mask).linear(x_NxI, kernel_IxO, None, key)

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return W + s A diag(g * m) B."""
        return self.as_lora(mask).merge(kernel, None)

    def count(self, mask: Array | None) -> int:
        """Count (d_in + 1 + d_out) for every live component."""
        live = int(jnp.sum(mask)) if mask is not None else getattr(self, self.diagonal).size
        return live * (self.a.shape[-2] + 1 + self.b.shape[-1])

    def as_lora(self, mask: Array | None) -> Lora:
        """Fold g * m into A."""
        g = getattr(self, self.diagonal)
        g = g if mask is None else g * mask
        return Lora(self.a * g[..., None, :], self.b, self.scale, self.dropout)
