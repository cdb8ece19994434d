"""Rotation: the same function in the SVD basis, judged by float64, and moments that follow the gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.surgery import Decision, apply, rotate, rotate_adapters, rotate_gradients, svd_bases
from tests.surgery.test_surgery import CHAINS, loss_fn, setting, some_masks
from tests.test_methods import FORMS
from tests.tower import tower


def delta(adapter, mask):
    """Return s (A * m) B in float64."""
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    return adapter.scale * (a * np.asarray(mask)) @ b


@functools.lru_cache
def state_of(form="plain", chain="adamw", masked=True):
    """A tower in training, with some components masked; the site that would lose all loses none."""
    params, state, step, optimizer, batch, forward = setting(form, chain)
    if masked:
        masks = some_masks(state)
        masks[next(iter(masks))][:] = 1
        masks = {path: jnp.asarray(mask) for path, mask in masks.items()}
        trained, masks, opt_state = apply(Decision(masks), state.trained, state.masks, state.opt_state, optimizer)
        state = state._replace(
            adapters={p: x for p, x in trained.items() if p in masks}, masks=masks, opt_state=opt_state
        )
    return params, state, step, optimizer, batch, forward


@pytest.mark.parametrize("form", FORMS)
def test_components_are_those_of_the_singular_value_decomposition(form):
    params, state, _, _, batch, forward = state_of(form)
    bases = svd_bases(state.adapters, state.masks)
    rotated = rotate_adapters(bases, state.adapters)
    seen = 0
    for path, adapter in rotated.items():
        mask = np.asarray(state.masks[path])
        if not mask.any():
            assert path not in bases
            continue
        before, alive = delta(state.adapters[path], mask), mask > 0
        sigma = np.linalg.svd(before, compute_uv=False)[: alive.sum()]
        norms = np.linalg.norm(adapter.a, axis=0) * np.linalg.norm(adapter.b, axis=1)
        np.testing.assert_allclose(adapter.scale * norms[alive], sigma, atol=1e-5 * sigma[0])
        np.testing.assert_allclose(delta(adapter, mask), before, atol=2e-6 * sigma[0])
        a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
        assert not a[:, ~alive].any() and not b[~alive].any()
        for gram in (a.T @ a, b @ b.T):  # orthogonal, and of equal size
            np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-4 * np.trace(gram))
        large = alive & (adapter.scale * norms > 1e-2 * sigma[0])
        np.testing.assert_allclose(np.diag(a.T @ a)[large], np.diag(b @ b.T)[large], rtol=1e-2)
        # Cut anywhere, it is the nearest matrix of that rank (Eckart and Young).
        order = np.flatnonzero(alive)
        for rank in range(len(order)):
            less = adapter.scale * a[:, order[:rank]] @ b[order[:rank]]
            np.testing.assert_allclose(
                np.square(before - less).sum(), np.square(sigma[rank:]).sum(), rtol=1e-3, atol=1e-7 * sigma[0] ** 2
            )
        seen += 1
    assert seen >= 4
    np.testing.assert_allclose(
        forward(params, rotated, state.masks, batch["x"]),
        forward(params, state.adapters, state.masks, batch["x"]), atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["dora", "bfloat16"])
def test_other_kinds_do_not_change_either(kind):
    params, state, _, _, batch, forward = state_of()
    adapters = state.adapters
    if kind == "dora":
        adapters = jp.to_dora(adapters, params)
        adapters = {path: dataclasses.replace(x, magnitude=1.3 * x.magnitude) for path, x in adapters.items()}
    else:
        adapters = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapters)
    rotated = rotate_adapters(svd_bases(adapters, state.masks), adapters)
    assert jax.tree.structure(rotated) == jax.tree.structure(adapters)
    assert jax.tree.map(jnp.result_type, rotated) == jax.tree.map(jnp.result_type, adapters)
    before, after = (forward(params, x, state.masks, batch["x"]) for x in (adapters, rotated))
    plain = forward(params, {}, {}, batch["x"])
    # bfloat16 keeps eight bits of what the adapters add.
    bound = 1e-5 if kind == "dora" else 2**-7 * np.abs(before - plain).max()
    assert np.abs(before - after).max() < bound


def test_gradients_of_the_rotated_adapters_are_the_rotated_gradients():
    params, state, _, _, batch, forward = state_of()
    bases = svd_bases(state.adapters, state.masks)

    @jax.jit
    def gradient(adapters):
        return jax.grad(lambda x: loss_fn(lambda *y: forward(params, x, state.masks, *y), batch, None))(adapters)

    expected = gradient(rotate_adapters(bases, state.adapters))
    found = rotate_gradients(bases, gradient(state.adapters))
    for path in bases:
        for name in ("a", "b"):
            one, two = getattr(expected[path], name), getattr(found[path], name)
            np.testing.assert_allclose(one, two, atol=1e-4 * np.abs(one).max())
            assert np.abs(one).max() > 0


def test_first_moments_follow_as_gradients_and_second_ones_as_squares():
    _, state, _, optimizer, _, _ = state_of()
    bases = svd_bases(state.adapters, state.masks)
    adapters, opt_state = rotate(bases, state.trained, state.opt_state, optimizer)
    before, after = state.opt_state[0], opt_state[0]
    assert before.count == after.count and set(adapters) == set(state.trained)
    for path, basis in bases.items():
        to_a, to_b = basis.back.T, basis.into.T
        for old, new, power in ((before.mu, after.mu, 1), (before.nu, after.nu, 2)):
            a, b = np.asarray(old[path].a, np.float64), np.asarray(old[path].b, np.float64)
            for found, expected in ((new[path].a, a @ to_a**power), (new[path].b, to_b**power @ b)):
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    decided, _, carried = apply(Decision({}, bases=bases), state.trained, state.masks, state.opt_state, optimizer)
    for one, other in zip(jax.tree.leaves((decided, carried)), jax.tree.leaves((adapters, opt_state)), strict=True):
        np.testing.assert_array_equal(one, other)  # an event does the same
    head = "head/kernel"
    np.testing.assert_array_equal(before.mu[head].value, after.mu[head].value)


@pytest.mark.parametrize("chain", [name for name in CHAINS if name != "adafactor"])
def test_every_chain_goes_on_and_what_dies_stays_dead(chain):
    params, state, step, optimizer, batch, forward = state_of(chain=chain)
    bases = svd_bases(state.adapters, state.masks)
    fewer = {path: np.asarray(state.masks[path]) * (np.arange(4) < 2) for path in bases}
    cut, masks, opt_state = apply(Decision(fewer, bases=bases), state.trained, state.masks, state.opt_state, optimizer)
    assert jax.tree.structure(opt_state) == jax.tree.structure(state.opt_state)
    for leaf, old in zip(jax.tree.leaves(opt_state), jax.tree.leaves(state.opt_state), strict=True):
        assert leaf.shape == old.shape and leaf.dtype == old.dtype and bool(jnp.all(jnp.isfinite(leaf)))
        assert not bool(jnp.all(old >= 0)) or bool(jnp.all(leaf >= 0))  # an average of squares stays one
    state = state._replace(adapters={p: x for p, x in cut.items() if p in masks}, masks=masks, opt_state=opt_state)
    losses = []
    for _ in range(5):
        state, metrics = step(params, state, batch)
        losses.append(float(metrics["loss"]))
    # The chain "masked" passes the gradients of biases on as they are.
    assert chain == "masked" or losses[-1] < losses[0]
    for path, mask in masks.items():
        assert not np.asarray(state.adapters[path].a)[:, np.asarray(mask) == 0].any()


def test_momentum_of_any_sign_follows_as_a_gradient():
    """Its steps from one basis are those from the other, as long as both factors stay: SGD on a linear loss."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    adapters, masks = {"fc": jp.Lora(draw(6, 3), draw(3, 5), 1.0)}, {"fc": jnp.ones(3)}
    slope = {"fc": jp.Lora(draw(6, 3), draw(3, 5), 1.0)}
    chain = optax.chain(optax.scale(-0.1), optax.trace(0.9))  # a momentum against the gradient
    _, opt_state = chain.update(slope, chain.init(adapters), adapters)
    bases = svd_bases(adapters, masks)
    _, turned = rotate(bases, adapters, opt_state, chain)
    expected = rotate_gradients(bases, slope)["fc"]
    np.testing.assert_allclose(turned[1].trace["fc"].a, -0.1 * expected.a, rtol=1e-5)
    np.testing.assert_allclose(turned[1].trace["fc"].b, -0.1 * expected.b, rtol=1e-5)


