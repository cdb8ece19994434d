"""VeRA and LoRA-FA against their formulas, and what of them is trained, kept and exported."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.adapters.vera import SHARED
from jaxprune.sites import flatten, split
from tests.test_attach import equals, random_adapters
from tests.test_methods import FORMS
from tests.tower import begin, sites_of, tower


def random_vera(form="plain", rank=5):
    rng = np.random.default_rng(0)
    context = jp.Context(jax.random.key(3), tower(form)[1], sites_of(form), None, None)
    adapters = dict(jp.vera(rank=rank).start(context).adapters)
    for path, x in adapters.items():
        if path != SHARED:
            d, b = (jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for leaf in (x.d, x.b))
            adapters[path] = dataclasses.replace(x, d=d, b=b)
    return adapters


@pytest.mark.parametrize("form", FORMS)
def test_vera_equals_its_formula(form):
    params = tower(form)[1]
    adapters = random_vera(form)
    flat = {path: np.array(leaf, np.float64) for path, leaf in flatten(params).items()}
    big_a, big_b = np.asarray(adapters[SHARED].a, np.float64), np.asarray(adapters[SHARED].b, np.float64)
    assert big_a.shape == (12, 5) and big_b.shape == (5, 12)
    for path, one in adapters.items():
        if path == SHARED:
            continue
        module, index = split(path)
        kernel = flat[f"{module}/kernel"]
        a, b = big_a[: kernel.shape[-2]], big_b[:, : kernel.shape[-1]]
        kernel[index or ...] += (a * np.asarray(one.d, np.float64)) @ b * np.asarray(one.b, np.float64)
    ours = equals(form, flat, adapters, {}, functools.partial(jp.vera(rank=5).seen, ()))
    assert not np.any(ours[SHARED].a) and not np.any(ours[SHARED].b)


@pytest.mark.parametrize("form", ["plain", "scan_of_remat"])
@pytest.mark.parametrize("name", ["vera", "lorafa"])
def test_what_is_frozen_stays_and_has_no_moments(name, form):
    """Weight decay included: a large one would move whatever the optimizer touches."""
    world = begin(getattr(jp, name)(rank=4), form, optax.adamw(1e-2, weight_decay=10.0))
    state, start = world.state, world.start
    for _ in range(2):
        state, _ = world.step(world.params, state, world.batch)
    layers = 3
    expected = (
        sum(4 * (n == "vera") + d_out * (4 if n == "lorafa" else 1) for n in [name] for d_out in (12, 8)) * layers
    )
    assert jp.count(state.adapters, state.masks) == expected
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * expected
    for path, adapter in state.adapters.items():
        for field in getattr(adapter, "frozen", ()):
            np.testing.assert_array_equal(getattr(adapter, field), getattr(start.adapters[path], field))
    trained = [(a.b, start.adapters[p].b) for p, a in state.adapters.items() if p != SHARED]
    assert all(np.abs(new - old).max() > 1e-4 for new, old in trained)


def test_the_pair_is_held_once_and_depends_on_the_key_alone():
    first, second = random_vera(), random_vera()
    np.testing.assert_array_equal(first[SHARED].a, second[SHARED].a)
    assert sum(leaf.size for leaf in jax.tree.leaves(first)) == 5 * (12 + 12) + 3 * (5 + 12 + 5 + 8)
    assert np.abs(first[SHARED].a).max() <= (6 / 12) ** 0.5 and np.abs(first[SHARED].b).max() <= (6 / 5) ** 0.5


def test_without_the_view_vera_is_an_error():
    model, params, x = tower()
    adapters = random_vera()
    with pytest.raises(jp.UsageError, match="not in the parameters"):
        jp.attach(model)(params, adapters, {}, x)
    with pytest.raises(jp.UsageError, match="pass the adapters through method.seen"):
        jp.attach(model)(params, {"layer_0/fc1": adapters["layer_0/fc1"]}, {}, x)
    with pytest.raises(jp.UsageError, match="rank of 1 or more"):
        jp.adapters.init_vera(jax.random.key(0), jp.find_sites(params), rank=0)


def test_lorafa_computes_what_lora_computes():
    model, params, x = tower("scan")
    loras, masks = random_adapters("scan", dead=1)
    frozen = jp.adapters.to_lorafa(loras)
    run = jax.jit(jax.value_and_grad(lambda a: jnp.sum(jp.attach(model)(params, a, masks, x) ** 2)))
    (left, ours), (right, full) = run(frozen), run(loras)
    np.testing.assert_allclose(left, right, rtol=1e-6)
    merged = jax.jit(jax.grad(lambda a: jnp.sum(model.apply({"params": jp.merge(params, a, masks)}, x) ** 2)))(frozen)
    for path in loras:
        np.testing.assert_allclose(ours[path].b, full[path].b, rtol=1e-5, atol=1e-6)
        assert not np.any(ours[path].a) and np.any(full[path].a) and not np.any(merged[path].a)
