"""Rotation: the same function in a basis whose components are orthogonal, so that each can be judged alone.

A B = (A M) (M^-1 B) for every invertible M, so the sizes of components say as much about the basis they happen to be in as about
the function. In the basis of the singular value decomposition, s A B = U diag(sigma) V^T, what a site loses is exactly

    |s A B - s A' B'|_F^2 = sum of sigma_j^2 over those that go,

the least that any choice of rank r' can lose. With C = R_A R_B^T = U S V^T, R the roots of the Gram matrices A^T A and B B^T,

    A <- A M = Q_A U sqrt(S),    B <- M^-1 B = sqrt(S) V^T Q_B^T,    M = R_A^-1 U sqrt(S).

Gradients, and what is linear in them, follow as dA <- dA M^-T, dB <- M^T dB. Averages of their squares have no exact map: they
follow with the squares of the matrices' entries, as if the entries of a gradient were independent.

The Gram matrices are formed where the factors lie, and only they, r x r each, come to the host; divided factors stay divided.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.adapters import Adapters, Lora, Masks
from jaxprune.errors import UsageError, shown
from jaxprune.surgery.components import Place, host, like, map_adapters, map_moments, rebuild

# What methods let one choose: components of the factors as they were trained, or of their product's decomposition.
BASES = ("trained", "svd")
# Singular values of a factor below this share of the largest are rounding errors of a Gram matrix in float32. Taken as so much,
# they leave every component a direction to grow in.
_ROUNDING = 1e-4


class Basis(NamedTuple):
    """The way from a site's components to those of its singular value decomposition.

    Attributes:
      into: M, (r, r): A <- A M; zero where a component is dead.
      back: M^-1, (r, r): B <- M^-1 B; likewise.
    """

    into: np.ndarray
    back: np.ndarray


def svd_bases(adapters: Adapters, masks: Masks) -> dict[str, Basis]:
    """Find the SVD basis of every site, in float64 from Gram matrices in the dtype of the factors, float32 at least.

    Args:
      adapters: {site path: adapter}: LoRA, or DoRA.
      masks: {site path: (r,)}.

    Raises:
      UsageError: an adapter is of another kind, whose components have a basis of their own, or is not finite.

    Returns:
      {site path: basis}, where at least one component is live.
    """
    for path, adapter in adapters.items():
        if not isinstance(adapter, Lora) or getattr(adapter, "frozen", ()):
            raise UsageError(
                f"the adapter at {shown(path)} is a {type(adapter).__name__}, whose components cannot be rotated; expected LoRA "
                f"or DoRA"
            )
    grams = jax.device_get({path: _grams(adapter.a, adapter.b) for path, adapter in adapters.items()})
    found = {}
    for path, mask in host({path: masks[path] for path in adapters}).items():
        alive = np.flatnonzero(mask > 0)
        if alive.size:
            gram_a, gram_b = grams[path]
            if not (np.isfinite(gram_a).all() and np.isfinite(gram_b).all()):
                raise UsageError(f"the adapter at {shown(path)} is not finite, so it has no singular values")
            found[path] = _embedded(gram_a, gram_b, alive)
    return found


def svd_basis(gram_a: np.ndarray, gram_b: np.ndarray) -> Basis:
    """Return M and M^-1 from A^T A and B B^T, each (r, r), of components that are all live; the largest comes first."""
    if not (np.trace(gram_a) > 0 and np.trace(gram_b) > 0):  # a fresh adapter adds nothing in any basis
        return Basis(np.eye(len(gram_a)), np.eye(len(gram_a)))
    (width_a, axes_a), (width_b, axes_b) = _root(gram_a), _root(gram_b)
    u, sigma, _ = np.linalg.svd((width_a[:, None] * axes_a.T) @ (axes_b * width_b))
    return Basis((axes_a / width_a) @ u * np.sqrt(sigma), (u.T * width_a) @ axes_a.T / np.sqrt(sigma)[:, None])


def rotate(
    bases: Mapping[str, Basis],
    adapters: Adapters,
    opt_state: Any,
    optimizer: optax.GradientTransformation,
) -> tuple[dict[str, Any], Any]:
    """Bring sites and their moments into other bases; the function does not change, and nothing is compiled again.

    Args:
      bases: {site path: basis}; other sites stay as they are.
      adapters: {site path: adapter}.
      opt_state: the state of `optimizer`.
      optimizer: the chain that made it. What is odd in the gradients follows as they do, what is even as their squares, and
        copies of what is trained as it does; which of them a leaf is, is tried on small arrays.

    Raises:
      UsageError: moments of a rotated site have not the shape of its leaves.

    Returns:
      (adapters, opt_state).
    """
    # One site stands for all, the same at every event: places of leaves in the state differ by their site's path alone.
    path = next(path for path, adapter in adapters.items() if isinstance(adapter, Lora))
    kinds = _kinds(optimizer, path, adapters[path])
    rotated = rotate_adapters(bases, adapters)

    def one(leaf: Any, place: Place) -> Any:
        if place.axis is None or place.path not in bases:
            return leaf
        return _turned(leaf, place, bases[place.path], kinds[_below(place.keys, place.path)])

    moments = map_moments(one, opt_state, adapters, set(bases))
    return rotated, rebuild(moments, rotated, optimizer)


def rotate_adapters(bases: Mapping[str, Basis], adapters: Adapters) -> dict[str, Any]:
    """Bring sites into other bases: A <- A M, B <- M^-1 B."""
    return map_adapters(
        lambda leaf, place: (
            _turned(leaf, place, bases[place.path], "value") if place.axis is not None and place.path in bases else leaf
        ),
        adapters,
    )


def rotate_gradients(bases: Mapping[str, Basis], grads: Adapters) -> dict[str, Any]:
    """Bring gradients of the adapters into other bases: dA <- dA M^-T, dB <- M^T dB."""
    return map_adapters(
        lambda leaf, place: (
            _turned(leaf, place, bases[place.path], "odd") if place.axis is not None and place.path in bases else leaf
        ),
        grads,
    )


def _turned(leaf: Any, place: Place, basis: Basis, kind: str) -> Any:
    """Multiply a factor, or a moment of it, by what its components become."""
    right = place.axis == -1
    if kind == "value":
        matrix = basis.into if right else basis.back
    else:
        matrix = basis.back.T if right else basis.into.T
        matrix = np.square(matrix) if kind == "even" else matrix
    return _times(leaf, like(matrix, leaf), right)


@functools.partial(jax.jit, static_argnames="right")
def _times(leaf: jax.Array, matrix: jax.Array, right: bool) -> jax.Array:
    product = jnp.matmul(leaf, matrix, precision="highest") if right else jnp.matmul(matrix, leaf, precision="highest")
    return product.astype(leaf.dtype)


@jax.jit
def _grams(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = (leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in (a, b))
    return jnp.matmul(a.T, a, precision="highest"), jnp.matmul(b, b.T, precision="highest")


def _root(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return w, E with E diag(w^2) E^T = gram."""
    squares, axes = np.linalg.eigh(np.asarray(gram, np.float64))
    return np.sqrt(np.maximum(squares, _ROUNDING**2 * squares[-1])), axes


