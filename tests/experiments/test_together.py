"""Several runs in one compiled step, against the same runs alone: the files that both leave."""


import numpy as np
import pytest

from experiments.bench.resume import outcome
from experiments.data.packing import Batches
from experiments.run import comparison, loop, together
from experiments.run.config import RunConfig
from experiments.tasks import get_task
from jaxprune import UsageError, load_run
from jaxprune.models import load_classifier
from tests.experiments.refusals import assert_refused
from tests.test_compilations import Compiled

SHORT = dict(task="grammar", max_steps=20, max_train_samples=60, max_length=32, batch_size=8, log_steps=1, rank=4)
EVENTS = dict(events=3, prune_ratio=0.6, budget=1500, solver="DP")
ONES = {
    "lora": [dict(seed=seed, dropout=0.1) for seed in (1, 2, 3)],
    # Their plans differ, so that each needs room for the others' ranks; events decide with what each has measured.
    "dplora": [dict(seed=seed, **EVENTS) for seed in (1, 2, 3)],
    # Ranks as masks of the largest.
    "oplora": [dict(seed=seed, budget=budget) for seed, budget in ((1, 900), (1, 1800), (2, 900))],
    # Its factors come out of the kernels, which are then no longer shared; and its ranks differ.
    "pissa": [dict(seed=1, rank=2), dict(seed=2, rank=4)],
    # What it trains beside the adapters is of the model; it measures in a probe, in some steps alone.
    "g2r2": [dict(seed=seed, interval=3, g2r2_warmup=2, progressive=12) for seed in (1, 2)],
}


def configs(method, model, folder, **more):
    return [
        RunConfig.of(**{**SHORT, "method": method, "model": str(model), "output_dir": folder / str(i), **own, **more})
        for i, own in enumerate(ONES[method])
    ]


def losses(found):
    return [[line["loss"] for line in one["metrics"] if "loss" in line] for one in found]


@pytest.mark.parametrize("method", ONES)
def test_each_run_is_as_if_alone(method, tiny_bert, tmp_path, capsys):
    ours, alone = (configs(method, tiny_bert, tmp_path / name, compact="never") for name in ("together", "alone"))
    compiled = Compiled()
    summaries = together.run(ours)
    shapes = {one.shape(*divmod(step, one.steps_per_epoch)) for one in trains(tiny_bert) for step in range(20)}
    assert 1 <= compiled.steps() <= len(shapes), "one program for each shape of batch"
    for config in alone:
        loop.run(config)
    for config, other, summary in zip(ours, alone, summaries, strict=True):
        mine, single = outcome(config.output_dir), outcome(other.output_dir)
        # Scores are shares of a few rows, and the arrays of a checkpoint have the shapes of a run alone.
        for name in ("metrics", "summary"):
            near(mine[name], single[name])
        assert mine["arrays"].keys() == single["arrays"].keys()
        for name, (shape, kind, raw) in single["arrays"].items():
            assert mine["arrays"][name][:2] == (shape, kind), name
            if "mask" in name:
                assert mine["arrays"][name][2] == raw
        assert summary["trained_together"] == len(ours)
        text = ["the cat sees the dogs", "the cats sees a dog"]
        np.testing.assert_allclose(
            load_run(config.output_dir).logits(text), load_run(other.output_dir).logits(text), atol=1e-4
        )
    seeds = losses([outcome(config.output_dir) for config in ours])
    assert len(seeds[0]) == 20 and seeds[0] != seeds[1], "each run has its own"
    if method in ("dplora", "g2r2"):
        kept = [[event["params_after"] for event in summary["events"]] for summary in summaries]
        assert all(kept) and summaries[0]["ranks"] != summaries[1]["ranks"]
    total = [summary["seconds"]["total"] for summary in summaries]
    assert total == sorted(total) and "seconds are the share of each" in capsys.readouterr().out


def trains(model):
    task, loaded = get_task("grammar"), load_classifier(model, num_labels=2)
    encoded = task.encode(task.rows(None, 60)["train"], loaded, 32)
    return [Batches(encoded, 8, seed) for seed in (1, 2, 3)]


def near(mine, single):
    """Compare what JSON holds: numbers to rounding, everything else exactly."""
    assert type(mine) is type(single)
    if isinstance(single, dict):
        assert mine.keys() == single.keys()
        for key in single:
            if key != "seconds":
                near(mine[key], single[key])
    elif isinstance(single, list):
        assert len(mine) == len(single)
        for a, b in zip(mine, single, strict=True):
            near(a, b)
    elif isinstance(single, float):
        assert mine == pytest.approx(single, rel=1e-5, abs=1e-6)
    else:
        assert mine == single or isinstance(single, str), (mine, single)
