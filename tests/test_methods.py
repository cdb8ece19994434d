"""One suite over every method: a new method gets all of it by adding one line to METHODS."""

import functools

import jax
import numpy as np
import pytest

import jaxprune as jp
from tests.tower import begin, loss_fn, tower

METHODS = {
    "adalora": functools.partial(
        jp.adalora, total_steps=40, init_rank=3, target_rank=2, tinit=1, tfinal=10, alpha=60, orthogonal=0.01
    ),
    "channelmask": functools.partial(jp.channelmask, total_steps=40, rank=3, channels=("fc1",)),
    "channelmask_paper": functools.partial(jp.channelmask, total_steps=40, rank=3, channels=("fc1",), learn="paper"),
    "dora": functools.partial(jp.dora, rank=3),
    "dora_pissa": functools.partial(jp.dora, rank=3, init="pissa"),
    "dplora": lambda: jp.dplora(jp.oplora(budget=240, ranks=range(5), solver="DP"), total_steps=24, events=3),
    "dylora": functools.partial(jp.dylora, rank=3),
    "full": jp.full,
    "bitfit": jp.bitfit,
    "houlsby": functools.partial(jp.houlsby, width=3, types=("fc1", "fc2")),
    "g2r2": functools.partial(jp.g2r2, rank=3, warmup=2, progressive=2, interval=1),
    "lora": functools.partial(jp.lora, rank=3),
    "lorafa": functools.partial(jp.lorafa, rank=3),
    "loradrop": functools.partial(jp.loradrop, rank=3, measure_at=10),
    "oplora": functools.partial(jp.oplora, budget=200, ranks=range(5), solver="DP"),
    "oplora_energy": functools.partial(jp.oplora, budget=200, ranks=range(5), solver="DP", gain="energy"),
    "pfeiffer": functools.partial(jp.pfeiffer, width=3),
    "pissa": functools.partial(jp.pissa, rank=3),
    "pissa_niter": functools.partial(jp.pissa, rank=3, niter=16),
    "rslora": functools.partial(jp.rslora, rank=3),
    "prunedlora": functools.partial(jp.prunedlora, rank=4, target=2, alpha=8, interval=2, remove=1),
    "sora": functools.partial(jp.sora, rank=3, total_steps=40, threshold=0.03),
    "squeeze": lambda: jp.squeeze(jp.lora(rank=4), total_steps=24, events=3),
    "uniformmask": functools.partial(jp.uniformmask, total_steps=40, rank=3, channels=("fc1",)),
    "vera": functools.partial(jp.vera, rank=16),
}

# Adapters that are no change of a kernel, and whose parameters are not those of low-rank factors.
BOTTLENECKS = {"houlsby", "pfeiffer"}

every = pytest.mark.parametrize("name", METHODS)
# The tests of `attach` go through all four forms; here the plain one and both transformations together.
FORMS = ("plain", "scan_of_remat")


@functools.lru_cache
def trained(name, form="plain", steps=5):
    """Start a method on a tower and train it for some steps; returns the world, its state after them, and the losses."""
    world = begin(METHODS[name](), form)
    state, losses = world.state, []
    for _ in range(steps):
        state, metrics = world.step(world.params, state, world.batch)
        losses.append(float(metrics["loss"]))
    return world, state, losses


@every
@pytest.mark.parametrize("form", FORMS)
def test_no_op_at_the_start_then_learning_without_retracing(name, form):
    world, _, losses = trained(name, form)
    x, start = world.batch["x"], world.start
    plain = jax.jit(lambda: world.model.apply({"params": tower(form)[1]}, x))()
    params = jp.with_weights(world.params, start.weights)
    begun = jax.jit(world.forward)(params, *world.method.seen(world.state.method_state, start.adapters, start.masks), x)
    np.testing.assert_allclose(begun, plain, rtol=1e-5, atol=1e-6)
    # Once for the steps that measure and once for the others, where there are both.
    programs = 2 if world.method.probes and world.method.probes.when else 1
    assert losses[-1] < losses[0] and len(world.traces) == programs


