"""Where each parameter lies in a Hugging Face checkpoint: tables of (our module, torch module, kind), and their use.

`{i}` stands for the layer. Read one way the tables load weights, read the other way they name the modules for an
export. Every mismatch between a table and a checkpoint is collected before anything is raised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxprune.errors import UsageError, clipped
from jaxprune.models.config import EncoderConfig
from jaxprune.models.decoder_config import DecoderConfig
from jaxprune.models.weights import TYPES, Stored


class Leaf(NamedTuple):
    """One array of a module: our name, its names in checkpoints (newest first), whether it is transposed there."""

    name: str
    torch: tuple[str, ...]
    transpose: bool = False


LINEAR = (Leaf("kernel", ("weight",), transpose=True), Leaf("bias", ("bias",)))
NORM = (Leaf("scale", ("weight", "gamma")), Leaf("bias", ("bias", "beta")))  # gamma, beta: converted from TensorFlow
EMBEDDING = (Leaf("embedding", ("weight",)),)

_BERT_BODY = (
    ("embeddings/word", "embeddings.word_embeddings", EMBEDDING),
    ("embeddings/position", "embeddings.position_embeddings", EMBEDDING),
    ("embeddings/token_type", "embeddings.token_type_embeddings", EMBEDDING),
    ("embeddings/norm", "embeddings.LayerNorm", NORM),
    ("encoder/layer_{i}/attention/query", "encoder.layer.{i}.attention.self.query", LINEAR),
    ("encoder/layer_{i}/attention/key", "encoder.layer.{i}.attention.self.key", LINEAR),
    ("encoder/layer_{i}/attention/value", "encoder.layer.{i}.attention.self.value", LINEAR),
    ("encoder/layer_{i}/attention/out", "encoder.layer.{i}.attention.output.dense", LINEAR),
    ("encoder/layer_{i}/attention_norm", "encoder.layer.{i}.attention.output.LayerNorm", NORM),
    ("encoder/layer_{i}/mlp/fc1", "encoder.layer.{i}.intermediate.dense", LINEAR),
    ("encoder/layer_{i}/mlp/fc2", "encoder.layer.{i}.output.dense", LINEAR),
    ("encoder/layer_{i}/mlp_norm", "encoder.layer.{i}.output.LayerNorm", NORM),
)

_DISTILBERT_BODY = (
    ("embeddings/word", "embeddings.word_embeddings", EMBEDDING),
    ("embeddings/position", "embeddings.position_embeddings", EMBEDDING),
    ("embeddings/norm", "embeddings.LayerNorm", NORM),
    ("encoder/layer_{i}/attention/query", "transformer.layer.{i}.attention.q_lin", LINEAR),
    ("encoder/layer_{i}/attention/key", "transformer.layer.{i}.attention.k_lin", LINEAR),
    ("encoder/layer_{i}/attention/value", "transformer.layer.{i}.attention.v_lin", LINEAR),
    ("encoder/layer_{i}/attention/out", "transformer.layer.{i}.attention.out_lin", LINEAR),
    ("encoder/layer_{i}/attention_norm", "transformer.layer.{i}.sa_layer_norm", NORM),
    ("encoder/layer_{i}/mlp/fc1", "transformer.layer.{i}.ffn.lin1", LINEAR),
    ("encoder/layer_{i}/mlp/fc2", "transformer.layer.{i}.ffn.lin2", LINEAR),
    ("encoder/layer_{i}/mlp_norm", "transformer.layer.{i}.output_layer_norm", NORM),
)

# Below the prefix (`bert.`, `roberta.`, `distilbert.`), which checkpoints of the bare encoder leave out.
BODY = {
    "bert": (*_BERT_BODY, ("pooler", "pooler.dense", LINEAR)),
    "roberta": _BERT_BODY,
    "distilbert": _DISTILBERT_BODY,
}

# Beside the prefix.
HEAD = {
    "bert": (("head/out", "classifier", LINEAR),),
    "roberta": (("head/dense", "classifier.dense", LINEAR), ("head/out", "classifier.out_proj", LINEAR)),
    "distilbert": (("head/dense", "pre_classifier", LINEAR), ("head/out", "classifier", LINEAR)),
}

# What a fine-tuned classifier has no use for: buffers, and the heads of pretraining or of other tasks.
IGNORED = {
    "bert": r"embeddings\.position_ids|(cls|qa_outputs)\..*",
    "roberta": r"embeddings\.position_ids|(lm_head|pooler|qa_outputs)\..*",
    "distilbert": r"embeddings\.position_ids|(vocab_(transform|layer_norm|projector)|qa_outputs)\..*",
}

# Mismatches that a message shows, those of many layers counted as one.
SHOWN = 6

# What a checkpoint may lack, or hold for another number of labels: it is then initialised and reported.
OPTIONAL = r"(pooler|head/.*)"


class Module(NamedTuple):
    """One module of a model: its path, the path in `transformers`' *ForSequenceClassification, its arrays."""

    path: str
    torch: str
    leaves: tuple[Leaf, ...]


