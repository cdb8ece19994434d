"""VeRA (Kopiczko et al. 2024): one frozen random pair A, B for all sites, and two trained vectors at each.

    y = x W + ((x A * d) B) * b

The pair has the largest d_in and d_out among the sites, and a site takes the top left of each, as PEFT does; it is held once,
as one more entry beside the adapters of the sites. What is shared has no components that pruning could remove, so VeRA has no
masks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Adapters, Array, base, drop, key_for, matmul
from jaxprune.adapters.lora import Lora
from jaxprune.errors import UsageError, shown
from jaxprune.inputs import check_dropout, check_plan, check_sites, real, whole
from jaxprune.reprs import one_line
from jaxprune.sites import Site

# No site can have this path: it names no module.
SHARED = "vera shared pair"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=[])
@dataclass(frozen=True, repr=False)
class Pair:
    """Hold the frozen matrices: a (d_in, r) and b (r, d_out)."""

    a: Array
    b: Array

    frozen: ClassVar[tuple[str, ...]] = ("a", "b")
    __repr__ = one_line

    def count(self, mask: Array | None) -> int:
        """Count nothing: it is not trained."""
        return 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["d", "b", "pair"], meta_fields=["d_in", "dropout"])
@dataclass(frozen=True, repr=False)
class Vera:
    """Hold the vectors of one site.

    Attributes:
      d: (r,); scales the components.
      b: (d_out,); scales the outputs.
      d_in: input features of the kernel.
      dropout: rate of the dropout on the adapter's input.
      pair: A and B, where `share_pair` has handed them out; None in what a training step keeps.
    """

    d: Array
    b: Array
    d_in: int
    dropout: float = 0.0
    pair: Pair | None = None
    __repr__ = one_line

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W + ((dropout(x) A * d) B) * b."""
        pair = self._own()
        z_NxR = matmul(drop(x_NxI, self.dropout, key), pair.a) * self.d.astype(x_NxI.dtype)
        return base(x_NxI, kernel_IxO) + matmul(z_NxR, pair.b) * self.b.astype(x_NxI.dtype)

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return W + (A * d) B * b."""
        return self.as_lora(mask).merge(kernel, None)

    def count(self, mask: Array | None) -> int:
        """Count both vectors."""
        return self.d.size + self.b.size

    def as_lora(self, mask: Array | None) -> Lora:
        """Return LoRA of factors A * d and B * b, with s = 1."""
        pair = self._own()
        return Lora(pair.a * self.d, pair.b * self.b, 1.0, self.dropout)

    def _own(self) -> Pair:
        if self.pair is None:
            raise UsageError(
                "a VeRA adapter came without the shared A and B; pass the adapters through method.seen first"
            )
        return self.pair


def share_pair(adapters: Adapters) -> dict[str, Any]:
    """Hand the shared A and B out to the sites, each its own part."""
    pair: Pair = jax.lax.stop_gradient(adapters[SHARED])

    def own(adapter: Vera) -> Vera:
        part = Pair(pair.a[: adapter.d_in], pair.b[:, : adapter.b.shape[-1]])
        return dataclasses.replace(adapter, pair=part)

    rest = {path: adapter for path, adapter in adapters.items() if path != SHARED}
    return {path: own(adapter) if isinstance(adapter, Vera) else adapter for path, adapter in rest.items()}


def init_vera(
    key: Array, sites: Sequence[Site], *, rank: int, d_initial: float = 0.1, dropout: float = 0.0
) -> dict[str, Any]:
    """Create VeRA adapters: d = `d_initial`, b = 0, and A ~ U(-sqrt(6/d_in), sqrt(6/d_in)), B ~ U(-sqrt(6/r), sqrt(6/r)).

    Args:
      key: random key of the shared pair.
      sites: the sites to adapt.
      rank: r.
      d_initial: the start of d.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: the rank is not positive, or there are no sites.

    Returns:
      {site path: Vera}, and the pair at the path `SHARED`.
    """
    sites, dropout = check_sites(sites), check_dropout(dropout)
    d_in, d_out = max(site.d_in for site in sites), max(site.d_out for site in sites)
    if whole(rank) is None or rank < 1:
        raise UsageError(f"VeRA wants a rank of 1 or more, got {shown(rank)}")
    rank = next(iter(check_plan({SHARED: rank}, [Site(SHARED, d_in, d_out, 0, SHARED)]).values()))
    if (start := real(d_initial)) is None or not math.isfinite(start):
        raise UsageError(f"d_initial {shown(d_initial)} cannot be used: expected a number")
    key_a, key_b = jax.random.split(key_for(key, SHARED))
    a = jax.random.uniform(key_a, (d_in, rank), jnp.float32, -1, 1) * math.sqrt(6 / d_in)
    b = jax.random.uniform(key_b, (rank, d_out), jnp.float32, -1, 1) * math.sqrt(6 / rank)
    adapters: dict[str, Any] = {
        site.path: Vera(
            jnp.full(rank, start, jnp.float32),
            jnp.zeros(site.d_out, jnp.float32),
            site.d_in,
            dropout,
        )
        for site in sites
    }
    adapters[SHARED] = Pair(a, b)
    return adapters
