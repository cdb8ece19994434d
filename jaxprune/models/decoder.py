"""Decoders of the Llama kind in Flax Linen: root-mean-square norms, rotary positions, shared key-value heads, a gated MLP.

Layers lie in stacks, each run by one `nn.scan`: the program is as large as one layer, and where a plan adapts the upper layers
only, a stack of the lower ones gets no backward pass.

Axes: B rows, T tokens of a row, S slots of a cache or scored positions, D hidden, H query heads, N key-value heads, K width of a
head, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jax.ad_checkpoint import checkpoint_name

from jaxprune.errors import UsageError
from jaxprune.models.attention import attend, choose
from jaxprune.models.config import ACTIVATIONS
from jaxprune.models.decoder_config import DecoderConfig
from jaxprune.models.next_token import next_token_loss
from jaxprune.models.rope import turn

_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("base"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for generation.

    Attributes:
      keys: for every stack of layers (layers, B, S, N, K).
      values: likewise.
      segment_ids: (B, S), 1 where a slot holds a token, 0 where it is padding or free.
      used: slots in use, the same in all rows.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    segment_ids: jax.Array
    used: jax.Array


class _View(NamedTuple):
    """What every layer needs beside its input."""

    cosine: jax.Array
    sine: jax.Array
    mask: jax.Array
    start: Any


def empty_cache(config: DecoderConfig, rows: int, slots: int) -> Cache:
    """Return a cache without tokens."""
    shapes = [(n, rows, slots, config.num_kv_heads, config.head_dim) for n in config.stacks.values()]
    keys, values = (tuple(jnp.zeros(shape, config.dtype) for shape in shapes) for _ in range(2))
    return Cache(keys, values, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32))


class Norm(nn.Module):
    """Scale to a root mean square of 1, in float32, and by a trained factor."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return (wide * self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)).astype(x.dtype)


def _product(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    out = jax.lax.dot_general(
        x, kernel, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
    )
    return checkpoint_name(out, "base")


def _dense(config: DecoderConfig, features: int, name: str, bias: bool = False) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.dtype,
        kernel_init=nn.initializers.normal(config.initializer_range),
        dot_general=_product,
        name=name,
    )


class Attention(nn.Module):
    """Attend to the tokens before, of the same segment: (B, T, D) -> (B, T, D)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, view: _View, cache):
        cfg = self.config
        rows, length, _ = x_BxTxD.shape

        def project(name, heads):
            features = heads * cfg.head_dim
            return _dense(cfg, features, name, cfg.qkv_bias)(x_BxTxD).reshape(rows, length, heads, cfg.head_dim)

        q_BxTxHxK = turn(project("q_proj", cfg.num_heads), view.cosine, view.sine)
        k_BxTxNxK = turn(project("k_proj", cfg.num_kv_heads), view.cosine, view.sine)
        v_BxTxNxK = project("v_proj", cfg.num_kv_heads)
        keys, values = k_BxTxNxK, v_BxTxNxK
        if cache is not None:
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=view.start, axis=1)
            keys, values = cache = put(cache[0], keys), put(cache[1], values)
        implementation = choose(cfg.attention, cfg.dtype, length) if cache is None else "xla"
        out = attend(
            q_BxTxHxK, keys, values, view.mask,
            chunk=cfg.query_chunk, causal=cache is None, implementation=implementation,
        )  # fmt: skip
        out = out.reshape(rows, length, cfg.num_heads * cfg.head_dim)
        return _dense(cfg, cfg.hidden_size, "o_proj", cfg.output_bias)(out), cache


class MLP(nn.Module):
    """Return (act(x G) * (x U)) W: (B, T, D) -> (B, T, D)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        cfg = self.config
        gate = ACTIVATIONS[cfg.activation](_dense(cfg, cfg.intermediate_size, "gate_proj", cfg.mlp_bias)(x_BxTxD))
        up = _dense(cfg, cfg.intermediate_size, "up_proj", cfg.mlp_bias)(x_BxTxD)
        return _dense(cfg, cfg.hidden_size, "down_proj", cfg.mlp_bias)(gate * up)


