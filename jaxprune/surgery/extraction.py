"""Extraction: take masked channels out of an encoder, so that it is really smaller and computes the same.

A channel can go where what reads it goes with it, and its value is exactly 0 while it is masked:

| group | goes | why nothing changes |
| --- | --- | --- |
| channel of the MLP | column of fc1, row of fc2 | act(0) = 0 |
| channel of the values | column of value, row of out | attention of zeros is 0 |
| pair of a query and a key channel of one head | columns of query and key | their product is 0 if either is |

Outputs that write to the residual stream (out, fc2) stay as they are, masked or not. Scores stay divided by the root of the
original head width. A DoRA site that loses inputs gets the magnitude m' = m |V after| / |V before| per output, because its
directions are divided by norms over its inputs.

Heads have one width in a layer: each keeps as many channels as the fullest, the surplus ones stay masked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, Dora, Lora, MaskedDora, Masks
from jaxprune.adapters.base import Array
from jaxprune.adapters.channel import GONE
from jaxprune.adapters.weight import NONE, Weights
from jaxprune.errors import UsageError
from jaxprune.sites import flatten, with_leaves

if TYPE_CHECKING:
    from jaxprune.models import EncoderConfig


_ROWS, _COLUMNS = -2, -1


class Kept(NamedTuple):
    """The channels that a group keeps.

    Attributes:
      index: where they were.
      live: booleans; the others only fill their head up.
      heads: heads they belong to, each with equally many.
    """

    index: np.ndarray
    live: np.ndarray
    heads: int


class Cut(NamedTuple):
    """What a site keeps of its inputs (axis -2) or of its outputs (axis -1)."""

    axis: int
    kept: Kept


class Extracted(NamedTuple):
    """A smaller model; the masks of rank components are the ones it had.

    Attributes:
      config: its configuration.
      params: its parameters.
      adapters: its adapters.
      weights: its trained weights.
    """

    config: EncoderConfig
    params: dict[str, Any]
    adapters: dict[str, Any]
    weights: dict[str, Array]


def extract(
    config: EncoderConfig,
    params: Mapping[str, Any],
    adapters: Adapters,
    masks: Masks | None = None,
    *,
    weights: Weights = NONE,
) -> Extracted:
    """Remove the channels that the adapters' channel masks switch off.

    The adapted model computes the same as before, up to rounding, and can be trained on. Shared masks of heads become masks
    of their own.

    Args:
      config: of an encoder in `jaxprune.models`.
      params: its parameters; left as they are.
      adapters: {path: adapter}; those of `MaskedDora` say what goes, LoRA and DoRA go along.
      masks: {site path: (r,)} of the rank components.
      weights: {leaf path: array}, which are cut like the parameters.

    Raises:
      UsageError: an adapter of another kind sits on a module that gets smaller.
    """
    masks = masks or {}
    cuts: dict[str, Cut] = {}
    widths = []
    for layer in range(config.num_layers):
        attention, mlp = (f"encoder/layer_{layer}/{part}" for part in ("attention", "mlp"))
        heads, inner = config.num_heads, config.widths(layer)
        pairs = _kept(adapters, masks, (f"{attention}/query", f"{attention}/key"), heads, inner.key)
        values = _kept(adapters, masks, (f"{attention}/value",), heads, inner.value)
        hidden = _kept(adapters, masks, (f"{mlp}/fc1",), 1, inner.mlp)
        cuts |= {
            f"{attention}/query": Cut(_COLUMNS, pairs),
            f"{attention}/key": Cut(_COLUMNS, pairs),
            f"{attention}/value": Cut(_COLUMNS, values),
            f"{attention}/out": Cut(_ROWS, values),
            f"{mlp}/fc1": Cut(_COLUMNS, hidden),
            f"{mlp}/fc2": Cut(_ROWS, hidden),
        }
        widths.append((hidden.index.size, pairs.index.size // heads, values.index.size // heads))

    flat, small = flatten(params), dict(adapters)
    for path, adapter in adapters.items():
        if path in cuts:
            small[path] = _cut_adapter(path, adapter, flat[f"{path}/kernel"], masks.get(path), cuts[path])
    left = {path: _cut_leaf(path, leaf, cuts) for path, leaf in flat.items()}
    trained = {path: _cut_leaf(path, leaf, cuts) for path, leaf in weights.items()}
    return Extracted(_with_widths(config, widths), with_leaves(params, left), small, trained)


def _kept(adapters: Adapters, masks: Masks, paths: tuple[str, ...], heads: int, width: int) -> Kept:
    """Choose the channels that stay of sites whose channels go together: in every head as many as its fullest has."""
    live = np.ones(heads * width, bool)
    for path in paths:
        if isinstance(adapter := adapters.get(path), MaskedDora):
            live &= np.asarray(adapter.channels(masks.get(path))) > 0
    live = live.reshape(heads, width)
    stay = max(1, int(live.sum(-1).max()))
    index = np.sort(np.argsort(~live, axis=-1, kind="stable")[:, :stay], axis=-1)
    index = (index + width * np.arange(heads)[:, None]).reshape(-1)
    return Kept(index, live.reshape(-1)[index], heads)


def _cut_leaf(path: str, leaf: Array, cuts: Mapping[str, Cut]) -> Array:
    module, _, name = path.rpartition("/")
    cut = cuts.get(module)
    if cut is None or (name == "bias" and cut.axis == _ROWS):
        return leaf
    return jnp.take(leaf, cut.kept.index, axis=cut.axis)


def _cut_adapter(path: str, adapter: Any, kernel: Array, mask: Array | None, cut: Cut) -> Any:
    """Give an adapter the inputs or outputs that its site keeps."""
    index, live, heads = cut.kept
    if index.size == kernel.shape[cut.axis]:
        return adapter
    if type(adapter) not in (Lora, Dora, MaskedDora):
        raise UsageError(
            f"adapter {path!r} is a {type(adapter).__name__}, which cannot lose channels of its site; merge it into the "
            f"parameters before extraction, or leave it off the sites next to masked channels"
        )
    new: dict[str, Any] = {}
    if cut.axis == _ROWS:
        new["a"] = adapter.a[index]
        if isinstance(adapter, Dora):
            direction = kernel.astype(jnp.float32) + adapter.delta(mask)
            new["magnitude"] = adapter.gain(direction, None) * jnp.linalg.norm(direction[index], axis=-2)
        return dataclasses.replace(adapter, **new)
    new["b"] = adapter.b[:, index]
    if isinstance(adapter, Dora):
        new["magnitude"] = adapter.magnitude[index]
    if isinstance(adapter, MaskedDora):
        own = jnp.tile(adapter.logits, adapter.magnitude.size // adapter.logits.size)
        new["logits"] = jnp.where(live, own[index], GONE)
        new["heads"] = heads if adapter.heads == heads else 1
    return dataclasses.replace(adapter, **new)


def _with_widths(config: EncoderConfig, widths: list[tuple[int, int, int]]) -> EncoderConfig:
    """Say the new widths; an MLP as wide in every layer needs no widths of its own, and stays readable for everyone."""
    hidden, keys, values = zip(*widths, strict=True)
    whole = (config.head_dim,) * config.num_layers
    even = len(set(hidden)) == 1
    return dataclasses.replace(
        config,
        intermediate_size=hidden[0] if even else config.intermediate_size,
        intermediate_sizes=None if even else hidden,
        key_dims=None if keys == whole else keys,
        value_dims=None if values == whole else values,
    )
