"""Build sequence classifiers: from a Hugging Face checkpoint, or with fresh weights."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import UsageError, reason, shown
from jaxprune.models.config import FAMILIES, EncoderConfig
from jaxprune.models.convert import classifier_torch_paths, convert
from jaxprune.models.encoder import SequenceClassifier
from jaxprune.models.hub import refuse_gguf, resolve, tokenizer_files
from jaxprune.models.weights import open_weights
from jaxprune.sites import Site, find_sites, flatten, unflatten

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """A classifier and what is known of its origin.

    Attributes:
      model: the Linen module.
      params: its parameters, nested dict of float32 arrays.
      config: its configuration.
      hf_config: its configuration as `transformers` has it, with `num_labels` and `problem_type` set.
      folder: where the files lie (the tokenizer's too).
      origin: "folder", "cache", "package" or "hub".
      initialised: paths of the parameters that the checkpoint does not have, or not in this shape.
      ignored: arrays of the checkpoint that a classifier has no use for.
      notes: one line for each reason to initialise.
      torch_paths: our module path -> module path in `transformers`' *ForSequenceClassification.
    """

    model: SequenceClassifier
    params: dict[str, Any]
    config: EncoderConfig
    hf_config: Any
    folder: Path
    origin: str
    initialised: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    torch_paths: dict[str, str]

    def sites(self, targets: str | Sequence[str] = "all-linear") -> tuple[Site, ...]:
        """Find the sites that `targets` selects."""
        return find_sites(self.params, targets)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the files of the tokenizer, {name: content}."""
        return {path.name: path.read_bytes() for path in tokenizer_files(self.folder)}


def load_classifier(
    name_or_path: str | os.PathLike[str],
    *,
    num_labels: int,
    regression: bool = False,
    dtype: Any = jnp.float32,
    seed: int = 0,
    revision: str | None = None,
) -> Pretrained:
    """Load a BERT, RoBERTa or DistilBERT checkpoint as a sequence classifier.

    Args:
      name_or_path: a folder with config.json and safetensors, or a hub id.
      num_labels: outputs of the head; 1 for regression.
      regression: whether the output is a number, not classes; recorded in `hf_config.problem_type`.
      dtype: type of the computation; parameters are float32 in any case.
      seed: of the head's weights where the checkpoint has none that fit.
      revision: branch, tag or commit on the hub.

    Raises:
      UsageError: the files are not found, damaged, of an unsupported kind, or disagree with config.json.
    """
    if regression and num_labels != 1:
        raise UsageError(f"num_labels={num_labels} with regression=True; a regression has num_labels=1")
    source = resolve(name_or_path, revision)
    EncoderConfig(num_labels=num_labels, dtype=dtype)  # refuses the caller's own before a file is blamed
    config = _read_config(refuse_gguf(source), num_labels, dtype)
    stored = open_weights(source.folder)
    if config.num_layers > len(stored):  # which are found out before they are built
        raise UsageError(
            f"{source.folder / 'config.json'}: {config.num_layers} layers are more than the {len(stored)} arrays beside it"
        )
    model = SequenceClassifier(config)
    shapes = parameter_shapes(model)
    weights = convert(stored, config, shapes, str(source.folder))
    for note in weights.notes:
        log.info("%s: %s", name_or_path, note)
    fresh = _initialise(config, weights.initialised, shapes, seed)
    flat = {path: jnp.asarray(fresh[path] if path in fresh else weights.arrays[path]) for path in shapes}
    return Pretrained(
        model=model,
        params=unflatten(flat),
        config=config,
        hf_config=_hf_config(config, regression),
        folder=source.folder,
        origin=source.origin,
        initialised=weights.initialised,
        ignored=weights.ignored,
        notes=weights.notes,
        torch_paths=classifier_torch_paths(config),
    )


def init_classifier(config: EncoderConfig, seed: int = 0) -> tuple[SequenceClassifier, dict[str, Any]]:
    """Make a classifier with fresh weights: N(0, initializer_range) for kernels and tables, LayerNorms at identity.

    >>> model, params = init_classifier(EncoderConfig(hidden_size=24, num_heads=2, num_layers=1, vocab_size=50))
    >>> model.apply({"params": params}, jnp.ones((3, 7), jnp.int32)).shape
    (3, 2)
    """
    model = SequenceClassifier(config)
    shapes = parameter_shapes(model)
    arrays = _initialise(config, shapes, shapes, seed)
    return model, unflatten({path: jnp.asarray(array) for path, array in arrays.items()})


def parameter_shapes(model: SequenceClassifier) -> dict[str, tuple[int, ...]]:
    """Map each parameter's path to its shape, without computing anything."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), ids)
    return {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}


def _initialise(
    config: EncoderConfig, paths: Iterable[str], shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, np.ndarray]:
    # numpy, because drawing 100 million normals with jax.random would compile first and take longer on a CPU. The
    # seed is joined with the path, so that a head is the same whatever else is initialised beside it.
    arrays = {}
    for path in paths:
        module, leaf = path.rsplit("/", 1)
        if leaf in ("scale", "bias"):
            arrays[path] = np.full(shapes[path], leaf == "scale", np.float32)
            continue
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        array = rng.standard_normal(shapes[path], dtype=np.float32)
        array *= np.float32(config.initializer_range)
        padded = module == "embeddings/word" or (
            module == "embeddings/position" and FAMILIES[config.family].padded_positions
        )
        if padded:
            array[config.pad_token_id] = 0.0
        arrays[path] = array
    return arrays


def _read_config(folder: Path, num_labels: int, dtype: Any) -> EncoderConfig:
    """Translate config.json; a field that it lacks is what `transformers` says for the family."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no config.json; expected the folder of a Hugging Face model")
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a JSON object ({reason(error)}); fetch it again") from None
    if not isinstance(given, dict):
        raise UsageError(f"{path} is not a JSON object but {shown(given)}; fetch it again")
    family = given.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UsageError(f"{path} has model_type {shown(family)}; expected one of {', '.join(FAMILIES)}")
    from transformers import AutoConfig

    # Of a file from outside `transformers` sees nothing: it asks more of it than is needed here, in many lines.
    plain = AutoConfig.for_model(family)
    aliases = plain.attribute_map
    said = {**plain.to_dict(), **{aliases.get(name, name): value for name, value in given.items()}}
    try:
        return EncoderConfig.from_hf(SimpleNamespace(**said), num_labels, dtype)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _hf_config(config: EncoderConfig, regression: bool) -> Any:
    from transformers import AutoConfig

    # One output that is no regression is none of the problems that `transformers` knows.
    problem = "regression" if regression else "single_label_classification" if config.num_labels > 1 else None
    return AutoConfig.for_model(**config.to_hf(), problem_type=problem)
