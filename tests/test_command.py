"""`python -m jaxprune`: what it says of folders, what it merges, and wrong input in one line."""

import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.adapters import init_bottleneck
from jaxprune.command import main
from jaxprune.models import load_classifier
from jaxprune.runs import PREDICT, Reading
from tests.experiments.conftest import tiny_bert  # noqa: F401
from tests.experiments.refusals import listing

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def made(tiny_bert, tmp_path_factory):  # noqa: F811
    """A model, a PEFT folder as others write it, one in the folder of a run, and bottlenecks."""
    root = tmp_path_factory.mktemp("made")
    model = load_classifier(tiny_bert, num_labels=3, seed=3)
    sites = jp.find_sites(model.params)
    adapters, masks = jp.init_lora(jax.random.key(0), sites, {site.path: 1 + i % 3 for i, site in enumerate(sites)})
    adapters = {path: jax.tree.map(lambda leaf: leaf + 0.01, adapter) for path, adapter in adapters.items()}
    head = jp.init_weights(model.params, "^head/")
    weights = {**head, **jp.init_weights(model.params, "pooler")}
    beside = {PREDICT: Reading(str(tiny_bert), ("text",), ("a", "b", "c"), 10, "float32").content()}
    beside |= {name: (tiny_bert / name).read_bytes() for name in TOKENIZER}
    for folder, extra in (("peft", {}), ("run/adapter", beside)):
        (root / folder).parent.mkdir(exist_ok=True)
        jp.save_peft(
            adapters, masks, root / folder, weights=weights, torch_paths=model.torch_paths, params=model.params,
            base_model=str(tiny_bert), beside=extra,
        )  # fmt: skip
    summary = {"method": "lora", "task": "rte", "score": 50.0, "metric": "accuracy", "events": []}
    (root / "run" / "summary.json").write_text(json.dumps(summary))
    bottlenecks, widths = init_bottleneck(jax.random.key(0), sites[:3], {site.path: 2 for site in sites[:3]})
    jp.save_adapters({**adapters, **bottlenecks}, {**masks, **widths}, root / "own", weights=head)
    return root, model, adapters, masks, weights


def ended(capsys, *arguments):
    """Run the command, and return its status, its output, and what it complained."""
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


def test_inspect_an_adapter_of_peft(made, capsys):
    root, model, adapters, masks, weights = made
    status, out, err = ended(capsys, "inspect", root / "peft")
    assert status == 0 and not err and max(map(len, out.splitlines()[4:])) <= 80
    assert "LoRA adapter of PEFT" in out and "saved whole  classifier" in out and "attention/output/dense" in out
    params, beside = jp.count(adapters, masks), sum(weight.size for weight in weights.values())
    assert f"{params:,} parameters in factors at {len(adapters)} sites, {beside:,} beside" in out


def test_inspect_a_run_our_own_adapters_and_a_model(made, tiny_bert, capsys):  # noqa: F811
    root, model, *_ = made
    status, out, _ = ended(capsys, "inspect", root / "run")
    assert status == 0 and "method  lora" in out and "LoRA adapter of PEFT" in out
    status, out, _ = ended(capsys, "inspect", root / "own")
    assert status == 0 and "3 Bottleneck" in out and "layer" in out
    status, out, _ = ended(capsys, "inspect", tiny_bert, "--rank", 2)
    sites = jp.find_sites(model.params)
    assert status == 0 and f"{len(sites)}    all" in out and f"{sum(site.cost(2) for site in sites):,}" in out


@pytest.mark.parametrize("folder", ["peft", "run"])
def test_a_merged_model_computes_what_the_adapted_one_does(folder, made, capsys, tmp_path):
    root, model, adapters, masks, weights = made
    status, out, err = ended(capsys, "merge", root / folder, "--output-dir", tmp_path / "new")
    assert status == 0 and not err and str(tmp_path / "new") in out
    again = load_classifier(tmp_path / "new", num_labels=3)
    assert not again.initialised
    ids = jnp.arange(12).reshape(2, 6) + 5
    expected = jp.attach(model.model)(model.params, adapters, masks, ids)
    np.testing.assert_allclose(again.model.apply({"params": again.params}, ids), expected, atol=1e-5)
    assert np.abs(expected - model.model.apply({"params": model.params}, ids)).max() > 1e-3
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    if folder == "run":
        assert jp.load_run(tmp_path / "new").predict(["one two"])[0].label in "abc"


def refused(capsys, tmp_path, message, *arguments):
    before = listing(tmp_path)
    status, out, err = ended(capsys, *arguments)
    assert status == 2 and not out and len(err.splitlines()) == 1 and err.startswith("jaxprune: error: ")
    assert re.search(message, err), err
    assert listing(tmp_path) == before


def test_wrong_input_is_one_line(made, tiny_bert, capsys, tmp_path):  # noqa: F811
    root, *_ = made
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    file = tmp_path / "used" / "mine.txt"
    new, check = tmp_path / "new", lambda message, *given: refused(capsys, tmp_path, message, *given)
    check("COMMAND", *())
    check("invalid choice", "inspekt", root)
    check("--output-dir", "merge", root / "peft")
    check("is a file", "inspect", file)
    check("holds 'nothing'.*expected adapter_config.json", "inspect", tmp_path / "empty")
    check("is not a folder; expected a folder", "inspect", tmp_path / "nowhere")
    check("rank '0' cannot", "inspect", tiny_bert, "--rank", "0")
    check("rank 'x' cannot", "inspect", tiny_bert, "--rank", "x")
    check("no adapter_config.json and no adapters.json", "merge", tmp_path / "empty", "--output-dir", new)
    check("whole model.*nothing to merge", "merge", tiny_bert, "--output-dir", new)
    check("in use", "merge", root / "peft", "--output-dir", tmp_path / "used")
    check("in use", "merge", root / "peft", "--output-dir", file)
    check("does not name its model; pass --model", "merge", root / "own", "--output-dir", new)
    check("nonlinear and cannot be merged", "merge", root / "own", "--model", tiny_bert, "--output-dir", new)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[1", b"\xff" * 40, b"{}"])
def test_damaged_adapters_are_one_line(name, content, made, capsys, tmp_path):
    root, *_ = made
    shutil.copytree(root / "peft", tmp_path / "peft")
    (tmp_path / "peft" / name).write_bytes(content)
    refused(capsys, tmp_path, "damaged|nameless|cannot be read", "inspect", tmp_path / "peft")
    refused(
        capsys, tmp_path, "damaged|nameless|cannot be read", "merge", tmp_path / "peft", "--output-dir", tmp_path / "x"
    )


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"nul"])
def test_a_damaged_summary_is_one_line(content, made, capsys, tmp_path):
    root, *_ = made
    shutil.copytree(root / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_bytes(content)
    refused(capsys, tmp_path, "summary.json is damaged", "inspect", tmp_path / "run")


def test_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxprune", "inspect", "."], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