class Layer(nn.Module):
    """Add attention and MLP, each of the normed input; a scan over layers carries x and hands out each layer's cache."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, view: _View, cache):
        x_BxTxD = with_logical_constraint(x_BxTxD, ("batch", "length", "hidden"))
        attended, cache = Attention(self.config, name="attention")(
            Norm(self.config, name="attention_norm")(x_BxTxD), view, cache
        )
        x_BxTxD = x_BxTxD + attended
        return x_BxTxD + MLP(self.config, name="mlp")(Norm(self.config, name="mlp_norm")(x_BxTxD)), cache


class Decoder(nn.Module):
    """Predict the next token at every position."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        segment_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        scored: jax.Array | None = None,
        targets: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Compute logits, or losses, or logits and a longer cache.

        Args:
          input_ids_BxT: integer ids.
          segment_ids: (B, T); tokens see earlier ones of their own segment alone, and 0 is padding. Default: one segment.
          position_ids: (B, T) of each token within its segment. Default: from 0 in each row.
          scored: (B, S) indices of the tokens of each row whose outputs are wanted. Default: all.
          targets: (B, S) the token after each scored one; losses take the place of logits.
          cache: of the tokens before; the new ones come behind them. Its rows are one segment, padded on the left.

        Raises:
          UsageError: shapes that do not fit.

        Returns:
          logits (B, S, V) in float32; with targets (nll, correct), both (B, S); with a cache (logits, cache).
        """
        cfg = self.config
        if input_ids_BxT.ndim != 2:
            raise UsageError(f"input_ids has shape {input_ids_BxT.shape}; expected (rows, row length)")
        rows, length = input_ids_BxT.shape
        for name, ids in {"segment_ids": segment_ids, "position_ids": position_ids}.items():
            if ids is not None and ids.shape != input_ids_BxT.shape:
                raise UsageError(f"{name} has shape {ids.shape}; expected that of input_ids, {input_ids_BxT.shape}")
        if position_ids is None:
            start = 0 if cache is None else cache.used
            position_ids = jnp.broadcast_to(start + jnp.arange(length)[None, :], (rows, length))
        if segment_ids is None:
            segment_ids = jnp.ones((rows, length), jnp.int32)

        frequencies, factor = cfg.rope.frequencies(cfg.head_dim, cfg.max_positions, jnp.max(position_ids) + 1)
        angles = position_ids[..., None].astype(jnp.float32) * frequencies
        mask, cache = _mask(cfg, segment_ids, cache)
        view = _View(jnp.cos(angles) * factor, jnp.sin(angles) * factor, mask, None if cache is None else cache.used)

        table = nn.Embed(
            cfg.vocab_size, cfg.hidden_size, dtype=cfg.dtype, param_dtype=cfg.dtype,
            embedding_init=nn.initializers.normal(cfg.initializer_range), name="embed",
        )  # fmt: skip
        x_BxTxD = with_logical_constraint(table(input_ids_BxT), ("batch", "length", "hidden"))
        grown = []
        for i, (name, count) in enumerate(cfg.stacks.items()):
            held = None if cache is None else (cache.keys[i], cache.values[i])
            x_BxTxD, held = _stack(cfg, name, count)(x_BxTxD, view, held)
            grown.append(held)
        if scored is not None:
            x_BxTxD = jnp.take_along_axis(x_BxTxD, scored[..., None], axis=1)
        x_BxSxD = Norm(cfg, name="norm")(x_BxTxD)
        head = None if cfg.tied else _dense(cfg, cfg.vocab_size, "lm_head")
        if targets is not None and not self.is_initializing():
            kernel = table.embedding.T if head is None else self.variables["params"]["lm_head"]["kernel"]
            return next_token_loss(x_BxSxD, kernel, targets, cfg.loss_chunk)
        logits = (table.attend(x_BxSxD) if head is None else head(x_BxSxD)).astype(jnp.float32)
        if cache is None:
            return logits
        keys, values = (tuple(pair[i] for pair in grown) for i in (0, 1))
        return logits, Cache(keys, values, cache.segment_ids, cache.used + length)


def _stack(config: DecoderConfig, name: str, count: int) -> Any:
    layer = Layer
    if config.remat != "none":
        layer = nn.remat(Layer, policy=_POLICIES[config.remat], prevent_cse=False)
    axes: Any = (nn.broadcast, 0)
    split: Any = {"params": True, "dropout": True}
    return nn.scan(layer, {"params": 0}, split_rngs=split, in_axes=axes, length=count)(config, name=name)


def _mask(config: DecoderConfig, segment_ids: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    """Return which keys each query may see, (B, T, S), and the cache with the new tokens' segments."""
    queries = keys = jnp.arange(segment_ids.shape[1])
    seen = segment_ids
    if cache is not None:
        seen = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.used, axis=1)
        queries, keys = cache.used + queries, jnp.arange(seen.shape[1])
        cache = cache._replace(segment_ids=seen)
    apart = queries[:, None] - keys[None, :]
    near = apart >= 0 if config.window is None else (apart >= 0) & (apart < config.window)
    # Padding sees itself, whatever it holds: so every query has a key, and nobody reads what it gets.
    return (segment_ids[:, :, None] == seen[:, None, :]) & near, cache
