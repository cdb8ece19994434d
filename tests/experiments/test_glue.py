"""The command from flags to files, on a tiny model and a tiny task."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from transformers import AutoConfig

from experiments.data.packing import Batches
from experiments.data.tokens import encode, read
from experiments.presets import PRESETS
from experiments.run.build import make_method, make_schedule
from experiments.run.config import RunConfig
from experiments.run.flags import parse_run
from experiments.run.loop import run
from experiments.tasks import classification, get_task
from jaxprune import attach, find_sites, load_peft, load_run, with_weights
from jaxprune.methods import METHODS
from jaxprune.models import EncoderConfig, load_classifier
from tests.models import tiny

PLANNED, UNRANKED = ("oplora", "dplora"), ("full", "bitfit", "vera")
STAGED = ("channelmask", "uniformmask")
WHOLE = ("full", "bitfit", *STAGED)  # what is left is a model, not an adapter
# What a run this short needs in order to prune at all.
OWN = {
    "dplora": dict(events=2),
    "g2r2": dict(interval=1, g2r2_warmup=2, progressive=4),
    "prunedlora": dict(interval=2, remove=1),
    "adalora": dict(tfinal=4),
}
PRUNING = ("dplora", "g2r2", "prunedlora", "adalora")


def glue(tiny_bert, tiny_rte, folder, **settings):
    """Run in this process and return the summary."""
    fixed = dict(
        model=str(tiny_bert), task="rte", data_dir=tiny_rte, max_length=32, epochs=2, batch_size=8, log_steps=2
    )
    return run(RunConfig.of(**{**fixed, "output_dir": folder, **settings}))


@pytest.fixture
def outputs(monkeypatch):
    """The logits of every evaluation, as a run gives them to its metrics."""
    found = []

    score = classification.Classification.score

    def kept(task, logits, labels):
        found.append(logits)
        return score(task, logits, labels)

    monkeypatch.setattr(classification.Classification, "score", kept)
    return found


def check_loaded(folder, summary, outputs, tiny_rte):
    """What is loaded gives the validation rows the outputs that the run itself found when it evaluated them last."""
    rows = get_task("rte").rows(tiny_rte)["validation"]
    loaded, pairs = load_run(folder), list(zip(*rows.texts, strict=True))
    np.testing.assert_allclose(loaded.logits(pairs), outputs[-1], atol=2e-5)
    names = ("entailment", "not_entailment")
    predictions = loaded.predict(pairs)
    right = [names.index(one.label) == label for one, label in zip(predictions, rows.labels, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(summary["score"])
    assert all(one.probabilities[one.label] == max(one.probabilities.values()) > 0.5 for one in predictions)


# One of every form in which something is trained, pruned and left behind; tests of the library go over all methods.
LEFT = ("oplora", "dplora", "g2r2", "loradrop", "vera", "pissa", "dora", "houlsby", "channelmask", "full", "bitfit")


@pytest.mark.parametrize("method", LEFT)
def test_a_run_leaves_what_it_promises(method, tiny_bert, tiny_rte, tmp_path, capsys, outputs):
    folder = tmp_path / "run"
    budget = dict(budget=1500) if method in PLANNED else {}
    compact = "always" if method == "dplora" else "never"  # whatever the machine's speed
    settings = dict(epochs=4, max_steps=20, compact=compact, learning_rate=1e-2, **OWN.get(method, {}))
    settings |= dict(rank=4) if METHODS[method].components else {}
    summary = glue(tiny_bert, tiny_rte, folder, method=method, **budget, **settings)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    wanted = (
        "method model task seed metric score best_score adapter_params weight_params head_params budget ranks layers_adapted "
        "steps events seconds versions"
    )
    assert set(wanted.split()) <= set(summary)
    parts = {"total", "load", "compile", "score", "allocate", "eval", "train", "prune", "save"}
    assert set(summary["seconds"]) == parts and (summary["seconds"]["score"] > 0) == (method in PLANNED)
    adapters = method not in ("full", "bitfit")
    assert (summary["adapter_params"] > 0) == adapters and summary["weight_params"] >= summary["head_params"] > 0
    assert (summary["weight_params"] == summary["head_params"]) == adapters
    assert sum(summary["seconds"].values()) <= 2 * summary["seconds"]["total"]
    assert summary["steps"] == 20 and len(summary["ranks"]) == 12

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(2, 21, 2)]
    evaluations = [line for line in lines if line.get("split") == "validation"]
    assert [line["step"] for line in evaluations] == [6, 12, 18, 20]
    assert summary["score"] == evaluations[-1]["accuracy"] and summary["best_score"] >= summary["score"]
    assert (folder / "checkpoints" / "20").is_dir()

    assert (folder / "ranks.png").exists() == (method not in UNRANKED)
    assert (folder / "adapter").exists() == (method not in WHOLE)
    assert (folder / "report.html").exists() and (folder / "model").exists() == (method in WHOLE)
    check_loaded(folder, summary, outputs, tiny_rte)
    shown = capsys.readouterr().out
    begun = [
        "device     cpu",
        "loading    ",
        "data       rte",
        "planning   ",
        "compiling  the training step",
        "evaluating on",
    ]
    places = [
        shown.index(text) for text in (*begun, "step 6     accuracy", "step 20    accuracy", "writing    ", "files ")
    ]
    assert places == sorted(places) and re.search(r"step 20 .*parameters.*, loss \d\.\d+ \([+-]\d", shown)
    (files,) = (line for line in shown.splitlines() if line.startswith("files "))
    assert {name.rstrip("/") for name in files.partition(": ")[2].split(", ")} == {
        path.name for path in folder.iterdir() if not path.name.startswith(".")
    }
    assert "accuracy" in shown and str(folder) in shown and ("Optimal" in shown) == (method in PLANNED)
    if method in PLANNED:
        assert summary["adapter_params"] <= 1500 and summary["allocation"]["gap"] == 0.0
    if method in PRUNING:
        assert summary["events"] and (folder / "pruning.png").exists() and (folder / "ranks_after.png").exists()
        assert summary["adapter_params"] < summary["adapter_params_at_start"]
        assert len(re.findall(" pruned (from|nothing)", shown)) == len(summary["events"])
    if method in STAGED:
        smaller = load_classifier(folder / "model", num_labels=2).params
        assert sum(leaf.size for leaf in jax.tree.leaves(smaller)) == summary["model_params"]
        assert summary["model_params"] < summary["model_params_at_start"] and "channels kept: query" in shown


def test_the_exported_adapter_is_the_trained_one(tiny_bert, tiny_rte, tmp_path):
    """Rebuild the model from the adapter folder alone: its accuracy on the validation rows is the run's score."""
    summary = glue(tiny_bert, tiny_rte, tmp_path / "run", method="oplora", budget=1500, learning_rate=1e-2)
    model = load_classifier(tiny_bert, num_labels=2, seed=0)
    sites = find_sites(model.params)
    adapters, masks, weights = load_peft(tmp_path / "run" / "adapter", sites, torch_paths=model.torch_paths)
    params = with_weights(model.params, weights)
    assert {p: summary["ranks"][p] for p in adapters} == {p: len(m) for p, m in masks.items()}
    rows = get_task("rte").rows(tiny_rte)["validation"]
    batches = Batches(encode(rows, tiny_bert, 32, cache_dir=None), 7, None)
    forward = jax.jit(lambda batch: read(lambda *a, **k: attach(model.model)(params, adapters, masks, *a, **k), batch))
    logits = batches.restore([np.asarray(forward(batch)) for batch in batches.all()])
    assert 100 * (logits.argmax(1) == rows.labels).mean() == pytest.approx(summary["score"])


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_transformers_loads_the_model_folder(method, tiny_bert, tiny_rte, tmp_path, outputs):
    """PyTorch with model/ alone, tokenizer included, gives the outputs of the run's last evaluation and its labels."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    glue(tiny_bert, tiny_rte, tmp_path / "run", method=method, learning_rate=1e-2, max_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not any(info.values()) and theirs.config.problem_type == "single_label_classification"
    assert theirs.config.id2label == {0: "entailment", 1: "not_entailment"}
    rows = get_task("rte").rows(tiny_rte)["validation"]
    for i, pair in enumerate(zip(*rows.texts, strict=True)):
        with torch.no_grad():
            logits = theirs.eval()(**tokenizer(*pair, truncation=True, max_length=32, return_tensors="pt")).logits
        np.testing.assert_allclose(logits[0].numpy(), outputs[-1][i], atol=1e-5)
    # And it is a --model.
    again = glue(tmp_path / "run" / "model", tiny_rte, tmp_path / "again", method="bitfit", max_steps=1)
    assert again["model"] == str(tmp_path / "run" / "model")


def test_the_same_seed_gives_the_same_run(tiny_bert, tiny_rte, tmp_path):
    def losses(name, **settings):
        glue(tiny_bert, tiny_rte, tmp_path / name, method="lora", epochs=1, log_steps=1, **settings)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    first, again, other = losses("a"), losses("b"), losses("c", seed=7)
    assert first == again and first != other
    # Two microbatches sum up the same mean loss, but for dropout and the order of additions.
    assert losses("d", accumulate=2)[0] == pytest.approx(first[0], rel=0.1)


def test_overwriting_is_asked_for(tiny_bert, tiny_rte, tmp_path):
    from jaxprune import UsageError

    folder = tmp_path / "run"
    glue(tiny_bert, tiny_rte, folder, method="lora", max_steps=1)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds a finished run; pass --overwrite"):
        glue(tiny_bert, tiny_rte, folder, method="lora", max_steps=1)
    assert glue(tiny_bert, tiny_rte, folder, method="bitfit", max_steps=2, overwrite=True)["steps"] == 2
    assert (folder / "notes.txt").exists() and not (folder / "adapter").exists()


def test_a_frozen_head_stays_as_it_was(tiny_bert, tiny_rte, tmp_path):
    summary = glue(
        tiny_bert,
        tiny_rte,
        tmp_path / "run",
        method="oplora",
        budget=1500,
        train_head=False,
        max_steps=2,
        dtype="bfloat16",
    )
    assert summary["head_params"] == 0 and (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize("score", ["squared", "top10", "activation", "weight"])
def test_every_score_plans(score, tiny_bert, tiny_rte, tmp_path):
    summary = glue(tiny_bert, tiny_rte, tmp_path / "run", score=score, budget=1500, max_steps=1)
    assert 0 < summary["adapter_params"] <= 1500


def test_tensorboard_events(tiny_bert, tiny_rte, tmp_path):
    pytest.importorskip("tensorboardX")
    glue(tiny_bert, tiny_rte, tmp_path / "run", method="bitfit", max_steps=2, tensorboard=True)
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.*")
    assert b"train/loss" in events.read_bytes() and b"validation/accuracy" in events.read_bytes()


def test_presets_give_way_to_flags():
    config = parse_run(["--preset", "paper", "--task", "cola", "--epochs", "3"], "glue").resolve()
    assert (config.learning_rate, config.max_length, config.epochs) == (9.3e-4, 256, 3)
    assert config.settings == {"budget": 1_250_000}
    assert RunConfig.of(preset="efficiency", method="lora", task="mnli").resolve().warmup == 3000
    # A preset that clips nothing keeps it so, and 0 is not "not given".
    assert not RunConfig.of(preset="paper", method="full", task="mnli").resolve().max_grad_norm
    assert RunConfig.of(max_grad_norm=0.0).resolve().max_grad_norm == 0.0
    # What a method has for itself gives way to both.
    rates = [RunConfig.of(method="full", task="rte", **more).resolve().learning_rate for more in (
        {}, {"preset": "paper"}, {"preset": "paper", "learning_rate": 3e-5},
    )]  # fmt: skip
    assert rates == [5e-5, 1e-5, 3e-5] and RunConfig.of(method="lora").resolve().learning_rate == 1e-3


def test_every_preset_makes_its_method_and_schedule():
    encoder = EncoderConfig.from_hf(AutoConfig.for_model(**tiny.CONFIGS["roberta"]), 2)
    for name, methods in PRESETS.items():
        for method, tasks in methods.items():
            for task in tasks:
                config = RunConfig.of(preset=name, method=method, task=task).resolve()
                method_ = make_method(config, 60_000, encoder.num_heads)
                rates = [float(make_schedule(config, 60_000, method_)(step)) for step in (10_000, 50_000)]
                assert rates[0] > rates[1] > 0.999 * config.final_learning_rate
    assert RunConfig.of(preset="paper", method="g2r2", task="sst2").resolve().batch_size == 8


def scheduled(total, **settings):
    config = RunConfig.of(learning_rate=2.0, **settings).resolve()
    return make_schedule(config, total, make_method(config, total, 1))


@pytest.mark.parametrize("final", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_learning_rate_schedules(kind, final):
    schedule = scheduled(100, final_learning_rate=final, warmup=0.1, schedule=kind)
    half = final + (2 - final) / 2 * (1.0 if kind == "linear" else 1 + np.cos(np.pi * 45 / 90))
    np.testing.assert_allclose([schedule(i) for i in (0, 5, 10, 55, 100)], [0, 1, 2, half, final], atol=1e-6)
    assert scheduled(10, warmup=0)(0) == 2.0
    assert scheduled(10, warmup=4)(2) == 1.0


@pytest.mark.parametrize("warmup", [0, 4])
def test_each_stage_has_its_rate(warmup):
    """Stage 1 ends with the event after step 30 of 100, so the step of count 30, the 31st, is stage 2's first."""
    schedule = scheduled(
        100, method="channelmask", stage=0.3, final_learning_rate=0.5, warmup=warmup, schedule="stages"
    )
    assert [float(schedule(i)) for i in (warmup, 29, 30, 99)] == [2.0, 2.0, 0.5, 0.5]


