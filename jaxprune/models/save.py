"""Write a classifier as the folder of an ordinary Hugging Face checkpoint, which `load_classifier` reads back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.errors import UsageError
from jaxprune.models.config import EncoderConfig
from jaxprune.models.convert import modules
from jaxprune.models.encoder import SequenceClassifier
from jaxprune.models.hub import VOCABULARIES
from jaxprune.models.pretrained import parameter_shapes
from jaxprune.models.weights import SINGLE
from jaxprune.sites import flatten

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", *VOCABULARIES)


def save_classifier(
    folder: str | os.PathLike[str],
    config: EncoderConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Path:
    """Write config.json and model.safetensors, float32, under the names that `transformers` gives them.

    A model whose inner widths differ from layer to layer has them in config.json as `intermediate_sizes`, `key_dims` and
    `value_dims`; `transformers`, which does not know these, refuses its weights.

    Args:
      folder: made if it does not exist; files of the same names are replaced.
      config: describes the model.
      params: its parameters, adapters merged.
      tokenizer: folder whose tokenizer files to copy (`Pretrained.folder`); None for none.

    Raises:
      UsageError: the parameters do not fit the configuration, or config.json cannot say the configuration.
    """
    from safetensors.numpy import save_file
    from transformers import AutoConfig

    said = config.to_hf()
    again = EncoderConfig.from_hf(AutoConfig.for_model(**said), config.num_labels, config.dtype)
    lost = [f.name for f in dataclasses.fields(config) if getattr(again, f.name) != getattr(config, f.name)]
    if lost:
        raise UsageError(
            f"config.json of {config.family} cannot say {lost[0]}={getattr(config, lost[0])!r} beside the other settings, "
            f"which give {getattr(again, lost[0])!r}; make them agree"
        )
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    for path in [found for pattern in _TOKENIZER for found in Path(tokenizer).glob(pattern)] if tokenizer else ():
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return folder
