"""Adapters and how they reach a model: the activation-space forward against weights merged by hand, in four forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.sites import flatten, split
from tests.tower import FORMS, sites_of, tower

rng = np.random.default_rng


def random_adapters(form="plain", rank=4, dead=0, **kw):
    """Draw factors in numpy, with the first `dead` components masked."""
    sites = sites_of(form)
    adapters, masks = jp.init_lora(jax.random.key(1), sites, {s.path: rank for s in sites}, **kw)
    adapters = {
        path: jax.tree.map(lambda leaf, i=i: jnp.asarray(rng(i).normal(0, 0.3, leaf.shape), jnp.float32), adapter)
        for i, (path, adapter) in enumerate(adapters.items())
    }
    return adapters, {path: mask.at[..., :dead].set(0.0) for path, mask in masks.items()}


def merged_by_hand(params, adapters, masks):
    """W + s (A * m) B in float64, component by component."""
    flat = {path: np.array(leaf, np.float64) for path, leaf in flatten(params).items()}
    for path, adapter in adapters.items():
        a, b, m = (np.asarray(x, np.float64) for x in (adapter.a, adapter.b, masks[path]))
        module, index = split(path)
        for j in range(a.shape[1]):
            flat[module + "/kernel"][index or ...] += adapter.scale * m[j] * np.outer(a[:, j], b[j])
    return flat


def reference_logits(form, flat, x):
    """The tower in float64 numpy."""
    h = np.asarray(x, np.float64)
    for i in range(3):
        get = (lambda n, i=i: flat[f"layers/{n}"][i]) if "scan" in form else (lambda n, i=i: flat[f"layer_{i}/{n}"])
        h = h + np.tanh(h @ get("fc1/kernel") + get("fc1/bias")) @ get("fc2/kernel") + get("fc2/bias")
    return h.mean(1) @ flat["head/kernel"] + flat["head/bias"]


def equals(form, by_hand, adapters, masks, seen=lambda adapters, masks: (adapters, masks)):
    """Compare forward and merge with kernels made by hand, and gradients with those through the merge; return ours."""
    model, params, x = tower(form)
    forward, merged = jp.attach(model), flatten(jp.merge(params, *seen(adapters, masks)))
    logits = jax.jit(forward)(params, *seen(adapters, masks), x)
    np.testing.assert_allclose(logits, reference_logits(form, by_hand, x), rtol=1e-4, atol=1e-5)
    for path, expected in by_hand.items():
        np.testing.assert_allclose(merged[path], expected, rtol=1e-5, atol=1e-6)

    weight_space = jp.attach_function(lambda params, x: model.apply({"params": params}, x))
    ours, other = (
        jax.jit(jax.grad(lambda a, f=f: jnp.sum(f(params, *seen(a, masks), x) ** 2)))(adapters)
        for f in (forward, weight_space)
    )
    for left, right in zip(*map(jax.tree.leaves, (ours, other)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4 * float(jnp.abs(right).max()) + 1e-9)
    return ours


@pytest.mark.parametrize("form", FORMS)
def test_forward_merge_and_gradients_equal_the_formula(form):
    _, params, _ = tower(form)
    adapters, masks = random_adapters(form, dead=1)
    equals(form, merged_by_hand(params, adapters, masks), adapters, masks)


@pytest.mark.parametrize("form", FORMS)
def test_masked_components_get_exactly_no_gradient(form):
    model, params, x = tower(form)
    adapters, masks = random_adapters(form, dead=2)
    grads = jax.jit(jax.grad(lambda a: jnp.sum(jp.attach(model)(params, a, masks, x) ** 2)))(adapters)
    for grad in grads.values():
        assert not np.any(grad.a[..., :, :2]) and not np.any(grad.b[..., :2, :])
        assert np.all(np.any(grad.a[..., :, 2:] != 0, axis=-2)) and np.all(np.any(grad.b[..., 2:, :] != 0, axis=-1))


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_adapter_changes_nothing(form):
    model, params, x = tower(form)
    sites = sites_of(form)
    adapters, masks = jp.init_lora(jax.random.key(1), sites, {s.path: 3 for s in sites})
    with_adapters, without = (jax.jit(jp.attach(model))(params, *a, x) for a in ((adapters, masks), ({}, {})))
    np.testing.assert_array_equal(with_adapters, without)
    assert jp.count(adapters, masks) == sum(s.cost(3) for s in sites)


def test_merge_equals_the_formula_and_keeps_the_dtype():
    _, params, _ = tower()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    adapters, masks = random_adapters(dead=1)
    merged = jp.merge(params, adapters, masks)
    for path, expected in merged_by_hand(params, adapters, masks).items():
        leaf = flatten(merged)[path]
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(leaf, np.float64), expected, rtol=2**-7, atol=1e-6)


def test_trained_weights_replace_parameters():
    _, params, _ = tower()
    weights = jp.init_weights(params, "^head/")
    assert {path: leaf.shape for path, leaf in weights.items()} == {"head/bias": (2,), "head/kernel": (8, 2)}
    moved = {path: weight + 1.0 for path, weight in weights.items()}
    by_hand = {**params, "head": jax.tree.map(lambda leaf: leaf + 1.0, params["head"])}
    jax.tree.map(np.testing.assert_array_equal, jp.with_weights(params, moved), by_hand)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert jp.with_weights(half, moved)["head"]["kernel"].dtype == jnp.bfloat16
    assert jp.with_weights(params, {}) is params
    for wrong, message in [
        ({"head/kernal": jnp.ones((8, 2))}, "not in the parameters; nearest names: head/kernel"),
        ({"head/kernel": jnp.ones((2, 8))}, r"has shape \(2, 8\), expected \(8, 2\)"),
        ({"head/kernel": 1.0}, "is 1.0; expected an array"),
        (None, "weights None cannot be used"),
    ]:
        with pytest.raises(jp.UsageError, match=message):
            jp.with_weights(params, wrong) if wrong else jp.init_state(
                jax.random.key(0), {}, {}, optax.sgd(1.0), weights=wrong
            )


def test_initial_values_depend_on_the_path_alone():
    _, params, _ = tower()
    sites = jp.find_sites(params)
    every, _ = jp.init_lora(jax.random.key(1), sites, {s.path: 4 for s in sites})
    some, _ = jp.init_lora(jax.random.key(1), sites, {"layer_2/fc1": 4, "layer_0/fc1": 2})
    np.testing.assert_array_equal(every["layer_2/fc1"].a, some["layer_2/fc1"].a)
    assert np.abs(every["layer_0/fc1"].a).max() <= 8**-0.5 and not np.any(every["layer_0/fc1"].b)


def test_alpha_and_scale():
    sites = jp.find_sites(tower()[1])
    ranks = {"layer_0/fc1": 4, "layer_1/fc1": 2}
    by_alpha, _ = jp.init_lora(jax.random.key(1), sites, ranks, alpha=8.0)
    assert [by_alpha[path].scale for path in ranks] == [2.0, 4.0]
    assert {a.scale for a in jp.init_lora(jax.random.key(1), sites, ranks)[0].values()} == {2.0}


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_adapter_dropout_needs_a_key_and_keeps_the_mean(form):
    model, params, x = tower(form)
    adapters, masks = random_adapters(form, dropout=0.5)
    adapters = jax.tree.map(lambda leaf: 0.01 * leaf, adapters)
    forward = jax.jit(lambda key: jp.attach(model)(params, adapters, masks, x, rngs={"dropout": key}))
    base, still = (jp.attach(model)(params, a, masks, x) for a in ({}, adapters))
    draws = np.stack([forward(jax.random.key(i)) - base for i in range(600)])
    assert draws.std(0).min() > 0
    np.testing.assert_allclose(draws.mean(0), still - base, atol=4 * (draws.std(0) / 600**0.5).max())


def test_an_adapter_that_would_do_nothing_is_an_error():
    model, params, x = tower()
    adapters, masks = random_adapters()
    with pytest.raises(jp.UsageError, match="not in the parameters; nearest names: layer_./fc1"):
        jp.attach(model)(params, {"layer_9/fc1": adapters["layer_0/fc1"]}, masks, x)
    orphan = {**params, "unused": {"kernel": jnp.ones((8, 12))}}
    with pytest.raises(jp.UsageError, match="never reached, first 'unused'"):
        jp.attach(model)(orphan, {"unused": adapters["layer_0/fc1"]}, masks, x)


def test_bad_plans():
    sites = jp.find_sites(tower()[1])
    for ranks, message in [({"x": 1}, "not sites"), ({"layer_0/fc1": -1}, "0 or more"), ({}, "every rank")]:
        with pytest.raises(jp.UsageError, match=message):
            jp.init_lora(jax.random.key(0), sites, ranks)
    with pytest.raises(jp.UsageError, match="matches no parameter"):
        jp.init_weights(tower()[1], "nothing")
