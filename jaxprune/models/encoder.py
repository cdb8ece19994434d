"""The post-LN encoder classifier shared by BERT (arXiv:1810.04805), RoBERTa (1907.11692) and DistilBERT (1910.01108).

    h = LayerNorm(word + position + token type)
    h = LayerNorm(h + attention(h));  h = LayerNorm(h + fc2(act(fc1(h))))      per layer
    logits = out(act(dense(h[first token of each example])))

Hidden states stay flat, one row a token: XLA on CPU contracts (M, d) operands much faster than (B, T, d) ones in the
backward pass; only attention reshapes. The head reads first tokens alone, so the last layer computes its queries,
output projection and MLP for those tokens alone: the same logits and gradients, for a sixth of that layer's work.

Shape letters: B rows, T row length, M = B*T tokens (or just those that are asked for), N examples, D width, S keys,
H heads, K head width, V width of the values in a head, F width of the MLP.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.errors import UsageError
from jaxprune.models.config import ACTIVATIONS, FAMILIES, EncoderConfig
from jaxprune.models.dropout import dropout


class Queries(NamedTuple):
    """Which tokens a layer computes, and what they may see.

    Attributes:
      mask: (rows, 1, queries, keys) booleans, True where a query sees a key.
      tokens: (M,) flat indices of the tokens, or None for all.
      rows: (M,) row of keys each token looks at, or None where they are one token of each row in order, or all.
    """

    mask: jax.Array
    tokens: jax.Array | None = None
    rows: jax.Array | None = None


def _dense(config: EncoderConfig, features: int, name: str) -> nn.Dense:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, dtype=config.dtype, kernel_init=init, name=name)


def _norm(config: EncoderConfig, name: str) -> nn.LayerNorm:
    # Linen reduces and normalises in float32 whatever `dtype` is; the two-pass variance keeps digits that E[x^2]-E[x]^2
    # loses.
    return nn.LayerNorm(config.layer_norm_eps, dtype=config.dtype, use_fast_variance=False, name=name)


class Embeddings(nn.Module):
    """Sum word, position and token-type vectors, normalise, drop out: three (B, T) id arrays -> (M, D)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, input_ids_BxT, position_ids_BxT, token_type_ids_BxT):
        cfg = self.config

        def table(rows, name):
            init = nn.initializers.normal(cfg.initializer_range)
            return nn.Embed(rows, cfg.hidden_size, dtype=cfg.dtype, embedding_init=init, name=name)

        x_MxD = table(cfg.vocab_size, "word")(input_ids_BxT.reshape(-1))
        if cfg.type_vocab_size:
            x_MxD = x_MxD + table(cfg.type_vocab_size, "token_type")(token_type_ids_BxT.reshape(-1))
        x_MxD = x_MxD + table(cfg.max_positions, "position")(position_ids_BxT.reshape(-1) + cfg.position_offset)
        return dropout(self, _norm(cfg, "norm")(x_MxD), cfg.embedding_dropout)