def test_the_command_says_one_line_and_two(tmp_path):
    """As a process: status 2, one line on standard error, no folder."""
    command = [sys.executable, "-m", "experiments.glue", "--rnak", "4", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = done.stderr.splitlines()
    assert "--rnak" in line and "nearest known: --rank" in line


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT calls it, not this project
@pytest.mark.filterwarnings("error")
def test_real_peft_loads_the_adapter_folder(tiny_bert, tiny_rte, tmp_path, capfd):
    """PyTorch with the adapter folder gives the logits that JAX with the run's own state gives."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import BertForSequenceClassification

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        glue(tiny_bert, tiny_rte, tmp_path / "run", budget=1500, learning_rate=1e-2)
        base = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    capfd.readouterr()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    said = capfd.readouterr()
    assert "issing" not in said.err + said.out and "nexpected" not in said.err + said.out

    model = load_classifier(tiny_bert, num_labels=2)
    adapters, masks, weights = load_peft(
        tmp_path / "run" / "adapter", find_sites(model.params), torch_paths=model.torch_paths
    )
    params = with_weights(model.params, weights)
    ids = np.random.default_rng(0).integers(5, 120, (6, 20))
    ours = jax.jit(lambda ids: attach(model.model)(params, adapters, masks, ids))(ids)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(ids), attention_mask=torch.ones(6, 20)).logits
    np.testing.assert_allclose(ours, logits.numpy(), atol=1e-5)
