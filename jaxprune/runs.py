"""What a fine-tuning run has left in its folder, loaded to predict with."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, Masks, with_weights
from jaxprune.attaching import attach
from jaxprune.errors import UsageError, reason, shown
from jaxprune.files import checked_path
from jaxprune.inputs import whole
from jaxprune.models import Pretrained, load_classifier
from jaxprune.models.save import CONFIG
from jaxprune.peft import load_adapters, load_peft
from jaxprune.peft.own import ADAPTERS
from jaxprune.sites import find_sites
from jaxprune.train import make_predict

PREDICT = "predict.json"
_BATCH = 32  # rows computed together
_MULTIPLE = 16  # lengths are rounded up to it, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Reading:
    """What predicting takes beside weights: `predict.json` in `adapter/` and `model/` of a run.

    Attributes:
      base_model: hub id or folder of the checkpoint that adapters belong to; None where the weights are whole.
      texts: names of the one or two texts of an example.
      labels: name of each class; none for regression.
      max_length: tokens of an example, special ones included; longer texts are cut, the longer of a pair first.
      dtype: what the model computes in.
    """

    base_model: str | None
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    max_length: int
    dtype: str

    def content(self) -> bytes:
        """Return the content of the file."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()


class Prediction(NamedTuple):
    """The most probable class of an example, and the probability of every class."""

    label: str
    probabilities: dict[str, float]


