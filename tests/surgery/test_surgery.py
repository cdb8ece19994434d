"""Pruning operations: dead stays dead, masked equals compacted, whatever the Optax chain and the masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.adapters import parted
from jaxprune.surgery import Decision, apply, compact, live, survivors, trim
from tests.test_methods import FORMS
from tests.tower import sites_of, tower

CHAINS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clip, adam, schedule": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-2, 0.0, 200))
    ),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "masked": lambda: optax.masked(optax.adam(1e-2), lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    "every second step": lambda: optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
}


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch["x"]) - 1.0))


@functools.lru_cache
def setting(form="plain", chain="adamw", rank=4):
    """A tower in training; returns params, state, step, optimizer, batch, forward."""
    model, params, x = tower(form)
    sites, forward = sites_of(form), jp.attach(model)
    adapters, masks = jp.init_lora(jax.random.key(1), sites, {site.path: rank for site in sites})
    weights = jp.init_weights(params, "^head/")
    optimizer = CHAINS[chain]()
    state = jp.init_state(jax.random.key(2), adapters, masks, optimizer, weights=weights)
    step = jp.make_step(forward, loss_fn, optimizer, donate=False)
    for _ in range(3):
        state, _ = step(params, state, {"x": x})
    return params, state, step, optimizer, {"x": x}, forward


def prune_to(state, optimizer, masks):
    trained, masks, opt_state = apply(Decision(masks), state.trained, state.masks, state.opt_state, optimizer)
    adapters, weights = parted(trained)
    return state._replace(adapters=adapters, weights=weights, masks=masks, opt_state=opt_state)


def some_masks(state, seed=0):
    """Random masks; the first site loses everything, the second nothing."""
    rng = np.random.default_rng(seed)
    masks = {path: rng.integers(0, 2, mask.shape).astype(np.float32) for path, mask in state.masks.items()}
    first, second, *_ = masks
    masks[first][:] = 0
    masks[second][:] = 1
    return masks


def dead_entries(tree, masks):
    """Yield (dead columns of a, dead rows of b) of every Lora in a tree that holds adapters."""
    loras = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, jp.Lora))[0]
    for where, lora in loras:
        if isinstance(lora, jp.Lora):
            dead = np.asarray(masks[where[-1].key]) == 0
            yield np.asarray(lora.a).T[dead], np.asarray(lora.b)[dead]


@pytest.mark.parametrize("chain", CHAINS)
def test_dead_stays_dead_and_compaction_changes_nothing(chain):
    params, state, step, optimizer, batch, forward = setting(chain=chain)
    masked = prune_to(state, optimizer, some_masks(state))
    small = jp.compacted(masked, None, optimizer)
    assert live(small.masks) == {path: rank for path, rank in live(masked.masks).items() if rank}
    assert all(adapter.rank == live(small.masks)[path] for path, adapter in small.adapters.items())
    np.testing.assert_allclose(
        forward(params, masked.adapters, masked.masks, batch["x"]),
        forward(params, small.adapters, small.masks, batch["x"]), atol=1e-6,
    )  # fmt: skip
    counts = lambda s: [leaf for leaf in jax.tree.leaves(s.opt_state) if jnp.ndim(leaf) == 0]  # noqa: E731
    np.testing.assert_array_equal(counts(masked), counts(small))
    for _ in range(4):
        masked, one = step(params, masked, batch)
        small, other = step(params, small, batch)
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
    again = jp.compacted(masked, None, optimizer)
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(small), strict=True):
        if not jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_hundred_steps_with_adam_revive_nothing(form):
    params, state, step, optimizer, batch, _ = setting(form)
    masks = some_masks(state)
    state = prune_to(state, optimizer, masks)
    for _ in range(100):
        state, _ = step(params, state, batch)
    seen = 0
    for tree in (state.adapters, state.opt_state):
        for a, b in dead_entries(tree, masks):
            assert not a.any() and not b.any()
            seen += 1
    assert seen == 3 * len(masks)  # values, first and second moments
    for path, lora in state.adapters.items():  # or zeros everywhere would do
        alive = masks[path] > 0
        assert np.asarray(lora.a).T[alive].any() == np.asarray(lora.b)[alive].any() == alive.any()
    grads = jax.grad(lambda adapters: loss_fn(
        lambda x: setting(form)[5](params, adapters, state.masks, x), batch, None))(dict(state.adapters))  # fmt: skip
    assert all(not a.any() and not b.any() for a, b in dead_entries(grads, masks))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["plain", "scan"]))
def test_masked_equals_compacted_for_any_masks(seed, form):
    params, state, _, optimizer, batch, forward = setting(form)
    rng = np.random.default_rng(seed)
    masks = {path: rng.integers(0, 2, mask.shape).astype(np.float32) for path, mask in state.masks.items()}
    masked = prune_to(state, optimizer, masks)
    small = jp.compacted(masked, None, optimizer)
    np.testing.assert_allclose(
        forward(params, masked.adapters, masked.masks, batch["x"]),
        forward(params, small.adapters, small.masks, batch["x"]), atol=1e-6,
    )  # fmt: skip
    assert jp.count(masked.adapters, masked.masks) == jp.count(small.adapters, small.masks)
    assert not jp.compactable(small.masks)
    twice = jp.compacted(small, None, optimizer)
    jax.tree.map(np.testing.assert_array_equal, twice.adapters, small.adapters)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trim_keeps_the_best_of_the_living(data):
    size = data.draw(st.integers(1, 8))
    mask = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=size, max_size=size)), np.float32)
    values = st.sampled_from([0.0, 0.5, 1.0, 2.0, float("nan")])
    scores = np.array(data.draw(st.lists(values, min_size=size, max_size=size)))
    rank = data.draw(st.integers(0, int(mask.sum())))
    new = trim({"s": scores}, {"s": mask}, {"s": rank})["s"]
    assert new.sum() == rank and not (new > mask).any()
    key = lambda j: (-np.inf if np.isnan(scores[j]) else scores[j], -j)  # noqa: E731
    kept, lost = np.flatnonzero(new), np.flatnonzero((mask > 0) & (new == 0))
    assert all(key(j) > key(i) for j in kept for i in lost)


def test_decisions_that_cannot_be():
    _, state, _, optimizer, _, _ = setting()
    path = next(iter(state.masks))
    dead = prune_to(state, optimizer, {path: np.zeros(4)})
    with pytest.raises(jp.UsageError, match="revives a dead component"):
        prune_to(dead, optimizer, {path: np.ones(4)})
    with pytest.raises(jp.UsageError, match=r"shape \(3,\)"):
        prune_to(state, optimizer, {path: np.ones(3)})
    with pytest.raises(jp.UsageError, match="nothing to train"):
        everything = {p: np.zeros_like(m) for p, m in state.masks.items()}
        compact(state.adapters, everything, optimizer.init(state.adapters), optimizer)
    with pytest.raises(jp.UsageError, match="out of range"):
        trim({path: np.ones(4)}, state.masks, {path: 5})


def test_a_factored_optimizer_is_refused_by_name():
    """Adafactor factors large leaves; their row and column moments have no components to tell."""
    lora = {"s": jp.Lora(jnp.ones((256, 128)), jnp.ones((128, 256)), 1.0)}
    optimizer, masks = optax.adafactor(1e-2), {"s": jnp.ones(128)}
    with pytest.raises(jp.UsageError, match="not factored"):
        apply(Decision({"s": np.eye(128)[0]}), lora, masks, optimizer.init(lora), optimizer)


def test_a_decision_may_compensate_and_rescale():
    _, state, _, optimizer, _, _ = setting()
    path = next(iter(state.masks))
    old = state.adapters[path]
    better = jp.Lora(old.a + 1, old.b, old.scale)
    decision = Decision({path: np.array([1, 0, 0, 1])}, {path: better}, {path: 2.0})
    adapters, masks, opt_state = apply(decision, state.trained, state.masks, state.opt_state, optimizer)
    assert adapters[path].scale == 2 * old.scale
    np.testing.assert_array_equal(adapters[path].a, (old.a + 1) * np.array([1, 0, 0, 1]))
    assert jax.tree.structure(opt_state) == jax.tree.structure(jax.eval_shape(optimizer.init, adapters))


def test_survivors_keep_their_order():
    masks = {"s": jnp.array([1.0, 0, 1, 1]), "gone": jnp.zeros(3)}
    kept = survivors(masks)
    assert kept["s"].tolist() == [0, 2, 3] and kept["gone"].shape == (0,)
    lora = {"s": jp.Lora(jnp.arange(8.0).reshape(2, 4), jnp.arange(12.0).reshape(4, 3), 1.0)}
    small, small_masks, _ = compact(lora, {"s": masks["s"]}, optax.EmptyState(), optax.identity())
    np.testing.assert_array_equal(small["s"].a, lora["s"].a[:, [0, 2, 3]])
    np.testing.assert_array_equal(small["s"].b, lora["s"].b[jnp.array([0, 2, 3])])
    assert small_masks["s"].tolist() == [1, 1, 1]
