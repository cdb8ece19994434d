"""Whole runs of tiny decoders: what each kind of method leaves behind, and settings that must not change what is learned."""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from experiments.bench import resume as bench_resume
from experiments.bench.resume import ResumeConfig, kill_and_resume
from experiments.data import instructions
from experiments.data.prompts import TEMPLATES
from experiments.run import loop, one
from experiments.run.config import RunConfig
from experiments.run.flags import parse_run
from jaxprune import command
from jaxprune.adapters import with_weights
from jaxprune.errors import UsageError
from jaxprune.models.decoder_weights import load_decoder
from jaxprune.models.tokenizer import load_tokenizer
from jaxprune.sites import flatten
from tests.experiments.refusals import assert_refused
from tests.models import decoders

ROOT = Path(__file__).parents[2]
LENGTH = 192
ROWS = instructions.generate(26, 13)
# Methods that compare layers; for the others one is enough, and compiles in half the time.
OF_LAYERS = ("dplora", "g2r2", "loradrop", "oplora")
REFUSED = {
    "bitfit": "the model has no biases, and BitFit trains nothing else; choose another method",
    "channelmask": "--method channelmask takes channels out of encoders, and .* is a decoder; choose another",
    "uniformmask": "--method uniformmask takes channels out of encoders, and .* is a decoder; choose another",
}


def save_model(folder: Path, **changes: Any) -> Path:
    """Write a tiny decoder, and a byte-level BPE that can read any instruction."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers import decoders as joins

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = joins.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    texts = [text for column in ROWS["train"].texts for text in column]
    tokenizer.train_from_iterator([*texts, *(part for form in TEMPLATES.values() if form for part in form)], trainer)
    sizes = dict(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=LENGTH + 32, num_hidden_layers=2)
    decoders.save(folder, "llama3", **{**sizes, **changes})
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": decoders.CHAT}
    said = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    (folder / "tokenizer_config.json").write_text(said)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("shallow"), num_hidden_layers=1)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few rows of the built-in task."""
    monkeypatch.setattr(instructions, "generate", lambda: ROWS)


class Ran(NamedTuple):
    """A run that has ended, with what it held in memory."""

    folder: Path
    run: Any
    state: Any
    summary: dict[str, Any]

    def losses(self) -> list[float]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "split" not in line]


def go(model: Path, folder: Path, method: str = "lora", **more: Any) -> Ran:
    seen: list[tuple[Any, Any]] = []
    write = one.Run.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.Run, "write", lambda self, state: seen.append((self, state)) or write(self, state))
        given = dict(task="instructions", max_steps=4, batch_size=4, max_length=LENGTH, learning_rate=1e-2, log_steps=1)
        summary = loop.run(RunConfig.of(method=method, model=str(model), output_dir=folder, **{**given, **more}))
    return Ran(folder, *seen[0], summary)


def written(ran: Ran, prompt: list[int], count: int) -> str:
    """Write what is most probable, each token by a forward pass through all of the text."""
    own, state = ran.run, ran.state
    adapters, masks = own.method.seen(state.method_state, state.adapters, state.masks)
    params = with_weights(own.params, state.weights)
    forward = jax.jit(lambda ids: own._loaded.forward(params, adapters, masks, ids))
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : len(prompt)] = prompt
    tokenizer = load_tokenizer(own._loaded.model.source)
    for place in range(len(prompt), len(prompt) + count):
        ids[0, place] = int(np.argmax(np.asarray(forward(ids))[0, place - 1]))
        if ids[0, place] in tokenizer.stops:
            return tokenizer.decode(ids[0, len(prompt) : place].tolist())
    return tokenizer.decode(ids[0, len(prompt) : len(prompt) + count].tolist())


# One of each kind of adapter and of export; how methods of one kind differ is the matter of tests/methods.
KINDS = ("adalora", "dora", "dplora", "full", "g2r2", "houlsby", "lora", "loradrop", "pissa", "vera")


