"""All tasks by name; a family is one file, and one line here."""

from __future__ import annotations

from experiments.tasks import classification
from experiments.tasks.base import Task
from jaxprune.errors import UsageError, nearest, shown

TASKS: dict[str, Task] = {**classification.TASKS}
# What a command that is given none learns: it is built in, so that nothing has to be downloaded.
DEFAULT_TASK = classification.BUILT_IN


def get_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
      UsageError: there is no such task; the message holds the nearest names.
    """
    if name not in TASKS:
        raise UsageError(f"unknown task {shown(name)}; nearest: {nearest(name, TASKS)}; all: {', '.join(TASKS)}")
    return TASKS[name]
