"""What a run reads before it begins: the model, its sites, and the task's tokens, cut into batches."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data.packing import Batches, evaluation_batches, single_example_batches
from experiments.run.clock import Clock
from experiments.run.config import RunConfig
from experiments.run.console import say
from experiments.run.device import device, idle_accelerator
from experiments.tasks.base import Task
from jaxprune.attaching import attach
from jaxprune.errors import UsageError, reason
from jaxprune.models import Pretrained, PretrainedDecoder
from jaxprune.models.hub import PACKAGES
from jaxprune.sites import Site
from jaxprune.train import make_predict


class Data(NamedTuple):
    """A task's tokens, cut into batches; those of `train` and `validation` the task still has to finish."""

    examples: int
    train: Batches
    validation: dict[str, Batches]
    labels: dict[str, np.ndarray]
    scoring: list[dict[str, np.ndarray]]
    samples: list[dict[str, np.ndarray]]


class Loaded(NamedTuple):
    """A model and what it learns.

    Attributes:
      forward: of `attach`.
      predict: of `make_predict`.
    """

    model: Pretrained | PretrainedDecoder
    sites: Sequence[Site]
    data: Data
    forward: Callable[..., Any]
    predict: Callable[..., jax.Array]


def load(config: RunConfig, task: Task, clock: Clock) -> Loaded:
    """Load a model and a task, and say what they are and what computes."""
    assert config.model
    say("device", device())
    if idle := idle_accelerator(jax.default_backend()):
        say("WARNING", idle)
    _use_compilation_cache()
    say("loading", config.model)
    with clock.timing("load"):
        model = task.load(config.model, config.dtype, config.seed)
    say(
        "model",
        f"{config.model} ({_origin(config.model, model)}); {'; '.join(model.notes) or 'all weights from the checkpoint'}",
    )
    sites = model.sites(config.target_patterns())
    say("loading", f"{task.name}: rows and their tokens")
    with clock.timing("load"):
        data = _load_data(config, task, model)
    say(
        "data",
        f"{task.name}: {data.examples:,} training examples in rows of {data.train.shapes[0][1]} tokens, "
        f"{data.train.tokens_per_real_token:.2f} tokens computed per real token",
    )
    forward = attach(model.model)
    return Loaded(model, sites, data, forward, make_predict(forward, task.outputs))


def for_seed(loaded: Loaded, config: RunConfig, task: Task) -> Loaded:
    """Return the same for a run with another seed: the order of its data, and what the checkpoint lacks of the model."""
    if config.seed == loaded.data.train.seed:
        return loaded
    assert config.model
    model, data = task.load(config.model, config.dtype, config.seed), loaded.data
    # What does not depend on the seed is held once.
    params = jax.tree.map(lambda x, y: x if np.array_equal(x, y) else y, loaded.model.params, model.params)
    return loaded._replace(
        model=dataclasses.replace(model, params=params), data=data._replace(train=data.train.reseeded(config.seed))
    )


def _load_data(config: RunConfig, task: Task, model: Pretrained | PretrainedDecoder) -> Data:
    """Load, tokenise and pack a task; scores see the first training examples."""
    assert config.max_length and config.batch_size and config.score_batches
    if config.max_length > model.config.max_length:
        raise UsageError(
            f"--max-length {config.max_length} is more than the model's {model.config.max_length} positions; lower it"
        )
    rows = task.rows(config.data_dir, config.max_train_samples)
    encoded = {split: task.encode(part, model, config.max_length) for split, part in rows.items()}
    few = rows["train"].first(task.scored_on(config.batch_size // (config.accumulate or 1), config.score_batches))
    few = task.encode(few, model, config.max_length)
    for note in (note for split in ("train", *task.validation) for note in encoded[split].notes):
        say("data", note)
    validation = {split: encoded[split] for split in task.validation}
    return Data(
        len(encoded["train"]),
        Batches(encoded["train"], config.batch_size, config.seed, microbatches=config.accumulate or 1),
        evaluation_batches(validation, task.evaluated_at_once(config.batch_size)),
        {split: part.labels for split, part in validation.items()},
        [task.finish(batch) for batch in Batches(few, -(-len(few) // config.score_batches), None).all()],
        [each_finished(task, single_example_batches(few, len(few)))],
    )


def each_finished(task: Task, singles: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Finish batches of one example, each by itself, along a leading axis."""
    done = [task.finish({name: x[i] for name, x in singles.items()}) for i in range(len(singles["weights"]))]
    return {name: np.stack([batch[name] for batch in done]) for name in done[0]}


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs, so that the second run of a shape starts at once; without a place for them, do not."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxprune" / "xla"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say("note", f"compiled programs are not kept for the next run: {root} ({reason(error)})")
        return
    # A full disk costs the next run its time, and nothing else.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(root))


def _origin(name: str, model: Pretrained | PretrainedDecoder) -> str:
    if model.origin == "package":
        return f"pip package {PACKAGES[name].requirement.partition('==')[0]}"
    return {"folder": "local folder", "cache": "hub cache"}.get(model.origin, model.origin)
