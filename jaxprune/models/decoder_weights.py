"""Decoders from Hugging Face checkpoints, or with fresh weights, and back.

One table says where every parameter lies, `{}` standing for the layer. Arrays are read one matrix at a time and put into
their stack, so that beside the model itself no more than one stack of one kernel lies in memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import UsageError, reason, shown
from jaxprune.files import checked_path, new_folder
from jaxprune.models.convert import EMBEDDING, LINEAR, Leaf, refuse
from jaxprune.models.decoder import Decoder
from jaxprune.models.decoder_config import DECODERS, DecoderConfig
from jaxprune.models.gguf import open_gguf
from jaxprune.models.hub import Source, resolve
from jaxprune.models.tokenizer import load_tokenizer
from jaxprune.models.weights import INDEX, SINGLE, TYPES, Stored, open_weights
from jaxprune.sites import Site, find_sites, flatten, unflatten, ungrouped

SCALE = (Leaf("scale", ("weight",)),)

# Our module -> the same in `transformers`; `layers` stands for every stack.
TABLE = {
    "embed": ("model.embed_tokens", EMBEDDING),
    "layers/attention_norm": ("model.layers.{}.input_layernorm", SCALE),
    "layers/attention/q_proj": ("model.layers.{}.self_attn.q_proj", LINEAR),
    "layers/attention/k_proj": ("model.layers.{}.self_attn.k_proj", LINEAR),
    "layers/attention/v_proj": ("model.layers.{}.self_attn.v_proj", LINEAR),
    "layers/attention/o_proj": ("model.layers.{}.self_attn.o_proj", LINEAR),
    "layers/mlp_norm": ("model.layers.{}.post_attention_layernorm", SCALE),
    "layers/mlp/gate_proj": ("model.layers.{}.mlp.gate_proj", LINEAR),
    "layers/mlp/up_proj": ("model.layers.{}.mlp.up_proj", LINEAR),
    "layers/mlp/down_proj": ("model.layers.{}.mlp.down_proj", LINEAR),
    "norm": ("model.norm", SCALE),
    "lm_head": ("lm_head", LINEAR),
}
# Buffers that older checkpoints carry.
_BUFFERS = r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.attention\.(bias|masked_bias)"
# What a shard of an export may hold.
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class PretrainedDecoder:
    """A decoder and what is known of its origin.

    Attributes:
      model: the Linen module.
      params: its parameters, nested dict of arrays: kernels in the configuration's dtype, norms in float32.
      config: its configuration.
      source: where the files lie, the tokenizer's too.
      ignored: arrays of the checkpoint that the model has no use for.
    """

    model: Decoder
    params: dict[str, Any]
    config: DecoderConfig
    source: Source
    ignored: tuple[str, ...]
    initialised: ClassVar[tuple[str, ...]] = ()
    notes: ClassVar[tuple[str, ...]] = ()

    @property
    def folder(self) -> Path:
        """Return where the files lie."""
        return self.source.folder

    @property
    def origin(self) -> str:
        """Return "folder", "cache", "package" or "hub"."""
        return self.source.origin

    def sites(self, targets: str | Sequence[str] = "all-linear") -> tuple[Site, ...]:
        """Find the sites that `targets` selects."""
        return find_sites(self.params, targets, scan_axis=0)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the files of the tokenizer, {name: content}."""
        return load_tokenizer(self.source).files()

    @property
    def torch_paths(self) -> dict[str, str]:
        """Map each of our modules to its path in `transformers`; `{}` is the layer."""
        return {path: torch for path, (torch, _) in TABLE.items()}


def load_decoder(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    groups: Sequence[int] | None = None,
    **settings: Any,
) -> PretrainedDecoder:
    """Load a Llama, Mistral or Qwen2 checkpoint.

    Args:
      name_or_path: a folder with config.json and safetensors, a GGUF file or a folder with one, or a hub id.
      dtype: type of kernels and computation.
      revision: branch, tag or commit on the hub.
      groups: layers in each stack of parameters. By default all are in one, but on a CPU each by itself: there a training step
        takes a fifth less time, because a scan copies what the backward pass needs.
      settings: further fields of `DecoderConfig` that are no matter of the checkpoint: `remat`, `attention`, chunks.

    Raises:
      UsageError: the files are not found, damaged, of an unsupported kind, or disagree with config.json.
    """
    DecoderConfig(dtype=dtype, **settings)  # refuses the caller's own before a file is blamed
    source = resolve(name_or_path, revision)
    config = read_decoder_config(source, dtype=dtype, **settings)
    if groups is None and jax.default_backend() == "cpu":
        groups = (1,) * config.num_layers
    config = dataclasses.replace(config, groups=tuple(groups or ()))
    stored = open_gguf(source.gguf).weights if source.gguf else open_weights(source.folder)
    arrays, ignored = _chosen(stored, config, str(source.gguf or source.folder))
    params = unflatten({path: _read(path, parts, config) for path, parts in arrays.items()})
    return PretrainedDecoder(Decoder(config), params, config, source, ignored)


