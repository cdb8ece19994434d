"""The second half of the common suite: what every method's state goes through when it is pruned, compacted and resumed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.surgery import zero_dead
from jaxprune.surgery.components import along, map_moments
from tests.test_methods import METHODS
from tests.tower import begin

every = pytest.mark.parametrize("name", METHODS)
STEPS, SAVED = 40, 17


@functools.lru_cache
def run(name, form="plain"):
    """Train through all events; returns what the tests look at, with the state after step SAVED."""
    world = begin(METHODS[name](), form)

    def go(state, until):
        decisions = []
        while int(state.step) < until:
            state, _ = world.step(world.params, state, world.batch)
            state, decision = jp.prune(state, world.method, world.optimizer, world.context)
            decisions += [decision] if decision else []
        return state, decisions

    middle, first = go(world.state, SAVED)
    end, second = go(middle, STEPS)
    assert len(world.traces) == (2 if world.method.probes and world.method.probes.when else 1), (
        "an event had the step compiled again"
    )
    return world, go, middle, end, first + second


def arrays(tree):
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]


@every
def test_a_resumed_run_is_the_same_run(name, tmp_path):
    world, go, middle, end, _ = run(name)
    with jp.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(middle)
    restored = jp.Checkpoints(tmp_path).restore(world.optimizer, world.method)
    assert jax.tree.structure(restored) == jax.tree.structure(middle)
    for left, right in zip(arrays(go(restored, STEPS)[0]), arrays(end), strict=True):
        np.testing.assert_array_equal(left, right)


PRUNING = {"dplora", "g2r2", "prunedlora", "adalora", "sora"}


@every
def test_the_dead_are_zero_and_compaction_keeps_outputs_and_training(name):
    (_, params, batch, forward, _, method, optimizer, _, _, step, _), _, _, end, decisions = run(name)
    assert decisions or name not in PRUNING
    jax.tree.map(np.testing.assert_array_equal, zero_dead(end.adapters, end.masks), dict(end.adapters))

    def check(leaf, place):
        mask = end.masks.get(place.path)
        if place.axis is not None and mask is not None:
            assert not np.asarray(jnp.where(along(mask, leaf, place.axis) > 0, 0, leaf)).any()
        return leaf

    map_moments(check, end.opt_state, end.adapters)
    if not jp.compactable(end.masks):
        assert name not in PRUNING, "the settings of this suite should prune something"
        return
    small = jp.compacted(end, method, optimizer)
    assert jp.count(small.adapters, small.masks) == jp.count(end.adapters, end.masks)
    assert sum(a.size for a in arrays(small.opt_state)) < sum(a.size for a in arrays(end.opt_state))
    for _ in range(1 if name == "sora" else 2):
        outputs = [forward(params, *method.seen(s.method_state, s.adapters, s.masks), batch["x"]) for s in (end, small)]
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-6)
        (end, one), (small, other) = step(params, end, batch), step(params, small, batch)
        if name != "sora":  # whose penalty is a mean over the gates that are left; its event is the last step
            np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)
    with_spec = jax.tree.structure(method.init(small.adapters, small.masks))
    assert jax.tree.structure(small.method_state) == with_spec, "a compacted run could not be resumed"
