"""LoRA (Hu et al. 2022): y = x W + s ((x A) * m) B, with one mask entry per rank component."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array, base, drop, key_for, matmul
from jaxprune.inputs import check_dropout, check_factor, check_plan, check_sites
from jaxprune.reprs import one_line
from jaxprune.sites import Site


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["scale", "dropout", "residual"]
)
@dataclass(frozen=True, repr=False)
class Lora:
    """Hold the factors of one site.

    Attributes:
      a: (d_in, r).
      b: (r, d_out).
      scale: s = alpha / r, fixed when the site is planned and kept when ranks shrink.
      dropout: rate of the dropout on the adapter's input.
      residual: the kernel it belongs to is what the initial factors left of the model's own (PiSSA), W - s A0 B0.
    """

    a: Array
    b: Array
    scale: float
    dropout: float = 0.0
    residual: bool = False

    rank_axes: ClassVar[Mapping[str, int]] = MappingProxyType({"a": -1, "b": -2})
    __repr__ = one_line

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W + s ((dropout(x) A) * m) B."""
        return base(x_NxI, kernel_IxO) + self.product(drop(x_NxI, self.dropout, key), mask)

    def product(self, x_NxI: Array, mask: Array | None) -> Array:
        """Return s ((x A) * m) B."""
        z_NxR = matmul(x_NxI, self.a) * self._gate(mask).astype(x_NxI.dtype)
        return matmul(z_NxR, self.b)

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return W + s (A * m) B."""
        return (kernel.astype(jnp.float32) + self.delta(mask)).astype(kernel.dtype)

    def delta(self, mask: Array | None) -> Array:
        """Return s (A * m) B in float32, shaped as the kernel."""
        a = self.a.astype(jnp.float32) * self._gate(mask)[..., None, :]
        return jnp.matmul(a, self.b.astype(jnp.float32), precision="highest")

    def count(self, mask: Array | None) -> int:
        """Count (d_in + d_out) for every live component."""
        live = int(jnp.sum(mask)) if mask is not None else self.rank
        return live * (self.a.shape[-2] + self.b.shape[-1])

    def _gate(self, mask: Array | None) -> Array:
        return jnp.full((self.rank,), self.scale, jnp.float32) if mask is None else self.scale * mask


def init_lora(
    key: Array,
    sites: Sequence[Site],
    ranks: Mapping[str, int],
    *,
    alpha: float | None = None,
    scale: float = 2.0,
    dropout: float = 0.0,
) -> tuple[dict[str, Lora], dict[str, Array]]:
    """Create the LoRA adapters of a plan: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0, masks of ones.

    Args:
      key: random key; every site draws from a key of its own, derived from its path.
      sites: the sites of the model.
      ranks: {site path: rank} (`plan.ranks`); a site of rank 0, or absent, gets no adapter.
      alpha: where given, s = alpha / rank at each site; otherwise s = `scale` everywhere.
      scale: the factor s; 2 is the usual alpha = 2 r.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a rank is no whole number, 0 or more, or far beyond the kernel's size, every rank is 0, a path of `ranks` is
        not a site, or alpha, the scale or the dropout is out of range.

    Returns:
      (adapters, masks), both keyed by site path.
    """
    sites, dropout = check_sites(sites), check_dropout(dropout)
    planned = check_plan(ranks, sites)
    scale, alpha = check_factor("scale", scale), None if alpha is None else check_factor("alpha", alpha)
    adapters, masks = {}, {}
    for site in sites:
        if not (rank := planned.get(site.path, 0)):
            continue
        bound = 1.0 / math.sqrt(site.d_in)
        a = jax.random.uniform(key_for(key, site.path), (site.d_in, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((rank, site.d_out), jnp.float32)
        adapters[site.path] = Lora(a, b, scale if alpha is None else alpha / rank, dropout)
        masks[site.path] = jnp.ones(rank, jnp.float32)
    return adapters, masks