def test_copies_of_what_is_trained_follow_as_it_does():
    rng = np.random.default_rng(0)
    lora = jp.Lora(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 3), (3, 5))), 1.0)

    class Copy(optax.EmptyState):
        pass

    def init(params):
        return {"slow": params}

    chain = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    bases = svd_bases({"fc": lora}, {"fc": jnp.ones(3)})
    rotated, opt_state = rotate(bases, {"fc": lora}, chain.init({"fc": lora}), chain)
    np.testing.assert_array_equal(opt_state["slow"]["fc"].a, rotated["fc"].a)
    assert np.abs(rotated["fc"].a - lora.a).max() > 0.1


def test_a_fresh_adapter_and_a_component_of_nothing_keep_a_direction_to_grow_in():
    model, params, x = tower()
    sites = jp.find_sites(params)
    adapters, masks = jp.init_lora(jax.random.key(0), sites, {site.path: 3 for site in sites})
    fresh = rotate_adapters(svd_bases(adapters, masks), adapters)
    for path, adapter in fresh.items():
        np.testing.assert_array_equal(adapter.a, adapters[path].a)
    path, first = next(iter(adapters.items()))
    b = np.zeros_like(first.b)
    b[0] = 1.0  # rank 1, with three live components
    adapters[path] = dataclasses.replace(first, b=jnp.asarray(b))
    rotated = rotate_adapters(svd_bases(adapters, masks), adapters)[path]
    np.testing.assert_allclose(delta(rotated, np.ones(3)), delta(adapters[path], np.ones(3)), atol=1e-6)
    assert (np.linalg.norm(rotated.a, axis=0) > 1e-4).all()
    assert np.isfinite(rotated.a).all() and np.isfinite(rotated.b).all()


