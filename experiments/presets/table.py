"""Tables with a column a task."""

from __future__ import annotations

from typing import Any

TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")


def table(tasks: tuple[str, ...] = TASKS, /, **columns: Any) -> dict[str, dict[str, Any]]:
    """Turn {setting: one value, or a tuple with one per task} into {task: {setting: value}}; several words are a list."""
    return {
        task: {name: value[i] if isinstance(value, tuple) else value for name, value in columns.items()}
        for i, task in enumerate(tasks)
    }
