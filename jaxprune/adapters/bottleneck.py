"""A bottleneck on the output of a layer (Houlsby et al. 2019): y <- y + act(y D + c) * m U + e, one mask entry a unit."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array, base, key_for, matmul
from jaxprune.errors import UsageError, shown
from jaxprune.inputs import check_plan, check_sites
from jaxprune.reprs import one_line
from jaxprune.sites import Site

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["down", "down_bias", "up", "up_bias"],
    meta_fields=["activation"],
)
@dataclass(frozen=True, repr=False)
class Bottleneck:
    """Hold the two layers of one site with d outputs.

    Attributes:
      down: D, (d, r).
      down_bias: c, (r,).
      up: U, (r, d).
      up_bias: e, (d,).
      activation: a key of `ACTIVATIONS`.
    """

    down: Array
    down_bias: Array
    up: Array
    up_bias: Array
    activation: str = "gelu"

    rank_axes: ClassVar[Mapping[str, int]] = MappingProxyType({"down": -1, "down_bias": -1, "up": -2})
    __repr__ = one_line

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W: the bottleneck comes after the bias."""
        return base(x_NxI, kernel_IxO)

    def finish(self, y_NxO: Array, mask: Array | None) -> Array:
        """Return y + act(y D + c) * m U + e; without a live unit, y itself."""
        z_NxR = ACTIVATIONS[self.activation](matmul(y_NxO, self.down) + self.down_bias.astype(y_NxO.dtype))
        up_bias = self.up_bias
        if mask is not None:
            z_NxR = z_NxR * mask.astype(y_NxO.dtype)
            up_bias = up_bias * jnp.max(mask, axis=-1, keepdims=True)  # compaction drops the site, and with it e
        return y_NxO + matmul(z_NxR, self.up) + up_bias.astype(y_NxO.dtype)

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Refuse.

        Raises:
          UsageError: always; a nonlinear layer is no change of a kernel.
        """
        raise UsageError(
            "a bottleneck adapter is nonlinear and cannot be merged into a kernel; keep it beside the parameters and run the "
            "model through `attach`"
        )

    def count(self, mask: Array | None) -> int:
        """Count 2 d + 1 for every live unit, and d for the bias of a site that has one."""
        width, d = self.up.shape[-2:]
        units = width if mask is None else int(jnp.sum(mask))
        return units * (2 * d + 1) + (d if units else 0)


def init_bottleneck(
    key: jax.Array, sites: Sequence[Site], widths: Mapping[str, int], *, activation: str = "gelu"
) -> tuple[dict[str, Bottleneck], dict[str, Array]]:
    """Create bottlenecks that change nothing yet: D ~ U(-1/sqrt(d), 1/sqrt(d)), the rest 0, masks of ones.

    Args:
      key: random key; every site draws from a key of its own, derived from its path.
      sites: the sites of the model.
      widths: {site path: units r}; a site of width 0, or absent, gets none.
      activation: a key of `ACTIVATIONS`.

    Raises:
      UsageError: a width is no whole number, 0 or more, or far beyond the kernel's size, all are 0, a path is not a site, or
        the activation is unknown.

    Returns:
      (adapters, masks), both keyed by site path.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UsageError(f"activation {shown(activation)} is unknown; expected one of {', '.join(ACTIVATIONS)}")
    sites = check_sites(sites)
    planned = check_plan(widths, sites, "width")
    adapters, masks = {}, {}
    for site in sites:
        if not (width := planned.get(site.path, 0)):
            continue
        d = site.d_out
        bound = 1.0 / math.sqrt(d)
        down = jax.random.uniform(key_for(key, site.path), (d, width), jnp.float32, -bound, bound)
        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        adapters[site.path] = Bottleneck(down, zeros(width), zeros((width, d)), zeros(d), activation)
        masks[site.path] = jnp.ones(width, jnp.float32)
    return adapters, masks