def _embedded(gram_a: np.ndarray, gram_b: np.ndarray, alive: np.ndarray) -> Basis:
    """Put the basis of the live components among the dead, which keep their places."""
    block, whole = np.ix_(alive, alive), Basis(np.zeros(gram_a.shape), np.zeros(gram_a.shape))
    whole.into[block], whole.back[block] = svd_basis(gram_a[block], gram_b[block])
    return whole


def _below(keys: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    """Return where a leaf of a state lies, whatever the site is called."""
    return tuple(None if key == jax.tree_util.DictKey(path) else key for key in keys)


def _kinds(optimizer: optax.GradientTransformation, path: str, adapter: Any) -> dict[tuple[Any, ...], str]:
    """Say of every leaf of a chain's state what it is for a site: `odd` or `even` in the gradients, or a copy of the `value`."""
    small = jax.tree.map(lambda leaf: jnp.ones((2,) * leaf.ndim, leaf.dtype), {path: adapter})
    states = [optimizer.init(small)] * 3
    # A chain that gathers several updates shows nothing after one; 61 is prime, so nothing has just been emptied then.
    for _ in range(61):
        for number, slope in ((1, 1e-3), (2, -1e-3)):  # below what chains clip
            slopes = jax.tree.map(lambda leaf, x=slope: jnp.full_like(leaf, x), small)
            states[number] = optimizer.update(slopes, states[number], small)[1]
        if all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(states[1])):
            break
    kinds = {}
    for (keys, start), above, below in zip(
        jax.tree_util.tree_flatten_with_path(states[0])[0], *map(jax.tree.leaves, states[1:]), strict=True
    ):
        copied = np.size(start) > 1 and bool(jnp.all(start == 1))
        even = bool(jnp.all(above == below)) and bool(jnp.any(above != 0))
        kinds[_below(keys, path)] = "value" if copied else "even" if even else "odd"
    return kinds
