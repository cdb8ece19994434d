"""Ctrl-C at any moment, with real processes and real signals: one line, status 130, and what was trained is saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "experiments.glue": ["--method", "lora"],
    "experiments.compare": ["--methods", "lora", "--tasks", "grammar"],
    "experiments.bench": ["resume", "--kills", "1"],
}


def begin(program: str, arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", program, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(condition, seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("program", COMMANDS)
@pytest.mark.parametrize("after", [0.5, 1.0, 3.0])
def test_ctrl_c_in_the_first_seconds(program, after, tmp_path):
    """While the interpreter imports, loads and scores; earlier than some hundredths of a second nothing of ours runs."""
    where = [] if program == "experiments.bench" else ["--output-dir", str(tmp_path / "out")]
    process = begin(program, [*COMMANDS[program], *where])
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=20)
    last = err.splitlines()[-1]
    assert process.returncode == 128 + signal.SIGINT, err
    assert last == f"{program}: interrupted" or last.startswith(f"{program}: stopped by SIGINT in "), err
    assert "Traceback" not in err
    wait_for(lambda: not left(process.pid), 20)


def left(session: int) -> list[str]:
    """List the processes of a session that still run."""
    found = subprocess.run(["ps", "-s", str(session), "-o", "args="], capture_output=True, text=True, check=False)
    return [line for line in found.stdout.splitlines() if "<defunct>" not in line]


@pytest.fixture(scope="module")
def flags(tiny_bert, tiny_rte) -> list[str]:
    given = dict(model=tiny_bert, data_dir=tiny_rte, rank=2, batch_size=8, max_length=24, epochs=3000)
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def test_ctrl_c_while_training_saves_first_and_says_so(flags, tmp_path):
    run = begin(
        "experiments.glue", ["--task", "rte", "--method", "lora", *flags, "--output-dir", str(tmp_path / "run")]
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(metrics.exists)
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=60)[1].splitlines()
    told = "experiments.glue: SIGINT: stopping after this step, with everything saved; once more ends at once"
    assert run.returncode == 130 and told in err, err
    assert "stopped by SIGINT after step" in err[-1] and "--resume goes on from there" in err[-1]
    assert any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_comparison_passes_ctrl_c_on_and_can_go_on(flags, tmp_path):
    given = ["--tasks", "rte", "--methods", "lora", *flags, "--output-dir", str(tmp_path / "out")]
    compare = begin("experiments.compare", given)
    wait_for((tmp_path / "out" / "rte-lora-42" / "metrics.jsonl").exists)
    os.killpg(compare.pid, signal.SIGINT)
    out, err = compare.communicate(timeout=60)
    assert compare.returncode == 130, err
    wait_for(lambda: not left(compare.pid), 20)
    assert "stopping the run, which saves what it has first" in err
    assert "stopped by SIGINT in" in err.splitlines()[-1] and "the same command goes on" in err.splitlines()[-1]
    log = (tmp_path / "out" / "logs" / "rte-lora-42.txt").read_text()
    assert "stopped by SIGINT after step" in log.splitlines()[-1]
    checkpoints = [path.name for path in (tmp_path / "out" / "rte-lora-42" / "checkpoints").iterdir()]
    assert f"after step {max(map(int, checkpoints))};" in log


def test_a_reader_that_goes_away_leaves_no_stack_trace(tmp_path):
    run = begin("experiments.glue", ["--method", "lora", "--output-dir", str(tmp_path / "run")])
    assert run.stdout and run.stderr
    run.stdout.close()
    err = run.stderr.read()
    assert run.wait(60) == 128 + signal.SIGPIPE and not err, err


def test_nohup_is_respected(flags, tmp_path):
    """A process that was started with SIGINT ignored, as a shell starts what runs in the background, goes on."""
    given = [sys.executable, "-m", "experiments.glue", "--task", "rte", "--method", "lora", *flags, "--epochs", "1"]
    run = subprocess.Popen(
        [*given, "--output-dir", str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    assert run.wait(180) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


def test_a_wrong_flag_is_said_where_the_terminal_has_ascii_alone():
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    given = [sys.executable, "-m", "experiments.glue", "--rnak", "3"]
    ended = subprocess.run(given, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    line = "experiments.glue: error: Unrecognized options: --rnak, 3; nearest known: --rank; --help lists every flag\n"
    assert ended.returncode == 2 and ended.stderr == line
