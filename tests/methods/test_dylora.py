"""DyLoRA: which component learns, with which scale, and cutting at any rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.methods.dylora import at_rank
from tests.tower import sites_of, tower

RANK, ALPHA = 4, 6.0


def started(form="plain", **settings):
    """Return (method, adapters with random B, masks, params, x, forward)."""
    model, params, x = tower(form)
    sites, forward = sites_of(form), jp.attach(model)
    method = jp.dylora(rank=RANK, alpha=ALPHA, **settings)
    start = method.start(jp.Context(jax.random.key(3), params, sites, forward, None))
    adapters = {
        path: dataclasses.replace(a, b=0.3 * jax.random.normal(jax.random.key(i), a.b.shape))
        for i, (path, a) in enumerate(start.adapters.items())
    }
    return method, adapters, start.masks, params, x, forward


def drawn(method, adapters, masks):
    """Return {b: a key that draws it}, read off the masks of the view."""
    keys = {}
    for seed in range(60):
        key = jax.random.key(seed)
        counts = {int(mask.sum()) for mask in method.view((), adapters, masks, key, 1)[1].values()}
        assert len(counts) == 1  # the same for all sites
        keys.setdefault(counts.pop(), key)
    return keys


@pytest.mark.parametrize("frozen", [True, False])
def test_what_learns_is_what_the_released_code_trains(frozen):
    """Forward pass and gradients of sqrt(r / b) on both factors cut at b, with s = alpha / r, earlier components held."""
    method, adapters, masks, params, x, forward = started(frozen=frozen)
    keys = drawn(method, adapters, masks)
    assert set(keys) == set(range(1, RANK + 1))
    loss = jax.jit(lambda seen, masks: jnp.mean(jnp.square(forward(params, seen, masks, x) - 1)))
    for b, key in keys.items():
        value, grads = jax.value_and_grad(lambda a, key=key: loss(*method.view((), a, masks, key, 1)))(adapters)
        root = np.sqrt(RANK / b)
        cut = {p: jp.Lora(root * v.a[:, :b], root * v.b[:b], ALPHA / RANK) for p, v in adapters.items()}
        wanted, slow = jax.value_and_grad(loss)(cut, {path: jnp.ones(b) for path in cut})
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        first = b - 1 if frozen else 0
        for path in adapters:
            got = grads[path]
            np.testing.assert_allclose(got.a[:, first:b], root * slow[path].a[:, first:], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(got.b[first:b], root * slow[path].b[first:], rtol=1e-4, atol=1e-6)
            others = np.r_[0:first, b:RANK]
            assert (np.asarray(got.a)[:, others] == 0).all() and (np.asarray(got.b)[others] == 0).all()
            assert (np.asarray(got.a)[:, b - 1] != 0).any() and (np.asarray(got.b)[b - 1] != 0).any()


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_cutting_at_a_rank(form):
    """s = alpha / b, in forward, merge and count; the full rank is the model as it is, and so is the view outside training."""
    method, adapters, masks, params, x, forward = started(form)
    assert method.seen((), adapters, masks) == (adapters, masks)
    for b in range(1, RANK + 1):
        cut, cut_masks = at_rank(adapters, masks, b)
        by_hand = {p: jp.Lora(a.a[:, :b], a.b[:b], ALPHA / b) for p, a in adapters.items()}
        ones = {p: mask[:b] for p, mask in masks.items()}
        np.testing.assert_allclose(
            forward(params, cut, cut_masks, x), forward(params, by_hand, ones, x), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            forward(jp.merge(params, cut, cut_masks), {}, {}, x),
            forward(params, by_hand, ones, x),
            rtol=1e-4,
            atol=1e-5,
        )
        assert jp.count(cut, cut_masks) == jp.count(by_hand, ones)


@pytest.mark.parametrize("rank", [0, RANK + 1])
def test_a_rank_that_was_not_trained(rank):
    _, adapters, masks, *_ = started()
    with pytest.raises(jp.UsageError, match=f"rank {rank}"):
        at_rank(adapters, masks, rank)
