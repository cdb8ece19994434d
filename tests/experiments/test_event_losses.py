"""`--event-losses`: the loss right before and right after every event, against merged models, and its picture."""

import numpy as np
import pytest

import jaxprune as jp
from experiments.run import comparison
from experiments.run.clock import Clock
from experiments.run.events import Pruner
from tests.tower import begin, loss_fn

STEPS = 24


def pruned(losses):
    """Run DPLoRA on a tower; returns the world, its events, and (before, after) of each."""
    world = begin(jp.dplora(jp.lora(rank=4), total_steps=STEPS, events=3, target=0.7))
    context = world.context._replace(params=world.params)
    pruner = Pruner(world.method, world.optimizer, context, Clock(), STEPS, "never", losses=losses)
    state, around = world.state, []
    pruner.begin(0)
    for number in range(1, STEPS + 1):
        state, _ = world.step(world.params, state, world.batch)
        if world.method.triggers(number):
            before, state = state, pruner.after(number, state)
            around.append((before, state))
    return world, pruner.events, around


def test_losses_are_those_of_the_merged_models_around_the_event(tmp_path):
    world, events, around = pruned(losses=True)
    assert len(events) == len(around) == 3
    for event, states in zip(events, around, strict=True):
        merged = [jp.merge(world.params, state.adapters, state.masks) for state in states]
        expected = [loss_fn(lambda x, p=p: world.model.apply({"params": p}, x), world.batch, None) for p in merged]
        np.testing.assert_allclose([event["loss_before"], event["loss_after"]], expected, rtol=1e-5)
        assert event["loss_before"] != event["loss_after"]
    summaries = {("rte", "dplora"): [{"events": events}], ("rte", "lora"): [{"events": []}]}
    jumps = comparison._jumps(summaries)
    assert jumps == {("rte", "dplora"): [events]}
    comparison.plot_events(jumps, tmp_path / "events.png")
    assert (tmp_path / "events.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_unless_asked_for():
    _, events, _ = pruned(losses=False)
    assert len(events) == 3 and not any("loss_before" in event for event in events)
    assert comparison._jumps({("rte", "dplora"): [{"events": events}]}) == {}


@pytest.mark.parametrize("number", range(12))
def test_methods_look_different(number):
    assert comparison._look(number) not in [comparison._look(other) for other in range(number)]
