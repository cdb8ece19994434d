"""LoRA-drop: importance by brute force, who shares, and what sharing means for gradients, counts and compaction."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.adapters import SharedLora
from jaxprune.methods.loradrop import output_importance
from tests.tower import sites_of, tower


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch) - 1))


# Strength of the LoRA of each layer; with T = 0.9 the middle one is enough.
STRENGTH = (0.05, 1.0, 0.1)


def started(form="plain", **settings):
    """Return (method, context, adapters, masks), layers' B random and of the strengths above."""
    model, params, x = tower(form)
    sites, forward = sites_of(form), jp.attach(model)
    method = jp.loradrop(rank=2, **{"measure_at": 3, **settings})
    context = jp.Context(jax.random.key(3), params, sites, forward, loss_fn, [x, 2 * x[:2]])
    start = method.start(context)
    adapters = {}
    for site in sites:
        a = start.adapters[site.path]
        b = STRENGTH[site.layer] * jax.random.normal(jax.random.key(ord(site.type[-1])), a.b.shape)
        adapters[site.path] = dataclasses.replace(a, b=b)
    return method, context, adapters, start.masks


def path_of(form, layer, kind):
    return f"layers/{kind}[{layer}]" if form == "scan" else f"layer_{layer}/{kind}"


def brute_force(context, adapters):
    """Run the tower by hand in float64: {(layer, type): mean over tokens of |s x A B|^2}."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(context.params))
    total = {}
    for batch in context.batches:
        h = np.asarray(batch, np.float64)
        for layer in range(3):
            x = h
            for kind in ("fc1", "fc2"):
                stacked = "layers" in params
                of = params["layers"][kind] if stacked else params[f"layer_{layer}"][kind]
                lora = adapters[path_of("scan" if stacked else "plain", layer, kind)]
                pick = lambda leaf: np.asarray(leaf, np.float64)[layer] if stacked else np.asarray(leaf, np.float64)  # noqa: B023, E731
                out = lora.scale * x @ np.asarray(lora.a, np.float64) @ np.asarray(lora.b, np.float64)
                total[layer, kind] = total.get((layer, kind), 0) + (out**2).sum(-1).mean() / len(context.batches)
                x = x @ pick(of["kernel"]) + pick(of["bias"]) + out
                x = np.tanh(x) if kind == "fc1" else x
            h = h + x
    return total


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_importance_by_brute_force(form):
    _, context, adapters, masks = started(form)
    got = output_importance(context, adapters, masks)
    for (layer, kind), value in brute_force(context, adapters).items():
        np.testing.assert_allclose(got[path_of(form, layer, kind)], value, rtol=1e-4)


def test_a_layer_that_sees_few_tokens_is_not_small_for_that():
    """The upper layer sees one token of five: with equal outputs at every token, equal importance."""
    params = {f"layer_{i}": {"fc": {"kernel": jnp.eye(4)}} for i in range(2)}
    sites, x = jp.find_sites(params), jnp.ones((3, 5, 4))

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            low = Layer(name="layer_0")(x)
            return Layer(name="layer_1")(x[:, :1]) + low[:, :1]

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, use_bias=False, name="fc")(x)

    context = jp.Context(jax.random.key(3), params, sites, jp.attach(Two()), loss_fn, [x])
    start = jp.loradrop(rank=2, measure_at=3).start(context)
    lora = start.adapters["layer_0/fc"]
    same = dict.fromkeys(start.adapters, dataclasses.replace(lora, b=lora.b + 1))
    found = output_importance(context, same, start.masks)
    np.testing.assert_allclose(found["layer_1/fc"], found["layer_0/fc"], rtol=1e-6)
    assert found["layer_0/fc"] > 0


def pruned(form, optimizer, **settings):
    method, context, adapters, masks = started(form, **settings)
    state = jp.init_state(jax.random.key(4), adapters, masks, optimizer, method)
    state, decision = jp.prune(state._replace(step=jnp.asarray(3)), method, optimizer, context)
    return method, context, adapters, state, decision


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_the_unimportant_layers_share(form):
    method, context, before, state, decision = pruned(form, optax.adam(1e-2))
    shares = brute_force(context, before)
    layers = np.asarray([shares[layer, "fc1"] + shares[layer, "fc2"] for layer in range(3)])
    assert layers[1] > 0.9 * layers.sum() and layers[2] > layers[0]  # as the test means it
    np.testing.assert_allclose(decision.report["share"], layers[1] / layers.sum(), rtol=1e-4)
    seen, masks = method.seen(state.method_state, state.adapters, state.masks)

    def of(tree, kind, layer):
        return tree[path_of(form, layer, kind)].b

    for kind in ("fc1", "fc2"):
        assert bool((of(seen, kind, 1) == of(before, kind, 1)).all())
        assert bool((of(seen, kind, 0) == of(before, kind, 2)).all()) and bool(
            (of(seen, kind, 2) == of(before, kind, 2)).all()
        )
    assert all(type(x) is jp.Lora for x in seen.values()) and all(bool((mask == 1).all()) for mask in masks.values())
    # Two LoRAs of each type instead of three.
    ones = {path: jnp.ones_like(mask) for path, mask in state.masks.items()}
    assert jp.count(state.adapters, state.masks) * 3 == jp.count(before, ones) * 2


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_training_goes_on_with_shared_factors(form):
    """The first step has the sum of the sharers' gradients, the dead stay zero, and compaction changes nothing."""
    optimizer = optax.sgd(1e-2)
    method, context, _, state, _ = pruned(form, optimizer)
    forward, params, x = context.forward, context.params, context.batches[0]
    seen, masks = method.seen(state.method_state, state.adapters, state.masks)
    untied = jax.grad(lambda a: loss_fn(lambda x: forward(params, a, masks, x), x, None))(seen)
    step = jp.make_step(forward, loss_fn, optimizer, method, donate=False)
    after, _ = step(params, state, x)
    for kind in ("fc1", "fc2"):
        first, last = path_of(form, 0, kind), path_of(form, 2, kind)
        move = after.adapters[last].b - state.adapters[last].b
        total = untied[first].b + untied[last].b
        np.testing.assert_allclose(move, -1e-2 * total, rtol=1e-4, atol=1e-6)

    optimizer = optax.adam(1e-2)
    method, _, _, state, _ = pruned(form, optimizer)
    step = jp.make_step(forward, loss_fn, optimizer, method, donate=False)
    for _ in range(100):
        state, _ = step(params, state, x)
    for path, mask in state.masks.items():
        dead = np.asarray(mask) == 0
        for tree in (state.adapters, *(optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu"))):
            assert (np.asarray(tree[path].b)[dead] == 0).all()
            assert (np.asarray(tree[path].a).T[dead] == 0).all()
    small = jp.compacted(state, method, optimizer)
    assert set(small.adapters) == {path_of(form, i, kind) for i in (1, 2) for kind in ("fc1", "fc2")}
    outputs = lambda s: forward(params, *method.seen((), s.adapters, s.masks), x)  # noqa: E731
    np.testing.assert_allclose(outputs(small), outputs(state), atol=1e-6)
    with pytest.raises(jp.UsageError, match="seen"):
        jp.merge(params, small.adapters, small.masks)
    merged = jp.merge(params, *method.seen((), small.adapters, small.masks))
    np.testing.assert_allclose(forward(merged, {}, {}, x), outputs(state), rtol=1e-4, atol=1e-5)


def test_ranking_the_sites_of_each_type_and_keeping_all():
    *_, everything = pruned("plain", optax.sgd(0.1), threshold=1.0)
    assert everything is not None and not everything.adapters and everything.report["own"] == 3
    *_, state, decision = pruned("plain", optax.sgd(0.1), per="site")
    assert decision.report["own"] == 2 and set(decision.adapters) == {"layer_2/fc1", "layer_2/fc2"}
    assert state.adapters["layer_2/fc1"].members == ("layer_0/fc1",)


def test_a_shared_adapter_survives_its_description_in_json():
    x = SharedLora(jnp.ones((3, 2)), jnp.ones((2, 3)), 2.0, members=("p", "q"))
    settings = {name: getattr(x, name) for name in ("scale", "dropout", "members")}
    again = SharedLora(x.a, x.b, **json.loads(json.dumps(settings)))
    assert jax.tree.structure(again) == jax.tree.structure(x) and hash(jax.tree.structure(again))


def test_what_cannot_be_measured():
    method, context, adapters, masks = started()
    with pytest.raises(jp.UsageError, match="context with batches"):
        method.decide((), adapters, masks, 3, context._replace(batches=()))
    zero = {path: dataclasses.replace(a, b=a.b * 0) for path, a in adapters.items()}
    with pytest.raises(jp.UsageError, match="measure later"):
        method.decide((), zero, masks, 3, context)
    with pytest.raises(jp.UsageError, match="per 'token'"):
        jp.loradrop(measure_at=1, per="token")
    with pytest.raises(jp.UsageError, match="threshold 0"):
        jp.loradrop(measure_at=1, threshold=0)
