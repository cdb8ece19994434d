"""Run several methods on several tasks and seeds, and set them side by side.

Every run is a process of its own; flags of `experiments.glue` beside those here go to all of them. Runs that are finished
are read, not run again, and broken-off ones go on, so the command can be repeated until all is there. With `--together` those
that differ in their seed alone train in one process and one compiled step; of these, broken-off ones begin anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

import numpy as np

from experiments.run import together
from experiments.run.cli import parse_known
from experiments.run.config import RunConfig
from experiments.run.console import say
from experiments.run.fields import COMMON
from experiments.run.flags import FOLDER, chunks, name_of, parse_run
from experiments.run.folder import Folder
from experiments.run.settings import OF_THE_RUN, flag_text, owners
from experiments.run.stopping import Stop, Stopped, before_end
from experiments.tasks import get_task
from jaxprune.errors import UsageError, reason
from jaxprune.files import write_whole
from jaxprune.methods import METHODS
from jaxprune.models.hub import resolve
from jaxprune.report.figure import write_figure
from jaxprune.report.page import duration

PROGRAM = "experiments.compare"
# The first words of the lines of a run that are shown while it goes.
_PROGRESS = (
    "loading",
    "planning",
    "scoring",
    "solving",
    "compiling",
    "together",
    "evaluating",
    "pruning",
    "step",
    "writing",
)
# What the table takes from a summary.
_READ = (
    "metric",
    "score",
    "best_score",
    "adapter_params",
    "weight_params",
    "head_params",
    "seconds",
    "steps",
    "config",
)


class RunError(UsageError):
    """A run broke off; the others go on."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods on the same tasks and seeds; every other flag goes to experiments.glue, such as --epochs 3."""

    methods: tuple[str, ...] = tuple(sorted(METHODS))
    """which methods; NAME:FLAGS gives one settings of its own, such as "lora:--rank 4" """
    tasks: tuple[str, ...] = ("mrpc", "rte")
    """which tasks"""
    seeds: tuple[int, ...] = (42,)
    """which seeds"""
    together: bool = False
    """train the seeds of a method and task in one compiled step, and its ranks or budgets too where they are masks alone"""
    output_dir: Annotated[Path | None, FOLDER] = Path("runs/compare")
    """where runs, table and picture go"""


class Run(NamedTuple):
    """One run of the comparison: its flags and settings, and where it goes."""

    task: str
    method: str
    seed: int
    flags: list[str]
    folder: Path
    config: RunConfig


