"""Causal attention within segments: query chunks anywhere, cuDNN on a GPU where it is found to be right.

    out_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s    over the s <= t of t's own segment, the last `window` of them if given,

with scores and softmax in float32. G = heads / key-value heads queries share a key.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Lengths at which cuDNN's gradients are right with a mask; rows are padded to it.
CUDNN_MULTIPLE = 128


def attend(q_BxTxHxK, k_BxSxNxK, v_BxSxNxK, mask, *, chunk: int, causal: bool, implementation: str) -> jax.Array:
    """Attend: -> (B, T, H, K) in the type of the values.

    Args:
      q_BxTxHxK: queries.
      k_BxSxNxK: keys; H is a multiple of N.
      v_BxSxNxK: values.
      mask: bool, (B, T, S), which keys a query may see; where `causal` those after it need not be out.
      chunk: queries whose scores exist at a time; 0 for a quarter of a row, 64 or more.
      causal: whether query t sees no key after the t-th, T and S being one length.
      implementation: "cudnn" or "xla".
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q_BxTxHxK, k_BxSxNxK, v_BxSxNxK, mask=mask[:, None], is_causal=causal, implementation="cudnn"
        )
    length = q_BxTxHxK.shape[1]
    if not causal:
        return _plain(q_BxTxHxK, k_BxSxNxK, v_BxSxNxK, mask)
    parts, chunk = [], chunk or max(64, -(-length // 4))
    for start in range(0, length, chunk):  # each sees no key after its own last: half of all scores are never made
        own, seen = slice(start, min(start + chunk, length)), slice(0, min(start + chunk, length))
        before = jnp.arange(seen.stop)[None, :] <= jnp.arange(own.start, own.stop)[:, None]
        part = (q_BxTxHxK[:, own], k_BxSxNxK[:, seen], v_BxSxNxK[:, seen], mask[:, own, seen] & before)
        parts.append(_plain(*part))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _plain(q_BxTxHxK, k_BxSxNxK, v_BxSxNxK, mask_BxTxS) -> jax.Array:
    rows, length, heads, width = q_BxTxHxK.shape
    shared = k_BxSxNxK.shape[2]
    # One product a key's head, over all queries that share it.
    q_BxNxMxK = (
        q_BxTxHxK.reshape(rows, length, shared, -1, width).transpose(0, 2, 3, 1, 4).reshape(rows, shared, -1, width)
    )
    scores = jnp.einsum("bnmk,bsnk->bnms", q_BxNxMxK, k_BxSxNxK, preferred_element_type=jnp.float32) * width**-0.5
    scores = scores.reshape(rows, shared, -1, *mask_BxTxS.shape[1:])
    # Every query sees itself, so that no row of scores is empty.
    scores = jnp.where(mask_BxTxS[:, None, None], scores, -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BxSxNxK.dtype).reshape(rows, shared, -1, mask_BxTxS.shape[-1])
    out_BxNxMxK = jnp.einsum("bnms,bsnk->bnmk", probs, v_BxSxNxK)
    return out_BxNxMxK.reshape(rows, heads, length, width).transpose(0, 2, 1, 3)


def choose(wanted: str, dtype, length: int) -> str:
    """Return what a row of so many tokens is computed with: `wanted`, or for `auto` cuDNN where it can be trusted."""
    if wanted != "auto":
        return wanted
    fits = jnp.dtype(dtype).itemsize == 2 and length % CUDNN_MULTIPLE == 0 and jax.default_backend() == "gpu"
    return "cudnn" if fits and _cudnn_agrees() else "xla"


@functools.cache
def _cudnn_agrees() -> bool:
    """Compare cuDNN with plain attention on this device: outputs and gradients, shared heads, two segments in a row."""
    with jax.ensure_compile_time_eval():
        keys = jax.random.split(jax.random.key(0), 4)
        q = jax.random.normal(keys[0], (1, CUDNN_MULTIPLE, 4, 64), jnp.bfloat16)
        k, v = (jax.random.normal(key, (1, CUDNN_MULTIPLE, 2, 64), jnp.bfloat16) for key in keys[1:3])
        weights = jax.random.normal(keys[3], q.shape, jnp.bfloat16)
        segments = (jnp.arange(CUDNN_MULTIPLE) >= 40)[None]
        mask = segments[:, :, None] == segments[:, None, :]

        def loss(implementation, q, k, v):
            out = attend(q, k, v, mask, chunk=CUDNN_MULTIPLE, causal=True, implementation=implementation)
            return jnp.sum((out * weights).astype(jnp.float32))

        try:
            grad = lambda name: jax.value_and_grad(functools.partial(loss, name), argnums=(0, 1, 2))(q, k, v)  # noqa: E731
            ours, theirs = grad("xla"), grad("cudnn")
        except Exception:  # no cuDNN, or a version that lacks this form: the library says so in many ways
            return False
        close = lambda a, b: bool(jnp.max(jnp.abs(a - b).astype(jnp.float32)) <= 0.05 * jnp.max(jnp.abs(a)))  # noqa: E731
        return all(close(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
