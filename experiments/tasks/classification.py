"""Texts, or pairs of texts, to classes or one number: the tasks of GLUE, and the built-in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import grammar, tokens
from experiments.data.rows import Rows, find_files, load_rows
from experiments.data.tokens import Encoded
from experiments.tasks.metrics import compute
from jaxprune.models import Pretrained, load_classifier, save_classifier
from jaxprune.runs import PREDICT, Reading


@dataclass(frozen=True)
class Classification:
    """Describe one task.

    Args:
        name: the name on the command line, which is also the Hub's configuration name.
        texts: the one or two text columns, in the order in which the tokenizer takes them.
        labels: the name of each class, as the Hub has them; none for regression.
        metrics: everything that is computed; the first is the score.
        validation: validation splits; the score is taken on the first.
        hub: dataset on the Hugging Face Hub, or None for a built-in task.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    hub: str | None = "nyu-mll/glue"
    program = "experiments.glue"
    pipeline = "text-classification"
    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    lower_is_better = False

    @property
    def regression(self) -> bool:
        """Say whether the label is a real number."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Return the number of classes; 1 for regression."""
        return len(self.labels) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """Return every split that a run reads."""
        return ("train", *self.validation)

    def check_files(self, data_dir: Path | None) -> None:
        """Refuse a folder without the task's files, before anything is opened or downloaded."""
        find_files(self, data_dir)

    def rows(self, data_dir: Path | None = None, most: int | None = None) -> Mapping[str, Rows]:
        """Read and check every split, `train` first and of it at most so many rows."""
        find_files(self, data_dir)  # of which a built-in task has none
        found = grammar.generate() if self.hub is None else load_rows(self, data_dir)
        return {split: found[split].first(most if split == "train" else None) for split in self.splits}

    def load(self, model: str, dtype: Any, seed: int) -> Pretrained:
        """Load an encoder with a head of one output a class, or one in all."""
        return load_classifier(
            model, num_labels=self.num_labels, regression=self.regression, dtype=jnp.dtype(dtype), seed=seed
        )

    def encode(self, rows: Rows, model: Pretrained, max_length: int) -> Encoded:
        """Turn rows into tokens, which the model must know."""
        encoded = tokens.encode(rows, model.folder, max_length)
        tokens.check_ids(encoded, model.config, model.folder)
        return encoded

    def evaluated_at_once(self, batch_size: int) -> int:
        """Return four times the examples of a training batch: no gradients are kept."""
        return 4 * batch_size

    def scored_on(self, batch_size: int, batches: int) -> int:
        """Return 500, as the DPLoRA paper does."""
        return 500

    def finish(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Scale the weights to mean 1, so that fillers do not dilute the mean loss of a batch."""
        return {**batch, "weights": batch["weights"] * (batch["weights"].size / batch["weights"].sum())}

    def loss(self, apply: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """Return the mean cross-entropy, or squared error for regression."""
        logits = tokens.read(apply, batch, key)
        if self.regression:
            losses = jnp.square(logits[:, 0] - batch["labels"])
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.mean(losses * batch["weights"])

    def outputs(self, apply: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return the logits, `(examples, labels)`."""
        return tokens.read(apply, batch)

    def score(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute every metric, in percent."""
        return compute(self, outputs, labels)

    def use(self, folder: Path) -> str:
        """Say how to predict."""
        return f"predict with jp.load_run({str(folder)!r})"

    def save(self, folder: Path, config: Any, params: Any, beside: Mapping[str, bytes]) -> None:
        """Write a checkpoint as `transformers` does, with the names of the classes."""
        save_classifier(folder, config, params, labels=self.labels, beside=beside)

    def reading(self, base_model: str | None, max_length: int, dtype: str) -> dict[str, bytes]:
        """Return the file that says how texts are read and what the classes are called."""
        return {PREDICT: Reading(base_model, self.texts, self.labels, max_length, dtype).content()}

    def usage(self, max_length: int) -> str:
        """Say in the model card what is read and predicted, and how."""
        example = '"..."' if len(self.texts) == 1 else '("...", "...")'
        labels = ", ".join(f"{number} {name}" for number, name in enumerate(self.labels)) or "none, a number"
        return f"""Reads {" and ".join(self.texts)}, at most {max_length} tokens. Labels: {labels}.

```python
import jaxprune as jp

jp.load_run("THIS FOLDER").predict([{example}])
```"""


BUILT_IN = "grammar"
_SENTENCE_PAIR = ("sentence1", "sentence2")

_ENTAILED = ("entailment", "not_entailment")
_ACCEPTABLE = ("unacceptable", "acceptable")

# MRPC and QQP are scored by accuracy and STS-B by Pearson, as the DPLoRA and OPLoRA tables do; the rest is logged too.
TASKS = {
    task.name: task
    for task in (
        Classification("cola", ("sentence",), _ACCEPTABLE, metrics=("matthews", "accuracy")),
        Classification("sst2", ("sentence",), ("negative", "positive")),
        Classification("mrpc", _SENTENCE_PAIR, ("not_equivalent", "equivalent"), metrics=("accuracy", "f1")),
        Classification("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), metrics=("accuracy", "f1")),
        Classification("stsb", _SENTENCE_PAIR, (), metrics=("pearson", "spearman")),
        Classification(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        Classification("qnli", ("question", "sentence"), _ENTAILED),
        Classification("rte", _SENTENCE_PAIR, _ENTAILED),
        Classification(BUILT_IN, ("sentence",), _ACCEPTABLE, metrics=("accuracy", "matthews"), hub=None),
    )
}
