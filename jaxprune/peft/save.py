"""Write adapters as a folder that Hugging Face PEFT loads."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.adapters import Adapters, Dora, Lora, Masks
from jaxprune.adapters.base import check_mappings, check_mask
from jaxprune.adapters.weight import NONE, Weights, check_weights
from jaxprune.errors import UsageError, shown
from jaxprune.files import checked_path, new_folder
from jaxprune.peft.load import load_peft, read_folder
from jaxprune.peft.names import CONFIG, PREFIX, TENSORS, TorchPaths, ancestors, saved_whole, torch_name
from jaxprune.sites import DEFAULT_EXCLUDE, Site, flatten, leaf_at, stacked_axes

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# PEFT takes these modules for trained heads, whatever the configuration says, and cannot load a folder without them.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_VLLM_MAX_RANK = 512
_MAGNITUDE = ".lora_magnitude_vector"


def save_peft(
    adapters: Adapters,
    masks: Masks,
    folder: str | os.PathLike[str],
    *,
    weights: Weights = NONE,
    initial: Adapters | None = None,
    torch_paths: TorchPaths | None = None,
    params: Mapping[str, Any] | None = None,
    base_model: str | os.PathLike[str] | None = None,
    task_type: str | None = "SEQ_CLS",
    profile: str = "peft",
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write adapters and the trained head as a folder that Hugging Face PEFT loads.

    Masked components are dropped, sites without a live one are left out, and s is folded into A: with k the live
    components, lora_A = (s m_k A[:, k])^T and lora_B = B[k]^T in float32, and lora_magnitude_vector with DoRA. The folder
    appears whole or not at all, after it was read back and every product compared with s (A * m) B; an adapter that was there
    before is replaced.

    PiSSA's adapters belong to kernels from which s A0 B0 was taken. Written is s (A B - A0 B0), of twice the rank, which
    belongs to the checkpoint as it is: lora_A = [s A, -s A0]^T and lora_B = [B; B0]^T.

    Args:
      adapters: {site path: adapter}, as `method.seen` gives them.
      masks: {site path: (r,)}; a site without a mask is taken whole.
      folder: where to write.
      weights: {leaf path: array}, the trained leaves of the head.
      initial: what training started from, `start.adapters`; needed where factors were taken out of the kernels, and a copy
        on the host (`jax.device_get`), since a training step donates its state.
      torch_paths: {module path: module path in the PyTorch model}; by default `/` becomes `.`. The module of
        scanned layers needs a pattern with `{}` for the layer's number, or a sequence with a path for every layer.
      params: the model's parameters. PEFT saves a head whole; leaves of it that were not trained are taken from here. They also
        tell adapters of embeddings and convolutions from those of linear layers.
      base_model: name or folder of the checkpoint the adapters belong to.
      task_type: PEFT's name of the task; `SEQ_CLS` goes with a head, `CAUSAL_LM` or None without.
      profile: `"peft"`, or `"vllm"` to refuse what vLLM could not load.
      beside: {name: content} of further files to write into the folder, such as a model card.

    Raises:
      UsageError: the format cannot express the adapters (a kind that is no LoRA, LoRA beside DoRA, embeddings, convolutions,
        biases or whole weights trained outside the head), `initial` or the head is incomplete, a path is missing in
        `torch_paths`, the folder cannot be written or holds other files.
    """
    check_mappings(adapters, masks)
    if initial is not None:
        check_mappings(initial, {})
    for path, adapter in adapters.items():
        check_mask(path, adapter, masks.get(path))
    base_model = os.fspath(base_model) if isinstance(base_model, os.PathLike) else base_model
    for name, value in (("base_model", base_model), ("task_type", task_type)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{name} {shown(value)} cannot be used: expected text or None")
    check_weights(weights)
    loras, masks = _as_written(adapters, masks, initial)
    doras = [path for path, adapter in loras.items() if isinstance(adapter, Dora)]
    if doras and len(doras) < len(loras):
        raise UsageError(
            f"{len(doras)} adapters are DoRA and {len(loras) - len(doras)} are LoRA, which no PEFT folder holds together; "
            f"merge the adapters into the parameters and save those"
        )
    _check_linear(loras, flatten(params or {}))
    outside = [path for path in weights if not re.search(DEFAULT_EXCLUDE, path.rpartition("/")[0])]
    if outside:
        raise UsageError(
            f"{len(outside)} leaves trained outside the head, first {outside[0]!r}, cannot be expressed in the PEFT "
            f"LoRA format; merge the adapters into the parameters and save those"
        )
    if profile not in ("peft", "vllm"):
        raise UsageError(f"profile {shown(profile)} is unknown; expected 'peft' or 'vllm'")
    if profile == "vllm" and (weights or task_type in _TASK_HEADS):
        raise UsageError(
            f"vLLM refuses adapters with a trained head, and here are {len(weights)} of its leaves and task_type "
            f"{task_type!r}; train without a head and pass task_type='CAUSAL_LM', or use profile='peft'"
        )
    if profile == "vllm" and doras:
        raise UsageError("vLLM refuses DoRA; merge the adapters into the parameters, or use profile='peft'")
    tensors, ranks = _lora_tensors(loras, masks, torch_paths)
    head, modules = _head_tensors(weights, params, torch_paths, list(ranks), task_type)
    bad = [key for key, value in {**tensors, **head}.items() if not np.isfinite(value).all()]
    if bad:
        raise UsageError(f"{len(bad)} tensors hold NaN or infinity, first {bad[0]!r}; the training diverged")
    top = max(ranks.values())
    if profile == "vllm" and top > _VLLM_MAX_RANK:
        raise UsageError(f"vLLM loads ranks up to {_VLLM_MAX_RANK}, got {top}; prune further or use profile='peft'")
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": top,
        "lora_alpha": top,
        "lora_dropout": max(adapter.dropout for adapter in loras.values()),
        "bias": "none",
        "target_modules": sorted(ranks),
        "modules_to_save": modules or None,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "use_dora": bool(doras),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    from safetensors.numpy import save_file

    beside = beside or {}
    with new_folder(checked_path("folder", folder), (CONFIG, TENSORS, *beside), "adapter") as new:
        save_file({**tensors, **head}, new / TENSORS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        magnitudes = {key: value for key, value in tensors.items() if key.endswith(_MAGNITUDE)}
        _verify(new, loras, masks, torch_paths, head, magnitudes)
        for name, content in beside.items():
            (new / name).write_bytes(content)


def _check_linear(loras: Mapping[str, Lora], leaves: Mapping[str, Any]) -> None:
    """Refuse the adapter of an embedding or of a convolution: PEFT has other tensors there than for a linear layer."""
    for path, adapter in loras.items():
        found = leaf_at(leaves, path)
        if found is None:
            continue
        leaf, index = found
        stacked, shape = stacked_axes(index), leaves[leaf].shape
        own = [size for axis, size in enumerate(shape) if axis not in stacked]
        embedding = leaf.endswith("/embedding")
        if embedding or (len(own) > 2 and own[0] != adapter.a.shape[0]):
            what = "an embedding" if embedding else f"a kernel of shape {tuple(shape)}, as convolutions have"
            hint = "" if embedding else ", or leave params out where its PyTorch module is a linear layer"
            raise UsageError(
                f"the adapter at {shown(path)} lies on {what}, which cannot be written as PEFT's LoRA of a linear layer; merge "
                f"the adapters into the parameters and save those{hint}"
            )


def _as_written(adapters: Adapters, masks: Masks, initial: Adapters | None) -> tuple[dict[str, Lora], dict[str, Any]]:
    """Return every adapter as LoRA or DoRA on the model's own kernel, with its mask where it has one."""
    loras: dict[str, Lora] = {}
    written: dict[str, Any] = {path: mask for path, mask in masks.items() if path in adapters}
    for path, adapter in adapters.items():
        if hasattr(adapter, "as_lora"):
            adapter = adapter.as_lora(written.pop(path, None))
        if not isinstance(adapter, Lora):
            raise UsageError(
                f"adapter {path!r} is a {type(adapter).__name__}, which the PEFT LoRA format cannot express; "
                f"merge the adapters into the parameters and save those"
            )
        loras[path] = adapter
    taken = {path: first for path, first in (initial or {}).items() if getattr(first, "residual", False)}
    lost = [path for path, adapter in loras.items() if adapter.residual and path not in taken]
    lost += [path for path, first in taken.items() if getattr(first.a, "is_deleted", bool)()]
    if lost:
        raise UsageError(
            f"the factors of {len(lost)} adapters, first {lost[0]!r}, were taken out of the kernels; pass initial, a copy on "
            f"the host of what training started from: jax.device_get(start.adapters)"
        )
    # Sites that compaction removed are in `taken` only; their kernels lack A0 B0 all the same.
    for path, first in taken.items():
        loras[path], written[path] = _on_own_kernel(path, loras.get(path), written.get(path), first)
    return loras, written


def _on_own_kernel(path: str, adapter: Lora | None, mask: Any, first: Lora) -> tuple[Lora, np.ndarray]:
    """Return s (A * m) B - s0 A0 B0 as one adapter."""
    if adapter is None:
        adapter, mask = dataclasses.replace(first, a=first.a[:, :0], b=first.b[:0]), None
    mask = np.ones(adapter.rank, np.float32) if mask is None else np.asarray(mask)
    if isinstance(first, Dora) and not (mask > 0).any():
        raise UsageError(
            f"DoRA site {path!r} has no live component, and its kernel is not the model's own, which the PEFT format cannot "
            f"express; merge the adapters into the parameters and save those"
        )
    a = np.concatenate([adapter.a, np.asarray(first.a) * np.float32(-first.scale / adapter.scale)], -1)
    b = np.concatenate([adapter.b, first.b], -2)
    mask = np.concatenate([mask, np.ones(first.rank, np.float32)])
    return dataclasses.replace(adapter, a=a, b=b, residual=False), mask


def _factors(adapter: Lora, mask: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (a, b, gate) in float32, where gate = s m."""
    gate = np.ones(adapter.a.shape[-1], np.float32) if mask is None else np.asarray(mask, np.float32)
    return np.asarray(adapter.a, np.float32), np.asarray(adapter.b, np.float32), gate * np.float32(adapter.scale)


def _lora_tensors(
    loras: Mapping[str, Lora], masks: Masks, torch_paths: TorchPaths | None
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    seen: dict[str, str] = {}
    for path, adapter in loras.items():
        name, (a, b, gate) = torch_name(path, torch_paths), _factors(adapter, masks.get(path))
        if seen.setdefault(name, path) != path:
            raise UsageError(f"sites {seen[name]!r} and {path!r} both have the torch path {name!r}")
        live = gate != 0
        if live.any():
            ranks[name] = int(live.sum())
            a, b = a[:, live] * gate[live], b[live]
            # The safetensors writer takes the bytes as they lie, so a transposed view would be saved untransposed.
            tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
            if isinstance(adapter, Dora):
                tensors[f"{PREFIX}{name}{_MAGNITUDE}"] = np.asarray(adapter.magnitude, np.float32)
    if not ranks:
        raise UsageError("no adapter has a live component, so there is no LoRA to save; save the parameters instead")
    # A pattern also matches paths that end in it, and the first match wins: the longer path has to come first.
    return tensors, dict(sorted(ranks.items(), key=lambda item: (-len(item[0]), item[0])))


def _head_tensors(
    weights: Weights,
    params: Mapping[str, Any] | None,
    torch_paths: TorchPaths | None,
    adapted: Sequence[str],
    task_type: str | None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the tensors of the modules saved whole, and those modules' names."""
    leaves: dict[str, dict[str, Any]] = {}
    for path, value in {**flatten(params or {}), **weights}.items():
        module, _, leaf = path.rpartition("/")
        leaves.setdefault(module, {})[leaf] = value
    known = {module: module.replace("/", ".") for module in leaves} if torch_paths is None else torch_paths
    known = {module: name for module, name in known.items() if isinstance(name, str)}
    heads = {module: name for module, name in known.items() if re.search(DEFAULT_EXCLUDE, module)}
    body = [*adapted, *(name for module, name in known.items() if module not in heads)]

    modules: dict[str, None] = {}
    for module in dict.fromkeys(path.rpartition("/")[0] for path in weights):
        name = torch_name(module, torch_paths)
        # The outermost module is what PEFT's users name, unless the rest of the model lies in it (BERT's pooler).
        outermost = name.split(".")[0]
        modules[name if any(other.split(".")[0] == outermost for other in body) else outermost] = None
    for name in heads.values():
        modules.update({path: None for path in ancestors(name) if path.endswith(_TASK_HEADS.get(str(task_type), ()))})
    if task_type in _TASK_HEADS and not modules:
        raise UsageError(
            f"task_type {task_type!r} goes with a head, and none was trained; pass params and torch_paths to save the "
            f"frozen one, or task_type=None"
        )
    within = [name for name in adapted if saved_whole(modules, name)]
    if within:
        raise UsageError(f"module {within[0]!r} has an adapter but lies in the head, which PEFT saves whole; merge it")

    tensors: dict[str, np.ndarray] = {}
    for module, name in heads.items():
        if not saved_whole(modules, name):
            continue
        own = leaves.get(module, {})
        if not own.keys() & {"kernel", "scale"}:
            raise UsageError(f"PEFT saves the head whole, but {module!r} was not trained; pass params to complete it")
        for leaf, value in own.items():
            value = np.asarray(value, np.float32)
            if leaf not in _LEAVES or value.ndim > 2:
                raise UsageError(f"head leaf '{module}/{leaf}' of shape {value.shape} has no counterpart in PyTorch")
            tensors[f"{PREFIX}{name}.{_LEAVES[leaf]}"] = np.ascontiguousarray(value.T if leaf == "kernel" else value)
    return tensors, list(modules)


def _verify(
    folder: Path,
    loras: Mapping[str, Lora],
    masks: Masks,
    torch_paths: TorchPaths | None,
    head: Mapping[str, np.ndarray],
    magnitudes: Mapping[str, np.ndarray],
) -> None:
    """Read the folder back and compare every product s (A * m) B, every leaf of the head, and what there is of both.

    Magnitudes and the head must be the same to the bit.
    """
    sites = [Site(path, x.a.shape[0], x.b.shape[-1], 0, "") for path, x in loras.items()]
    back, back_masks, heads = load_peft(folder, sites, torch_paths=torch_paths)
    wrong = [] if len(heads) == len(head) else [f"{len(heads)} leaves of the head instead of {len(head)}"]
    stored = read_folder(folder)[1]
    wrong += [key for key, value in {**head, **magnitudes}.items() if not np.array_equal(stored[key], value)]
    for path, adapter in loras.items():
        nothing = Lora(adapter.a[:, :0], adapter.b[:0], 1.0)
        written, read = _factors(adapter, masks.get(path)), _factors(back.get(path, nothing), back_masks.get(path))
        if _distance(written, read) > 1e-5:
            wrong.append(path)
    if wrong:
        raise RuntimeError(f"the adapter read back differs from the one written, in {wrong}; nothing was written")


def _distance(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Return |A B - A' B'| / |A B| in the Frobenius norm, from Gram matrices of 2 r rows: the products may be huge.

    With C = [A, A'] and D = [B; -B'], |C D|^2 = sum_ij (C^T C)_ij (D D^T)_ij; float64 resolves it to about 1e-8.
    """
    (a, b, gate), (a2, b2, gate2) = one, other
    c = np.concatenate([a * gate, a2 * gate2], axis=1).astype(np.float64)
    d = np.concatenate([b, -b2]).astype(np.float64)
    terms = (c.T @ c) * (d @ d.T)
    r = len(b)
    size = np.abs(terms[:r, :r]).sum()
    return math.sqrt(abs(terms.sum()) / size) if size else math.sqrt(abs(terms.sum()))
