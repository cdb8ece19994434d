"""A task of another kind, in one file: two numbers for each text. `run` trains, evaluates and saves it unknown."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tasks
from experiments.data import tokens
from experiments.data.rows import Rows
from experiments.run.config import RunConfig
from experiments.run.loop import run
from jaxprune.models import load_classifier, save_classifier

WORDS = "one two three four five six seven words are cut plain the same word again".split()


@dataclasses.dataclass(frozen=True)
class Counting:
    """How often "one" and "two" stand in a text; the score is the share of counts that are right when rounded."""

    name: str = "counting"
    program: str = "experiments.glue"
    metrics: tuple[str, ...] = ("right", "near")
    validation: tuple[str, ...] = ("held out",)
    pipeline: str = "other"
    task_type: str = "SEQ_CLS"
    auto_class: str = "AutoModelForSequenceClassification"
    lower_is_better: bool = False

    def check_files(self, data_dir):
        assert data_dir is None

    def rows(self, data_dir, most):
        rng = np.random.default_rng(0)
        made = {}
        for split, count in (("train", most or 48), ("held out", 10)):
            texts = [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(count)]
            labels = [[text.split().count(word) for word in ("one", "two")] for text in texts]
            made[split] = Rows((texts,), np.array(labels, np.float32), "made here")
        return made

    def load(self, model, dtype, seed):
        return load_classifier(model, num_labels=2, dtype=jnp.dtype(dtype), seed=seed)

    def encode(self, rows, model, max_length):
        return tokens.encode(rows, model.folder, max_length, cache_dir=None)

    def evaluated_at_once(self, batch_size):
        return batch_size

    def scored_on(self, batch_size, batches):
        return 500

    def finish(self, batch):
        return {**batch, "weights": batch["weights"] / batch["weights"].mean()}

    def loss(self, apply, batch, key):
        off = jnp.square(tokens.read(apply, batch, key) - batch["labels"]).sum(-1)
        return jnp.mean(off * batch["weights"])

    def outputs(self, apply, batch):
        return tokens.read(apply, batch)

    def score(self, outputs, labels):
        assert outputs.shape == labels.shape == (10, 2)
        off = np.abs(outputs - labels)
        return {"right": 100 * float((off < 0.5).mean()), "near": 100 * float((off < 1.5).mean())}

    def use(self, folder):
        return f"count with {folder}"

    def save(self, folder, config, params, beside):
        save_classifier(folder, config, params, beside=beside)

    def reading(self, base_model, max_length, dtype):
        return {"counting.json": json.dumps([base_model, max_length, dtype]).encode()}

    def usage(self, max_length):
        return f"Counts words in texts of {max_length} tokens."


def test_it_trains_is_scored_and_is_left_behind(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "counting", Counting())
    about = dict(task="counting", model=str(tiny_bert), batch_size=8, epochs=2, max_length=24, learning_rate=1e-2)
    summary = run(RunConfig.of(method="lora", rank=2, output_dir=tmp_path / "run", **about))
    assert summary["metric"] == "right" and 0 <= summary["score"] <= summary["metrics"]["near"] <= 100
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["right"] for line in lines if line.get("split") == "held out"][-1] == summary["score"]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(np.isfinite(losses))
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "counting.json").read_text()) == [str(tiny_bert), 24, "float32"]
    card = (adapter / "README.md").read_text()
    assert "Counts words in texts of 24 tokens" in card and 'pipeline_tag: "other"' in card
    # A whole model is saved by the task too.
    summary = run(RunConfig.of(method="full", output_dir=tmp_path / "full", max_steps=1, **about))
    assert (tmp_path / "full" / "model" / "counting.json").exists() and summary["adapter_params"] == 0


@pytest.mark.parametrize(("lower", "best"), [(True, 2), (False, 3)])
def test_the_best_may_be_the_least(lower, best, tiny_bert, tmp_path, monkeypatch):
    """Of the scores 5, 1, 9, 4, one an evaluation: in the summary, and among the checkpoints beside the last."""
    scores = iter([5.0, 1.0, 9.0, 4.0])
    monkeypatch.setattr(Counting, "score", lambda self, outputs, labels: {"right": next(scores), "near": 0.0})
    monkeypatch.setitem(tasks.TASKS, "counting", Counting(lower_is_better=lower))
    about = dict(task="counting", model=str(tiny_bert), batch_size=8, max_length=24, eval_steps=1, max_steps=4, keep=1)
    summary = run(RunConfig.of(method="lora", rank=2, output_dir=tmp_path / "run", **about))
    assert summary["score"] == 4.0 and summary["best_score"] == (1.0 if lower else 9.0)
    kept = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {best, 4}


def test_no_room_of_the_loop_names_a_task():
    for path in (Path(tasks.__file__).parents[1] / "run").glob("*.py"):
        text = path.read_text()
        # The defaults of a comparison are flags' values, and a comparison is a main.
        known = [name for name in tasks.TASKS if re.search(rf"\b{name}\b", text) and path.name != "comparison.py"]
        assert not known, (path.name, known)
        assert "classification" not in text, path.name
