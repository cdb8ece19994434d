"""Methods side by side: real processes on a tiny task, the table worked out by hand, and what is refused before anything runs."""

import json
import re
import shutil

import numpy as np
import pytest

from experiments.run import comparison as compare
from jaxprune import UsageError
from tests.experiments.refusals import assert_refused


@pytest.fixture
def flags(tiny_bert, tiny_rte, tmp_path):
    where = ["--model", str(tiny_bert), "--data-dir", str(tiny_rte), "--output-dir", str(tmp_path / "out")]
    return [*where, "--max-steps", "2", "--max-length", "32"]


def test_runs_are_made_once_and_set_side_by_side(flags, tmp_path, capsys):
    methods = ["--tasks", "rte", "--methods", "bitfit", "oplora:--budget 1500"]
    (bitfit, oplora) = compare.run([*methods, *flags, "--seeds", "1"])
    assert (bitfit["method"], oplora["method"]) == ("bitfit", "oplora:--budget 1500")
    assert oplora["params"] <= 1500 and oplora["spread"] is None and (tmp_path / "out" / "compare.png").stat().st_size
    shown = capsys.readouterr().out
    assert "running    run 1 of 2: rte with bitfit and seed 1; all that it prints is in" in shown
    assert re.search(r"score      accuracy .*trained parameters, in .*; .* so far", shown) and "run 2 of 2" in shown
    assert "  loading    rte: rows and their tokens" in shown and "  compiling  the training step" in shown
    folder = tmp_path / "out" / "rte-bitfit-1"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and bitfit["score"] == summary["score"]

    # A second seed that is there already, with a score that makes mean and deviation easy.
    other = {**summary, "score": summary["score"] + 2, "config": {**summary["config"], "seed": 2}}
    (tmp_path / "out" / "rte-bitfit-2").mkdir()
    (tmp_path / "out" / "rte-bitfit-2" / "summary.json").write_text(json.dumps(other))
    (row,) = compare.run(["--tasks", "rte", "--methods", "bitfit", *flags, "--seeds", "1", "2"])
    shown = capsys.readouterr().out
    assert "running " not in shown and "finished   run 2 of 2" in shown
    assert row["runs"] == 2 and row["score"] == summary["score"] + 1
    np.testing.assert_allclose(row["spread"], 2**0.5)
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert (
        re.fullmatch(rf"\| rte, accuracy \| bitfit \| {row['score']:.1f} ± 1.4 \| .* \|", table[2]) and len(table) == 3
    )

    with pytest.raises(UsageError, match="has other settings: --max-steps was 2, is 3; use another --output-dir"):
        compare.run(["--tasks", "rte", "--methods", "bitfit", *flags, "--seeds", "1", "--max-steps", "3"])


def test_a_run_that_breaks_off_does_not_stop_the_others(flags, tmp_path, monkeypatch):
    seconds = {"train": 4.0, "compile": 1.0, "total": 6.0}
    summary = {"score": 50.0, "best_score": 60.0, "metric": "accuracy", "adapter_params": 7, "steps": 2,
               "weight_params": 5, "head_params": 3}  # fmt: skip

    def fake(glue, log):
        method, folder = glue[glue.index("--method") + 1], tmp_path / "out" / glue[-1].rsplit("/", 1)[-1]
        if method == "lora":
            log.write_text("experiments.glue: stopped: step 1: the loss is not finite\n")
            return 1
        config = compare.parse_run(["--method", method, "--task", "rte", *flags], "glue").resolve()
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({**summary, "seconds": seconds, "config": config.plain()}))
        return 0

    monkeypatch.setattr(compare, "_run_and_log", fake)
    with pytest.raises(UsageError, match="1 of 2 runs are missing in the table: rte with lora.*the loss is not finite"):
        compare.run(["--tasks", "rte", "--methods", "lora", "bitfit", *flags])
    (line,) = (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    assert line == "| rte, accuracy | bitfit | 50.0 | 60.0 | 9 | 2.000 | 1 | 6 |"
    (tmp_path / "out" / "rte-bitfit-42" / "summary.json").write_text('{"score": 1}')
    with pytest.raises(UsageError, match=r"rte-bitfit-42/summary.json' is damaged \(no 'metric' in it\); move it away"):
        compare.run(["--tasks", "rte", "--methods", "lora", "bitfit", *flags])


WRONG = {
    "--methods dplra": "--method 'dplra' is not known; .*nearest: dplora",
    "--methods lora bitfit --interval 3": "--interval is no setting of lora, bitfit; adalora, g2r2, prunedlora have it",
    "--methods lora bitfit:--rank=3": "--rank is no setting of bitfit; it has none; .* have it",
    "--methods lora lora:--rank": "Missing value for argument '--rank'",
    "--methods lora --epochs none": "none is no int",
    "--methods lora --epochs 0": "--epochs 0",
    "--methods lora --learning 3": "learning",
    "--methods lora --seed 7": "give --methods, --tasks and --seeds",
    "--methods lora:--task=cola": "give --methods, --tasks and --seeds",
    "--seeds one": "--seeds",
    "--methods": "--methods",
    "--tasks": "--tasks",
    "--seeds": "--seeds",
    "--methods lora bitfit lora": "--methods lora bitfit lora: name one or more, each once",
    "--tasks rte rte": "--tasks rte rte: name one or more, each once",
    "--seeds 1 2 1": "--seeds 1 2 1: name one or more, each once",
    "--methods lora --tasks rte mrcp": "unknown task 'mrcp'; nearest: mrpc",
    "--methods lora --tasks rte cola --data-dir data": "no data of task 'cola'",
    "--methods lora --tasks rte --model nobody/nothing --data-dir data": "nobody/nothing not found",
    "--methods lora --tasks rte grammar --data-dir data": "grammar is built in and reads no files",
    "--output-dir mine": "it holds 'table.md', which no comparison made",
    "--output-dir file": "cannot be written",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_flags_are_found_before_anything_runs(wrong, tiny_rte, tmp_path):
    shutil.copytree(tiny_rte, tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.md").write_text("my own")
    (tmp_path / "file").write_text("mine")
    given = [] if "--output-dir" in wrong else ["--output-dir", "out"]
    assert_refused("experiments.compare", [*wrong.split(), *given], tmp_path, WRONG[wrong])
