"""What XLA compiles in a run: the step once, whatever events and restores come between; and where a divided state lies."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.train import leaf_names, place
from tests.tower import begin

STEPS = 40
RUNS = {
    "dplora": lambda: jp.dplora(
        jp.oplora(budget=400, ranks=range(9), solver="DP"), total_steps=STEPS, events=10, recovery_steps=3, target=0.8
    ),
    "squeeze": lambda: jp.squeeze(jp.lora(rank=8), total_steps=STEPS, events=10, target=0.8),
    "prunedlora": functools.partial(jp.prunedlora, rank=8, target=2, interval=3, remove=1),
    "adalora": functools.partial(jp.adalora, total_steps=STEPS, init_rank=3, target_rank=2, tinit=1, tfinal=10),
    "g2r2": functools.partial(jp.g2r2, rank=3, warmup=2, progressive=20, interval=2),
    "channelmask": functools.partial(jp.channelmask, total_steps=STEPS, channels=("fc1",), rank=2),
}
EVENTS = {"dplora": 10, "squeeze": 8, "prunedlora": 6, "adalora": 1, "g2r2": 4, "channelmask": 1}


class Compiled:
    """The names of the programs that XLA compiles from now on."""

    def __init__(self):
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event, duration_secs, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(about.get("fun_name"))

    def steps(self):
        return self.names.count("jit(step)")


@pytest.mark.parametrize("name", RUNS)
def test_events_and_restores_compile_no_step(name, tmp_path):
    world = begin(RUNS[name]())
    compiled, state, fired, late = Compiled(), world.state, 0, []
    with jp.Checkpoints(tmp_path) as checkpoints:
        for _ in range(STEPS):
            state, _ = world.step(world.params, state, world.batch)
            if int(state.step) == STEPS // 2:
                checkpoints.save(state)
            before = len(compiled.names)
            state, decision = jp.prune(state, world.method, world.optimizer, world.context)
            fired += decision is not None
            late += compiled.names[before:] if fired > 3 else []
    assert fired == EVENTS[name] and compiled.steps() == 1
    # Zeroing and rotating are one program for each shape of leaf, when the first of that shape loses a component.
    shapes = {
        (leaf.shape, at) for x in state.adapters.values() for at, leaf in vars(x).items() if hasattr(leaf, "shape")
    }
    assert set(late) <= {"jit(zero_components)", "jit(_times)"} and compiled.names.count("jit(zero_components)") <= len(
        shapes
    )
    restored = jp.Checkpoints(tmp_path).restore(world.optimizer, world.method)
    restored, _ = world.step(world.params, restored, world.batch)
    restored, _ = jp.prune(restored, world.method, world.optimizer, world.context)
    world.step(world.params, restored, world.batch)
    assert compiled.steps() == 1
    if jp.compactable(state.masks):
        small = jp.compacted(state, world.method, world.optimizer)
        for _ in range(3):
            small, _ = world.step(world.params, small, world.batch)
        assert compiled.steps() == 2


def divided(folder):
    """Train, prune, compact and restore on eight devices, divided along d_in and d_out, and compare with one device."""
    named = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # noqa: E731
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    # Compensation sums products, and a divided sum has other roundings.
    method = jp.prunedlora(rank=8, target=2, interval=3, compensate="none")
    world = begin(method, optimizer=optax.adamw(1e-2, weight_decay=0.1))
    optimizer = world.optimizer

    def split(lora):
        along = [jax.device_put(leaf, named(*spec)) for leaf, spec in ((lora.a, ("y", None)), (lora.b, (None, "y")))]
        return jp.Lora(*along, lora.scale)

    begun = {path: split(lora) for path, lora in world.start.adapters.items()}
    wide = jp.init_state(world.state.key, begun, world.start.masks, optimizer, method)
    first, compiled = wide, Compiled()

    def check(state):
        for name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True):
            lora = leaf.ndim == 2 and ".method_state" not in name
            want = named() if not lora else named("y", None) if name.endswith(".a") else named(None, "y")
            assert leaf.sharding.is_equivalent_to(want, leaf.ndim), (name, leaf.sharding)

    check(wide)
    for _ in range(9):
        wide, _ = world.step(world.params, wide, world.batch)
        check(wide)
    assert compiled.steps() == 1
    one = jax.tree.map(jnp.array, jax.device_get(wide._replace(key=jax.random.key_data(wide.key))))
    one = place(one._replace(key=world.state.key))
    with jp.Checkpoints(folder) as checkpoints:
        checkpoints.save(wide)
    back = jp.Checkpoints(folder).restore(optimizer, method, where=first)
    check(back)
    results = []
    for state in (wide, one, back):
        state, decision = jp.prune(state, method, optimizer, world.context)
        small = jp.compacted(state, method, optimizer)
        assert decision is not None and jp.compactable(state.masks) and not jp.compactable(small.masks)
        results.append((state, small))
    for got in (results[0], results[2]):
        for mine, single in zip(got, results[1], strict=True):
            check(mine)
            for a, b in zip(jax.tree.leaves(mine[:3]), jax.tree.leaves(single[:3]), strict=True):
                np.testing.assert_array_equal(a, b)
    compiled.names.clear()
    for state in results[0]:
        check(world.step(world.params, state, world.batch)[0])
    assert compiled.steps() == 1, "the compacted one alone"
    spare = jax.make_mesh((8,), ("z",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jp.init_state(world.state.key, world.start.adapters, world.start.masks, optimizer, method, mesh=spare)
    assert all(leaf.sharding.is_fully_replicated and leaf.sharding.mesh == spare for leaf in jax.tree.leaves(whole))


def test_a_divided_state_stays_divided(tmp_path):
    code = f"from tests.test_compilations import divided; divided({str(tmp_path)!r})"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
