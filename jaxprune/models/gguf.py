"""Read the GGUF files of llama.cpp: a decoder's configuration and weights, under the names `transformers` gives them."""

from __future__ import annotations

import functools
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.checks import Range, number, whole
from jaxprune.errors import UsageError, clipped, reason, shown
from jaxprune.models.weights import TYPES, Stored

# Numbers in the metadata, by GGUF's type, as `struct` and NumPy both write them; beside them are texts and arrays.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)

# Our name and shape: d the width, q and k all heads of queries and keys, f the inner width, v the vocabulary.
_OUTER = {
    "token_embd.weight": ("model.embed_tokens.weight", "vd"),
    "output_norm.weight": ("model.norm.weight", "d"),
    "output.weight": ("lm_head.weight", "vd"),
}
_LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", "d"),
    "attn_q.weight": ("self_attn.q_proj.weight", "qd"),
    "attn_k.weight": ("self_attn.k_proj.weight", "kd"),
    "attn_v.weight": ("self_attn.v_proj.weight", "kd"),
    "attn_output.weight": ("self_attn.o_proj.weight", "dq"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "d"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "fd"),
    "ffn_up.weight": ("mlp.up_proj.weight", "fd"),
    "ffn_down.weight": ("mlp.down_proj.weight", "df"),
}
_QKV_BIASES = {
    "attn_q.bias": ("self_attn.q_proj.bias", "q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "k"),
    "attn_v.bias": ("self_attn.v_proj.bias", "k"),
}
_BIASES = {**_QKV_BIASES, "attn_output.bias": ("self_attn.o_proj.bias", "d")}
_FREQUENCIES = "rope_freqs.weight"


class Gguf(NamedTuple):
    """What a GGUF file holds: `config`, as config.json of the same model says it, and its arrays by name."""

    config: dict[str, Any]
    weights: dict[str, Stored]


def open_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Open the GGUF file of a Llama, Mistral (without its window) or Qwen2 decoder; values are read when asked for.

    llama.cpp stores rows 2i and 2i + 1 of a head of q and k where `transformers` has i and i + d/2; for Llama they are put back.
    Numbers that the file has in float32 are given as the shortest decimals that round to them: 1e-05, not 9.99999975e-06.
    `torch_dtype` is the type of the matrices, float32 where they are quantised.
    Factors of the RoPE frequencies become `rope_scaling` of type llama3 where low_freq_factor 1 and high_freq_factor 4, as all
    of Llama 3 has them, give these very factors.

    Raises:
      UsageError: the file is no GGUF, truncated or damaged; a key or array is missing, unknown or does not fit the others;
        the architecture, the type of an array or the scaling of RoPE is not supported; or the package gguf is not installed.

    Source: the GGUF specification, docs/gguf.md of ggml.
    """
    path = Path(path)
    try:
        cursor, metadata, count = _metadata(path)
        arrays = _arrays(cursor, metadata, count)
        config, names = _config(metadata, arrays)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for name, ours in names.items():
        array = arrays[name]
        if config["model_type"] == "llama":
            array.heads = heads.get(ours.split(".")[-2], 0)
        weights[ours] = Stored(path, ours, array)
    return Gguf(config, weights)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a GGUF file, with lists for arrays; the package gguf is not needed.

    Raises:
      UsageError: the file is no GGUF, or truncated or damaged there.
    """
    try:
        return _metadata(Path(path))[1]
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


@dataclass
class _Array:
    """An array in the file, with the interface of a slice of safetensors; what is quantised is read as F32."""

    kind: Any
    shape: tuple[int, ...]
    packed: np.ndarray
    heads: int = 0

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.kind.name if self.kind.name in TYPES else "F32"

    def __getitem__(self, index: slice) -> np.ndarray:
        from gguf.quants import dequantize

        values = dequantize(self.packed, self.kind)
        if self.heads:
            pairs = values.reshape(self.heads, -1, 2, *self.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(self.shape)
        return values[index]


class _Cursor:
    """Takes little-endian values from a file one after another, and never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise UsageError(
                f"is truncated or damaged: it ends at byte {len(self.data):,}, in its header; fetch it again"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _TEXT:
                return [self.text() for _ in range(count)]
            if kind in _NUMBERS:
                dtype = np.dtype("<" + _NUMBERS[kind])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        raise UsageError(f"is damaged: its metadata has a value of type {kind}; fetch it again")


def _metadata(path: Path) -> tuple[_Cursor, dict[str, Any], int]:
    """Return a cursor at the list of arrays, the metadata, and the number of arrays."""
    try:
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            start = file.read(4)
            cursor = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if start else None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read ({reason(error)}); name a GGUF file") from None
    if cursor is None or start != b"GGUF":
        raise UsageError(f"is not a GGUF file, as it starts with {shown(start)}; name one, or fetch it again")
    cursor.take(4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise UsageError(f"has GGUF version {version}; expected 2 or 3, little-endian: convert the model again")
    arrays, keys = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    try:
        for _ in range(keys):
            key = cursor.text()
            metadata[key] = cursor.value()
    except UnicodeDecodeError as error:
        raise UsageError(f"is damaged: a text in its metadata is not UTF-8 ({reason(error)}); fetch it again") from None
    return cursor, metadata, arrays


def _arrays(cursor: _Cursor, metadata: Mapping[str, Any], count: int) -> dict[str, _Array]:
    """Return the arrays by llama.cpp's names, each of which lies wholly in the file."""
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        try:
            name = cursor.text()
        except UnicodeDecodeError as error:
            raise UsageError(f"is damaged: a name of an array is not UTF-8 ({reason(error)}); fetch it again") from None
        axes = cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        if name in entries or not shape or 0 in shape:
            raise UsageError(f"is damaged: {shown(name)} is there twice or has shape {shown(shape)}; fetch it again")
        entries[name] = shape, cursor.number("I"), cursor.number("Q")
    alignment = whole("general.alignment", metadata.get("general.alignment", 32), Range(1))
    start = -(-cursor.at // alignment) * alignment

    arrays = {}
    for name, (shape, code, offset) in entries.items():
        if (found := _block(code)) is None:
            raise UsageError(
                f"{name} has type {code}, which the installed gguf cannot turn into numbers; quantise the model in another "
                "way, or pip install -U gguf"
            )
        kind, values, size = found
        if shape[-1] % values:
            raise UsageError(
                f"is damaged: rows of {name} have {shape[-1]} values, no multiple of {values}; fetch it again"
            )
        row = shape[-1] // values * size
        length = math.prod(shape[:-1]) * row
        if start + offset + length > len(cursor.data):
            raise UsageError(
                f"is truncated: {name} ends at byte {start + offset + length:,} and the file at {len(cursor.data):,}; "
                "fetch it again"
            )
        packed = np.frombuffer(cursor.data, np.uint8, length, start + offset).reshape(*shape[:-1], row)
        arrays[name] = _Array(kind, shape, packed)
    return arrays


@functools.cache
def _block(code: int) -> tuple[Any, int, int] | None:
    """Return a type of array, the values in a block of it and the block's bytes; None where it cannot be read."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise UsageError(f"needs the package gguf ({reason(error)}); pip install 'jaxprune[gguf]'") from None
    try:
        kind = GGMLQuantizationType(code)
        values, size = GGML_QUANT_SIZES[kind]
        dequantize(np.zeros(size, np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return kind, values, size


def _config(metadata: Mapping[str, Any], arrays: Mapping[str, _Array]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the configuration, and our name for each array, all of which are there and of the right shape."""
    kind = metadata.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise UsageError(f"has the architecture {shown(kind)}; expected llama or qwen2")

    parts = whole("split.count", metadata.get("split.count", 1), Range(0))
    if parts > 1:
        raise UsageError(f"is one of {parts} parts; join them: llama-gguf-split --merge FIRST WHOLE")

    def count(key: str, default: Any = None) -> int:
        return whole(f"{kind}.{key}", _given(metadata, f"{kind}.{key}", default), Range(1))

    layers, width, heads = count("block_count"), count("embedding_length"), count("attention.head_count")
    if layers > len(arrays):
        raise UsageError(f"{kind}.block_count is {layers}, more than its {len(arrays)} arrays; fetch it again")
    pairs = count("rope.dimension_count", max(width // heads, 1))
    head = count("attention.key_length", pairs)
    if not head == count("attention.value_length", head) == pairs:
        raise UsageError(
            f"heads of {head} values, of which RoPE turns {pairs}, are not supported; expected keys and values of one size "
            "that are turned whole"
        )
    config = {
        "model_type": kind,
        "vocab_size": arrays["token_embd.weight"].shape[0] if "token_embd.weight" in arrays else 0,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": head,
        "intermediate_size": count("feed_forward_length"),
        "max_position_embeddings": count("context_length"),
        "rms_norm_eps": _decimal(metadata, f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _decimal(metadata, f"{kind}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in arrays,
    }
    leaves = dict(_LAYER)
    if kind == "qwen2":
        leaves |= _QKV_BIASES
    elif config.setdefault("attention_bias", any(f"blk.0.{bias}" in arrays for bias in _BIASES)):
        leaves |= _BIASES
    names = _names(config, leaves, arrays)
    config["rope_scaling"] = _rope_scaling(config, metadata, arrays.get(_FREQUENCIES))
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            token = whole(f"tokenizer.ggml.{key}_token_id", token, Range(0, config["vocab_size"] - 1))
        config[f"{name}_token_id"] = token
    stored = {arrays[f"blk.0.{leaf}"].kind.name for leaf in leaves if leaf.endswith("weight") and "norm" not in leaf}
    plain = stored.pop() if len(stored) == 1 else ""
    config["torch_dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(plain, "float32")
    return config, names


def _names(
    config: Mapping[str, Any], leaves: Mapping[str, tuple[str, str]], arrays: Mapping[str, _Array]
) -> dict[str, str]:
    """Map llama.cpp's names to ours; what is missing, unknown or of another shape is refused."""
    sizes = {
        "d": config["hidden_size"],
        "q": config["num_attention_heads"] * config["head_dim"],
        "k": config["num_key_value_heads"] * config["head_dim"],
        "f": config["intermediate_size"],
        "v": config["vocab_size"],
    }
    wanted = {name: row for name, row in _OUTER.items() if name != "output.weight" or not config["tie_word_embeddings"]}
    for i in range(config["num_hidden_layers"]):
        wanted |= {f"blk.{i}.{leaf}": (f"model.layers.{i}.{ours}", axes) for leaf, (ours, axes) in leaves.items()}
    if absent := [name for name in wanted if name not in arrays]:
        raise UsageError(
            f"lacks {len(absent)} arrays: {clipped(', '.join(absent))}; fetch it, or convert the model, again"
        )
    if unknown := [name for name in arrays if name not in wanted and name != _FREQUENCIES]:
        raise UsageError(
            f"has {len(unknown)} arrays that a plain {config['model_type']} decoder has not: {clipped(', '.join(unknown))}; "
            "models with experts or other parts are not supported"
        )
    for name, (_, axes) in wanted.items():
        if (got := arrays[name].shape) != (want := tuple(sizes[axis] for axis in axes)):
            raise UsageError(f"{name} has shape {got}, expected {want} by the metadata; convert the model again")
    return {name: ours for name, (ours, _) in wanted.items()}


def _rope_scaling(
    config: Mapping[str, Any], metadata: Mapping[str, Any], frequencies: _Array | None
) -> dict[str, Any] | None:
    """Return what config.json says of RoPE's scaling."""
    key = f"{config['model_type']}.rope.scaling."
    kind = metadata.get(key + "type", "none")
    if kind == "linear" and frequencies is None:
        return {"rope_type": "linear", "factor": _decimal(metadata, key + "factor")}
    if kind != "none":
        raise UsageError(f"{key}type is {shown(kind)}; expected none, linear, or factors as Llama 3 has them")
    if frequencies is None:
        return None
    given = frequencies[:].astype(np.float64)
    scaling = {
        "rope_type": "llama3",
        "factor": float(str(np.float32(given.max()))),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": whole(
            key + "original_context_length", metadata.get(key + "original_context_length", 8192), Range(1)
        ),
    }
    expected = _llama3_factors(config["rope_theta"], config["head_dim"], scaling)
    if given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-5, atol=0):
        raise UsageError(f"{_FREQUENCIES} is no scaling of RoPE as Llama 3 has it; take the model's safetensors")
    return scaling


def _llama3_factors(theta: float, size: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """Return what Llama 3 divides each frequency by, which goes from 1 for high to `factor` for low ones.

    With f = theta^(-2i/size), n = f original / (2 pi) turns in the original context and s = (n - low) / (high - low) kept
    within 0 and 1, it is 1 / ((1 - s) / factor + s).
    """
    turns = theta ** (-np.arange(0, size, 2) / size) * scaling["original_max_position_embeddings"] / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _given(metadata: Mapping[str, Any], key: str, default: Any) -> Any:
    if (value := metadata.get(key, default)) is None:
        raise UsageError(f"lacks the metadata key {key}; fetch it, or convert the model, again")
    return value


def _decimal(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = number(key, _given(metadata, key, default), Range(above=0))
    return float(str(np.float32(value)))
