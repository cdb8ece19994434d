"""DoRA against its formula in float64, its gradients against one written out, its masks, and its folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.adapters.base import drop
from jaxprune.sites import flatten, split
from jaxprune.surgery import Decision
from tests.test_attach import equals, random_adapters
from tests.test_methods import FORMS
from tests.tower import begin, tower


def random_doras(form="plain", dead=0, **kw):
    """Draw factors and magnitudes, the magnitudes away from the norms."""
    loras, masks = random_adapters(form, dead=dead, **kw)
    doras = jp.to_dora(loras, tower(form)[1])
    moved = {
        path: dataclasses.replace(x, magnitude=x.magnitude * (1.2 + 0.5 * jnp.sin(jnp.arange(x.magnitude.shape[0]))))
        for path, x in doras.items()
    }
    return moved, masks


def merged_by_hand(params, adapters, masks):
    """m V / |V| in float64, column by column; the kernel itself where no component lives."""
    flat = {path: np.array(leaf, np.float64) for path, leaf in flatten(params).items()}
    for path, x in adapters.items():
        module, index = split(path)
        kernel = flat[f"{module}/kernel"][index or ...]  # a view
        a, b, mask, magnitude = (np.asarray(leaf, np.float64) for leaf in (x.a, x.b, masks[path], x.magnitude))
        v = kernel + x.scale * (a * mask) @ b
        if mask.any():
            for o in range(v.shape[1]):
                kernel[:, o] = magnitude[o] * v[:, o] / np.sqrt((v[:, o] ** 2).sum())
    return flat


@pytest.mark.parametrize("form", FORMS)
def test_forward_merge_and_gradients_equal_the_formula(form):
    params = tower(form)[1]
    adapters, masks = random_doras(form, dead=1)
    masks = {path: mask * (i != 1) for i, (path, mask) in enumerate(masks.items())}  # one without a live component
    ours = equals(form, merged_by_hand(params, adapters, masks), adapters, masks)
    for grad in ours.values():
        assert not np.any(grad.a[:, :1]) and not np.any(grad.b[:1])


def test_gradients_take_the_norm_for_a_constant():
    """d/dm, d/dA and d/dB of sum(c * x V m / n) with n held, written out in float64."""
    rng = np.random.default_rng(0)
    x, w, a, b, c = (rng.normal(size=shape) for shape in [(7, 6), (6, 5), (6, 3), (3, 5), (7, 5)])
    m, s = rng.uniform(0.5, 2, 5), 0.7
    adapter = jp.Dora(jnp.float32(a), jnp.float32(b), s, magnitude=jnp.float32(m))
    grads = jax.grad(lambda p: jnp.sum(c * p.linear(jnp.float32(x), jnp.float32(w), None, None)))(adapter)
    v = w + s * a @ b
    gain = m / np.linalg.norm(v, axis=0)
    g_v = x.T @ (c * gain)
    np.testing.assert_allclose(grads.a, s * g_v @ b.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads.b, s * a.T @ g_v, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads.magnitude, (c * (x @ v)).sum(0) * gain / m, rtol=1e-5, atol=1e-5)


def test_dropout_thins_the_change_alone():
    rng = np.random.default_rng(1)
    x, w, a, b = (rng.normal(size=shape) for shape in [(7, 6), (6, 5), (6, 3), (3, 5)])
    m, key = rng.uniform(0.5, 2, 5), jax.random.key(3)
    adapter = jp.Dora(jnp.float32(a), jnp.float32(b), 2.0, 0.4, magnitude=jnp.float32(m))
    dropped = np.asarray(drop(jnp.float32(x), 0.4, key), np.float64)
    assert (dropped == 0).any()
    gain = m / np.linalg.norm(w + 2 * a @ b, axis=0)
    expected = x @ w + (gain - 1) * (dropped @ w) + gain * 2 * (dropped @ a @ b)
    np.testing.assert_allclose(
        adapter.linear(jnp.float32(x), jnp.float32(w), None, key), expected, rtol=1e-4, atol=1e-5
    )


def test_bfloat16_rounds_outputs_and_not_the_gain():
    """Rounded itself, a gain of 1.005 would be 1.0078 for every token; the tokens' own rounding averages out."""
    kernel = jnp.ones((1, 1))
    adapter = jp.Dora(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 1.0, magnitude=jnp.array([1.005]))
    x = jnp.linspace(1, 2, 1000, dtype=jnp.bfloat16)[:, None]
    y = adapter.linear(x, kernel.astype(jnp.bfloat16), None, None)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.mean(y.astype(jnp.float32) / x.astype(jnp.float32)), 1.005, atol=1e-3)


def test_a_column_of_zeros_gives_no_nan():
    kernel = jnp.ones((4, 2)).at[:, 1].set(0.0)
    adapter = jp.to_dora({"fc": jp.Lora(jnp.ones((4, 1)), jnp.zeros((1, 2)), 2.0)}, {"fc": {"kernel": kernel}})["fc"]
    value, grads = jax.value_and_grad(lambda p: jnp.sum(p.linear(jnp.ones((3, 4)), kernel, None, None)))(adapter)
    np.testing.assert_allclose(adapter.merge(kernel, None), kernel, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in [value, *jax.tree.leaves(grads)])


@pytest.mark.parametrize("form", ["plain", "scan_of_remat"])
def test_rank_pruning_works_and_compaction_changes_nothing(form):
    def decide(state, adapters, masks, step, context):
        first, *rest = sorted(masks)
        dead = {first: np.zeros_like(masks[first])}
        return state, Decision({**dead, **{path: np.asarray(masks[path].at[0].set(0.0)) for path in rest}})

    method = jp.with_dora(jp.lora(rank=3))._replace(decide=decide, events=(2,))
    world = begin(method, form)
    state = world.state
    assert all(isinstance(adapter, jp.Dora) for adapter in state.adapters.values())
    for _ in range(2):
        state, _ = world.step(world.params, state, world.batch)
    state, decision = jp.prune(state, method, world.optimizer, world.context)
    assert decision is not None
    small = jp.compacted(state, method, world.optimizer)
    assert sorted(small.adapters) == sorted(state.adapters)[1:]
    assert jp.count(small.adapters, small.masks) == jp.count(state.adapters, state.masks)
    assert jp.count(small.adapters, small.masks) == sum(
        2 * (s.d_in + s.d_out) + s.d_out for s in world.context.sites if s.path in small.adapters
    )
    for _ in range(2):
        state, left = world.step(world.params, state, world.batch)
        small, right = world.step(world.params, small, world.batch)
        np.testing.assert_allclose(left["loss"], right["loss"], rtol=1e-5)


def test_dplora_prunes_dora():
    world = begin(jp.with_dora(jp.dplora(jp.oplora(ranks=range(5), solver="DP"), total_steps=12, events=2, target=0.5)))
    state = world.state
    counts = [jp.count(state.adapters, state.masks)]
    for _ in range(12):
        state, metrics = world.step(world.params, state, world.batch)
        state, decision = jp.prune(state, world.method, world.optimizer, world.context)
        if decision:
            counts.append(jp.count(state.adapters, state.masks))
    assert len(counts) == 3 and counts[0] > counts[1] > counts[2]
    assert all(isinstance(adapter, jp.Dora) for adapter in state.adapters.values()) and np.isfinite(metrics["loss"])


def test_only_lora_becomes_dora():
    _, params, _ = tower()
    context = jp.Context(jax.random.key(0), params, jp.find_sites(params), None, None)
    with pytest.raises(jp.UsageError, match="is a LoraFA; only Lora can become DoRA"):
        jp.with_dora(jp.lorafa(rank=2)).start(context)
    with pytest.raises(jp.UsageError, match="init 'svd' is not known"):
        jp.dora(init="svd")
    with pytest.raises(jp.UsageError, match="not in the parameters"):
        jp.to_dora(jp.lora(rank=2).start(context).adapters, {})
