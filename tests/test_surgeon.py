"""Closed forms of pruning with curvature against constrained least squares, and the worked example."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.scores import surgeon
from jaxprune.scores.surgeon import Factor, component_score

compensation, damped_inverse, downdate, surgery_score = (
    jax.jit(kernel)
    for kernel in (surgeon.compensation, surgeon.damped_inverse, surgeon.downdate, surgeon.surgery_score)
)


def random_factor(seed, rows=5, columns=7):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(rows, rows + 3))
    return rng.normal(size=(rows, columns)), rng.normal(size=(rows, columns)), root @ root.T


def least(factor, gradient, curvature, removed):
    """Minimise <g, D> + 1/2 tr(D^T H D) subject to D[removed] = -F[removed], by solving the KKT system in float64."""
    rows, k = factor.shape[0], len(removed)
    select = np.eye(rows)[list(removed)]
    system = np.block([[curvature, select.T], [select, np.zeros((k, k))]])
    right = np.concatenate([-gradient, -factor[list(removed)]])
    change = np.linalg.solve(system, right)[:rows]
    return change, (gradient * change).sum() + 0.5 * np.trace(change.T @ curvature @ change)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_closed_forms_are_the_constrained_optimum(size):
    factor, gradient, curvature = random_factor(size)
    inverse = jnp.asarray(np.linalg.inv(curvature), jnp.float32)
    unconstrained = -0.5 * np.trace(gradient.T @ np.linalg.solve(curvature, gradient))
    for removed in itertools.combinations(range(5), size):
        # Without a gradient: the compensation, and the price as the sum of the prices of one removal after the other.
        change, price = least(factor, 0 * gradient, curvature, removed)
        update = np.asarray(compensation(inverse, jnp.array(removed))) @ factor[list(removed)]
        update[list(removed)] = -factor[list(removed)]
        np.testing.assert_allclose(update, change, rtol=2e-3, atol=2e-3)
        total, rest, current = 0.0, inverse, factor
        for j in removed:
            total += surgery_score(rest, Factor(jnp.asarray(curvature), jnp.sum(jnp.square(current), 1)))[j]
            current = current + np.asarray(compensation(rest, jnp.array([j]))) @ current[[j]]
            current[j] = 0
            rest = downdate(rest, j)
        assert float(total) == pytest.approx(price, rel=1e-3)
        # With it: the same for F - H^-1 g, above the unconstrained optimum.
        change, price = least(factor, gradient, curvature, removed)
        residual = factor - np.linalg.solve(curvature, gradient)
        full = np.asarray(compensation(inverse, jnp.array(removed))) @ residual[list(removed)]
        full[list(removed)] = -residual[list(removed)]
        np.testing.assert_allclose(full - np.linalg.solve(curvature, gradient), change, rtol=2e-3, atol=2e-3)
        if size == 1:
            known = Factor(
                jnp.asarray(curvature), jnp.sum(jnp.square(factor), 1), gradient @ factor.T, gradient @ gradient.T
            )
            score = surgery_score(inverse, known)[removed[0]]
            assert float(score) == pytest.approx(price - unconstrained, rel=1e-3)


def test_the_downdated_inverse_is_the_inverse_of_the_rest():
    _, _, curvature = random_factor(9)
    inverse = jnp.asarray(np.linalg.inv(curvature), jnp.float32)
    for removed in itertools.permutations(range(5), 2):
        rest = [i for i in range(5) if i not in removed]
        both = downdate(downdate(inverse, removed[0]), removed[1])
        np.testing.assert_allclose(
            both[np.ix_(rest, rest)], np.linalg.inv(curvature[np.ix_(rest, rest)]), rtol=1e-3, atol=1e-4
        )
        assert not np.asarray(both)[list(removed)].any()


def test_the_worked_example():
    """B (d_out, r) and its gradient are given transposed to what they are here."""
    factor = np.array([[1.0, 2, 0], [0, 1, 1]]).T
    gradient = np.array([[0.5, 0, 0.2], [0, 0.5, 0.1]]).T
    gram = gradient @ gradient.T
    inverse = damped_inverse(jnp.asarray(gram), jnp.ones(3), 0.0, 0.1)
    np.testing.assert_allclose(np.diag(inverse), [3.571429, 3.035714, 8.75], rtol=1e-5)
    plain = Factor(jnp.asarray(gram), jnp.sum(jnp.square(factor), 1))
    np.testing.assert_allclose(surgery_score(inverse, plain), [0.14, 0.823529, 0.057143], rtol=1e-4)
    first = plain._replace(cross=jnp.asarray(gradient @ factor.T))
    np.testing.assert_allclose(surgery_score(inverse, first), [0.012143, 0.732143, 0.046429], rtol=1e-3)
    update = compensation(inverse, jnp.array([2])) @ factor[[2]]
    np.testing.assert_allclose(update.T, [[0, 0, 0], [0.285714, 0.142857, 0]], rtol=1e-5)


def test_damping_is_relative_and_dead_components_take_no_part():
    _, _, curvature = random_factor(3)
    mask = jnp.array([1.0, 0, 1, 1, 0])
    alive = [0, 2, 3]
    part = curvature[np.ix_(alive, alive)]
    expected = np.linalg.inv(part + 0.01 * np.diag(part).mean() * np.eye(3))
    for scale in (1.0, 1e-12):
        inverse = np.asarray(damped_inverse(jnp.asarray(scale * curvature), mask, 0.01)) * scale
        np.testing.assert_allclose(inverse[np.ix_(alive, alive)], expected, rtol=1e-3)
        assert not inverse[1].any() and not inverse[:, 4].any()


def test_a_singular_curvature_is_inverted_on_its_range():
    _, _, curvature = random_factor(4)
    low = curvature[:, :2] @ curvature[:, :2].T
    # Rounding has made it indefinite, so that Cholesky fails.
    inverse = damped_inverse(jnp.asarray(low - 1e-4 * np.eye(5)), jnp.ones(5), 0.0)
    np.testing.assert_allclose(inverse, np.linalg.pinv(low), rtol=1e-2, atol=1e-4)


def test_component_scores():
    rng = np.random.default_rng(0)
    a, b, da, db = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3), (3, 5), (4, 3), (3, 5)))

    def loop(f):
        pairs = lambda j: zip([*a[:, j], *b[j]], [*da[:, j], *db[j]], strict=True)  # noqa: E731
        return [sum(f(w, g) for w, g in pairs(j)) for j in range(3)]

    np.testing.assert_allclose(component_score("element1", a, b, da, db), loop(lambda w, g: abs(w * g)), rtol=1e-5)
    np.testing.assert_allclose(component_score("element2", a, b, da, db), loop(lambda w, g: w * w * g * g), rtol=1e-5)
    taylor = loop(lambda w, g: abs(w * g - (w * g) ** 2 / 2))
    np.testing.assert_allclose(component_score("taylor2", a, b, da, db), taylor, rtol=1e-5)