def modules(config: EncoderConfig) -> tuple[Module, ...]:
    """List the modules with parameters of the model that `config` describes."""
    found = []
    for path, torch, leaves in BODY[config.family]:
        if path == "embeddings/token_type" and not config.type_vocab_size:
            continue
        for i in range(config.num_layers if "{i}" in path else 1):
            found.append(Module(path.format(i=i), f"{config.family}.{torch.format(i=i)}", leaves))
    return (*found, *(Module(*row) for row in HEAD[config.family]))


def classifier_torch_paths(config: EncoderConfig) -> dict[str, str]:
    """Map each of our modules that has a kernel or a bias to its path in `transformers`' sequence classifier.

    >>> classifier_torch_paths(EncoderConfig())["encoder/layer_0/attention/query"]
    'bert.encoder.layer.0.attention.self.query'
    """
    return {m.path: m.torch for m in modules(config) if m.leaves is not EMBEDDING}


class Converted(NamedTuple):
    """Arrays by our path, the paths left to initialise, the checkpoint keys ignored, and remarks for people."""

    arrays: dict[str, np.ndarray]
    initialised: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    weights: Mapping[str, Stored], config: EncoderConfig, shapes: Mapping[str, tuple[int, ...]], origin: str
) -> Converted:
    """Select and transpose a checkpoint's arrays.

    Args:
      weights: checkpoint key -> where it is stored, as `open_weights` returns them.
      config: the model to fill.
      shapes: our path -> shape of each of its parameters.
      origin: name of the checkpoint, for messages.

    Raises:
      UsageError: arrays are missing, unexpected, of another shape or not floating point, of which it lists the first; or
        values are not finite.
    """
    prefix, stripped, problems = config.family + ".", {}, []
    for key, value in weights.items():
        if (name := key.removeprefix(prefix)) in stripped:
            problems.append((name, "is there twice, with and without its prefix"))
        stripped[name] = value
    chosen: dict[str, tuple[Stored, bool]] = {}
    initialised: list[str] = []
    notes: list[str] = []
    used: set[str] = set()
    for module in modules(config):
        torch, faults, found = module.torch.removeprefix(prefix), [], {}
        for leaf in module.leaves:
            path = f"{module.path}/{leaf.name}"
            key = next((k for n in leaf.torch if (k := f"{torch}.{n}") in stripped), None)
            if key is None:
                faults.append((f"{torch}.{leaf.torch[0]}", "is missing"))
                continue
            used.add(key)
            want = shapes[path][::-1] if leaf.transpose else shapes[path]
            if (got := stripped[key].shape) != want:
                faults.append((key, f"has shape {got}, expected {want}"))
            elif (dtype := stripped[key].dtype) not in TYPES:
                faults.append((key, f"has type {dtype}, expected {', '.join(TYPES)}"))
            else:
                found[path] = (stripped[key], leaf.transpose)
        if faults and re.fullmatch(OPTIONAL, module.path):
            initialised += [f"{module.path}/{leaf.name}" for leaf in module.leaves]
            reasons = "; ".join(f"{name} {fault}" for name, fault in faults)
            notes.append(f"{module.path} is freshly initialised: {reasons}")
        else:
            problems += faults
            chosen |= found
    rest = [name for name in stripped if name not in used]
    ignored = tuple(name for name in rest if re.fullmatch(IGNORED[config.family], name))
    problems += [(name, "is unexpected") for name in rest if name not in ignored]
    refuse(problems, origin, config)
    arrays = {path: _read(value, transpose) for path, (value, transpose) in chosen.items()}
    return Converted(arrays, tuple(initialised), ignored, tuple(notes))


def refuse(problems: list[tuple[str, str]], origin: str, config: EncoderConfig | DecoderConfig) -> None:
    """Raise where there are mismatches, each (array of the checkpoint, what is wrong with it)."""
    if not problems:
        return
    lines = _fold_layers(problems)
    if len(lines) > SHOWN:
        lines = [*lines[: SHOWN - 1], "and so on"]
    raise UsageError(
        f"the weights in {origin} do not fit its config.json ({config.family}, {config.num_layers} layers of "
        f"width {config.hidden_size}): {len(problems)} mismatches: " + "; ".join(clipped(line) for line in lines)
    )


def _read(stored: Stored, transpose: bool) -> np.ndarray:
    array = stored.read()
    return np.ascontiguousarray(array.T) if transpose else array


def _fold_layers(problems: list[tuple[str, str]]) -> list[str]:
    """Write one line for the same problem in many layers: `encoder.layer.{0,1,2}.output.dense.bias ...`."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name, fault in problems:
        numbers = re.findall(r"\.(\d+)\.", name)[:1]
        layers.setdefault((re.sub(r"\.\d+\.", ".{}.", name, count=1), fault), []).extend(numbers)
    lines = []
    for (name, fault), numbers in layers.items():
        which = numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"
        lines.append(f"{name.replace('{}', which)} {fault}")
    return lines
