"""All tasks by name, and the programs that run them; a family is one file, and one line in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.tasks import causal, classification
from experiments.tasks.base import Task
from jaxprune.errors import UsageError, nearest, shown


class Program(NamedTuple):
    """What a program takes where it is given nothing.

    Attributes:
      task: built in, so that nothing has to be downloaded.
      model: hub id of one that pip can install.
      defaults: {setting: value} that stand before those of `experiments.run.fields`.
    """

    task: str
    model: str
    defaults: Mapping[str, Any] = {}


TASKS: dict[str, Task] = {**classification.TASKS, **causal.TASKS}
PROGRAMS = {
    "experiments.glue": Program(classification.BUILT_IN, "sentence-transformers/all-MiniLM-L6-v2"),
    "experiments.alpaca": Program(causal.BUILT_IN, "HuggingFaceTB/SmolLM2-135M-Instruct", causal.DEFAULTS),
}


def get_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
      UsageError: there is no such task; the message holds the nearest names.
    """
    if name not in TASKS:
        raise UsageError(f"unknown task {shown(name)}; nearest: {nearest(name, TASKS)}; all: {', '.join(TASKS)}")
    return TASKS[name]
