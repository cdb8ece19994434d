"""One suite over every method: a new method gets all of it by adding one line to METHODS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.tower import FORMS, tower

METHODS = {
    "full": jp.full,
    "bitfit": jp.bitfit,
    "lora": functools.partial(jp.lora, rank=3),
    "oplora": functools.partial(jp.oplora, budget=200, ranks=range(5), solver="DP"),
}

every = pytest.mark.parametrize("name", METHODS)


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch["x"]) - 1.0))


@functools.lru_cache
def trained(name, form="plain", steps=5):
    """Start a method on a tower and train it for some steps; returns everything a test may look at."""
    model, params, x = tower(form)
    sites, forward, batch = jp.find_sites(params), jp.attach(model), {"x": x}
    method = METHODS[name]()
    context = jp.Context(jax.random.key(3), params, sites, forward, loss_fn, [batch], [{"x": x[:, None]}])
    start = method.start(context)
    optimizer = optax.adamw(1e-2)
    state = jp.init_state(jax.random.key(4), start.adapters, start.masks, optimizer, method, sites)
    traces = []

    def counted(apply, batch, key):
        traces.append(1)
        return loss_fn(apply, batch, key)

    step = jp.make_step(forward, counted, optimizer, method, donate=False)
    losses = []
    for _ in range(steps):
        state, metrics = step(params, state, batch)
        losses.append(float(metrics["loss"]))
    return model, params, x, forward, start, state, losses, len(traces)


@every
@pytest.mark.parametrize("form", FORMS)
def test_no_op_at_the_start_then_learning_without_retracing(name, form):
    model, params, x, forward, start, state, losses, traces = trained(name, form)
    plain = jax.jit(lambda: model.apply({"params": params}, x))()
    begun = jax.jit(forward)(params, start.adapters, start.masks, x)
    np.testing.assert_allclose(begun, plain, rtol=1e-5, atol=1e-6)
    assert losses[-1] < losses[0] and traces == 1


@every
@pytest.mark.parametrize("form", FORMS)
def test_merging_gives_the_adapted_model(name, form):
    model, params, x, forward, _, state, _, _ = trained(name, form)
    merged = jp.merge(params, state.adapters, state.masks)
    adapted = jax.jit(forward)(params, state.adapters, state.masks, x)
    np.testing.assert_allclose(jax.jit(lambda: model.apply({"params": merged}, x))(), adapted, rtol=1e-4, atol=1e-5)
    assert np.abs(adapted - jax.jit(lambda: model.apply({"params": params}, x))()).max() > 1e-3


@every
def test_frozen_parameters_are_not_differentiated(name):
    """The step's program has no gradient output for a parameter that is not trained, and leaves `params` alone."""
    _, params, _, _, start, state, _, _ = trained(name)
    assert jax.tree.structure(state.adapters) == jax.tree.structure(start.adapters)
    assert jp.count(state.adapters, state.masks) == jp.count(start.adapters, start.masks)
    trainable = sum(leaf.size for leaf in jax.tree.leaves(state.adapters))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * trainable


@every
def test_the_state_is_a_pytree_that_a_checkpoint_carries(name, tmp_path):
    _, params, _, _, start, state, _, _ = trained(name)
    loaded = jp.load_checkpoint(jp.save_checkpoint(tmp_path, state), state)
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(loaded), strict=True):
        assert bool((left == right).all())


@every
def test_plans_keep_their_promises(name):
    _, params, _, _, start, _, _, _ = trained(name)
    if start.plan is None:
        assert start.masks == {}
        return
    sites = jp.find_sites(params)
    assert set(start.plan.ranks) == {site.path for site in sites}
    assert sum(site.cost(start.plan.ranks[site.path]) for site in sites) == jp.count(start.adapters, start.masks)
    assert set(start.adapters) == {path for path, rank in start.plan.ranks.items() if rank}
    if name == "oplora":
        assert jp.count(start.adapters, start.masks) <= 200
        for kind in ("fc1", "fc2"):
            assert any(rank for path, rank in start.plan.ranks.items() if path.endswith(kind))


def test_what_full_and_bitfit_train():
    _, params, _ = tower()
    assert set(trained("full")[4].adapters) == {p for p in jp.sites.flatten(params)}
    assert all(path.endswith("/bias") for path in trained("bitfit")[4].adapters)


def test_oplora_follows_the_scores():
    """With the score tables turned over, the ranks turn over too."""
    model, params, x = tower()
    context = jp.Context(jax.random.key(0), params, jp.find_sites(params), jp.attach(model), loss_fn, [{"x": x}])
    scores = jp.site_scores("absolute", context.forward, loss_fn, params, context.sites, context.batches)
    plan = jp.oplora(budget=200, ranks=range(5), solver="DP").start(context).plan
    assert plan.ranks == jp.allocate(scores, context.sites, 200, ranks=range(5), solver="DP").ranks
    inverse = {path: 1 / value for path, value in scores.items()}
    assert plan.ranks != jp.allocate(inverse, context.sites, 200, ranks=range(5), solver="DP").ranks
