"""Bottlenecks against their formula in float64, under rank masks, and the methods that place them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import erf

import jaxprune as jp
from jaxprune.adapters import init_bottleneck
from jaxprune.surgery import compact
from tests.tower import tower

PLAIN = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def noisy(adapters, key=0):
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    new = [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, new)


@pytest.mark.parametrize("activation", PLAIN)
def test_the_formula(activation):
    site = jp.Site("fc2", 7, 9, 0, "fc2")
    adapters, _ = init_bottleneck(jax.random.key(0), [site], {"fc2": 4}, activation=activation)
    adapter = noisy(adapters)["fc2"]
    y, mask = jax.random.normal(jax.random.key(1), (5, 9)), jnp.array([1.0, 0, 1, 1])
    y64, d, c, u, e = (np.asarray(v, np.float64) for v in (y, *jax.tree.leaves(adapter)))
    want = y64 + PLAIN[activation](y64 @ d + c) * np.asarray(mask) @ u + e
    np.testing.assert_allclose(adapter.finish(y, mask), want, rtol=1e-5, atol=1e-5)


def test_masked_units_compact_and_a_dead_site_vanishes():
    model, params, x = tower()
    sites, forward = jp.find_sites(params), jax.jit(jp.attach(model))
    adapters, masks = init_bottleneck(jax.random.key(0), sites, {s.path: 4 for s in sites if s.type == "fc2"})
    adapters = noisy(adapters)
    first, second, third = masks
    masks = {first: jnp.zeros(4), second: jnp.array([0.0, 1, 0, 1]), third: masks[third]}
    optimizer = optax.adam(1e-3)
    small, small_masks, _ = compact(adapters, masks, optimizer.init(adapters), optimizer)
    assert set(small) == {second, third} and small[second].down.shape[-1] == 2
    want = forward(params, adapters, masks, x)
    np.testing.assert_allclose(forward(params, small, small_masks, x), want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - model.apply({"params": params}, x)).max() > 1e-2
    d = 8
    assert jp.count(adapters, masks) == jp.count(small, small_masks) == (2 + 4) * (2 * d + 1) + 2 * d


def start_on(method, layers=12, d=768):
    # Shapes are all that it looks at.
    kernel = {
        "query": (d, d), "key": (d, d), "value": (d, d), "out": (d, d), "fc1": (d, 4 * d), "fc2": (4 * d, d)
    }  # fmt: skip
    tree = {
        f"layer_{i}": {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in kernel.items()}
        for i in range(layers)
    }
    sites = jp.find_sites(tree)
    return method.start(jp.Context(jax.random.key(0), tree, sites, None, None))  # pyright: ignore


@pytest.mark.parametrize(
    ("method", "per_layer", "parameters"),
    [
        # For BERT-base: 2 adapters a layer, each 2 d w + w + d parameters.
        (jp.houlsby(), ("out", "fc2"), 1_789_056),
        (jp.houlsby(width=64), ("out", "fc2"), 2_379_264),
        (jp.pfeiffer(), ("fc2",), 894_528),
    ],
)
def test_where_they_go_and_how_many_parameters(method, per_layer, parameters):
    start = start_on(method)
    assert set(start.adapters) == {f"layer_{i}/{name}" for i in range(12) for name in per_layer}
    assert jp.count(start.adapters, start.masks) == start.plan.cost == parameters
    assert start.plan.ranks["layer_3/query"] == 0


def test_wrong_settings_say_what_to_do():
    model, params, _ = tower()
    context = jp.Context(jax.random.key(0), params, jp.find_sites(params), jp.attach(model), lambda *a: 0.0)
    with pytest.raises(jp.UsageError, match="no site of type 'out'.*nearest types: .*fc1.*set types"):
        jp.houlsby().start(context)
    with pytest.raises(jp.UsageError, match="activation 'selu' is not known.*nearest: silu"):
        jp.pfeiffer(activation="selu")
    with pytest.raises(jp.UsageError, match="reduction 0.5 is out of range"):
        jp.pfeiffer(reduction=0.5)