@pytest.mark.parametrize("name", KINDS)
def test_what_each_kind_leaves_behind_writes_as_the_trained_state(name, model, shallow, tmp_path):
    # AdaLoRA's schedule needs room for its three parts.
    ran = go(model if name in OF_LAYERS else shallow, tmp_path / "run", name, max_steps=6 if name == "adalora" else 4)
    folder, losses = ran.folder, ran.losses()
    assert len(losses) == ran.summary["steps"] and np.isfinite(losses).all()
    page = HTMLParser()
    page.feed((folder / "report.html").read_text())
    page.close()
    assert name in (folder / "report.html").read_text()
    kinds = {
        x
        for x in ("adapter/adapter_config.json", "adapter/adapters.json", "model/config.json")
        if (folder / x).exists()
    }
    assert len(kinds) == 1
    writer = jp.load_writer(folder)
    if "adapter/adapters.json" in kinds:
        assert str(ran.run.config.model) in " ".join(command.inspected(str(folder / "adapter")))
    asked = ("Sort the words.", "b a")
    answer = writer.generate([asked], max_tokens=10)[0]
    assert answer == written(ran, writer.writing.ask(writer.tokenizer, *asked), 10)


def test_biases_are_trained_where_there_are_some(tmp_path):
    folder = save_model(tmp_path / "model", attention_bias=True, mlp_bias=True)
    ran = go(folder, tmp_path / "run", "bitfit")
    writer = jp.load_writer(ran.folder)
    asked = ("Sort the words.", "b a")
    assert writer.generate([asked], max_tokens=10)[0] == written(ran, writer.writing.ask(writer.tokenizer, *asked), 10)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_methods_that_cannot_work_say_so_before_the_folder_is_made(name, model, tmp_path):
    with pytest.raises(UsageError, match=REFUSED[name]) as caught:
        go(model, tmp_path / "run", name)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


# What must not change what is learned


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory) -> Ran:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instructions, "generate", lambda: ROWS)
        return go(model, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("more", [{"accumulate": 2}, {"remat": "full"}, {"remat": "names"}, {"chunk": 3}], ids=str)
def test_losses_do_not_depend_on_how_they_are_computed(more, model, plain, tmp_path):
    np.testing.assert_allclose(go(model, tmp_path / "run", **more).losses(), plain.losses(), rtol=2e-5)


def test_sixteen_bits_are_the_models_and_not_the_adapters(model, plain, tmp_path):
    ran = go(model, tmp_path / "run", dtype="bfloat16")
    np.testing.assert_allclose(ran.losses(), plain.losses(), rtol=2e-2)
    kernels = [leaf for path, leaf in flatten(ran.run.params).items() if path.endswith("kernel")]
    assert kernels and {leaf.dtype for leaf in kernels} == {jnp.dtype("bfloat16")}
    moments = [leaf for leaf in jax.tree.leaves(ran.state.opt_state) if leaf.ndim]
    assert {leaf.dtype for leaf in [*jax.tree.leaves(ran.state.adapters), *moments]} == {jnp.dtype("float32")}
    assert jp.load_writer(ran.folder).model.config.dtype == jnp.bfloat16


def test_a_chat_of_rows_in_files(model, tmp_path):
    for name, count in (("train", 9), ("validation", 5)):
        rows = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = dict(train_file=tmp_path / "train.json", validation_file=tmp_path / "validation.json")
    ran = go(model, tmp_path / "run", task="alpaca", template="chat", max_length=48, **files)
    data, tokenizer = ran.run._loaded.data, load_tokenizer(ran.run._loaded.model.source)
    assert data.examples == 9 and len(data.labels["validation"]) == 5
    ids = np.asarray(next(iter(ran.run.batches(0)))["input_ids"])
    assert any("user Say " in tokenizer.decode(row.tolist()) for row in ids)
    writer = jp.load_writer(ran.folder)
    prompt = tokenizer.encode("user Say 3. </s> assistant ", special=False)
    assert writer.writing.template is None and writer.writing.ask(writer.tokenizer, "Say 3.") == prompt
    assert writer.generate(["Say 3."], max_tokens=6)[0] == written(ran, prompt, 6)


# Six layers


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    # So wide that kernels, and not adapters, take most of a step.
    return save_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=6, hidden_size=96, intermediate_size=160)


class Begun(Exception):
    """The first step, not yet done."""


def first_step(model: Path, folder: Path, method: str, **more: Any) -> tuple[Any, Any, Any, Any]:
    """Return the step, the parameters, the state and the batch of a run."""

    def stop(step, params, state, batches, **_):
        raise Begun(step, params, state, next(batches))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Begun) as caught:
        patch.setattr(loop, "fit", stop)
        go(model, folder, method, **more)
    return caught.value.args  # pyright: ignore[reportReturnType]


def test_a_time_budget_adapts_upper_layers_only_and_saves_flops(deep, tmp_path):
    loaded = load_decoder(deep)
    assert loaded.config.groups == (1,) * 6
    layers = {site.path: site.layer for site in loaded.sites()}
    flops, lowest = [], []
    chosen: dict[str, dict[str, Any]] = {"lora": {"rank": 16}, "oplora": {"time_budget": 0.35}}
    for name, more in chosen.items():
        step, params, state, batch = first_step(deep, tmp_path / name, name, **more)
        flops.append(step.lower(params, state, batch).compile().cost_analysis()["flops"])
        lowest.append(min(layers[path] for path in state.adapters))
    # The forward pass takes 0.15 of uniform rank 16, and each layer of the backward pass 0.055: no room below layer 3.
    assert lowest[0] == 0 and lowest[1] >= 3
    assert flops[1] < 0.75 * flops[0]


# Killed and resumed


def test_a_killed_run_ends_like_the_undisturbed_one(model, tmp_path, monkeypatch):
    """One kill in a pruning event, one at a step; components are chosen in another basis, by the loss without each."""
    places = itertools.cycle(["event", "step"])
    monkeypatch.setattr(bench_resume.random.Random, "choice", lambda self, _: next(places))
    monkeypatch.setattr(bench_resume.random.Random, "randint", lambda self, low, high: 1)
    monkeypatch.chdir(ROOT)
    flags = (
        f"--model {model} --task instructions --method dplora --max-train-samples 26 --batch-size 4 --max-steps 6 --events 2 "
        f"--prune-ratio 0.5 --max-length {LENGTH} --log-steps 1 --eval-steps 6 --basis svd --loss components"
    ).split()
    report = kill_and_resume(ResumeConfig(2, save_steps=1), flags, tmp_path, "experiments.alpaca")
    assert report["died"] == {"moment": 0, "step": 1, "event": 1, "after event": 0, "save": 0}
    assert report["leaves"] > 20 and report["lines"] >= 7
    events = json.loads((tmp_path / "straight" / "summary.json").read_text())["events"]
    assert len(events) == 2 and all(event["compacted"] for event in events)
    assert events[1]["params_after"] < events[0]["params_after"] < events[0]["params_before"]


# Bad input


def test_refusals(model, tiny_bert, tmp_path):
    bare, torn = save_model(tmp_path / "bare"), save_model(tmp_path / "torn")
    said = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "chat_template"}))
    content = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(content[: len(content) // 2])
    bad: list[tuple[Path, dict[str, Any], str]] = [
        (model, {"max_length": 500}, "--max-length 500 is more than the model's 224 positions; lower it"),
        (tiny_bert, {}, "model_type 'bert' is not supported; expected one of llama, mistral, qwen2"),
        (bare, {"template": "chat"}, "bare has no chat template; .*--template alpaca"),
        (torn, {}, "model.safetensors is truncated or not a safetensors file"),
        (model, {"targets": "q_prj"}, "'q_prj' matches no kernel; .*nearest names: q_proj"),
        (model, {"targets": "query,value"}, "'query' matches no kernel; .*nearest names: q_proj"),
    ]
    for where, more, message in bad:
        with pytest.raises(UsageError, match=message) as caught:
            go(where, tmp_path / "run", **more)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="--task rte is one of experiments.glue"):
        parse_run(["--task", "rte"], "experiments.alpaca").resolve()


def test_a_refusal_as_a_command(model, tmp_path):
    flags = ["--model", str(model), "--task", "instructions", "--max-length", "500", "--output-dir", "run"]
    assert_refused("experiments.alpaca", flags, tmp_path, "--max-length 500 is more than the model's 224 positions")
