"""One fine-tuning run from settings to files: load, plan, train, report.

Everything that can be wrong with the input is found before the output folder is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.run import settings_file
from experiments.run.clock import Clock
from experiments.run.config import RunConfig
from experiments.run.console import say
from experiments.run.folder import Folder
from experiments.run.loading import load
from experiments.run.one import Run
from experiments.run.record import MADE
from experiments.run.stopping import Stop, Stopped
from jaxprune import report
from jaxprune.checkpoint import Checkpoints
from jaxprune.errors import UsageError
from jaxprune.train import fit


def run(config: RunConfig) -> dict[str, Any]:
    """Run one fine-tuning, print what happens, and return what `summary.json` holds."""
    clock = Clock()
    given, config = config, config.resolve()
    assert config.task and config.output_dir
    with Folder(config.output_dir, MADE) as folder:
        folder.check(resume=config.resume, overwrite=config.overwrite, inputs=inputs(config))
        checkpoints = Checkpoints(folder.path / "checkpoints", keep=config.keep or 1)
        if config.resume and (summary := _finished(config, folder)):
            return summary
        kept, task = _look_back(config, checkpoints), config.chosen()
        settings = settings_file.written(given, config)
        one = Run(config, settings, task, load(config, task, clock), folder, checkpoints, clock)
        state = one.begin(one.plan()) if kept is None else one.resume(kept)
        done = int(state.step)
        say("compiling", f"the training step; {one.steps - done:,} steps follow")
        with checkpoints, Stop("stopping after this step, with everything saved") as stop:
            with clock.timing("train"):
                state = fit(
                    one.step, one.params, state, one.batches(done), total_steps=one.steps, log=one.recorder.log,
                    pause_at=one.pauses, pause=one.pause, stop=stop,
                )  # fmt: skip
            one.close(state)
            if stop() and int(state.step) < one.steps:
                raise Stopped(stop.signal, f"after step {int(state.step)}; saved, and --resume goes on from there")
        return one.write(state)


def inputs(config: RunConfig) -> dict[str, Path]:
    """Return flag -> folder or file of what a run reads, where it lies on this machine."""
    given = {
        "--model": Path(config.model or ""), "--data-dir": config.data_dir, "--train-file": config.train_file,
        "--validation-file": config.validation_file,
    }  # fmt: skip
    return {flag: path for flag, path in given.items() if path and path.exists()}


def _finished(config: RunConfig, folder: Folder) -> dict[str, Any] | None:
    """Return the summary of a run that has ended; None where there is none, or it must be written again."""
    if not folder.finished:
        return None
    path = folder.path / "summary.json"
    try:
        summary = json.loads(path.read_bytes())
        changes = config.differences(summary["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        say("note", f"{path} is damaged; it is made again from the last checkpoint")
        return None
    if changes:
        raise _other_settings(config, changes)
    say("finished", f"{folder.path}/ holds a finished run; nothing is left to resume")
    if not (folder.path / "report.html").exists():
        folder.own("report.html")
        report.write_page(folder.path)
    return summary


def _look_back(config: RunConfig, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Return what the run in the output folder knew when it was last saved, or None where a run begins."""
    if not config.resume:
        return None
    if checkpoints.latest() is None:
        say("note", f"nothing to resume in {checkpoints.folder}; the run begins")
        return None
    kept = checkpoints.extra()
    if changes := config.differences(kept["config"]):
        raise _other_settings(config, changes)
    return kept


def _other_settings(config: RunConfig, changes: str) -> UsageError:
    return UsageError(
        f"--resume: the run in {str(config.output_dir)!r} has other settings: {changes}; use its own, or another --output-dir"
    )
