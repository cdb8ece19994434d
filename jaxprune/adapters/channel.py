"""DoRA with a trained mask on the output channels: h = g * (x V * magnitude / |V| + bias), g in {0, 1} per channel.

The mask multiplies the bias too, so a channel that is off is exactly 0 and can be removed. Each channel has a logit l:
g = 1[l > 0], and at least the largest logit of every group of channels (a head) is taken. Its gradient is that of sigmoid(l),
straight through the step. A method that trains the logits passes (l + noise) / temperature in their place; settled ones lie so
far from 0 that their gradient is exactly 0 and no noise moves them, which is how a mask is frozen.

These masks are no rank masks: they are part of the adapter, trained with it, and beside them the rank components keep
theirs.

Source: Ali et al., "Learning to prune and low-rank adaptation for compact language model deployment", ASP-DAC 2025; that the
bias is masked and a group never empties is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array
from jaxprune.adapters.dora import Dora
from jaxprune.errors import UsageError, shown
from jaxprune.inputs import whole

# sigmoid(+-SETTLED / temperature) is 1 or 0 in float32, so its derivative is exactly 0.
SETTLED = 1e4
# A channel with this logit is off even where its group has no other: extraction pads heads with such channels.
GONE = -1e6


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b", "magnitude", "logits"],
    meta_fields=["scale", "dropout", "residual", "heads"],
)
@dataclass(frozen=True, repr=False)
class MaskedDora(Dora):
    """Hold the factors, the magnitude and the channel logits of one site.

    Attributes:
      logits: (d_out,), or (d_out / heads,) shared by all heads; trained without weight decay and at a rate of their own.
      heads: groups of equally many neighbouring channels, each of which keeps at least one.
    """

    logits: Array = field(kw_only=True)
    heads: int = field(default=1, kw_only=True)

    undecayed: ClassVar[tuple[str, ...]] = ("logits",)
    rate: ClassVar[Mapping[str, float]] = MappingProxyType({"logits": 10.0})

    def channels(self, mask: Array | None) -> Array:
        """Return g (..., d_out): 1[l > 0] with the gradient of sigmoid(l), and 1 where no rank component is live.

        Args:
          mask: (r,) or None.
        """
        soft = jax.nn.sigmoid(self.logits)
        gate = self.kept().astype(jnp.float32) + (soft - jax.lax.stop_gradient(soft))
        gate = self.grouped(gate)
        gate = jnp.broadcast_to(gate, (*gate.shape[:-2], self.heads, gate.shape[-1])).reshape(self.magnitude.shape)
        return gate if mask is None else jnp.where(jnp.any(mask > 0, axis=-1, keepdims=True), gate, 1.0)

    def kept(self) -> Array:
        """Say where l > 0, or l is the first of the largest of its group and not GONE; shaped as the logits."""
        logits = self.grouped(self.logits)
        best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
        return ((logits > 0) | (best & (logits > GONE / 2))).reshape(self.logits.shape)

    def finish(self, y_NxO: Array, mask: Array | None) -> Array:
        """Return y * g, where y has the bias."""
        return y_NxO * self.channels(mask).astype(y_NxO.dtype)

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return V * g * magnitude / |V|."""
        return self._masked(super().merge(kernel, mask), self.channels(mask)[..., None, :])

    def merge_bias(self, bias: Array, mask: Array | None) -> Array:
        """Return bias * g."""
        return self._masked(bias, self.channels(mask))

    def count(self, mask: Array | None) -> int:
        """Count the parameters of DoRA and every logit that is not settled."""
        return super().count(mask) + int(jnp.sum(jnp.abs(self.logits) < SETTLED / 2))

    def grouped(self, logits: Array) -> Array:
        """Return what is shaped as the logits with an axis more, (..., groups, channels of a group)."""
        return logits.reshape(*logits.shape[:-1], -1, self.magnitude.shape[-1] // self.heads)

    @staticmethod
    def _masked(leaf: Array, gate: Array) -> Array:
        return (leaf * gate).astype(leaf.dtype)


def mask_channels(adapter: Dora, *, start: float = 3.0, heads: int = 1, shared: bool = False) -> MaskedDora:
    """Give a DoRA adapter a mask that is all ones.

    Args:
      adapter: of the site to mask.
      start: initial logit; 3 draws a 1 with probability 0.95 at first.
      heads: groups of channels, each of which keeps at least one.
      shared: give all heads one mask.

    Raises:
      UsageError: the site's channels do not divide into that many heads.
    """
    d_out = adapter.magnitude.shape[-1]
    groups = whole(heads) or 0
    if groups < 1 or d_out % groups:
        raise UsageError(
            f"{d_out} output channels do not divide into heads={shown(heads)}; set the model's number of heads"
        )
    logits = jnp.full((*adapter.magnitude.shape[:-1], d_out // groups if shared else d_out), start, jnp.float32)
    return MaskedDora(**{f.name: getattr(adapter, f.name) for f in fields(adapter)}, logits=logits, heads=groups)


def settle(adapter: MaskedDora, kept: Array | None = None) -> MaskedDora:
    """Freeze the mask: channels that are on get the logit SETTLED, the others -SETTLED.

    Args:
      adapter: of the site.
      kept: booleans shaped as the logits; None for the mask as it stands.
    """
    return replace(adapter, logits=jnp.where(adapter.kept() if kept is None else kept, SETTLED, -SETTLED))
