"""Several runs in one compiled step, against the same runs alone: the files that both leave."""

import json

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
    "dplora": [dict(seed=seed, gain="energy", **EVENTS) for seed in (1, 2)],
    # Its factors come out of the kernels, which are then no longer shared; and its ranks differ.
    "pissa": [dict(seed=1, rank=2), dict(seed=2, rank=4)],
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
    folders = [(tmp_path / "together" / str(i), tmp_path / "alone" / str(i)) for i in range(len(ours))]
    for (ours_at, alone_at), summary in zip(folders, summaries, strict=True):
        mine, single = outcome(ours_at), outcome(alone_at)
        # Scores are shares of a few rows, and the arrays of a checkpoint have the shapes of a run alone.
        for name in ("metrics", "summary"):
            near(mine[name], single[name])
        np.testing.assert_allclose(*losses([mine, single]), rtol=1e-6)
        assert mine["arrays"].keys() == single["arrays"].keys()
        for name, (shape, kind, raw) in single["arrays"].items():
            assert mine["arrays"][name][:2] == (shape, kind), name
            if "mask" in name:
                assert mine["arrays"][name][2] == raw
        assert summary["trained_together"] == len(ours)
        text = ["the cat sees the dogs", "the cats sees a dog"]
        np.testing.assert_allclose(load_run(ours_at).logits(text), load_run(alone_at).logits(text), atol=1e-4)
    seeds = losses([outcome(ours_at) for ours_at, _ in folders])
    assert len(seeds[0]) == 20 and seeds[0] != seeds[1], "each run has its own"
    if method == "dplora":
        kept = [[event["params_after"] for event in summary["events"]] for summary in summaries]
        assert all(kept) and (kept[0], summaries[0]["ranks"]) != (kept[1], summaries[1]["ranks"])
        assert summaries[0]["ranks_at_start"] != summaries[1]["ranks_at_start"]
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


def test_a_comparison_trains_its_seeds_together(tiny_bert, tmp_path, capsys):
    """In a real process, ranks too; what is finished is read, with and without the flag, and what is not begins anew."""
    common = "--tasks grammar --max-steps 2 --max-train-samples 60 --max-length 32 --seeds 1 2 --methods".split()
    flags = [
        "--model",
        str(tiny_bert),
        "--output-dir",
        str(tmp_path / "out"),
        *common,
        "lora:--rank 2",
        "lora:--rank 4",
    ]
    rows = comparison.run([*flags, "--together"])
    shown = capsys.readouterr().out
    assert (
        "runs 1 to 4 of 4: grammar with lora:--rank 2, lora:--rank 4 and seeds 1, 2, together; all that they" in shown
    )
    assert "  step 2     seed 1, rank 2: accuracy" in shown
    assert [row["runs"] for row in rows] == [2, 2] and rows[0]["params"] * 2 == rows[1]["params"]
    folders = sorted(path.parent for path in (tmp_path / "out").glob("*/summary.json"))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert len(folders) == 4 and {summary["trained_together"] for summary in summaries} == {4}
    assert {max(summary["ranks"].values()) for summary in summaries} == {2, 4}
    for folder in folders[:2]:
        (folder / "summary.json").unlink()
    assert comparison.run([*flags, "--together"])[0]["score"] == rows[0]["score"]
    shown = capsys.readouterr().out
    assert shown.count("finished   run") == 2 and "runs 1 to 2 of 4" in shown
    assert comparison.run(flags)[1]["score"] == rows[1]["score"] and "running" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    {
        "--resume": "--resume is for runs in turn: .* leave out --resume or --together",
        "--accumulate 2": "--accumulate 2 is for runs in turn",
        "--compact always": "--compact always is for runs in turn",
    }.items(),
)
def test_what_runs_cannot_have_together(given, message, tmp_path):
    given = ["--together", "--methods", "lora", "--tasks", "grammar", "--seeds", "1", "2", *given.split()]
    assert_refused("experiments.compare", [*given, "--output-dir", "out"], tmp_path, message)


# Runs that differ in more than a seed, and in what is more than a mask.
APART = {
    "--learning-rate 0.001 and 0.5": [dict(method="lora"), dict(method="lora", learning_rate=0.5)],
    "after step 0 the adapters of the run with seed 42, rank 2 have other shapes or scales": [
        dict(method="lora", alpha=8.0, rank=rank) for rank in (4, 2)
    ],
    # What a step draws depends on the ranks.
    r"dylora does more in a step than train what is not masked \(view": [
        dict(method="dylora", rank=rank) for rank in (4, 2)
    ],
    # Scales that grow as ranks fall are a matter of each run's decisions.
    "the adapters of the run with seed 2, rank 4, budget 1500 have other shapes or scales": [
        dict(method="dplora", seed=seed, scaling="grow", **EVENTS) for seed in (1, 2)
    ],
}


@pytest.mark.parametrize("message", APART)
def test_runs_that_are_no_one_program_are_refused(message, tiny_bert, tmp_path):
    both = [
        RunConfig.of(**{**SHORT, "model": str(tiny_bert), "output_dir": tmp_path / str(i), **own})
        for i, own in enumerate(APART[message])
    ]
    with pytest.raises(UsageError, match=message):
        together.run(both)
