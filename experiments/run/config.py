"""The settings of a run: what the command line offers, and what stands where a flag and a preset are silent."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from experiments.presets import preset
from experiments.run import settings as method_settings
from experiments.run.fields import COMMON, DEFAULTS, FREE, Common
from experiments.run.settings import by_flag, checked, flag_text, further, layered, sort
from experiments.tasks import PROGRAMS, TASKS, get_task
from experiments.tasks.base import Task
from jaxprune.checks import MOST_STEPS, check, one_of
from jaxprune.errors import UsageError, shown
from jaxprune.methods import METHODS, Entry

# Flags that are one only of tasks that have a field of their name.
OF_TASKS = tuple(name for name, field in COMMON.items() if field.metadata["of_task"])
_PATHS = ("data_dir", "train_file", "validation_file", "output_dir")


@dataclass(frozen=True)
class RunConfig(Common):
    """The settings of a run: those that every run has, and those of its method."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """{setting of the method's factory: value}; `rank` where one number of components stands for several"""
    program: str | None = None
    """the program that reads the command line, whose tasks alone it runs; None where any task may be named"""

    @classmethod
    def of(cls, **values: Any) -> RunConfig:
        """Sort values, by the names of flags, into those of every run and those of the method."""
        common, settings = sort(_entry(values.get("method", Common.method)), values)
        return cls(**common, settings=settings)

    @property
    def entry(self) -> Entry:
        """Return what is registered of the method."""
        return _entry(self.method)

    def resolve(self) -> RunConfig:
        """Fill every open setting from the preset or the defaults, and check the values.

        Raises:
          UsageError: a value is out of range, or the preset does not fit.
        """
        if self.config is not None:
            raise UsageError(
                f"config {shown(str(self.config))} is for the command line; experiments.run.flags.parse_run reads it"
            )
        entry = self.entry
        for name, kind in _kinds().items():
            _check_flag(name, getattr(self, name), kind)
        self.target_patterns()
        settings = checked(entry, self.settings)
        for name, value in further(entry, self.set).items():
            if name in settings:
                raise UsageError(f"--set {name} and its own flag are both given; give one of them")
            settings[name] = value
        task = PROGRAMS[self.program or next(iter(PROGRAMS))].task if self.task is None else self.task
        program = self._program(task)
        model = _home("model", PROGRAMS[program].model if self.model is None else self.model)
        known = {} if self.preset is None else preset(self.preset, self.method, task)
        layers = [sort(entry, layer) for layer in (entry.defaults, known)]
        silent = {**DEFAULTS, **PROGRAMS[program].defaults, **layers[0][0], **layers[1][0]}
        open_ = {name: value for name, value in silent.items() if getattr(self, name) is None}
        folder = Path("runs") / f"{task}-{self.method}-{self.seed}" if self.output_dir is None else self.output_dir
        given = {name: getattr(self, name) for name in _PATHS} | {"output_dir": folder}
        paths = {name: Path(_home(name, path)) for name, path in given.items() if path is not None}
        settings = layered(entry, [*(layer for _, layer in layers), settings])
        named = dict(task=task, program=program, model=model)
        config = replace(self, **named, set=(), settings=settings, **{**open_, **paths})
        config._check()
        return config

    def chosen(self) -> Task:
        """Return the task of resolved settings, with the flags that its program alone has."""
        assert self.task
        task: Any = get_task(self.task)
        own = {name: getattr(self, name) for name in OF_TASKS if hasattr(task, name)}
        return replace(task, **own) if own else task

    def _program(self, task: str) -> str:
        """Return the program of a task, which must fit what else is said."""
        program = get_task(task).program
        if self.program not in (None, program):
            raise UsageError(f"--task {task} is one of {program}: python -m {program} --task {task}")
        for name in OF_TASKS:
            if getattr(self, name) is not None and not hasattr(get_task(task), name):
                raise UsageError(f"{flag_text(name)} is for tasks of {owner(name)}; --task {task} is one of {program}")
        return program

    def _check(self) -> None:
        assert self.learning_rate and self.final_learning_rate is not None and self.warmup is not None
        assert self.batch_size and self.accumulate
        if self.final_learning_rate > self.learning_rate:
            raise UsageError(
                f"--final-learning-rate {self.final_learning_rate} is out of range; expected 0 up to --learning-rate "
                f"{self.learning_rate}"
            )
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise UsageError(
                f"--warmup {self.warmup} is out of range; expected a share below 1, or a whole number of steps"
            )
        if self.schedule == "stages" and not self.entry.staged:
            staged = sorted(name for name, entry in METHODS.items() if entry.staged)
            raise UsageError(
                f"--schedule stages is for {' and '.join(staged)}, which have stages; --method is {self.method}"
            )
        if self.tensorboard and find_spec("tensorboardX") is None:
            raise UsageError("--tensorboard needs tensorboardX, which is not installed: pip install tensorboardX")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be split into --accumulate {self.accumulate} equal parts"
            )

    def plain(self) -> dict[str, Any]:
        """Return the settings by the names of their flags, as JSON gives them back."""
        known = {name: getattr(self, name) for name in COMMON if name not in ("config", "set")}
        known = {name: value for name, value in known.items() if value is not None or name not in OF_TASKS}
        known |= by_flag(self.entry, {**self.settings, **further(self.entry, self.set)})
        return json.loads(json.dumps(known, default=lambda value: list(value) if _is_list(value) else str(value)))

    def differences(self, other: Mapping[str, Any]) -> str:
        """Name the settings in which a run with the plain settings `other` is another run; nothing where it is this one.

        A setting that one of them does not know has its default.
        """
        defaults = {name: flag.default for name, flag in method_settings.flags(self.entry).items()}
        silent = {**replace(RunConfig(), **DEFAULTS).plain(), **defaults}
        own, there = {**silent, **self.plain()}, {**silent, **other}
        names = [*COMMON, *(name for name in {**own, **there} if name not in COMMON)]
        differ = [name for name in names if name not in FREE and own.get(name) != there.get(name)]
        return "; ".join(f"{flag_text(name)} was {there.get(name)!r}, is {own.get(name)!r}" for name in differ)

    def target_patterns(self) -> str | list[str]:
        """Return `targets` as `find_sites` takes it.

        Raises:
          UsageError: `targets` names nothing, or is not a regular expression.
        """
        targets = "all-linear" if self.targets is None else self.targets
        if targets == "all-linear":
            return targets
        if targets.startswith("re:"):
            expression = targets.removeprefix("re:")
            try:
                re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                raise UsageError(f"--targets {shown(targets)} is not a regular expression: {error}") from None
            if expression:
                return expression
        elif names := [part.strip() for part in targets.split(",") if part.strip()]:
            return names
        raise UsageError(
            f"--targets {targets!r} names no kernel; expected all-linear, path suffixes such as query,value, or "
            f"re:EXPRESSION"
        )