def test_components_with_a_basis_of_their_own_are_refused():
    params, state, *_ = state_of()
    path, adapter = next(iter(state.adapters.items()))
    gated = jp.Gated(adapter.a, jnp.ones(4), adapter.b, 1.0)
    with pytest.raises(jp.UsageError, match=r"is a Gated, whose components cannot be rotated; expected LoRA or DoRA"):
        svd_bases({path: gated}, {path: jnp.ones(4)})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31), st.floats(-3, 3), st.booleans())
def test_any_factors_keep_their_product(rank, seed, spread, dependent):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(9, rank)), rng.normal(size=(rank, 7)) * np.exp(spread * np.arange(rank))[:, None]
    if dependent and rank > 1:
        a[:, 1] = a[:, 0]
    adapter = {"fc": jp.Lora(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), -0.5)}
    masks = {"fc": jnp.asarray((rng.random(rank) < 0.7).astype(np.float32))}
    bases = svd_bases(adapter, masks)
    rotated = rotate_adapters(bases, adapter)
    before, after = delta(adapter["fc"], masks["fc"]), delta(rotated["fc"], masks["fc"])
    np.testing.assert_allclose(after, before, atol=1e-4 * max(np.abs(before).max(), 1e-30))
    if bases:
        sizes = np.linalg.norm(rotated["fc"].a, axis=0) * np.linalg.norm(rotated["fc"].b, axis=1)
        assert (np.diff(sizes[np.asarray(masks["fc"]) > 0]) <= 1e-4 * sizes.max()).all()
