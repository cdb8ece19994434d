"""Kill a run again and again, resume it, and compare with the run that was left alone: `python -m experiments.bench resume`.

Real processes and SIGKILL. Each life of the run is told where to die: at a random moment, at a random step, in the middle of
a pruning event, between an event and the next save, or while a checkpoint is being written in the background; the next life
continues with `--resume`. At the end everything but the seconds must be the same, bit for bit: adapters, masks, moments,
method state, metrics, and the exported adapter.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.run import stopping
from experiments.run.cli import parse_known
from experiments.run.stopping import temporary_folder
from jaxprune.errors import UsageError

DEFAULT = "--method dplora --max-train-samples 480 --epochs 4 --events 6 --prune-ratio 0.8"
PLACES: tuple[str, ...] = ("moment", "step", "event", "after event", "save")
# What only the clock decides.
_TIMED = ("seconds", "solve_seconds", "compact_seconds", "compile_seconds", "compile_estimate", "step_seconds_before",
          "step_seconds_after")  # fmt: skip


@dataclass(frozen=True)
class ResumeConfig:
    """Kill and resume a training run, and compare it with an undisturbed one; every other flag goes to experiments.glue."""

    kills: int = 50
    """how many times the run is killed"""
    save_steps: int = 3
    """steps between checkpoints"""
    seed: int = 0
    """decides where the run dies"""


def main(arguments: list[str]) -> None:
    """Kill, resume, compare, and print how often the run died where; raise where anything differs."""
    config, flags = parse_known(ResumeConfig, arguments, "experiments.bench resume")
    with temporary_folder() as folder:
        start = time.perf_counter()
        report = kill_and_resume(config, flags or DEFAULT.split(), folder)
        died = ", ".join(f"{count} at {place}" for place, count in report["died"].items() if count)
        print(
            f"{sum(report['died'].values())} kills ({died}) in {report['runs']} runs: every run ended with the same "
            f"{report['leaves']} arrays, {report['lines']} metric lines and adapter, bit for bit "
            f"({time.perf_counter() - start:.0f} s)"
        )


def kill_and_resume(
    config: ResumeConfig, flags: Sequence[str], folder: Path, program: str = "experiments.glue"
) -> dict[str, Any]:
    """Run once undisturbed, then kill and resume further runs until `config.kills` kills are done, comparing each."""
    rng = random.Random(config.seed)
    straight = folder / "straight"
    begun = time.perf_counter()
    _life(config, flags, straight, "never", 0, program)
    lifetime = time.perf_counter() - begun
    expected = outcome(straight)
    died = dict.fromkeys(PLACES, 0)
    runs = 0
    while sum(died.values()) < config.kills:
        killed = folder / f"killed-{runs}"
        runs += 1
        while not (killed / "summary.json").exists():
            place = rng.choice(PLACES) if sum(died.values()) < config.kills else "never"
            count = rng.randint(1, 4) if place in ("event", "after event", "save") else rng.randint(1, 12)
            if place == "moment":
                count = int(1000 * lifetime * rng.random())
            if _life(config, flags, killed, place, count, program):
                died[place] += 1
            whole_checkpoints(killed / "checkpoints")
        found = outcome(killed)
        for what in expected:
            if found[what] != expected[what]:
                raise UsageError(f"run {runs} ended with another {what} than the undisturbed run; compare {folder}")
        shutil.rmtree(killed)
    return {"died": died, "runs": runs, "leaves": len(expected["arrays"]), "lines": len(expected["metrics"])}


def _life(config: ResumeConfig, flags: Sequence[str], folder: Path, place: str, count: int, program: str) -> bool:
    """Run until the end or the kill; return whether it was killed."""
    whole = [*flags, "--compact", "always", "--save-steps", str(config.save_steps), "--output-dir",
             str(folder), "--resume"]  # fmt: skip
    code = "import sys; from experiments.bench.resume import live; live(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])"
    process = stopping.run(
        [sys.executable, "-c", code, program, place, str(count), *whole], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if process.returncode not in (0, -signal.SIGKILL):
        raise UsageError(f"a run ended with status {process.returncode}: {process.stderr.strip()[-800:]}")
    return process.returncode != 0


def live(program: str, place: str, count: int, arguments: list[str]) -> None:
    """Run a program in this process, and die by SIGKILL at the `count`-th time at `place`."""
    left = count

    def passing(here: str) -> bool:
        nonlocal left
        left -= here == place
        return here == place and left == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "moment":
        threading.Timer(count / 1000, die).start()

    import jaxprune.train.events
    from experiments.run import loop, one
    from experiments.run.flags import parse_run
    from jaxprune.checkpoint import Checkpoints

    def around(function: Any, here: str, *, after: bool, delay: float = 0.0) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if passing(here) and not after:
                die()
            dies = here == place and left == 0
            result = function(*args, **kwargs)
            if dies and after:
                threading.Timer(delay, die).start() if delay else die()
            return result

        return wrapped

    jaxprune.train.events.apply = around(jaxprune.train.events.apply, "event", after=True)
    one.Pruner.after = around(one.Pruner.after, "after event", after=True)
    # The checkpoint is written in the background from here on; most take some hundredths of a second.
    Checkpoints.save = around(Checkpoints.save, "save", after=True, delay=1e-4 + 0.03 * (count % 4))
    one.Recorder.log = around(one.Recorder.log, "step", after=False)
    loop.run(parse_run(arguments, program))
    os._exit(0)  # a timer may still be waiting


def whole_checkpoints(folder: Path) -> None:
    """Check that every checkpoint that is listed can be read."""
    from jaxprune.checkpoint import Checkpoints

    with Checkpoints(folder) as checkpoints:
        for step in checkpoints.steps():
            checkpoints.extra(step)
            _arrays(folder / str(step))


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a run leaves behind but the seconds."""
    summary = json.loads((folder / "summary.json").read_text())
    last = folder / "checkpoints" / str(summary["steps"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("score", "best_score", "metrics", "adapter_params", "ranks", "events", "steps")
    return {
        "arrays": _arrays(last),
        "metrics": _timeless(lines),
        "summary": _timeless({name: summary[name] for name in names}),
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
    }


def _arrays(checkpoint: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        saved = reader.restore(checkpoint / "state")
    return {name: (leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()) for name, leaf in saved.items()}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _TIMED}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
