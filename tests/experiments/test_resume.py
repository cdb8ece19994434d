"""Killing and resuming real processes; `python -m experiments.bench resume` does it fifty times."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.bench import resume as bench_resume
from experiments.bench.resume import ResumeConfig, kill_and_resume
from experiments.run.config import RunConfig
from experiments.run.loop import run
from jaxprune.errors import UsageError

ROOT = Path(__file__).parents[2]


def flags(model, data, **more) -> str:
    given = dict(model=model, data_dir=data, task="rte", method="dplora", batch_size=8, epochs=3, max_length=24, rank=2,
                 events=3, prune_ratio=0.5, log_steps=1, solver="DP")  # fmt: skip
    given |= more
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())


def test_killed_runs_end_like_the_undisturbed_one(tiny_bert, tiny_rte, tmp_path, monkeypatch):
    """One kill in an event, one between event and save, one while a checkpoint is written."""
    places = itertools.cycle(["event", "after event", "save"])
    monkeypatch.setattr(bench_resume.random.Random, "choice", lambda self, _: next(places))
    monkeypatch.setattr(bench_resume.random.Random, "randint", lambda self, low, high: 1)
    monkeypatch.chdir(ROOT)
    report = kill_and_resume(ResumeConfig(3, save_steps=2), flags(tiny_bert, tiny_rte).split(), tmp_path)
    assert report["died"] == {"moment": 0, "step": 0, "event": 1, "after event": 1, "save": 1}
    assert report["leaves"] > 20 and report["lines"] >= 18


def test_a_run_stopped_by_sigterm_is_saved_and_goes_on(tiny_bert, tiny_rte, tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "experiments.glue",
        *flags(tiny_bert, tiny_rte, epochs=400, save_steps=10**6).split(),
    ]
    process = subprocess.Popen(
        [*command, "--output-dir", str(folder)], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr
    until = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in said and "--resume goes on" in said
    step = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    assert f"after step {step};" in said and not (folder / "summary.json").exists()
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] <= step


def config(model, data, folder, **more) -> RunConfig:
    base = dict(
        model=str(model), data_dir=data, task="rte", batch_size=8, epochs=1, max_length=24, method="lora", rank=2
    )
    return RunConfig.of(**{**base, "output_dir": folder, **more})


def test_resuming_with_other_settings_is_refused_with_the_difference(tiny_bert, tiny_rte, tmp_path):
    folder = tmp_path / "run"
    first = run(config(tiny_bert, tiny_rte, folder))
    assert run(config(tiny_bert, tiny_rte, folder, resume=True)) == first, "a finished run has nothing left to do"
    os.remove(folder / "summary.json")
    with pytest.raises(UsageError, match=r"--learning-rate was 0.001, is 0.5; --rank was 2, is 3"):
        run(config(tiny_bert, tiny_rte, folder, resume=True, rank=3, learning_rate=0.5))
    again = run(config(tiny_bert, tiny_rte, folder, resume=True))
    assert again["score"] == first["score"] and again["steps"] == first["steps"]
    # The seconds go on where they were, those of training too, though nothing was left to train.
    assert again["seconds"]["total"] > first["seconds"]["train"] + first["seconds"]["compile"]
    assert again["seconds"]["train"] > 0.9 * first["seconds"]["train"]
    times = [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times)


def test_nothing_to_resume_is_said(tiny_bert, tiny_rte, tmp_path, capsys):
    run(config(tiny_bert, tiny_rte, tmp_path / "new", resume=True, max_steps=1))
    assert "nothing to resume" in capsys.readouterr().out
