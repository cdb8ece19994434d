"""The model card beside what a run has trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from experiments.run.config import RunConfig
from experiments.tasks.base import Task


def card(config: RunConfig, task: Task, metrics: Mapping[str, float], *, library: str | None) -> dict[str, bytes]:
    """Return `{"README.md": content}`: front matter as the Hub reads it, the scores, the labels, and how to predict.

    Args:
      config: the settings of the run.
      task: what was learned.
      metrics: the scores of the last evaluation, in percent.
      library: the library that loads the folder, as the Hub names it; None for jaxprune alone.
    """
    assert config.model and config.max_length
    about: dict[str, object] = {"pipeline_tag": task.pipeline, "tags": ["jaxprune", config.method]}
    if library:
        about["library_name"] = library
    if not Path(config.model).is_dir():  # a folder of this machine means nothing elsewhere
        about["base_model"] = config.model
    # JSON is YAML too.
    matter = "\n".join(f"{name}: {json.dumps(value)}" for name, value in about.items())
    scores = "\n".join(f"| {name} | {value:.2f} |" for name, value in metrics.items())
    text = f"""---
{matter}
---

# {config.method} on {task.name}

{task.usage(config.max_length)}

| score on the {task.validation[0].replace("_", ", ")} rows | {"" if task.lower_is_better else "%"} |
| --- | --- |
{scores}
"""
    return {"README.md": text.encode(errors="backslashreplace")}
