"""The adapter of AdaLoRA (Zhang et al. 2023), shaped like a singular value decomposition: y = x W + s ((x A) * e * m) B."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array, key_for
from jaxprune.adapters.diagonal import Diagonal
from jaxprune.adapters.lora import init_lora
from jaxprune.sites import Site


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "e", "b"], meta_fields=["scale", "dropout"])
@dataclass(frozen=True, repr=False)
class Svd(Diagonal):
    """Hold the factors of one site.

    Attributes:
      a: (d_in, r), columns kept near orthonormal by a penalty.
      e: (r,), the singular values, of either sign.
      b: (r, d_out), rows kept near orthonormal.
      scale: s = alpha / (r + 1e-5), fixed when the site is planned.
      dropout: rate of the dropout on the adapter's input.
    """

    a: Array
    e: Array
    b: Array
    scale: float
    dropout: float = 0.0

    diagonal: ClassVar[str] = "e"
    rank_axes: ClassVar[Mapping[str, int]] = MappingProxyType({"a": -1, "e": -1, "b": -2})


def init_svd(
    key: jax.Array,
    sites: Sequence[Site],
    ranks: Mapping[str, int],
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> tuple[dict[str, Svd], dict[str, Array]]:
    """Create the adapters of a plan: A, B ~ N(0, 0.02^2), e = 0, masks of ones.

    Args:
      key: random key; every site draws from a key of its own, derived from its path.
      sites: the sites of the model.
      ranks: {site path: rank}; a site of rank 0, or absent, gets no adapter.
      alpha: s = alpha / (rank + 1e-5) at each site; None for alpha = 2 rank.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a rank is negative, every rank is 0, or a path of `ranks` is not a site.

    Returns:
      (adapters, masks), both keyed by site path.
    """
    loras, masks = init_lora(key, sites, ranks, alpha=alpha, dropout=dropout)
    adapters = {}
    for path, lora in loras.items():
        of_a, of_b = jax.random.split(key_for(key, path))
        scale = (2 * lora.rank if alpha is None else alpha) / (lora.rank + 1e-5)
        a, b = (0.02 * jax.random.normal(k, leaf.shape) for k, leaf in ((of_a, lora.a), (of_b, lora.b)))
        adapters[path] = Svd(a, jnp.zeros_like(masks[path]), b, scale, dropout)
    return adapters, masks
