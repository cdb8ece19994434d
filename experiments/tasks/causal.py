"""Instructions to responses, written by a decoder: rows as Alpaca has them, and the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import alpaca, instructions
from experiments.data.prompts import TEMPLATES, prompt_tokens, response_tokens
from experiments.data.rows import Rows
from experiments.data.tokens import Encoded
from jaxprune.errors import UsageError
from jaxprune.models.decoder_weights import load_decoder, save_decoder
from jaxprune.models.tokenizer import Tokenizer, load_tokenizer
from jaxprune.writing import WRITING, Writing

_SHORT = 800  # built-in rows that a run trains on unless it is told: five minutes on two cores
_FREE = ("loss", "perplexity", "token_accuracy", "exact_match")


@dataclass(frozen=True)
class Causal:
    """Describe one task; what stands below `built_in` are flags of the program.

    Args:
        name: the name on the command line.
        metrics: everything that is computed; the first is the score.
        built_in: whether its rows are made here.
        train_file: rows to train on; None for those of the folder, or else of the Hub.
        validation_file: rows to score on; None for those of the folder, or else a held-out part.
        template: a key of `experiments.data.prompts.TEMPLATES`.
        remat: what the model keeps for the backward pass.
        chunk: positions whose logits are made at once.
    """

    name: str
    metrics: tuple[str, ...] = _FREE
    built_in: bool = False
    train_file: Path | None = None
    validation_file: Path | None = None
    template: str = "alpaca"
    remat: str = "none"
    chunk: int = 128
    validation = ("validation",)
    program = "experiments.alpaca"
    pipeline = "text-generation"
    task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"

    @property
    def lower_is_better(self) -> bool:
        """Say whether the least score is the best."""
        return self.metrics[0] == "loss"

    def check_files(self, data_dir: Path | None) -> None:
        """Refuse missing files, or any for a built-in task, before anything is opened or downloaded."""
        given = {"data-dir": data_dir, "train-file": self.train_file, "validation-file": self.validation_file}
        if not self.built_in:
            alpaca.find(self.name, *given.values())
        elif said := [f"--{flag} {str(path)!r}" for flag, path in given.items() if path is not None]:
            raise UsageError(f"{self.name} is built in and reads no files, got {said[0]}; leave it out, or give --task")

    def rows(self, data_dir: Path | None = None, most: int | None = None) -> Mapping[str, Rows]:
        """Read and check both splits, `train` first and of it at most so many rows."""
        self.check_files(data_dir)
        if not self.built_in:
            found = alpaca.load(self.name, data_dir, self.train_file, self.validation_file)
            return {**found, "train": found["train"].first(most)}
        found = instructions.generate()
        train = found["train"].first(_SHORT if most is None else most)
        if most is None:
            note = (
                f"the first {_SHORT:,} of {len(found['train']):,} rows, for a first run; --max-train-samples takes more"
            )
            train = replace(train, notes=(*train.notes, note))
        return {**found, "train": train}

    def load(self, model: str, dtype: Any, seed: int) -> Any:
        """Load a decoder, which has all the weights that the task needs."""
        return load_decoder(model, dtype=jnp.dtype(dtype), remat=self.remat, loss_chunk=self.chunk)

    def encode(self, rows: Rows, model: Any, max_length: int) -> Encoded:
        """Turn rows into the tokens of prompt, response and its end; the latter two are predicted, with type 1.

        A response is cut where `max_length` ends. A prompt that fills it alone leaves nothing to predict: it is left out.
        """
        tokenizer = load_tokenizer(model.source)
        if TEMPLATES[self.template] is None and not tokenizer.inner.chat_template:
            raise UsageError(f"{tokenizer.origin} has no chat template; give --template {Causal.template}")
        encoded = encode(rows, tokenizer, self.template, max_length)
        if (largest := int(encoded.ids.max())) >= model.config.vocab_size:
            raise UsageError(
                f"the tokenizer of {str(model.folder)!r} makes token {largest}, where the model has "
                f"{model.config.vocab_size}; get a tokenizer and a model that belong together"
            )
        return encoded

    def evaluated_at_once(self, batch_size: int) -> int:
        """Return as many examples as are in a training batch."""
        return batch_size

    def scored_on(self, batch_size: int, batches: int) -> int:
        """Return as many as keep the batches as small as those of training, whose memory is known to suffice; at most 500."""
        return min(500, batch_size * batches)

    def finish(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return what the model takes of a batch of `experiments.data.packing`; see `finish`."""
        return finish(batch)

    def loss(self, apply: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> jax.Array:
        r"""Return the mean cross-entropy of the predicted tokens, $\sum_{rs} w_{rs}\, \mathrm{nll}_{rs}$."""
        nll, _ = _read(apply, batch)
        return jnp.sum(nll * batch["weights"])

    def outputs(self, apply: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return the sum of the log-likelihoods, negated, the tokens, and those that are right, `(examples, 3)`."""
        nll, correct = _read(apply, batch)
        real = batch["weights"] > 0
        sums = jnp.stack([jnp.where(real, nll, 0.0), real, real & correct.astype(bool)], -1).astype(jnp.float32)
        examples = len(batch["labels"])
        return jax.ops.segment_sum(sums.reshape(-1, 3), batch["example"].reshape(-1), num_segments=examples)

    def score(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        r"""Compute every metric of the outputs of a whole split.

        `loss` is the mean over the predicted tokens of all examples, in nats, and `perplexity` $e^{\mathrm{loss}}$.
        `token_accuracy` is the percentage of tokens that are the most probable one behind the right tokens before them.
        `exact_match` is that of examples in which all are: what greedy decoding writes is then the response, token by
        token, as each of its steps sees what was seen here.
        """
        nll, tokens, right = np.asarray(outputs, np.float64).T
        loss = float(nll.sum() / tokens.sum())
        found = {
            "loss": loss,
            "perplexity": float(np.exp(min(loss, 700.0))),  # the largest power that a float holds
            "token_accuracy": 100.0 * float(right.sum() / tokens.sum()),
            "exact_match": 100.0 * float(np.mean(right == tokens)),
        }
        return {name: found[name] for name in self.metrics}

    def use(self, folder: Path) -> str:
        """Say how to ask."""
        return f'ask with python -m jaxprune generate {folder} "..."'

    def save(self, folder: Path, config: Any, params: Any, beside: Mapping[str, bytes]) -> None:
        """Write a checkpoint as `transformers` does."""
        save_decoder(folder, config, params, beside=beside)

    def reading(self, base_model: str | None, max_length: int, dtype: str) -> dict[str, bytes]:
        """Return the file that says how an instruction is put to the model."""
        form = TEMPLATES[self.template]
        return {WRITING: Writing(base_model, form and form._asdict(), max_length, dtype).content()}

    def usage(self, max_length: int) -> str:
        """Say in the model card what is read and written, and how."""
        return f"""Reads an instruction in the form of the template `{self.template}` and writes a response; together at most
{max_length} tokens.

```
python -m jaxprune generate "THIS FOLDER" "..."
```"""


def encode(rows: Rows, tokenizer: Tokenizer, template: str, max_length: int) -> Encoded:
    """Turn rows into tokens; see `Causal.encode`.

    Args:
      rows: with the texts instruction, input and output.
      tokenizer: the model's.
      template: a key of `TEMPLATES`.
      max_length: most tokens of an example.

    Raises:
      UsageError: no row leaves anything to predict.
    """
    questions, inputs, answers = rows.texts
    prompts = prompt_tokens(tokenizer, template, list(zip(questions, inputs, strict=True)))
    pairs = list(zip(prompts, response_tokens(tokenizer, answers), strict=True))
    stay = np.array([len(prompt) < max_length for prompt, _ in pairs])
    if not stay.any():
        raise UsageError(
            f"the shortest prompt of {rows.source} has {min(map(len, prompts))} tokens, which leaves nothing of "
            f"--max-length {max_length}; raise it"
        )
    cut = sum(len(prompt) < max_length < len(prompt) + len(response) for prompt, response in pairs)
    notes = [
        f"{count:,} of the {len(rows):,} {what} --max-length {max_length}"
        for count, what in (
            (cut, f"responses of {rows.source} are cut at"),
            (int((~stay).sum()), f"rows of {rows.source} are left out, as their prompts alone fill"),
        )
        if count
    ]
    kept = [pair for pair in pairs if len(pair[0]) < max_length]
    made = [np.array([*prompt, *response][:max_length], np.int32) for prompt, response in kept]
    types = [np.arange(len(ids)) >= len(prompt) for ids, (prompt, _) in zip(made, kept, strict=True)]
    return Encoded(
        np.concatenate(made),
        np.concatenate(types).astype(np.int8),
        np.append(0, np.cumsum([len(ids) for ids in made])),
        rows.labels[stay],
        predicts=True,
        notes=(*rows.notes, *notes),
    )


def finish(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    r"""Return what the model takes of a batch.

    With $N$ predicted tokens in all $k$ microbatches of a step, a token's weight is $w = k / N$: the mean over the
    microbatches of $\sum w\, \mathrm{nll}$ is then the mean over all predicted tokens, wherever they lie.

    Args:
      batch: of `experiments.data.packing`, with `predicted` (R, S), and before these the k microbatches, if any.

    Returns:
      `input_ids`, `segment_ids`, `position_ids` (R, T) and `labels` (B,) as they were, and (R, S) each: `scored`, the place
      in its row of the token before a predicted one; `targets`, that one; `weights` w, 0 where there is none; `example`, its
      place in the batch.
    """
    if batch["input_ids"].ndim == 3:
        parts = [{name: x[i] for name, x in batch.items()} for i in range(len(batch["input_ids"]))]
        done = [finish(part) for part in parts]
        tokens = [np.count_nonzero(part["predicted"]) for part in parts]
        for part, count in zip(done, tokens, strict=True):
            part["weights"] *= np.float32(count * len(parts) / sum(tokens))
        return {name: np.stack([part[name] for part in done]) for name in done[0]}
    places = batch["predicted"]
    real = places > 0  # each example begins with its prompt
    row = np.arange(len(places))[:, None]
    owner = np.zeros(batch["input_ids"].size, np.int32)
    there = batch["weights"] > 0
    owner[batch["first_tokens"][there]] = np.flatnonzero(there)
    first = row * batch["input_ids"].shape[1] + places - batch["position_ids"][row, places]
    return {
        **{name: batch[name] for name in ("input_ids", "segment_ids", "position_ids", "labels")},
        "scored": np.where(real, places - 1, 0).astype(np.int32),
        "targets": np.where(real, batch["input_ids"][row, places], 0),
        "weights": (real / max(1, real.sum())).astype(np.float32),
        "example": np.where(real, owner[first], 0),
    }


def _read(apply: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the negative log-likelihood of the targets, and whether each is the most probable token."""
    return apply(
        batch["input_ids"],
        batch["segment_ids"],
        batch["position_ids"],
        scored=batch["scored"],
        targets=batch["targets"],
    )


BUILT_IN, FILES = "instructions", "alpaca"
# A first run on two cores is short.
DEFAULTS = dict(max_length=256, epochs=1, batch_size=16, learning_rate=1e-3, template="alpaca", remat="none", chunk=128)
TASKS = {
    task.name: task
    for task in (
        Causal(FILES),
        Causal(BUILT_IN, ("exact_match", *(name for name in _FREE if name != "exact_match")), built_in=True),
    )
}