class LoadedRun:
    """A fine-tuned classifier; `load_run` makes it.

    Attributes:
      reading: how texts are read, and the names of the classes.
      model: the model that the adapters are attached to.
      adapters: what was trained beside the model's own weights, which have the rest.
      masks: of the adapters.
    """

    def __init__(self, folder: Path, reading: Reading, model: Pretrained, adapters: Adapters, masks: Masks) -> None:
        self.reading, self.model, self.adapters, self.masks = reading, model, adapters, masks
        self._tokenizer = _tokenizer(folder, reading)
        self._apply = make_predict(attach(model.model), lambda apply, batch: apply(*batch))

    def __repr__(self) -> str:
        labels = ", ".join(self.reading.labels) or "a number"
        return f"<LoadedRun {' and '.join(self.reading.texts)} -> {labels}>"

    def predict(self, examples: Sequence[Any]) -> list[Prediction] | list[float]:
        """Predict the class of every example, or its number where the run was a regression.

        Args:
          examples: texts; pairs of texts where the task has two.

        Raises:
          UsageError: they are something else, or the tokenizer cannot read one.
        """
        logits = self.logits(examples)
        if not self.reading.labels:
            return [float(x) for x in logits[:, 0]]
        names = self.reading.labels
        rows = np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))
        return [
            Prediction(names[int(row.argmax())], {name: float(x) for name, x in zip(names, row, strict=True)})
            for row in rows
        ]

    def logits(self, examples: Sequence[Any]) -> np.ndarray:
        """Return the model's outputs, (examples, classes) in float32; arguments and errors as for `predict`."""
        encoded = self._encode(examples)
        outputs = np.zeros((len(encoded), max(1, len(self.reading.labels))), np.float32)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            length = -(-len(encoded[rows[-1]].ids) // _MULTIPLE) * _MULTIPLE
            shape = (1 << (len(rows) - 1).bit_length(), min(length, self.model.config.max_length))
            ids, segments, types = (np.zeros(shape, np.int32) for _ in range(3))
            for i, row in enumerate(rows):
                tokens = encoded[row]
                ids[i, : len(tokens.ids)], types[i, : len(tokens.ids)] = tokens.ids, tokens.type_ids
                segments[i, : len(tokens.ids)] = 1
            positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
            found = self._apply(self.model.params, self.adapters, self.masks, (ids, segments, positions, types))
            outputs[rows] = np.asarray(found)[: len(rows)]
        return outputs

    def _encode(self, examples: Sequence[Any]) -> list[Any]:
        count = len(self.reading.texts)
        expected = f"a list of {'texts' if count == 1 else 'pairs of texts'} ({' and '.join(self.reading.texts)})"
        if isinstance(examples, str | bytes | Mapping) or not isinstance(examples, Sequence):
            raise UsageError(f"examples {shown(examples)} cannot be used: expected {expected}")
        for i, one in enumerate(examples):
            texts = [one] if count == 1 else one
            if not isinstance(texts, tuple | list) or len(texts) != count or not all(isinstance(x, str) for x in texts):
                raise UsageError(f"example {i} is {shown(one)}: expected {expected}")
        try:
            return self._tokenizer.encode_batch(list(examples) if count == 1 else [tuple(one) for one in examples])
        except Exception as error:  # the library raises plain Exception
            raise UsageError(f"the texts cannot be tokenized: {reason(error)}") from None


def load_run(folder: str | os.PathLike[str], *, model: str | os.PathLike[str] | None = None) -> LoadedRun:
    """Load what a run of `experiments` has trained.

    Args:
      folder: the run's output folder, or its `adapter/` or `model/` wherever it lies now.
      model: the checkpoint that adapters belong to, where it is no longer where the run had it.

    Raises:
      UsageError: no finished run lies there, or it, or the checkpoint, is damaged or missing.

    >>> load_run("runs/grammar-oplora-42").predict(["The old teachers was reading a book."])  # doctest: +SKIP
    [Prediction(label='unacceptable', probabilities={'unacceptable': 0.99, 'acceptable': 0.01})]
    """
    given = checked_path("folder", folder)
    part = next((path for path in (given, given / "adapter", given / "model") if (path / PREDICT).is_file()), None)
    if part is None:
        raise UsageError(
            f"{str(given)!r} holds no finished run: there is no {PREDICT} in it, in adapter/ or in model/; end the run first"
        )
    reading = read_reading(part / PREDICT)
    whole_model = (part / CONFIG).is_file()
    if model is None and not whole_model and reading.base_model is None:
        raise UsageError(
            f"{part / PREDICT} names no base_model; pass model, the checkpoint that the adapters belong to"
        )
    base = load_classifier(
        part if whole_model else model or reading.base_model or "",
        num_labels=len(reading.labels) or 1,
        regression=not reading.labels,
        dtype=jnp.dtype(reading.dtype),
    )
    if whole_model:
        adapters, masks, weights = {}, {}, {}
    elif (part / ADAPTERS).is_file():
        adapters, masks, weights = load_adapters(part)
    else:
        adapters, masks, weights = load_peft(part, find_sites(base.params), torch_paths=base.torch_paths)
    if lost := [path for path in base.initialised if path not in weights]:
        raise UsageError(f"{part} does not fit {base.folder}: neither has {lost[0]!r}; name the checkpoint of the run")
    if reading.max_length > base.config.max_length:
        raise UsageError(
            f"{part / PREDICT}: max_length {reading.max_length} is more than the {base.config.max_length} positions of "
            f"{base.folder}"
        )
    return LoadedRun(
        part, reading, dataclasses.replace(base, params=with_weights(base.params, weights)), adapters, masks
    )


def read_reading(path: Path) -> Reading:
    """Read `predict.json`; a damaged one is a UsageError."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        reading = Reading(**{**said, "texts": tuple(said["texts"]), "labels": tuple(said["labels"])})
        named = all(isinstance(x, str) and x for x in (*reading.texts, *reading.labels, reading.base_model or "-"))
        length = whole(reading.max_length)
        if not (named and len(reading.texts) in (1, 2) and len(reading.labels) != 1 and length and 0 < length < 2**31):
            raise ValueError("it holds no texts, labels and max_length")
        if reading.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {shown(reading.dtype)}, not float32 or bfloat16")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged ({reason(error)}); run --resume on the run's folder writes it again"
        ) from None
    return reading


def _tokenizer(folder: Path, reading: Reading) -> Any:
    """Read the tokenizer as a run used it: cut to `max_length`, never padded."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        config = path.with_name("tokenizer_config.json")
        said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        tokenizer.no_padding()
        side = said.get("truncation_side", "right")
        tokenizer.enable_truncation(reading.max_length, strategy="longest_first", direction=side)
    except Exception as error:  # the library raises plain Exception
        raise UsageError(
            f"{path} cannot be used as a tokenizer: {reason(error)}; copy it from the base model"
        ) from None
    return tokenizer
