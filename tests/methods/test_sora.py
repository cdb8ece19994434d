"""SoRA: both forms of the proximal step, the schedule of thresholds, and what happens at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.methods.sora import shrink, thresholds
from tests.tower import sites_of, tower


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch) - 1))


def started(form="plain", **settings):
    model, params, x = tower(form)
    sites, forward = sites_of(form), jp.attach(model)
    method = jp.sora(rank=4, **settings)
    start = method.start(jp.Context(jax.random.key(3), params, sites, forward, loss_fn))
    return method, start, params, x, forward


@pytest.mark.parametrize(
    "prox, gates, expected",
    [
        ("released", [1.2, 1.9, 2.1, 3, 1, -1, 0.5, 0, -1.2, -3], [0, 0, 1.1, 2, 1, -1, 0, 0, 0, -2]),
        ("soft", [1.2, 1.9, 2.1, 3, 1, -1, 0.5, 0, -1.2, -3], [0.2, 0.9, 1.1, 2, 0, 0, 0, 0, -0.2, -2]),
    ],
)
def test_the_proximal_step(prox, gates, expected):
    np.testing.assert_allclose(jax.jit(shrink, static_argnums=2)(jnp.asarray(gates), 1.0, prox), expected, atol=1e-6)


def test_the_released_form_is_its_three_lines():
    """In place, in this order, on values on and around both edges of the dead zone."""
    rng = np.random.default_rng(0)
    for limit in (0.0, 0.25, 0.5):
        given = np.float32([*rng.normal(size=200), 0, limit, -limit, 2 * limit, -2 * limit])
        gate = given.copy()
        gate[gate > limit] -= np.float32(limit)
        gate[gate < -limit] += np.float32(limit)
        gate[np.abs(gate) < limit] = 0
        np.testing.assert_array_equal(shrink(jnp.asarray(given), limit, "released"), gate)


def test_thresholds_rise_in_equal_parts():
    at = jax.jit(thresholds(7e-4, values=8, first_steps=5, steps=2))
    expected = [0] * 5 + [v * 1e-4 for v in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7)]
    np.testing.assert_allclose([float(at(step)) for step in range(1, 22)], expected, atol=1e-9)


def test_the_penalty_and_a_threshold_that_depends_on_the_step():
    method, start, *_ = started(
        total_steps=9, penalty=0.5, threshold=thresholds(0.25, values=2, first_steps=3, steps=1)
    )
    gates = np.concatenate([np.asarray(x.gate) for x in start.adapters.values()])
    np.testing.assert_allclose(method.penalty((), start.adapters, start.masks), 0.5 * np.abs(gates).mean(), rtol=1e-6)
    assert abs(gates.std() - 1) < 0.4  # N(0, 1), not shrunk by anything
    for step, limit in ((3, 0.0), (4, 0.25)):
        _, after = jax.jit(method.project)((), start.adapters, start.masks, None, step)
        for path, x in start.adapters.items():
            np.testing.assert_allclose(
                after[path].gate, np.sign(x.gate) * np.maximum(np.abs(x.gate) - limit, 0), atol=1e-7
            )
            assert after[path].a is not None and bool((after[path].a == x.a).all())


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_gates_of_zero_die_at_the_end_and_stay_dead(form):
    method, start, params, x, forward = started(form, total_steps=8, penalty=0.1, threshold=0.1)
    optimizer = optax.adam(1e-2)
    state = jp.init_state(jax.random.key(4), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, loss_fn, optimizer, method, donate=False)
    for number in range(1, 9):
        state, _ = step(params, state, x)
        before = state
        state, decision = jp.prune(state, method, optimizer, jp.Context(state.key, params, (), forward, loss_fn))
        assert (decision is not None) == (number == 8)
    zero = {path: np.asarray(a.gate) == 0 for path, a in before.adapters.items()}
    assert 0 < sum(z.sum() for z in zero.values()) < sum(z.size for z in zero.values())
    for path, mask in state.masks.items():
        assert ((np.asarray(mask) == 0) == zero[path]).all()
    outputs = lambda s: forward(params, s.adapters, s.masks, x)  # noqa: E731
    np.testing.assert_allclose(outputs(state), outputs(before), atol=1e-6)  # they did nothing
    np.testing.assert_allclose(outputs(jp.compacted(state, method, optimizer)), outputs(state), atol=1e-5)
    for _ in range(100):
        state, _ = step(params, state, x)
    for path, dead in zero.items():
        moments = [optax.tree_utils.tree_get(state.opt_state, name)[path] for name in ("mu", "nu")]
        for tree in (state.adapters[path], *moments):
            assert (np.asarray(tree.gate)[dead] == 0).all()
            assert (np.asarray(tree.a).T[dead] == 0).all()
            assert (np.asarray(tree.b)[dead] == 0).all()


def test_a_gate_can_come_back_before_the_end():
    method, start, params, x, forward = started(total_steps=99, threshold=1e-6)
    adapters = {p: jp.Gated(a.a, a.gate.at[0].set(0), a.b + 0.1, a.scale) for p, a in start.adapters.items()}
    optimizer = optax.adam(1e-2)
    state = jp.init_state(jax.random.key(4), adapters, start.masks, optimizer, method)
    state, _ = jp.make_step(forward, loss_fn, optimizer, method, donate=False)(params, state, x)
    assert all(float(a.gate[0]) != 0 for a in state.adapters.values())


@pytest.mark.parametrize("wrong", [{"prox": "hard"}, {"penalty": -1}, {"threshold": -1.0}, {"total_steps": 0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(jp.UsageError, match=next(iter(wrong))):
        jp.sora(**{"total_steps": 5, **wrong})