def is_decoder(source: Source) -> bool:
    """Say whether a checkpoint is one that `load_decoder` takes, by its kind of file and its model_type."""
    if source.gguf is not None:
        return True
    try:
        given = json.loads((source.folder / "config.json").read_text(encoding="utf-8-sig"))
        return given.get("model_type") in DECODERS
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False  # whoever loads it says what is wrong


def read_decoder_config(source: Source, **settings: Any) -> DecoderConfig:
    """Read the configuration of a checkpoint, and nothing else of it.

    Args:
      source: what `resolve` returns.
      settings: fields of `DecoderConfig` that are no matter of the checkpoint.

    Raises:
      UsageError: it is damaged, or of a kind that the decoder does not compute.
    """
    path = source.gguf or source.folder / "config.json"
    try:
        if source.gguf:
            return DecoderConfig.from_hf(open_gguf(source.gguf).config, **settings)
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{source.folder} has no config.json; expected the folder of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a JSON object ({reason(error)}); fetch it again") from None
    if not isinstance(given, dict):
        raise UsageError(f"{path} is not a JSON object but {shown(given)}; fetch it again")
    try:
        return DecoderConfig.from_hf(given, **settings)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def init_decoder(config: DecoderConfig, seed: int = 0) -> tuple[Decoder, dict[str, Any]]:
    """Make a decoder with fresh weights: N(0, initializer_range) for kernels and table, norms at identity.

    >>> config = DecoderConfig(hidden_size=24, num_heads=2, num_kv_heads=1, head_dim=12, num_layers=2, vocab_size=50)
    >>> model, params = init_decoder(config)
    >>> model.apply({"params": params}, jnp.ones((3, 7), jnp.int32)).shape
    (3, 7, 50)
    """
    flat = {}
    for path, leaf in decoder_shapes(config).items():
        if path.endswith(("scale", "bias")):
            flat[path] = jnp.full(leaf.shape, path.endswith("scale"), leaf.dtype)
            continue
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        array = rng.standard_normal(leaf.shape, dtype=np.float32) * np.float32(config.initializer_range)
        flat[path] = jnp.asarray(array, leaf.dtype)
    return Decoder(config), unflatten(flat)


def regroup(
    params: Mapping[str, Any], config: DecoderConfig, groups: tuple[int, ...]
) -> tuple[dict[str, Any], DecoderConfig]:
    """Store the layers in other stacks: the same model and the same names of sites.

    Args:
      params: of `config`.
      config: the present one.
      groups: layers in each stack, in order.

    Raises:
      UsageError: the groups do not add up to the model's layers.
    """
    new = dataclasses.replace(config, groups=groups)
    moved: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        name, _, rest = path.partition("/")
        if ungrouped(name)[0] != "layers":
            moved[path] = leaf
            continue
        _, start = ungrouped(name)
        for target in new.stacks:
            first = ungrouped(target)[1]
            low, high = max(start, first), min(start + leaf.shape[0], first + new.stacks[target])
            if low < high:
                whole = (low, high) == (start, start + leaf.shape[0])
                part = leaf if whole else leaf[low - start : high - start]
                moved.setdefault(f"{target}/{rest}", []).append(part)
    joined = {
        p: v if not isinstance(v, list) else v[0] if len(v) == 1 else jnp.concatenate(v) for p, v in moved.items()
    }
    return unflatten(joined), new


