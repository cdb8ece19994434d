"""Sensitivity of a whole LoRA module L = A B to the loss: S = sum |G o L|, G = dLoss/dL, exact and from the factors alone.

Every kernel here is a sum over entries of G o L, where G is itself a product of two thin matrices (x^T delta, or factors'
gradients), so both are formed for a block of rows at a time and never whole.

Source: G2R2, section 3.2. Its eq. 6 for G is wrong in general; it is kept as `as_written`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array

_ROWS = 512
_TINY = 1e-8


def _blockwise(reduce: Callable[[Array, Array], Array], left_MxI, right_MxO, a_IxR, b_RxO) -> Array:
    """Sum reduce(G, L) over blocks of rows of G = left^T right and L = a b, in float32."""
    rows = a_IxR.shape[0]
    blocks = -(-rows // _ROWS)
    size = -(-rows // blocks)
    padding = ((0, 0), (0, blocks * size - rows))  # rows of zeros add nothing
    left, a = jnp.pad(left_MxI, padding), jnp.pad(a_IxR.T, padding)
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ())))

    def block(i: Array) -> Array:
        take = lambda matrix: jax.lax.dynamic_slice_in_dim(matrix, i * size, size, axis=1)  # noqa: E731
        gradient = dot(take(left), right_MxO, preferred_element_type=jnp.float32)
        return reduce(gradient, dot(take(a), b_RxO, preferred_element_type=jnp.float32))

    zero = jnp.zeros_like(jax.eval_shape(block, 0))
    return jax.lax.fori_loop(0, blocks, lambda i, total: total + block(i), zero)


def dense_sensitivity(gradient: Array, product: Array) -> Array:
    """Return sum |G o L|."""
    return jnp.sum(jnp.abs(gradient * product))


def dense_bound(gradient: Array, product: Array) -> Array:
    """Return |G|_F |L|_F."""
    return jnp.linalg.norm(gradient) * jnp.linalg.norm(product)


def sensitivity(left_MxI: Array, right_MxO: Array, a_IxR: Array, b_RxO: Array) -> Array:
    """Return sum |G o (A B)| for G = left^T right; with tokens on the left and their gradients on the right it is exact."""
    return _blockwise(dense_sensitivity, left_MxI, right_MxO, a_IxR, b_RxO)


def bound(left_MxI: Array, right_MxO: Array, a_IxR: Array, b_RxO: Array) -> Array:
    """Return |G|_F |A B|_F, which is never below the sum of |G o (A B)|."""
    squares = lambda g, product: jnp.stack([jnp.sum(g * g), jnp.sum(product * product)])  # noqa: E731
    return jnp.prod(jnp.sqrt(_blockwise(squares, left_MxI, right_MxO, a_IxR, b_RxO)))


def tangent(a: Array, b: Array, grad_a: Array, grad_b: Array) -> Array:
    """Return sum |Gt o (A B)|, Gt the projection of G on the tangent space of rank-r matrices at A B.

        Gt = dA (B B^T)^-1 B + A (A^T A)^-1 (dB - A^T dA (B B^T)^-1 B)

    which needs the gradients of the factors alone, and has <Gt, A B> = <G, A B>.
    """
    by_b = _divide(b @ b.T, grad_a.T)  # (B B^T)^-1 dA^T
    rest = _divide(a.T @ a, grad_b - (by_b @ a).T @ b)
    return sensitivity(jnp.concatenate([by_b, a.T]), jnp.concatenate([b, rest]), a, b)


def as_written_a(a: Array, b: Array, grad_a: Array, grad_b: Array) -> Array:
    """Return sum |(dA (1 / B)) o (A B)|: G2R2's eq. 6 to the letter, with |B| kept above 1e-8."""
    return sensitivity(grad_a.T, 1.0 / _away_from_zero(b), a, b)


def as_written_b(a: Array, b: Array, grad_a: Array, grad_b: Array) -> Array:
    """Return sum |((1 / A) dB) o (A B)|: the other side of G2R2's eq. 6, which is not equal to the first."""
    return sensitivity(1.0 / _away_from_zero(a.T), grad_b, a, b)


def free(a: Array, b: Array, grad_a: Array, grad_b: Array) -> Array:
    """Return |<A, dA>| = |<G, A B>|, which is never above the sum of |G o (A B)|."""
    return jnp.abs(jnp.sum(a * grad_a))


def factors(a: Array, b: Array, grad_a: Array, grad_b: Array) -> Array:
    """Return sum |A o dA| sum |B o dB| / r^2, whose reciprocal times d k is the ablation's R(A) R(B)."""
    return jnp.sum(jnp.abs(a * grad_a)) * jnp.sum(jnp.abs(b * grad_b)) / a.shape[-1] ** 2


def _divide(gram: Array, right: Array) -> Array:
    """Return gram^-1 right; the damping, 1e-5 of the mean diagonal, lies well above float32's rounding."""
    size = gram.shape[-1]
    damped = gram + 1e-5 * jnp.trace(gram) / size * jnp.eye(size)
    return jax.scipy.linalg.solve(damped, right, assume_a="pos")


def _away_from_zero(value: Array) -> Array:
    return jnp.where(value >= 0, 1.0, -1.0) * jnp.maximum(jnp.abs(value), _TINY)
