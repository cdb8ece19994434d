"""The model card beside what a run has trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from experiments.run.config import GlueConfig
from experiments.tasks.classification import Task


def card(config: GlueConfig, task: Task, metrics: Mapping[str, float], *, library: str | None) -> dict[str, bytes]:
    """Return `{"README.md": content}`: front matter as the Hub reads it, the scores, the labels, and how to predict.

    Args:
      config: the settings of the run.
      task: what was learned.
      metrics: the scores of the last evaluation, in percent.
      library: the library that loads the folder, as the Hub names it; None for jaxprune alone.
    """
    assert config.model
    about: dict[str, object] = {"pipeline_tag": "text-classification", "tags": ["jaxprune", config.method]}
    if library:
        about["library_name"] = library
    if not Path(config.model).is_dir():  # a folder of this machine means nothing elsewhere
        about["base_model"] = config.model
    # JSON is YAML too.
    matter = "\n".join(f"{name}: {json.dumps(value)}" for name, value in about.items())
    example = '"..."' if len(task.texts) == 1 else '("...", "...")'
    labels = ", ".join(f"{number} {name}" for number, name in enumerate(task.labels)) or "none, a number"
    scores = "\n".join(f"| {name} | {value:.2f} |" for name, value in metrics.items())
    text = f"""---
{matter}
---

# {config.method} on {task.name}

Reads {" and ".join(task.texts)}, at most {config.max_length} tokens. Labels: {labels}.

| score on the {task.validation[0].replace("_", ", ")} rows | % |
| --- | --- |
{scores}

```python
import jaxprune as jp

jp.load_run("THIS FOLDER").predict([{example}])
```
"""
    return {"README.md": text.encode(errors="backslashreplace")}
