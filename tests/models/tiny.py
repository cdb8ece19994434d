"""Tiny models of the three families: odd sizes, reproducible weights, files as the hub has them."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("bert", "roberta", "distilbert")
LENGTH = 17  # the longest example of the tiny models
NUM_LABELS = 3
MINILM = "sentence-transformers/all-MiniLM-L6-v2"

_COMMON = {"vocab_size": 101, "num_labels": NUM_LABELS}
_BERT = {
    **_COMMON,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 52,
    "hidden_act": "gelu",
}

CONFIGS = {
    "bert": {**_BERT, "model_type": "bert", "max_position_embeddings": LENGTH, "type_vocab_size": 3, "pad_token_id": 0},
    "roberta": {
        **_BERT,
        "model_type": "roberta",
        "max_position_embeddings": LENGTH + 2,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
    },
    "distilbert": {
        **_COMMON,
        "model_type": "distilbert",
        "dim": 36,
        "n_heads": 3,
        "n_layers": 2,
        "hidden_dim": 52,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
    },
}


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Make weights from names and shapes alone; RandomState's streams are frozen, so they never change."""
    arrays = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        # Large enough for the activations to leave their linear range and the attention its uniform one.
        scale = 0.2 if len(shape) == 2 else 0.1
        norm = "norm" in name.lower() and name.endswith("weight")
        arrays[name] = (scale * noise + norm).astype(np.float32)
    return arrays


def batch(pad: int, types: int, rows: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    """Make a right-padded batch with examples of 1 to LENGTH tokens, the longest included."""
    rng = np.random.RandomState(seed)
    lengths = np.concatenate([[LENGTH, 1], rng.randint(2, LENGTH, rows - 2)])
    mask = np.arange(LENGTH)[None] < lengths[:, None]
    ids = np.where(mask, rng.randint(3, 101, (rows, LENGTH)), pad)
    return {
        "input_ids": ids,
        "attention_mask": mask.astype(np.int64),
        "token_type_ids": np.where(mask, rng.randint(0, max(types, 1), (rows, LENGTH)), 0),
        "labels": rng.randint(0, NUM_LABELS, rows),
    }


def golden(family: str) -> dict[str, np.ndarray]:
    """Read a golden file of `make_golden.py`."""
    with np.load(GOLDEN / f"{family}.npz") as file:
        return dict(file)


def state(family: str) -> dict[str, np.ndarray]:
    """Make the tiny model's weights under the names that transformers gives them."""
    return weights(json.loads(str(golden(family)["shapes"])))


def save(folder: Path, config: dict, arrays: dict[str, np.ndarray]) -> Path:
    """Write a model folder: config.json and one safetensors file."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    return folder


def jit(function):
    """Compile for the tests: compiling is nearly all the time they take, and the lowest level halves it."""
    import jax

    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


@functools.cache
def _compiled(model):
    return jit(lambda params, ids, kwargs, rngs: model.apply({"params": params}, ids, rngs=rngs, **kwargs))


def logits(model, params, ids, rngs=None, **kwargs):
    """Apply a model, compiled: operation by operation it would take longer still."""
    return _compiled(model)(params, ids, kwargs, rngs)
