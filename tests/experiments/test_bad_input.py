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


def assert_matches(message: str, line: str) -> None:
    import re

    assert re.search(message, line), line


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