class Attention(nn.Module):
    """Let each token in `queries_MxD` attend to the tokens `x_MxD` of its own row and segment: -> (M, D)."""

    config: EncoderConfig
    layer: int

    @nn.compact
    def __call__(self, queries_MxD, x_MxD, queries: Queries):
        cfg, widths = self.config, self.config.widths(self.layer)

        def project(name, inputs_MxD, rows, width):
            outputs = _dense(cfg, cfg.num_heads * width, name)(inputs_MxD)
            return outputs.reshape(rows, -1, cfg.num_heads, width)

        rows, _, _, length = queries.mask.shape
        q_BxTxHxK = project("query", queries_MxD, rows, widths.key)
        k_BxSxHxK = project("key", x_MxD, x_MxD.shape[0] // length, widths.key)
        v_BxSxHxV = project("value", x_MxD, x_MxD.shape[0] // length, widths.value)
        if queries.rows is not None:
            k_BxSxHxK, v_BxSxHxV = k_BxSxHxK[queries.rows], v_BxSxHxV[queries.rows]
        out_BxTxHxV = self._attend(q_BxTxHxK, k_BxSxHxK, v_BxSxHxV, queries.mask)
        out_MxD = _dense(cfg, cfg.hidden_size, "out")(out_BxTxHxV.reshape(-1, cfg.num_heads * widths.value))
        return dropout(self, out_MxD, cfg.attention_output_dropout)

    def _attend(self, q_BxTxHxK, k_BxSxHxK, v_BxSxHxV, mask):
        rate, scale = self.config.attention_dropout, self.config.head_dim**-0.5
        if (rate == 0.0 or not self.has_rng("dropout")) and k_BxSxHxK.shape == v_BxSxHxV.shape:
            return jax.nn.dot_product_attention(q_BxTxHxK, k_BxSxHxK, v_BxSxHxV, mask=mask, scale=scale)
        # jax.nn.dot_product_attention can neither drop probabilities nor take values of another width. Below are its
        # numerics (float32 scores and softmax, probabilities in the type of the values) with dropout in between.
        scores = jnp.einsum("BTHK,BSHK->BHTS", q_BxTxHxK, k_BxSxHxK, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores * scale, 0.7 * jnp.finfo(jnp.float32).min)
        probs = dropout(self, jax.nn.softmax(scores, axis=-1).astype(v_BxSxHxV.dtype), rate)
        return jnp.einsum("BHTS,BSHV->BTHV", probs, v_BxSxHxV)


class MLP(nn.Module):
    """Apply fc2(act(fc1(x))) and drop out: (M, D) -> (M, D)."""

    config: EncoderConfig
    layer: int

    @nn.compact
    def __call__(self, x_MxD):
        cfg = self.config
        x_MxF = ACTIVATIONS[cfg.activation](_dense(cfg, cfg.widths(self.layer).mlp, "fc1")(x_MxD))
        return dropout(self, _dense(cfg, cfg.hidden_size, "fc2")(x_MxF), cfg.mlp_dropout)


class Layer(nn.Module):
    """Apply attention and MLP, each added to its input and then normalised."""

    config: EncoderConfig
    layer: int

    @nn.compact
    def __call__(self, x_MxD, queries: Queries):
        q_MxD = x_MxD if queries.tokens is None else x_MxD[queries.tokens]
        attended_MxD = Attention(self.config, self.layer, name="attention")(q_MxD, x_MxD, queries)
        h_MxD = _norm(self.config, "attention_norm")(q_MxD + attended_MxD)
        return _norm(self.config, "mlp_norm")(h_MxD + MLP(self.config, self.layer, name="mlp")(h_MxD))


class Encoder(nn.Module):
    """Apply the layers; the last one only to the tokens that `last` names."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_MxD, every: Queries, last: Queries):
        for i in range(self.config.num_layers):
            queries = last if i == self.config.num_layers - 1 else every
            x_MxD = Layer(self.config, i, name=f"layer_{i}")(x_MxD, queries)
        return x_MxD


class Head(nn.Module):
    """Map the first token's vector to logits: (N, D) -> (N, num_labels)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_NxD):
        cfg, family = self.config, FAMILIES[self.config.family]
        if family.dense == "head/dense":
            if family.input_dropout:
                x_NxD = dropout(self, x_NxD, cfg.classifier_dropout)
            x_NxD = ACTIVATIONS[family.activation](_dense(cfg, cfg.hidden_size, "dense")(x_NxD))
        x_NxD = dropout(self, x_NxD, cfg.classifier_dropout)
        return _dense(cfg, cfg.num_labels, "out")(x_NxD)


class SequenceClassifier(nn.Module):
    """Classify, or regress on, examples that lie one to a row or several packed into a row."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        segment_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        first_tokens: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the logits; dropout is active exactly when a "dropout" rng is passed to `apply`.

        Args:
          input_ids_BxT: token ids.
          segment_ids: (B, T); 0 is padding, k > 0 the k-th example packed into the row. A token attends to the
            tokens of its own segment. Default: 1 where `input_ids` is not the padding token.
          position_ids: (B, T); position of each token in its example, from 0. Default: 0 ... T-1 in each row.
          token_type_ids: (B, T); 0 for the first sentence, 1 for the second. Default: 0. DistilBERT has none.
          first_tokens: (N,) indices into the B*T tokens: the first token of each example. Default: of each row. To keep
            N fixed, surplus entries may name any token, say 0: their logits are then that token's.

        Raises:
          UsageError: rows longer than the model's positions without `position_ids`, or a shape that does not fit.

        Returns:
          (N, num_labels) float32 logits, in the order of `first_tokens`.
        """
        cfg = self.config
        if input_ids_BxT.ndim != 2:
            raise UsageError(f"input_ids has shape {input_ids_BxT.shape}; expected (rows, row length)")
        rows, length = input_ids_BxT.shape
        given = {"segment_ids": segment_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
        for name, ids in given.items():
            if ids is not None and ids.shape != input_ids_BxT.shape:
                raise UsageError(f"{name} has shape {ids.shape}; expected that of input_ids, {input_ids_BxT.shape}")
        if position_ids is None:
            if length > cfg.max_length:
                raise UsageError(
                    f"rows of {length} tokens are longer than the model's {cfg.max_length} positions; "
                    "truncate them, or pass position_ids where several examples are packed into a row"
                )
            position_ids = jnp.broadcast_to(jnp.arange(length)[None, :], (rows, length))
        if segment_ids is None:
            segment_ids = (input_ids_BxT != cfg.pad_token_id).astype(jnp.int32)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids_BxT)

        # Equality alone keeps examples and padding apart. Padding sees padding, whose vectors nobody reads: so every
        # query has a key, and a row of nothing but padding stays finite.
        every = Queries(segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        if first_tokens is None:
            last = Queries(every.mask[:, :, :1, :], jnp.arange(rows) * length)
        else:
            own = first_tokens // length
            seen_NxT = segment_ids.reshape(-1)[first_tokens][:, None] == segment_ids[own]
            last = Queries(seen_NxT[:, None, None, :], first_tokens, own)

        x_MxD = Embeddings(cfg, name="embeddings")(input_ids_BxT, position_ids, token_type_ids)
        x_NxD = Encoder(cfg, name="encoder")(x_MxD, every, last)
        if FAMILIES[cfg.family].dense == "pooler":
            x_NxD = ACTIVATIONS[FAMILIES[cfg.family].activation](_dense(cfg, cfg.hidden_size, "pooler")(x_NxD))
        return Head(cfg, name="head")(x_NxD).astype(jnp.float32)
