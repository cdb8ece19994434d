"""Write a classifier as the folder of an ordinary Hugging Face checkpoint, which `load_classifier` reads back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.errors import UsageError, shown
from jaxprune.files import checked_path, new_folder
from jaxprune.models.config import EncoderConfig
from jaxprune.models.convert import modules
from jaxprune.models.encoder import SequenceClassifier
from jaxprune.models.hub import TOKENIZER, tokenizer_files
from jaxprune.models.pretrained import parameter_shapes
from jaxprune.models.weights import SINGLE
from jaxprune.sites import flatten

CONFIG = "config.json"
# Stands in the weights' own metadata: a model without it, such as one that was downloaded, is never replaced.
_MADE_BY = {"made_by": "jaxprune"}


def save_classifier(
    folder: str | os.PathLike[str],
    config: EncoderConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Write config.json and model.safetensors, float32, under the names that `transformers` gives them.

    A model whose inner widths differ from layer to layer has them in config.json as `intermediate_sizes`, `key_dims` and
    `value_dims`; `transformers`, which does not know these, refuses its weights.

    Args:
      folder: appears whole or not at all; a model that this function wrote there before is replaced.
      config: describes the model.
      params: its parameters, adapters merged.
      tokenizer: folder whose tokenizer files to copy (`Pretrained.folder`); None for none.
      labels: the name of each class, () for regression; by default LABEL_0, LABEL_1, and so on.
      beside: {name: content} of further files to write into the folder, such as a model card.

    Raises:
      UsageError: the parameters do not fit the configuration, config.json cannot say the configuration, or the folder cannot
        be written, holds other files, or is the tokenizer's.
    """
    from safetensors.numpy import save_file
    from transformers import AutoConfig

    folder = checked_path("folder", folder)
    source = None if tokenizer is None else checked_path("tokenizer", tokenizer)
    if not isinstance(config, EncoderConfig):
        raise UsageError(f"config {shown(config)} cannot be used: expected an EncoderConfig")
    said = config.to_hf()
    again = EncoderConfig.from_hf(AutoConfig.for_model(**said), config.num_labels, config.dtype)
    lost = [f.name for f in dataclasses.fields(config) if getattr(again, f.name) != getattr(config, f.name)]
    if lost:
        raise UsageError(
            f"config.json of {config.family} cannot say {lost[0]}={getattr(config, lost[0])!r} beside the other settings, "
            f"which give {getattr(again, lost[0])!r}; make them agree"
        )
    said |= _labelled(config, labels)
    flat, shapes = flatten(params), parameter_shapes(SequenceClassifier(config))
    got = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    wrong = sorted(path for path in got.keys() | shapes.keys() if got.get(path) != shapes.get(path))
    if wrong:
        raise UsageError(
            f"{len(wrong)} parameters do not fit the configuration, first {wrong[0]}: got {got.get(wrong[0])}, expected "
            f"{shapes.get(wrong[0])}; save the parameters with the configuration they were made for"
        )
    tensors = {}
    for module in modules(config):
        for leaf in module.leaves:
            array = np.asarray(flat[f"{module.path}/{leaf.name}"], np.float32)
            tensors[f"{module.torch}.{leaf.torch[0]}"] = np.ascontiguousarray(array.T if leaf.transpose else array)
    beside = beside or {}
    with new_folder(folder, (CONFIG, SINGLE, *TOKENIZER, *beside), "model") as new:
        _check_own(folder, source)
        save_file(tensors, new / SINGLE, metadata={"format": "pt", **_MADE_BY})
        for path in tokenizer_files(source) if source else ():
            shutil.copyfile(path, new / path.name)
        for name, content in beside.items():
            (new / name).write_bytes(content)
        (new / CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return folder


def _labelled(config: EncoderConfig, labels: Sequence[str] | None) -> dict[str, Any]:
    """Return what config.json says of the labels."""
    if labels is None:
        return {}
    if not labels:
        labels = ["LABEL_0"] if config.num_labels == 1 else []
        problem = "regression"
    else:
        problem = "single_label_classification"
    if len(labels) != config.num_labels or len(set(labels)) < len(labels):
        raise UsageError(f"labels {shown(labels)} do not fit: expected {config.num_labels} different names")
    names = {str(i): label for i, label in enumerate(labels)}
    return {"id2label": names, "label2id": {label: i for i, label in enumerate(labels)}, "problem_type": problem}


def _check_own(folder: Path, tokenizer: Path | None) -> None:
    """Raise where a folder holds a model that `save_classifier` has not written, or is the one to copy from."""
    from safetensors import SafetensorError, safe_open

    if tokenizer and not tokenizer.is_dir():
        raise UsageError(f"tokenizer {str(tokenizer)!r} is not a folder; name the one whose tokenizer files to copy")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if tokenizer and folder.samefile(tokenizer):
        raise UsageError(f"{folder} is where the tokenizer comes from; name a new folder for the model")
    try:
        with safe_open(folder / SINGLE, "numpy") as file:
            own = (file.metadata() or {}).items() >= _MADE_BY.items()
    except (OSError, SafetensorError):
        own = False
    if not own:
        raise UsageError(f"{folder} holds files that save_classifier has not written; name a new folder for the model")
