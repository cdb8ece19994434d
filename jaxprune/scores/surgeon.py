"""Optimal brain surgery on the rank components of one factor, and simpler scores of components to compare it with.

A factor F (r, d) is B, or A transposed, so that row j is component j. All its columns share one curvature H (r, r), and g
is its gradient. Removing the rows S raises the quadratic model <g, D> + 1/2 tr(D^T H D) least if the other rows move by
-H^-1[:, S] K F[S], K = ([H^-1]_SS)^-1. All of it needs matrices of r x r only, whatever d is.

Source: Hassibi & Stork 1993; PrunedLoRA's score as its released code has it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array

COMPONENT_SCORES = ("element1", "element2", "taylor2")


class Factor(NamedTuple):
    """What surgery needs to know of one factor F with gradient g.

    Attributes:
      curvature: H, (r, r), without damping.
      norm: |F_j|^2, (r,).
      cross: g F^T, (r, r); None without a first-order term.
      gram: g g^T, (r, r); None where there is no first-order term, or it is the curvature.
    """

    curvature: Array
    norm: Array
    cross: Array | None = None
    gram: Array | None = None


def damped_inverse(curvature: Array, mask: Array, relative: float, absolute: float = 0.0) -> Array:
    """Return (H + (relative mean(diag H) + absolute) I)^-1 over the live components, zero elsewhere.

    By Cholesky in float32; by pseudo-inverse where that fails.

    Args:
      curvature: H, (r, r).
      mask: (r,).
    """
    alive = mask > 0
    both = alive[:, None] & alive[None, :]
    symmetric = jnp.where(both, (curvature + curvature.T) / 2, 0.0)
    mean = jnp.trace(symmetric) / jnp.maximum(jnp.sum(alive), 1)
    # The dead get a diagonal of the others' size, which leaves the block of the living to itself.
    damped = symmetric + jnp.diag(jnp.where(alive, relative * mean + absolute, jnp.where(mean > 0, mean, 1.0)))
    eye = jnp.eye(curvature.shape[-1], dtype=curvature.dtype)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), eye)
    inverse = jax.lax.cond(
        jnp.all(jnp.isfinite(inverse)), lambda: inverse, lambda: jnp.linalg.pinv(damped, hermitian=True)
    )
    return jnp.where(both, inverse, 0.0)


def rotated(factor: Factor, rows: Array, value: Array, gradient: Array) -> Factor:
    """Bring what is known of a factor into another basis, F <- P F and g <- Q g: H <- Q H Q^T, and likewise what is made of g.

    Args:
      factor: in the old basis.
      rows: the factor in the new one, (r, d).
      value: P, (r, r).
      gradient: Q, (r, r), the inverse of P transposed.
    """
    turn = lambda matrix, right: None if matrix is None else gradient @ matrix @ right.T  # noqa: E731
    return Factor(
        gradient @ factor.curvature @ gradient.T,
        jnp.sum(jnp.square(rows.astype(jnp.float32)), axis=-1),
        turn(factor.cross, value),
        turn(factor.gram, gradient),
    )


def surgery_score(inverse: Array, factor: Factor) -> Array:
    """Return what removing each component costs, (r,): 1/2 |(F - H^-1 g)_j|^2 / [H^-1]_jj, without g where it is not known.

    Args:
      inverse: H^-1, (r, r).
      factor: its norms and, for the first-order term, its products with the gradient.
    """
    residual = factor.norm
    if factor.cross is not None:
        gram = factor.curvature if factor.gram is None else factor.gram
        residual = (
            residual - 2 * jnp.sum(inverse * factor.cross.T, axis=1) + jnp.sum((inverse @ gram) * inverse, axis=1)
        )
    return 0.5 * residual / jnp.diagonal(inverse)


def downdate(inverse: Array, j: Array | int) -> Array:
    """Return the inverse of H without component j: H^-1 - H^-1[:, j] H^-1[j, :] / [H^-1]_jj, with row and column j zero."""
    column = inverse[:, j]
    left = inverse - jnp.outer(column, column / column[j])
    return left.at[:, j].set(0.0).at[j, :].set(0.0)


def compensation(inverse: Array, removed: Array) -> Array:
    """Return the coefficients C (r, k), zero in removed rows, such that F + C F[removed] is the best without `removed`.

    One component after the other, each with the inverse downdated by those before: C = -H^-1[:, S] K in all.

    Args:
      inverse: H^-1 over the live components, (r, r).
      removed: indices, (k,).
    """

    def remove(slot: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, image = carry
        j = removed[slot]
        return downdate(rest, j), image - jnp.outer(rest[:, j] / rest[j, j], image[j])

    start = jax.nn.one_hot(removed, inverse.shape[-1], axis=0)
    _, image = jax.lax.fori_loop(0, removed.shape[0], remove, (inverse, start))
    gone = jnp.sum(start, axis=1) > 0
    return jnp.where(gone[:, None], 0.0, image)


def component_score(kind: str, a: Array, b: Array, grad_a: Array, grad_b: Array) -> Array:
    """Return a score of every component from values and gradients entry by entry, (r,).

    | kind | entries summed over column j of A and row j of B |
    | --- | --- |
    | `element1` | \\|g w\\| |
    | `element2` | g^2 w^2 |
    | `taylor2` | \\|g w - (g w)^2 / 2\\| |

    Source: LLM-Pruner (Ma et al. 2023), as PrunedLoRA adapts it.
    """
    entry = {
        "element1": jnp.abs,
        "element2": jnp.square,
        "taylor2": lambda salience: jnp.abs(salience - jnp.square(salience) / 2),
    }[kind]
    return jnp.sum(entry(grad_a * a), axis=-2) + jnp.sum(entry(grad_b * b), axis=-1)
