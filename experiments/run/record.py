"""What a run leaves behind while it goes: metrics.jsonl, and the scores of its evaluations."""

from __future__ import annotations

import contextlib
import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.run.clock import Clock
from experiments.run.config import RunConfig
from experiments.run.folder import Folder
from experiments.run.loading import Loaded
from experiments.tasks.base import Task
from jaxprune import report
from jaxprune.adapters import count, with_weights
from jaxprune.files import write_whole
from jaxprune.methods import Method
from jaxprune.train import NonFiniteError, TrainState

# What a run may leave in its folder.
MADE = (
    "summary.json", "config.yaml", "metrics.jsonl", "ranks.png", "ranks_after.png", "pruning.png", "report.html",
    "adapter/", "model/", "checkpoints/", "tensorboard/",
)  # fmt: skip


class Recorder:
    """Write metrics.jsonl (and TensorBoard events), evaluate, and remember the best score."""

    def __init__(
        self,
        config: RunConfig,
        folder: Folder,
        task: Task,
        loaded: Loaded,
        params,
        method: Method,
        schedule,
        clock: Clock,
        kept: dict[str, Any],
    ) -> None:
        self._folder, self._path, self._every = folder, folder.own("metrics.jsonl"), config.log_steps or 1
        self._task, self._data, self._predict = task, loaded.data, loaded.predict
        self._params, self._method = params, method
        self._schedule, self._clock = schedule, clock
        self._board = _tensorboard(folder.own("tensorboard")) if config.tensorboard else None
        self._losses: list[float] = []  # of the steps since the last note
        self._loss: float | None = None  # their mean at the last note
        self.last: dict[str, float] = kept.get("last", {})
        self.best: float = kept.get("best", math.inf if task.lower_is_better else -math.inf)

    def log(self, number: int, metrics: dict[str, float]) -> None:
        """Write a training line every `log_steps` steps."""
        self._losses.append(metrics["loss"])
        if number % self._every == 0:
            rate = float(self._schedule(number - 1))
            self._write(number, {**metrics, "learning_rate": rate})

    def evaluate(self, number: int, state: TrainState) -> str:
        """Evaluate every validation split, write a line each, and return what there is to say of it."""
        with self._clock.timing("eval"):
            adapters, masks = self._method.seen(state.method_state, state.adapters, state.masks)
            params = with_weights(self._params, state.weights)
            for split, batches in self._data.validation.items():
                finished = map(self._task.finish, batches.all())
                outputs = [self._predict(params, adapters, masks, batch) for batch in finished]
                found = batches.restore(jax.device_get(outputs))
                if not np.isfinite(found).all():
                    raise NonFiniteError(
                        f"step {number}: the outputs on {split} are not finite; lower the learning rate"
                    )
                metrics = self._task.score(found, self._data.labels[split])
                self._write(number, {"split": split, **metrics})
                if split == self._task.validation[0]:
                    self.last = metrics
                else:
                    self.last |= {f"{split}/{name}": value for name, value in metrics.items()}
        score = self.last[self._task.metrics[0]]
        self.best = min(self.best, score) if self._task.lower_is_better else max(self.best, score)
        counted = parameters(state)
        return f"{self._task.metrics[0]} {score:.2f} (best {self.best:.2f}), {said(counted)}"

    @property
    def worth(self) -> float | None:
        """Return the last score so that larger is better; None before the first evaluation."""
        score = self.last.get(self._task.metrics[0])
        return -score if score is not None and self._task.lower_is_better else score

    def loss_so_far(self) -> str:
        """Return the mean training loss of the steps since this was last asked for, and how it has changed."""
        if not self._losses:
            return ""
        before, self._loss = self._loss, sum(self._losses) / len(self._losses)
        self._losses.clear()
        return f", loss {self._loss:.4f}" + ("" if before is None else f" ({self._loss - before:+.4f})")

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of the evaluations on the first validation split so far, those before a resume too."""
        return [line for line in lines(self._path) if line.get("split") == self._task.validation[0]]

    def kept(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {"last": self.last, "best": self.best, "seconds": self._clock.total()}

    def close(self) -> None:
        """Finish the TensorBoard file, whose writer keeps the last events back."""
        if self._board:
            self._board.close()
            self._folder.complete("tensorboard")

    def _write(self, number: int, values: dict[str, Any]) -> None:
        report.append_jsonl(self._path, {"step": number, **values, "seconds": round(self._clock.total()["total"], 3)})
        if self._board:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{values.get('split', 'train')}/{name}", value, number)


def parameters(state: TrainState) -> dict[str, int]:
    """Count what is trained, as summary.json has it: adapters, leaves of the model, and of these the ones in the head."""
    size = lambda weights: sum(weight.size for weight in weights)  # noqa: E731
    return {
        "adapter_params": count(state.adapters, state.masks),
        "weight_params": size(state.weights.values()),
        "head_params": size(weight for path, weight in state.weights.items() if path.startswith("head/")),
    }


def said(counted: Mapping[str, int]) -> str:
    """Say how many parameters are trained beside the head's: of adapters, and of the model's own where there are any."""
    own = counted["weight_params"] - counted["head_params"]
    parts = [f"{counted['adapter_params']:,} adapter parameters"] if counted["adapter_params"] or not own else []
    return " and ".join([*parts, *([f"{own:,} parameters of the model"] if own else [])])


def versions() -> dict[str, str]:
    """Return the versions that a run's result depends on."""
    names = ("jaxprune", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "cvxpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def rewind(path: Path, step: int) -> None:
    """Take the lines of steps after `step` out of metrics.jsonl, as a resumed run writes them again, and what is no such line."""
    write_whole(path, b"".join(json.dumps(line).encode() + b"\n" for line in lines(path) if line["step"] <= step))


def lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl; one that was cut off when the process died, or is damaged, is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.append(record)
    return found


def _tensorboard(folder: Path) -> Any:
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    return SummaryWriter(str(folder))