def run(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run what is missing, then write table.md and compare.png; return a row for each method and task."""
    config, flags = parse_known(CompareConfig, arguments, PROGRAM)
    assert config.output_dir
    for name in ("methods", "tasks", "seeds"):
        given = getattr(config, name)
        if not given or len(set(given)) < len(given):
            raise UsageError(f"--{name} {' '.join(map(str, given)) or 'without a value'}: name one or more, each once")
    with Folder(config.output_dir, ("table.md", "compare.png", "events.png", "logs/"), "comparison") as folder:
        folder.check(resume=True, overwrite=False, inputs={})
        # A wrong setting of the last method, or a run of other settings, would otherwise be found after hours.
        given = _for_methods(flags, [method.partition(":")[0] for method in config.methods])
        wanted = [
            _checked(config.output_dir, task, method, seed, given)
            for task in config.tasks for seed in config.seeds for method in config.methods
        ]  # fmt: skip
        for model in {str(one.config.model) for one in wanted}:
            resolve(model)
        groups = _grouped(wanted) if config.together else [[one] for one in wanted]
        folder.begin(clear=False)
        summaries: dict[tuple[str, str], list[dict[str, Any]]] = {}
        failures = []
        start = time.monotonic()
        done = 0
        for group in groups:
            first, done = done + 1, done + len(group)
            try:
                found = _summaries(group, folder, f"{_numbered(first, done)} of {len(wanted)}: {_described(group)}")
            except RunError as error:
                failures.append(f"{_described(group)}: {error}")
                say("failed", str(error))
                continue
            for one, summary in zip(group, found, strict=True):
                summaries.setdefault((one.task, one.method), []).append(summary)
                say(
                    "score",
                    f"{summary['metric']} {summary['score']:.2f} (best {summary['best_score']:.2f}), "
                    f"{_trained(summary):,} trained parameters, in {duration(summary['seconds']['total'])}; "
                    f"{duration(time.monotonic() - start)} so far",
                )
        rows = [_row(task, method, runs) for (task, method), runs in summaries.items() if runs]
        if not rows:
            raise RunError("; ".join(failures))
        text = table(rows)
        write_whole(folder.own("table.md"), text.encode())
        plot(rows, folder.own("compare.png"))
        pictures = "compare.png"
        if jumps := _jumps(summaries):
            plot_events(jumps, folder.own("events.png"))
            pictures += ", events.png"
        print(f"\n{text}")
        say("files", f"{config.output_dir}/: table.md, {pictures}, logs/, and a folder for every run")
        if failures:
            missing = len(wanted) - sum(map(len, summaries.values()))
            raise RunError(f"{missing} of {len(wanted)} runs are missing in the table: {'; '.join(failures)}")
        return rows


# A flag with its values, and the methods that it goes to; None for all.
ForMethods = tuple[list[str], Sequence[str] | None]


def _for_methods(flags: Sequence[str], methods: Sequence[str]) -> list[ForMethods]:
    """Say for every flag which methods get it: one of some methods alone goes to those that have it.

    Raises:
      UsageError: none of the compared methods has it, but another does.
    """
    found: list[ForMethods] = []
    for flag in chunks(flags):
        name, having = name_of(flag), None
        if name not in COMMON and (known := owners(name)):
            having = [method for method in methods if method in known]
            if not having:
                raise UsageError(
                    f"{flag_text(name)} is no setting of {', '.join(methods)}; {', '.join(known)} "
                    f"{'has' if len(known) == 1 else 'have'} it"
                )
        found.append((flag, having))
    return found


def _checked(parent: Path, task: str, method: str, seed: int, flags: Sequence[ForMethods]) -> Run:
    name, _, own = method.partition(":")
    folder = parent / "-".join([task, name, *own.replace("--", "").split(), str(seed)]).replace("/", "_")
    common = [flag for flag, methods in flags if methods is None or name in methods]
    all_ = [
        "--method",
        name,
        "--task",
        task,
        "--seed",
        str(seed),
        *(text for flag in common for text in flag),
        *own.split(),
    ]
    config = parse_run(all_, PROGRAM).resolve()
    if (config.method, config.task, config.seed) != (name, task, seed):
        raise UsageError(
            "--method, --task and --seed of single runs are not for here; give --methods, --tasks and --seeds"
        )
    config.chosen().check_files(config.data_dir)
    if (found := _read(folder)) and (changes := config.differences(found["config"])):
        raise UsageError(f"the finished run in {str(folder)!r} has other settings: {changes}; use another --output-dir")
    return Run(task, method, seed, all_, folder, config)


def _grouped(wanted: Sequence[Run]) -> list[list[Run]]:
    """Put runs that train together side by side; finished ones stay alone."""
    groups: dict[str, list[Run]] = {}
    for one in wanted:
        entry, plain = one.config.entry, one.config.plain()
        # Where a method prunes, or changes something with the steps, ranks and budgets are more than masks at its start.
        own = together.OWN if not set(OF_THE_RUN) & set(entry.settings) else ("seed", "output_dir", "overwrite")
        alike = json.dumps({name: value for name, value in plain.items() if name not in own}, sort_keys=True)
        groups.setdefault(str(one.folder) if _read(one.folder) else alike, []).append(one)
    for group in groups.values():
        together.check([one.config for one in group])
    return list(groups.values())


def _numbered(first: int, last: int) -> str:
    return f"run {first}" if first == last else f"runs {first} to {last}"


def _described(group: Sequence[Run]) -> str:
    """Name the runs of a group."""
    methods, seeds = (
        list(dict.fromkeys(values)) for values in zip(*((one.method, one.seed) for one in group), strict=True)
    )
    seeds = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{group[0].task} with {', '.join(methods)} and {seeds}{', together' * (len(group) > 1)}"


def _read(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run, None where there is none."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        if missing := [name for name in _READ if name not in summary]:
            raise ValueError(f"no {missing[0]!r} in it")
        return summary
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{str(folder / 'summary.json')!r} is damaged ({reason(error)}); move it away, and the run is ended "
            f"anew from its last checkpoint"
        ) from None


def _summaries(group: Sequence[Run], folder: Folder, named: str) -> list[dict[str, Any]]:
    """Return what runs left behind, after running what has not ended: a single one from where it was, several anew."""
    if len(group) == 1 and (summary := _read(group[0].folder)) is not None:
        say("finished", named)
        return [summary]
    program, how = (
        (get_task(group[0].task).program, "--resume") if len(group) == 1 else (together.PROGRAM, "--overwrite")
    )
    first, *others = ([*one.flags, how, "--output-dir", str(one.folder)] for one in group)
    command = ["-m", program, *first, *(flag for one in others for flag in ("+", *one))]
    log = folder.own("logs") / f"{group[0].folder.name}{'-together' * (len(group) > 1)}.txt"
    log.parent.mkdir(exist_ok=True)
    say("running", f"{named}; all that {'it prints' if len(group) == 1 else 'they print'} is in {log}")
    status = _run_and_log(command, log)
    found = [None if status else _read(one.folder) for one in group]
    if None in found:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RunError(f"status {status}, {' '.join(last)}")
    return [summary for summary in found if summary is not None]


def _run_and_log(glue: Sequence[str], log: Path) -> int:
    """Run a command and show what it is at; a signal is passed on, so that it saves what it has, and ends the comparison."""
    with open(log, "a") as file, open(log, errors="replace") as written:
        print(f"$ python {shlex.join(glue)}", file=file, flush=True)
        written.seek(0, os.SEEK_END)
        # A process group of its own: a Ctrl-C reaches it through this process alone, once.
        process = subprocess.Popen(
            [sys.executable, *glue], stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
        )
        with (
            process,
            before_end(process.kill),
            Stop("stopping the run, which saves what it has first", process.send_signal) as stop,
        ):
            while (status := _ended(process)) is None:
                _show(written)
        _show(written)
    if stop():
        raise Stopped(stop.signal, f"in {shlex.join(glue[-2:])}; the same command goes on from there")
    return status


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """Return the status of a process, None where it has not ended within half a second."""
    try:
        return process.wait(0.5)
    except subprocess.TimeoutExpired:
        return None


def _show(written: TextIO) -> None:
    """Print the lines that a run has added to its log since the last time and that say what it is at."""
    for line in written.read().splitlines():
        if re.match(rf"({'|'.join(_PROGRESS)}) ", line):
            print(f"  {line}", flush=True)


def _row(task: str, method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = [run["score"] for run in runs]
    return {
        "task": task, "method": method, "metric": runs[0]["metric"], "runs": len(runs), "score": float(np.mean(scores)),
        "spread": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "best": float(np.mean([run["best_score"] for run in runs])),
        "params": float(np.mean([_trained(run) for run in runs])),
        "step": float(np.mean([run["seconds"]["train"] / run["steps"] for run in runs])),
        "compile": float(np.mean([run["seconds"]["compile"] for run in runs])),
        "total": float(np.mean([run["seconds"]["total"] for run in runs])),
    }  # fmt: skip


Jumps = dict[tuple[str, str], list[list[dict[str, Any]]]]


def _jumps(summaries: dict[tuple[str, str], list[dict[str, Any]]]) -> Jumps:
    """Return the events of runs that measured losses at theirs (`--event-losses`), by task and method."""
    found = {
        key: [[event for event in run.get("events") or () if "loss_before" in event] for run in runs]
        for key, runs in summaries.items()
    }
    return {key: [events for events in runs if events] for key, runs in found.items() if any(runs)}


def _trained(summary: dict[str, Any]) -> int:
    """Count what is trained beside the task's head, which all methods have."""
    return summary["adapter_params"] + summary["weight_params"] - summary["head_params"]


def _named(method: str) -> str:
    return method.replace(":--", ", ").replace(" --", ", ")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out in Markdown: score of the last epoch (mean, and standard deviation over seeds), parameters, seconds."""
    head = ("task", "method", "score", "best epoch", "trained parameters", "s a step", "compiling, s", "in all, s")
    lines = [head, tuple("---" for _ in head)]
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.1f}"
        lines.append((
            f"{row['task']}, {row['metric']}", _named(row["method"]),
            f"{row['score']:.1f}{spread}", f"{row['best']:.1f}", f"{row['params']:,.0f}", f"{row['step']:.3f}",
            f"{row['compile']:.0f}", f"{row['total']:.0f}",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _look(number: int) -> tuple[str, str]:
    """Return colour and marker of a method, the same in every panel."""
    return f"C{number % 10}", "osD^v<>Pp*hX"[number % 12]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw score against adapter parameters, one panel a task, with error bars where there are several seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(6.2 * len(tasks), 4.6), dpi=150, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        here = [row for row in rows if row["task"] == task]
        for row in here:
            colour, marker = _look(methods.index(row["method"]))
            axes.errorbar(
                row["params"], row["score"], yerr=row["spread"], marker=marker, linestyle="none", capsize=2, color=colour,
                label=_named(row["method"]),
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("trained parameters, without the head")
        axes.set_ylabel(f"{here[0]['metric']}{', lower is better' * get_task(task).lower_is_better}")
        axes.set_title(task)
        axes.grid(alpha=0.25)
    known = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(known.values()), list(known), fontsize=7.5, loc="outside right center", frameon=False)
    write_figure(path, figure)


def plot_events(jumps: Jumps, path: Path) -> None:
    """Draw the loss right before and right after every pruning event, one panel a task, a line for each event and seed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    tasks, methods = (list(dict.fromkeys(key[i] for key in jumps)) for i in (0, 1))
    figure = Figure(figsize=(6.2 * len(tasks), 4.6), dpi=150, layout="constrained")
    shared = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(shared, tasks, strict=True):
        for (own, method), runs in jumps.items():
            if own != task:
                continue
            colour, marker = _look(methods.index(method))
            for events in runs:
                steps = [event["step"] for event in events]
                before, after = ([event[name] for event in events] for name in ("loss_before", "loss_after"))
                axes.vlines(steps, before, after, colors=colour, lw=1.2)
                axes.plot(steps, before, marker, ms=3.5, mfc="white", mec=colour, ls="none")
                axes.plot(steps, after, marker, ms=4.5, color=colour, ls=":", lw=0.7)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss: open before the event, filled after")
        axes.set_title(task)
        axes.grid(alpha=0.25)
    known = [
        Line2D([], [], color=_look(i)[0], marker=_look(i)[1], ms=4.5, lw=1.2, label=_named(method))
        for i, method in enumerate(methods)
    ]
    figure.legend(handles=known, fontsize=7.5, loc="outside right center", frameon=False)
    write_figure(path, figure)