def offered(program: str) -> list[str]:
    """Name the common settings that a program has; what is no program of tasks has all."""
    return [name for name in COMMON if name not in OF_TASKS or program not in PROGRAMS or program == owner(name)]


def owner(name: str) -> str:
    """Return the program whose tasks have a field of a name."""
    return next(task.program for task in TASKS.values() if hasattr(task, name))


def total_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Return the optimiser steps of a run: its epochs, or --max-steps where those are fewer.

    Raises:
      UsageError: there are more than can be counted.
    """
    assert config.epochs
    steps = config.epochs * steps_per_epoch
    steps = steps if config.max_steps is None else min(steps, config.max_steps)
    if steps > MOST_STEPS:
        raise UsageError(
            f"--epochs {shown(config.epochs)} of {steps_per_epoch:,} steps are more than the {MOST_STEPS:,} steps that a run "
            f"can have; lower --epochs or set --max-steps"
        )
    return steps


def _entry(method: Any) -> Entry:
    return METHODS[one_of("--method", method, sorted(METHODS))]


@functools.cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(Common, include_extras=True)


def _is_list(value: Any) -> bool:
    return isinstance(value, range | tuple)


def _check_flag(name: str, value: Any, kind: Any) -> None:
    """Check the value of one flag against what its field says."""
    flag = flag_text(name)
    if name == "set":
        if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"--set {shown(value)} cannot be used; expected NAME=VALUE texts")
    elif name in (*_PATHS, "config"):
        if value is not None:
            _check_path(flag, value)
    else:
        check(flag, value, kind)
        if name == "model" and value is not None:
            _check_path(flag, value)


def _check_path(flag: str, value: str | Path) -> None:
    """Refuse what no file system has as a name."""
    if not isinstance(value, str | Path):
        raise UsageError(f"{flag} {shown(value)} cannot be used; expected a path")
    check(flag, str(value), str)
    if any(len(part.encode()) > 255 for part in Path(value).parts) or len(str(value).encode()) > 4000:
        raise UsageError(f"{flag} {shown(str(value))} is too long; expected names of at most 255 bytes each")


def _home(name: str, value: Any) -> str:
    """Replace `~` or `~USER` at the start of a path by the home folder."""
    if not str(value).startswith("~"):
        return str(value)
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:
        raise UsageError(
            f"{flag_text(name)} {shown(str(value))} cannot be used: {str(error).rstrip('.').lower()}"
        ) from None
