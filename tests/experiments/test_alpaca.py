"""Rows in Alpaca's own files, and the flags of the program that takes them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.data import alpaca
from experiments.run import settings_file
from experiments.run.config import RunConfig
from experiments.run.flags import parse_run
from experiments.tasks import get_task
from jaxprune.errors import UsageError
from tests.experiments.refusals import command
from tests.experiments.test_data import write

ROWS = [
    {"instruction": "Greet.", "input": "", "output": "Hello!"},
    {"instruction": "Sort.", "input": "b, a", "output": "a, b"},
    {"instruction": "Translate\u2028this.", "input": "sí", "output": " Yes.\n"},
]
MANY = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(41)]
TEXTS = tuple([row[name] for row in ROWS] for name in alpaca.COLUMNS)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".json", ".jsonl.gz", ".csv", "-00000-of-00001.parquet"])
@pytest.mark.parametrize("nested", [".", "alpaca"])
def test_every_format_reads_alike(tmp_path, ending, nested):
    for split in ("train", "validation"):
        write(tmp_path / nested / f"{split}{ending}", ROWS)
    found = get_task("alpaca").rows(tmp_path, 2)
    assert found["validation"].texts == TEXTS and len(found["train"]) == 2
    assert found["train"].texts == tuple(column[:2] for column in TEXTS) and not found["train"].notes


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_an_input_may_be_missing(tmp_path, ending):
    """As a column, in one row, or as null."""
    path = write(tmp_path / f"a{ending}", [{"instruction": "a", "output": "b"}] * 2)
    mixed = [{"instruction": "a", "input": None, "output": "b"}, {"instruction": "a", "input": "c", "output": "b"}]
    both = alpaca.load("alpaca", None, path, write(tmp_path / f"b{ending}", mixed))
    assert both["train"].texts[1] == ["", ""] and both["validation"].texts[1] == ["", "c"]


def test_a_part_is_held_out_where_no_rows_are_given_for_it(tmp_path):
    path = write(tmp_path / "train.json", MANY)
    found = alpaca.load("alpaca", tmp_path, None, None)
    train, out = (set(found[split].texts[2]) for split in ("train", "validation"))
    assert len(out) == 3 and train | out == {str(i) for i in range(41)} and not train & out
    assert found["train"].notes == (f"3 of the 41 rows of {path} are held out for validation, always the same ones",)
    again = alpaca.load("alpaca", None, path, None)
    assert again["validation"].texts == found["validation"].texts
    # A file for it is taken whole, and so are the others then.
    other = write(tmp_path / "other.jsonl", ROWS)
    found = alpaca.load("alpaca", tmp_path, None, other)
    assert len(found["train"]) == 41 and found["validation"].texts == TEXTS
    with pytest.raises(UsageError, match="holds one row, and none is left to validate on; give --validation-file"):
        alpaca.load("alpaca", None, write(tmp_path / "one.json", ROWS[:1]), None)


def test_at_most_500_rows_are_held_out(tmp_path):
    path = write(tmp_path / "big.jsonl", [MANY[i % 41] for i in range(12_000)])
    assert len(alpaca.load("alpaca", None, path, None)["validation"]) == 500


def test_the_real_rows(real_data, tmp_path):
    with gzip.open(real_data / "alpaca" / "alpaca_random_9k.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    given = alpaca.load("alpaca", None, real_data / "alpaca" / "alpaca_random_9k.jsonl.gz", None)
    assert (
        given["train"].notes[0].startswith("4 of the 9,229 rows of ")
        and "row 1461 the first" in given["train"].notes[0]
    )
    assert not given["validation"].notes
    found = alpaca.load("alpaca", None, write(tmp_path / "a.json", [row for row in records if row["output"]]), None)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 8763, "validation": 462}


@pytest.mark.parametrize("change", [{"output": ""}, {"output": " \n"}, {"instruction": ""}])
def test_rows_with_nothing_to_learn_are_left_out_and_said(tmp_path, change):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROWS[0], {**ROWS[1], **change}, *ROWS]))
    found = alpaca.load("alpaca", None, path, path)
    assert found["train"].texts == found["validation"].texts
    assert found["train"].texts[2] == [row["output"] for row in [ROWS[0], *ROWS]]
    assert f"1 of the {len(ROWS) + 2} rows of {path} are left out, row 1 the first" in found["train"].notes[0]
    path.write_text(json.dumps([{**ROWS[1], **change}]))
    with pytest.raises(UsageError, match="a.json: no row has both an instruction and an output; fill them in"):
        alpaca.load("alpaca", None, path, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, "output of row 1 is None; expected a string"),
        ({"instruction": 7}, "instruction of row 1 is 7; expected a string"),
        ({"input": ["a"]}, r"input of row 1 is \['a'\]; expected a string"),
        ({"input": 0}, "input of row 1 is 0; expected a string"),
        ({"output": "\ud800"}, "output of row 1 holds half a character"),
    ],
)
def test_wrong_values(tmp_path, change, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROWS[0], {**ROWS[1], **change}]))
    with pytest.raises(UsageError, match=f"a.json: {message}") as caught:
        alpaca.load("alpaca", None, path, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no column 'instruction'; expected instruction, input (may be missing) and output, found none"),
        ('[{"instruction": "a", "response": "b"}]', "no column 'output'; expected .*, found instruction, response"),
        ("", "no column 'instruction'"),
        ("[3]", "row 0 is 3; expected an object"),
        ('[{"instruction":', "line 1 is not JSON"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message.replace("(may be missing)", r"\(may be missing\)")) as caught:
        alpaca.load("alpaca", None, path, None)
    assert str(path) in str(caught.value)


def test_files_without_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\n")
    with pytest.raises(UsageError, match="a.csv: holds no rows"):
        alpaca.load("alpaca", None, path, None)


def test_missing_files(tmp_path):
    path = write(tmp_path / "a.json", ROWS)
    for arguments, message in (
        ((None, tmp_path / "no.json", None), "--train-file '.*no.json' is no file; name one"),
        ((None, path, tmp_path), "--validation-file '.*' is no file"),
        ((tmp_path, path, None), "--data-dir and --train-file both name rows to train on; give one"),
        ((tmp_path / "no", None, None), "--data-dir '.*no' is not a folder; expected one with alpaca/train.json"),
        ((tmp_path, None, None), "no file train.json, train.jsonl or train.parquet in '.*'; put it there, or name"),
    ):
        with pytest.raises(UsageError, match=message):
            alpaca.find("alpaca", *arguments)


def test_built_in_rows_need_no_files(tmp_path):
    with pytest.raises(
        UsageError, match="instructions is built in and reads no files, got --data-dir '.*'; leave it out"
    ):
        get_task("instructions").rows(tmp_path, None)
    chosen = RunConfig.of(task="instructions", train_file=tmp_path / "a.json").resolve().chosen()
    with pytest.raises(UsageError, match="reads no files, got --train-file"):
        chosen.check_files(None)


# Flags


def test_what_stands_where_nothing_is_said():
    config = parse_run([], "experiments.alpaca").resolve()
    assert (config.task, config.model) == ("instructions", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (config.template, config.remat, config.chunk) == ("alpaca", "none", 128)
    other = parse_run([], "experiments.glue").resolve()
    assert (other.task, other.model) == ("grammar", "sentence-transformers/all-MiniLM-L6-v2")
    assert other.template is other.remat is other.chunk is None
    assert not {"template", "remat", "chunk", "train_file", "validation_file"} & set(other.plain())


def test_the_task_gets_the_flags_of_its_program(tmp_path):
    flags = ["--task", "alpaca", "--train-file", "~/a.json", "--template", "chat", "--remat", "full", "--chunk", "64"]
    chosen: Any = parse_run(flags, "experiments.alpaca").resolve().chosen()
    assert (chosen.train_file, chosen.template) == (Path("~/a.json").expanduser(), "chat")
    assert (chosen.remat, chosen.chunk, chosen.validation_file) == ("full", 64, None)
    rte = RunConfig.of(task="rte").resolve()
    assert rte.chosen() is get_task("rte")


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("experiments.glue", ["--template", "chat"], "--template is a flag of experiments.alpaca, not of experiments.glue"),
        ("experiments.glue", ["--train-file=a"], "--train-file is a flag of experiments.alpaca"),
        ("experiments.glue", ["--task", "alpaca"], "--task alpaca is one of experiments.alpaca: python -m experiments.alp"),
        ("experiments.alpaca", ["--task", "rte"], "--task rte is one of experiments.glue: python -m experiments.glue"),
        ("experiments.compare", ["--task", "rte", "--remat", "full"], "--remat is for tasks of experiments.alpaca; --task rte"),
        ("experiments.alpaca", ["--template", "vicuna"], "--template 'vicuna' is not known; expected one of alpaca, chat"),
        ("experiments.alpaca", ["--remat", "some"], "--remat 'some' is not known; expected one of none, dots, names, full"),
        ("experiments.alpaca", ["--chunk", "0"], "--chunk 0 is out of range; expected .*1 or more"),
        ("experiments.alpaca", ["--train-file", ""], "--train-file.*an empty text"),
        ("experiments.alpaca", ["--train-file", "a" * 300], "--train-file 'a.*' is too long"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit(program, flags, message):
    with pytest.raises(UsageError, match=message):
        parse_run(flags, program).resolve()


def test_settings_files_hold_what_the_program_has(tmp_path):
    given = parse_run(["--template", "chat", "--train-file", "a.json", "--task", "alpaca"], "experiments.alpaca")
    path = tmp_path / "config.yaml"
    path.write_bytes(settings_file.written(given, given.resolve()))
    assert parse_run(["--config", str(path)], "experiments.alpaca").resolve().chosen() == given.resolve().chosen()
    with pytest.raises(UsageError, match="--train-file is a flag of experiments.alpaca, not of experiments.glue"):
        parse_run(["--config", str(path)], "experiments.glue")
    plain = parse_run([], "experiments.glue")
    assert b"template" not in settings_file.written(plain, plain.resolve())


def test_help_tells_of_the_program(capsys):
    for program, there, absent in (
        ("experiments.alpaca", ("--train-file", "SmolLM2", "alpaca, instructions"), ("MiniLM", "mrpc")),
        ("experiments.glue", ("MiniLM", "mrpc"), ("--train-file", "--remat", "SmolLM2")),
    ):
        with pytest.raises(SystemExit):
            parse_run(["--help"], program)
        said = " ".join(capsys.readouterr().out.split())
        assert all(word in said for word in there) and not any(word in said for word in absent)


def test_files_mean_the_task_that_reads_them(tmp_path):
    """As a command, which is refused before any model is looked up."""
    path = write(tmp_path / "a.json", [{"instruction": "a", "output": ""}] * 2)
    ended = command(
        "experiments.alpaca", ["--train-file", str(path), "--preset", "paper", "--method", "adalora"], tmp_path
    )
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "--preset paper has no settings for --task 'alpaca'" in ended.err
