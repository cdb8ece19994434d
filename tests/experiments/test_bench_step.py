"""The benchmark of training steps, small."""

import jax
import optax
import pytest

import jaxprune as jp
from experiments import bench
from experiments.bench import step as bench_step
from jaxprune import UsageError


def test_methods_are_timed_in_turn(capsys):
    bench.run("step --size minilm --batch 1 --length 4 --steps 3 --rank 2 --methods lora bitfit".split())
    times, work = capsys.readouterr().out.split("\n\n")
    head, columns, *rows = times.splitlines()
    assert head == "minilm, 1 x 4 tokens, rank 2, float32, 3 steps each" and columns.endswith("ratio to lora")
    found = {name: [float(x.replace(",", "")) for x in rest] for name, *rest in (row.split() for row in rows)}
    assert list(found) == ["lora", "bitfit"] and found["lora"][4] == 1.0
    for median, low, high, tokens, ratio in found.values():
        assert 0 < low <= median <= high and tokens == pytest.approx(4 / median, rel=0.05)
        assert ratio == pytest.approx(median / found["lora"][0], abs=0.1)
    columns, row = work.splitlines()
    name, forward, backward, adapters, rate, plain, share, _ = row.split()
    assert name == "lora" and "of plain products" in columns and float(plain) > 0
    assert float(rate) == pytest.approx(
        (float(forward) + float(backward) + float(adapters)) / found["lora"][0], rel=0.2
    )
    assert float(share) == pytest.approx(100 * float(rate) / float(plain), abs=3)


@pytest.mark.parametrize("rank, layers", [(2, 2), (64, 3)])
def test_the_flops_are_what_xla_counts(rank, layers, monkeypatch):
    """XLA counts what is done entry by entry too; its share falls as the width grows: 1.6 % here, 3.3 at half of it."""
    monkeypatch.setitem(bench_step.SIZES, "small", (50, 512, layers, 4, 2048))
    world = bench_step.setting("small", 4, 32)
    adapters, masks = jp.init_lora(jax.random.key(0), world.sites, {site.path: rank for site in world.sites})
    weights = jp.init_weights(world.params, "^head/")
    optimizer = optax.sgd(1e-3)
    state = jp.init_state(jax.random.key(1), adapters, masks, optimizer, weights=weights)
    step = jp.make_step(world.forward, world.loss_fn, optimizer)
    counted = step.lower(world.params, state, world.batch).compile().cost_analysis()["flops"]
    work = bench_step.step_flops(512, layers, 2048, 4, 32, rank, last_row=True)
    assert sum(work) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    "flags, message", [("--methods lroa", "lroa"), ("--steps 0", "1 or more"), ("--rank 0", "rank 0")]
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        bench.run(["step", *flags.split()])
