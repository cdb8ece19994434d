"""Read a folder that Hugging Face PEFT or `save_peft` wrote."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Dora, Lora
from jaxprune.errors import UsageError, shown
from jaxprune.files import checked_path, reason
from jaxprune.inputs import check_dropout, check_sites, real, whole
from jaxprune.peft.names import CONFIG, PREFIX, TENSORS, TorchPaths, saved_whole, selects, torch_name
from jaxprune.sites import DEFAULT_EXCLUDE, Site, expression

# Settings under which a LoRA folder means more than W + s A B, and the initialisations that leave the base as it was.
_UNSUPPORTED = (
    "lora_bias", "use_qalora", "use_bdlora", "target_parameters", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def load_peft(
    folder: str | os.PathLike[str], sites: Sequence[Site], *, torch_paths: TorchPaths | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read a LoRA or DoRA folder written by Hugging Face PEFT or by `save_peft`.

    A = lora_A^T, B = lora_B^T and s = alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA, where `rank_pattern` and
    `alpha_pattern` give a module its own r and alpha: the first of their keys that matches the end of its path wins.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      sites: the sites of the model; those the folder does not adapt get no adapter.
      torch_paths: as for `save_peft`; it has to name the modules of the head too.

    Raises:
      UsageError: the folder is neither LoRA nor DoRA (AdaLoRA, ...), cannot be read, or does not fit the sites; one
        message lists everything that does not.

    Returns:
      (adapters, masks, weights): {site path: Lora or Dora}, masks of ones, and {leaf path: array} of the modules saved whole.
    """
    folder, sites = checked_path("folder", folder), check_sites(sites)
    config, tensors = read_folder(folder)
    factors: dict[str, dict[str, np.ndarray]] = {}
    rest: dict[str, np.ndarray] = {}
    problems = []
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.lora_(?:([AB])\.weight|(magnitude_vector))", name)
        if name == key:
            problems.append(f"unexpected key {key!r}, expected it to start with {PREFIX!r}")
        elif factor:
            factors.setdefault(factor[1], {})[factor[2] or factor[3]] = value
        else:
            rest[name] = value

    adapters: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    rank, alpha = Setting(config, "r", "rank_pattern"), Setting(config, "lora_alpha", "alpha_pattern")
    dropout = check_dropout(config.get("lora_dropout", 0.0))
    for site in sites:
        name = torch_name(site.path, torch_paths)
        pair = factors.pop(name, {})
        if not pair and not _targeted(config, name):
            continue
        r = int(rank(name))
        expected: dict[str, tuple[int, ...]] = {"A": (r, site.d_in), "B": (site.d_out, r)}
        if config.get("use_dora"):
            expected["magnitude_vector"] = (site.d_out,)
        got = {part: pair[part].shape if part in pair else "missing" for part in {**expected, **pair}}
        if got != expected:
            parts = ", ".join(f"lora_{part}" for part in got)
            problems.append(f"{name}: {parts} are {[*got.values()]}, expected {[*expected.values()]}")
            continue
        scale = alpha(name) / (math.sqrt(r) if config.get("use_rslora") else r)
        a, b, magnitude = jnp.asarray(pair["A"].T), jnp.asarray(pair["B"].T), pair.get("magnitude_vector")
        adapters[site.path] = (
            Lora(a, b, scale, dropout)
            if magnitude is None
            else Dora(a, b, scale, dropout, magnitude=jnp.asarray(magnitude))
        )
        masks[site.path] = jnp.ones(r, jnp.float32)
    problems += [f"module {name!r} has an adapter but is not among the sites" for name in factors]
    heads, wrong = _heads(rest, config, torch_paths)
    problems += wrong
    if problems:
        raise UsageError(f"{folder} does not fit the model, {len(problems)} mismatches: " + "; ".join(problems))
    return adapters, masks, heads


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the configuration and the tensors, in float32, of a folder that holds a plain LoRA or DoRA."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    missing = [name for name in (CONFIG, TENSORS) if not os.path.isfile(folder / name)]
    if missing:
        pickled = os.path.isfile(folder / "adapter_model.bin")
        what = (
            "save its adapter_model.bin again with safe_serialization=True"
            if pickled
            else "expected a folder written by PEFT"
        )
        raise UsageError(f"{folder} has no {' and no '.join(missing)}; {what} (safetensors)")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        loaded = load_file(folder / TENSORS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UsageError(f"{folder} cannot be read, a file is damaged: {reason(error)}") from None
    except KeyError as error:  # a type that NumPy lacks
        raise UsageError(f"{folder} has tensors of type {error}, which cannot be read; save it in float32") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UsageError(
            f"{folder} holds a {kind if isinstance(kind, str) else 'nameless'} adapter; only peft_type 'LORA' can be imported"
        )
    reasons = [f"{name}={shown(config[name])}" for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={shown(config['bias'])}")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        reasons.append(f"init_lora_weights={shown(config['init_lora_weights'])} (it changed the base weights)")
    if reasons:
        raise UsageError(f"{folder} is not a plain LoRA ({', '.join(reasons)}); merge it in PEFT and import the model")
    _check_names(config)
    wrong = [key for key, value in loaded.items() if value.dtype.kind not in "fV"]  # V: bfloat16
    if wrong:
        raise UsageError(f"{folder}: {wrong[0]!r} is of type {loaded[wrong[0]].dtype}; expected floating-point numbers")
    tensors = {key: value.astype(np.float32) for key, value in loaded.items()}
    bad = [key for key, value in tensors.items() if not np.isfinite(value).all()]
    if bad:
        raise UsageError(
            f"{folder}: {len(bad)} tensors hold NaN or infinity, first {bad[0]!r}; train the adapter again"
        )
    return config, tensors


def _check_names(config: Mapping[str, Any]) -> None:
    """Raise where a setting that names modules, or one that is true or false, is something else."""
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(name)
        if isinstance(value, str) and name != "modules_to_save":
            expression(f"{CONFIG}: {name}", value)
        elif value is not None and not (isinstance(value, list) and all(isinstance(one, str) and one for one in value)):
            raise UsageError(f"{CONFIG}: {name} is {shown(value)}; expected a list of module names")
    for name in ("use_dora", "use_rslora"):
        if not isinstance(config.get(name) or False, bool):
            raise UsageError(f"{CONFIG}: {name} is {shown(config[name])}; expected true or false")


class Setting:
    """The value of a setting at a module: that of the first pattern matching the end of its path, or the global one."""

    def __init__(self, config: Mapping[str, Any], name: str, patterns: str):
        self.default = config.get(name, 8)
        own = config.get(patterns) or {}
        values = [self.default, *(own.values() if isinstance(own, Mapping) else [None])]
        numbers = [whole(value) if name == "r" else real(value) for value in values]
        if not all(number is not None and 0 < number < 2**31 for number in numbers):
            raise UsageError(
                f"{CONFIG}: {name} and {patterns} must be positive numbers{', whole ones' if name == 'r' else ''}, got "
                f"{shown(self.default)} and {shown(own)}"
            )
        self.own = [(expression(f"{CONFIG}: key of {patterns}", rf"(.*\.)?({key})$"), own[key]) for key in own]

    def __call__(self, name: str) -> float:
        return next((own for pattern, own in self.own if pattern.match(name)), self.default)


def _targeted(config: Mapping[str, Any], name: str) -> bool:
    """Say whether the configuration certainly puts an adapter on a module."""
    if config.get("layers_to_transform") is not None or saved_whole(config.get("modules_to_save") or (), name):
        return False
    return selects(config.get("target_modules"), name) and not selects(config.get("exclude_modules"), name)


def _heads(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], torch_paths: TorchPaths | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the leaves saved whole, and what is wrong with them."""
    modules = {name: path for path, name in (torch_paths or {}).items() if isinstance(name, str)}
    saved = config.get("modules_to_save") or ()
    heads: dict[str, Any] = {}
    problems = []
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        path = owner.replace(".", "/") if torch_paths is None else modules.get(owner)
        if leaf not in ("weight", "bias") or not saved_whole(saved, owner):
            problems.append(f"unexpected key '{PREFIX}{name}'")
        elif path is None:
            problems.append(f"torch_paths names no module for {owner!r}")
        elif not re.search(DEFAULT_EXCLUDE, path):
            problems.append(f"module {owner!r} is saved whole but is no head")
        else:
            kernel = leaf == "weight" and value.ndim == 2
            own = "kernel" if kernel else "scale" if leaf == "weight" else "bias"
            heads[f"{path}/{own}"] = jnp.asarray(value.T if kernel else value)
    for name in modules:
        if saved_whole(saved, name) and f"{name}.weight" not in tensors:
            problems.append(f"{name}.weight is missing, though modules_to_save has it")
    return heads, problems