@every
@pytest.mark.parametrize("form", FORMS)
def test_merging_gives_the_adapted_model(name, form):
    world, state, _ = trained(name, form)
    model, x = world.model, world.batch["x"]
    params = jp.with_weights(world.params, state.weights)
    adapters, masks = world.method.seen(state.method_state, state.adapters, state.masks)
    if name in BOTTLENECKS:
        with pytest.raises(jp.UsageError, match="cannot be merged"):
            jp.merge(params, adapters, masks)
        return
    merged = jp.merge(params, adapters, masks)
    adapted = jax.jit(world.forward)(params, adapters, masks, x)
    np.testing.assert_allclose(jax.jit(lambda: model.apply({"params": merged}, x))(), adapted, rtol=1e-4, atol=1e-5)
    assert np.abs(adapted - jax.jit(lambda: model.apply({"params": world.params}, x))()).max() > 1e-3


@every
def test_frozen_parameters_are_not_differentiated(name):
    """The step's program has no gradient output for a parameter that is not trained, and leaves `params` alone."""
    world, state, _ = trained(name)
    start = world.start
    assert jax.tree.structure(state.adapters) == jax.tree.structure(start.adapters)
    assert jp.count(state.adapters, state.masks) == jp.count(start.adapters, start.masks)
    leaves = [(adapter, *item) for adapter in state.adapters.values() for item in vars(adapter).items()]
    frozen = [leaf for adapter, field, leaf in leaves if field in getattr(adapter, "frozen", ())]
    both = jax.tree.leaves((state.adapters, state.weights))
    trainable = sum(leaf.size for leaf in both) - sum(leaf.size for leaf in frozen)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * trainable


@every
def test_plans_keep_their_promises(name):
    world = trained(name)[0]
    params, start = world.params, world.start
    if start.plan is None:
        assert start.masks == {}
        return
    sites = jp.find_sites(params)
    assert set(start.plan.ranks) == {site.path for site in sites}
    planned = sum(site.cost(start.plan.ranks[site.path]) for site in sites)
    if name in BOTTLENECKS:
        planned = start.plan.cost
    # A plan counts the factors; gates, singular values, magnitudes and unsettled channel masks come on top;
    # LoRA-FA's A is not trained.
    on_top = ("gate", "e", "magnitude", *(("logits",) if name == "channelmask_paper" else ()))
    extra = sum(getattr(x, leaf).size for x in start.adapters.values() for leaf in on_top if hasattr(x, leaf))
    extra -= sum(getattr(x, leaf).size for x in start.adapters.values() for leaf in getattr(x, "frozen", ()))
    assert planned + extra == jp.count(start.adapters, start.masks)
    assert set(start.adapters) == {path for path, rank in start.plan.ranks.items() if rank}
    if name.startswith("oplora"):
        assert jp.count(start.adapters, start.masks) <= 200
        for kind in ("fc1", "fc2"):
            assert any(rank for path, rank in start.plan.ranks.items() if path.endswith(kind))


def test_what_full_and_bitfit_train():
    _, params, _ = tower()
    assert set(trained("full")[0].start.weights) == {p for p in jp.sites.flatten(params)}
    assert all(path.endswith("/bias") for path in trained("bitfit")[0].start.weights)


def test_oplora_follows_the_scores():
    """With the score tables turned over, the ranks turn over too."""
    model, params, x = tower()
    context = jp.Context(jax.random.key(0), params, jp.find_sites(params), jp.attach(model), loss_fn, [{"x": x}])
    scores = jp.site_scores("absolute", context.forward, loss_fn, params, context.sites, context.batches)
    plan = jp.oplora(budget=200, ranks=range(5), solver="DP").start(context).plan
    assert plan.ranks == jp.allocate(scores, context.sites, 200, ranks=range(5), solver="DP").ranks
    inverse = {path: 1 / value for path, value in scores.items()}
    assert plan.ranks != jp.allocate(inverse, context.sites, 200, ranks=range(5), solver="DP").ranks
