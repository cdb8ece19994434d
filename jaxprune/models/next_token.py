"""The loss of the next token without all logits at once.

For hidden states x, a head W of a column for each token of the vocabulary, and targets y:

    nll = logsumexp(x W) - (x W)_y,    d nll / d x = W (softmax(x W) - e_y).

Logits exist for a chunk of each row at a time. Where the head is frozen, its usual state here, the gradient is formed in the
forward pass, while the logits are there: two products with the head in all, and nothing is kept but dx. A head that is trained
costs two more, as its gradient needs the logits again. Chunks run along the row: rows that are divided among devices stay so.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def next_token_loss(x_BxSxD: jax.Array, head_DxV: jax.Array, targets_BxS: jax.Array, chunk: int = 128) -> Any:
    """Return the negative log-likelihood of each target and whether it is the likeliest token.

    Args:
      x_BxSxD: hidden states.
      head_DxV: the head.
      targets_BxS: integer ids, from 0 to V - 1.
      chunk: positions of a row whose logits exist at a time; 0 for all.

    Returns:
      ((B, S) float32, (B, S) bool).
    """
    return _map(lambda x, y: _likelihood(_logits(x, head_DxV), y), chunk, x_BxSxD, targets_BxS)


def _logits(x_BxCxD: jax.Array, head_DxV: jax.Array) -> jax.Array:
    return jnp.einsum("bcd,dv->bcv", x_BxCxD, head_DxV.astype(x_BxCxD.dtype), preferred_element_type=jnp.float32)


def _likelihood(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return nll, jnp.argmax(logits, axis=-1) == targets


def _gradient(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)


def _map(function: Any, chunk: int, *arrays: jax.Array) -> Any:
    """Apply a function to chunks of the second axis, one after the other, the last filled up with zeros."""
    length = arrays[0].shape[1]
    if not chunk or chunk >= length:
        return function(*arrays)
    count = -(-length // chunk)
    fill = lambda a: jnp.pad(a, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
    cut = lambda a: jnp.moveaxis(fill(a).reshape(a.shape[0], count, chunk, *a.shape[2:]), 1, 0)  # noqa: E731
    out = jax.lax.map(lambda parts: function(*parts), tuple(cut(a) for a in arrays))
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], count * chunk, *a.shape[3:])[:, :length]  # noqa: E731
    return jax.tree.map(join, out)


def _forward(x, head, targets, chunk):
    if not x.perturbed and not head.perturbed:
        return next_token_loss(x.value, head.value, targets.value, chunk), None
    if head.perturbed:
        kept = (x.value, head.value, targets.value)
        return next_token_loss(*kept, chunk), (None, kept)

    def both(x_BxCxD, targets_BxC):
        logits = _logits(x_BxCxD, head.value)
        change = _gradient(logits, targets_BxC).astype(x_BxCxD.dtype)
        return *_likelihood(logits, targets_BxC), jnp.einsum("bcv,dv->bcd", change, head.value.astype(x_BxCxD.dtype))

    nll, correct, dx = _map(both, chunk, x.value, targets.value)
    return (nll, correct), (dx, None)


def _backward(chunk, kept, gradients):
    if kept is None:
        return None, None, None
    dx, again = kept
    g_BxS = gradients[0]
    zero = isinstance(g_BxS, jax.custom_derivatives.SymbolicZero)
    if again is None:
        return (jnp.zeros_like(dx) if zero else dx * g_BxS[..., None].astype(dx.dtype)), None, None
    x, head, targets = again
    if zero:
        return jnp.zeros_like(x), jnp.zeros_like(head), None
    loss = lambda x, head: jnp.sum(_recomputed(x, head, targets, chunk) * g_BxS)  # noqa: E731
    return *jax.grad(loss, argnums=(0, 1))(x, head), None


def _recomputed(x: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    one = jax.checkpoint(lambda x, y: _likelihood(_logits(x, head), y)[0])
    return _map(one, chunk, x, targets)


next_token_loss.defvjp(_forward, _backward, symbolic_zeros=True)
