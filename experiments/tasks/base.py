"""What a run must know of a task; a family of tasks is one file beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from experiments.data.rows import Rows
from experiments.data.tokens import Encoded
from jaxprune.models import Pretrained, PretrainedDecoder


class Task(Protocol):
    """One task: its rows, the model that learns it, and how that is scored."""

    @property
    def name(self) -> str:
        """The name on the command line."""
        ...

    @property
    def program(self) -> str:
        """The command that runs it, such as `experiments.glue`."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Everything that `score` returns; the first is the score."""
        ...

    @property
    def validation(self) -> tuple[str, ...]:
        """Names of the validation splits; the score is taken on the first."""
        ...

    @property
    def pipeline(self) -> str:
        """What the Hugging Face Hub calls such a task, for the model card."""
        ...

    @property
    def lower_is_better(self) -> bool:
        """Say whether a lower score is the better one, as of a loss."""
        ...

    def check_files(self, data_dir: Path | None) -> None:
        """Refuse a folder without the task's files, before anything is opened or downloaded."""
        ...

    def rows(self, data_dir: Path | None, most: int | None) -> Mapping[str, Rows]:
        """Read and check every split, `train` first and of it at most so many rows."""
        ...

    def load(self, model: str, dtype: Any, seed: int) -> Pretrained | PretrainedDecoder:
        """Load a model with the head that the task needs, whose parameters lie under `head/`."""
        ...

    def encode(self, rows: Rows, model: Any, max_length: int) -> Encoded:
        """Turn rows into tokens and labels; labels have any shape behind the axis of the examples."""
        ...

    def evaluated_at_once(self, batch_size: int) -> int:
        """Return the examples in a batch of an evaluation, for runs with `batch_size` in one of training."""
        ...

    def scored_on(self, batch_size: int, batches: int) -> int:
        """Return how many training examples, in so many batches, methods may measure on before training."""
        ...

    def finish(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make a batch of `experiments.data.packing` into what `loss` and `outputs` take, on the host.

        Every batch comes through here: of training (with an axis of microbatches before all others, where there are several),
        of evaluation, and of the scores, there of single examples too. Batches of one shape become batches of one shape.
        """
        ...

    def loss(self, apply: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """Return the mean loss of a finished batch; over microbatches the mean of theirs is that of the step."""
        ...

    def outputs(self, apply: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return what is scored, `(examples, ...)`, without dropout."""
        ...

    def score(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute every metric, in percent, of the outputs of a whole split."""
        ...

    @property
    def task_type(self) -> str:
        """What PEFT calls such a task."""
        ...

    @property
    def auto_class(self) -> str:
        """The class of `transformers` that loads a checkpoint of it."""
        ...

    def use(self, folder: Path) -> str:
        """Say how to use what a run has left in a folder."""
        ...

    def save(self, folder: Path, config: Any, params: Any, beside: Mapping[str, bytes]) -> None:
        """Write a model without adapters as a checkpoint that `load` takes, with further files beside it, the tokenizer's too."""
        ...

    def reading(self, base_model: str | None, max_length: int, dtype: str) -> dict[str, bytes]:
        """Return the files that a folder needs so that what was trained can predict, `{name: content}`."""
        ...

    def usage(self, max_length: int) -> str:
        """Say in the model card what is read and predicted, and how."""
        ...
