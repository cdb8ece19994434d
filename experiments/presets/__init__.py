"""Hyperparameters of the papers, as data: one file a paper, `PRESETS = {preset: {method: {task: {setting: value}}}}`.

Settings have the names of their flags, and any may be set. Budgets are numbers of adapter parameters. `warmup` is a ratio of all
steps where it is below 1 and a number of steps otherwise. Batch size is 32 where nothing else stands.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from jaxprune.checks import one_of
from jaxprune.errors import UsageError, shown

PRESETS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
for _file in pkgutil.iter_modules(__path__):
    if _file.name != "table":
        for _name, _methods in importlib.import_module(f"{__name__}.{_file.name}").PRESETS.items():
            PRESETS.setdefault(_name, {}).update(_methods)


def preset(name: str, method: str, task: str) -> dict[str, Any]:
    """Look a preset up.

    Raises:
      UsageError: there is no such preset, or it says nothing of the method or the task.

    Returns:
      {setting: value}.
    """
    one_of("--preset", name, PRESETS)
    if method not in PRESETS[name]:
        raise UsageError(f"--preset {name} has no settings for --method {method}; it has {', '.join(PRESETS[name])}")
    if task not in PRESETS[name][method]:
        raise UsageError(
            f"--preset {name} has no settings for --task {shown(task)}; it has {', '.join(PRESETS[name][method])}"
        )
    return PRESETS[name][method][task]
