"""LoRA with a trained gate on every component (Ding et al. 2023), y = x W + s ((x A) * g * m) B."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import jax

from jaxprune.adapters.base import Array, key_for
from jaxprune.adapters.diagonal import Diagonal
from jaxprune.adapters.lora import init_lora
from jaxprune.sites import Site


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "gate", "b"], meta_fields=["scale", "dropout"])
@dataclass(frozen=True, repr=False)
class Gated(Diagonal):
    """Hold the factors and the gates of one site.

    Attributes:
      a: (d_in, r).
      gate: (r,); a gate that is exactly 0 switches its component off. Gates take no weight decay.
      b: (r, d_out).
      scale: s = alpha / r, fixed when the site is planned.
      dropout: rate of the dropout on the adapter's input.
    """

    a: Array
    gate: Array
    b: Array
    scale: float
    dropout: float = 0.0

    diagonal: ClassVar[str] = "gate"
    rank_axes: ClassVar[Mapping[str, int]] = MappingProxyType({"a": -1, "gate": -1, "b": -2})
    undecayed: ClassVar[tuple[str, ...]] = ("gate",)


def init_gated(
    key: jax.Array,
    sites: Sequence[Site],
    ranks: Mapping[str, int],
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> tuple[dict[str, Gated], dict[str, Array]]:
    """Create the adapters of a plan: A and B as for LoRA, g ~ N(0, 1), masks of ones.

    Args:
      key: random key; every site draws from a key of its own, derived from its path.
      sites: the sites of the model.
      ranks: {site path: rank}; a site of rank 0, or absent, gets no adapter.
      alpha: s = alpha / rank at each site; None for s = 2.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a rank is negative, every rank is 0, or a path of `ranks` is not a site.

    Returns:
      (adapters, masks), both keyed by site path.
    """
    loras, masks = init_lora(key, sites, ranks, alpha=alpha, dropout=dropout)
    # A drew from the site's key itself; the gates draw from one derived from it.
    gates = {path: jax.random.normal(jax.random.fold_in(key_for(key, path), 1), masks[path].shape) for path in loras}
    return {path: Gated(x.a, gates[path], x.b, x.scale, dropout) for path, x in loras.items()}, masks