def save_decoder(
    folder: str | os.PathLike[str],
    config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Write config.json and safetensors, in shards where they are large, under the names that `transformers` gives them.

    Args:
      folder: appears whole or not at all; a model that this function wrote there before is replaced.
      config: describes the model.
      params: its parameters, adapters merged.
      beside: {name: content} of further files, such as those of the tokenizer.

    Raises:
      UsageError: the parameters do not fit the configuration, or the folder cannot be written or holds other files.
    """
    from safetensors.numpy import save_file

    folder = checked_path("folder", folder)
    if not isinstance(config, DecoderConfig):
        raise UsageError(f"config {shown(config)} cannot be used: expected a DecoderConfig")
    flat, shapes = flatten(params), decoder_shapes(config)
    got = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    wanted = {path: leaf.shape for path, leaf in shapes.items()}
    if wrong := sorted(path for path in got.keys() | wanted.keys() if got.get(path) != wanted.get(path)):
        raise UsageError(
            f"{len(wrong)} parameters do not fit the configuration, first {wrong[0]}: got {got.get(wrong[0])}, expected "
            f"{wanted.get(wrong[0])}; save the parameters with the configuration they were made for"
        )
    places = {path: list(_places(path, leaf.shape)) for path, leaf in shapes.items()}
    sizes = {place.torch: _size(place, flat[path]) for path, own in places.items() for place in own}
    shards = _shards(sizes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    beside = beside or {}
    made = ("config.json", "model*.safetensors", *([INDEX] if len(shards) > 1 else []), *beside)
    with new_folder(folder, made, "model") as new:
        where = {place.torch: (path, place) for path, own in places.items() for place in own}
        for name, keys in zip(names, shards, strict=True):
            tensors = {key: _tensor(flat[where[key][0]], where[key][1], config) for key in keys}
            save_file(tensors, new / name, metadata={"format": "pt", "made_by": "jaxprune"})
        if len(shards) > 1:
            index = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            total = {"total_size": sum(sizes.values())}
            (new / INDEX).write_text(
                json.dumps({"metadata": total, "weight_map": index}, indent=2) + "\n", encoding="utf-8"
            )
        for name, content in beside.items():
            (new / name).write_bytes(content)
        said = {**config.to_hf(), "dtype": jnp.dtype(config.dtype).name}
        (new / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return folder


class _Place(NamedTuple):
    """Where a matrix, or a vector, of one of our leaves lies in a checkpoint."""

    torch: str
    names: tuple[str, ...]
    transpose: bool
    layer: int | None


def _places(path: str, shape: tuple[int, ...]) -> Iterator[_Place]:
    """Say where a leaf lies, the layers of a stack one after the other."""
    module, _, name = path.rpartition("/")
    own, start = ungrouped(module)
    torch, leaves = TABLE[own]
    leaf = next(leaf for leaf in leaves if leaf.name == name)
    for i in range(shape[0]) if "{}" in torch else [None]:
        at = torch if i is None else torch.format(start + i)
        yield _Place(f"{at}.{leaf.torch[0]}", tuple(f"{at}.{n}" for n in leaf.torch), leaf.transpose, i)


def decoder_shapes(config: DecoderConfig) -> dict[str, Any]:
    """Map each parameter's path to its shape and type, without computing anything."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(Decoder(config).init, jax.eval_shape(lambda: jax.random.key(0)), ids)
    return flatten(variables["params"])


def _chosen(
    stored: Mapping[str, Stored], config: DecoderConfig, origin: str
) -> tuple[dict[str, list[tuple[Stored, bool]]], tuple[str, ...]]:
    """Find what fills every leaf, matrix by matrix; every mismatch is collected before anything is raised."""
    # Checkpoints of the bare decoder leave the prefix out.
    known = {key if key.startswith(("model.", "lm_head.")) else f"model.{key}": value for key, value in stored.items()}
    chosen: dict[str, list[tuple[Stored, bool]]] = {}
    problems: list[tuple[str, str]] = []
    used: set[str] = set()
    for path, leaf in decoder_shapes(config).items():
        for place in _places(path, leaf.shape):
            key = next((name for name in place.names if name in known), None)
            want = leaf.shape if place.layer is None else leaf.shape[1:]
            want = want[::-1] if place.transpose else want
            if key is None:
                problems.append((place.torch, "is missing"))
                continue
            used.add(key)
            if (got := tuple(known[key].shape)) != want:
                problems.append((key, f"has shape {got}, expected {want}"))
            elif known[key].dtype not in TYPES:
                problems.append((key, f"has type {known[key].dtype}, expected {', '.join(TYPES)}"))
            else:
                chosen.setdefault(path, []).append((known[key], place.transpose))
    rest = [key for key in known if key not in used]
    ignored = tuple(key for key in rest if re.fullmatch(_BUFFERS, key) or (config.tied and key == "lm_head.weight"))
    refuse(problems + [(key, "is unexpected") for key in rest if key not in ignored], origin, config)
    return chosen, ignored


def _read(path: str, parts: list[tuple[Stored, bool]], config: DecoderConfig) -> jax.Array:
    dtype = jnp.float32 if path.endswith("scale") else config.dtype
    turned = lambda stored, transpose: stored.read().T if transpose else stored.read()  # noqa: E731
    if not ungrouped(path.partition("/")[0])[0] == "layers":
        return jnp.asarray(turned(*parts[0]), dtype)
    first = turned(*parts[0])
    stack = np.empty((len(parts), *first.shape), jnp.dtype(dtype))
    for i, part in enumerate(parts):
        stack[i] = first if i == 0 else turned(*part)
    return jnp.asarray(stack)


def _tensor(leaf: Any, place: _Place, config: DecoderConfig) -> np.ndarray:
    array = np.asarray(leaf if place.layer is None else leaf[place.layer]).astype(jnp.dtype(config.dtype))
    return np.ascontiguousarray(array.T if place.transpose else array)


def _size(place: _Place, leaf: Any) -> int:
    return leaf.size // (1 if place.layer is None else leaf.shape[0]) * leaf.dtype.itemsize


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards
