"""Lower a LoRA folder of PEFT to a budget, without training data and without the model.

With s A B = U diag(sigma) V^T at every site l, the nearest adapter of rank r keeps the r largest singular values and loses
sum_{j > r} sigma_lj^2 of the squared Frobenius norm. The ranks minimise the sum of what all sites lose,

    min sum_l w_l sum_{j > r_l} sigma_lj^2    s.t.    sum_l (r_l (d_in + d_out) + [DoRA] d_out) <= budget,

a knapsack that is solved to proof. PEFT's own `convert_to_lora` has one rank, or one share of the energy, for every site.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.allocation import Plan, component_problem, solve
from jaxprune.errors import UsageError, nearest, shown
from jaxprune.files import checked_path, new_folder
from jaxprune.inputs import real, whole
from jaxprune.peft.load import Setting, read_folder
from jaxprune.peft.names import CONFIG, PREFIX, TENSORS
from jaxprune.sites import Site, expression, site_at
from jaxprune.surgery.rotation import svd_basis

_CARD = "README.md"
# What vLLM takes for --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, repr=False)
class Resized:
    """What `resize` did.

    Attributes:
      before: {module path: rank}.
      ranks: {module path: rank}, those at 0 among them.
      kept: {module path: share of the squared Frobenius norm of s A B that is kept}; 1 where there was nothing.
      energy: the share of all sites' squared norms together that is kept.
      params: adapter parameters now; heads are not counted.
      params_before: adapter parameters before.
      sites: the modules, as sites.
      plan: how ranks were found; None where they were given.
    """

    before: dict[str, int]
    ranks: dict[str, int]
    kept: dict[str, float]
    energy: float
    params: int
    params_before: int
    sites: tuple[Site, ...]
    plan: Plan | None

    def __repr__(self) -> str:
        return (
            f"Resized({self.params_before:,} to {self.params:,} parameters at {len(self.ranks)} modules, ranks up to "
            f"{max(self.ranks.values())}, {100 * self.energy:.1f} % of the energy kept)"
        )

    @property
    def vllm_rank(self) -> int | None:
        """The smallest --max-lora-rank that vLLM needs; None where it has none large enough."""
        return next((rank for rank in _VLLM_RANKS if rank >= max(self.ranks.values())), None)


class _Module:
    """One module of the folder, in float64 and in its SVD basis."""

    def __init__(self, a: np.ndarray, b: np.ndarray, scale: float, magnitude: np.ndarray | None):
        a, b = a.T.astype(np.float64), b.T.astype(np.float64)
        into, back = svd_basis(a.T @ a, b @ b.T)
        self.a, self.b = abs(scale) ** 0.5 * a @ into, math.copysign(abs(scale) ** 0.5, scale) * (back @ b)
        # Of the factors themselves: smaller singular values than Gram matrices tell are right too.
        sizes = np.linalg.norm(self.a, axis=0) * np.linalg.norm(self.b, axis=1)
        self.order = np.argsort(-sizes, kind="stable")
        self.energy = np.square(sizes[self.order])
        self.extra = 0 if magnitude is None else magnitude.size

    def cost(self, rank: int) -> int:
        return rank * (len(self.a) + self.b.shape[1]) + (self.extra if rank else 0)

    def factors(self, rank: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return lora_A (r, d_in) and lora_B (d_out, r), of scale 1."""
        kept = self.order[:rank]
        return np.ascontiguousarray(self.a[:, kept].T.astype(dtype)), np.ascontiguousarray(self.b[kept].T.astype(dtype))


def resize(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    ratio: float | None = None,
    budget: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    importance: Mapping[str, float] | None = None,
    solver: str = "auto",
    time_limit: float = 60.0,
) -> Resized:
    """Lower any LoRA or DoRA folder of PEFT, of whatever ranks and scales, and write one that PEFT loads.

    The folder that is written has the scale folded into A and alpha = rank everywhere; heads, model card and tokenizer go
    with it as they are. A module of rank 0 is left out; a DoRA module keeps rank 1, since its magnitude belongs to no
    component.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      output: new folder, or one that an adapter may replace.
      ratio: share of the adapter parameters that may stay, above 0 and at most 1.
      budget: adapter parameters that may stay; one of `ratio`, `budget` and `rank_pattern` is needed.
      rank_pattern: {expression that the end of a module's path matches: rank}, as in PEFT; the first that matches counts, and
        modules that none matches stay as they are. `{".*": 4}` is a uniform rank.
      importance: {module path: w_l}, such as the squared gradients of `site_scores("squared", ...)`, the sites' diagonal Fisher
        information; 1 everywhere when None. Module paths have `.` or `/`.
      solver: see `allocate`.
      time_limit: seconds the solver may take.

    Raises:
      UsageError: the folder cannot be read or holds what is no LoRA of linear layers, the budget is out of range, a name fits no
        module, or the output folder cannot be written.

    Returns:
      What was done.
    """
    given = {"ratio": ratio, "budget": budget, "rank_pattern": rank_pattern}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise UsageError(f"give one of ratio, budget and rank_pattern; got {' and '.join(named) or 'none'}")
    source = checked_path("folder", folder)
    config, tensors = read_folder(source)
    modules = _modules(source, config, tensors)
    sites = tuple(site_at(name.replace(".", "/"), len(x.a), x.b.shape[1]) for name, x in modules.items())
    before = {name: len(x.energy) for name, x in modules.items()}
    full = sum(x.cost(before[name]) for name, x in modules.items())
    plan = None
    if rank_pattern is not None:
        ranks = _patterned(rank_pattern, before)
    else:
        weights = _weights(importance, modules)
        plan = _planned(modules, sites, weights, _budget(ratio, budget, full), solver, time_limit)
        ranks = {name: plan.ranks[site.path] for name, site in zip(modules, sites, strict=True)}
    if low := [name for name, x in modules.items() if x.extra and not ranks[name]]:
        raise UsageError(
            f"DoRA module {low[0]!r} would have rank 0, and its magnitude needs one component; give it rank 1"
        )
    _write(source, checked_path("output", output), config, modules, before, ranks)
    lost = {name: float(x.energy[ranks[name] :].sum()) for name, x in modules.items()}
    whole_energy = {name: float(x.energy.sum()) for name, x in modules.items()}
    share = lambda lost, all_: 1 - lost / all_ if all_ else 1.0  # noqa: E731
    return Resized(
        before,
        ranks,
        {name: share(lost[name], whole_energy[name]) for name in modules},
        share(sum(lost.values()), sum(whole_energy.values())),
        sum(x.cost(ranks[name]) for name, x in modules.items()),
        full,
        sites,
        plan,
    )


def _modules(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, _Module]:
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_(.+?)(?:\.weight)?", key.removeprefix(PREFIX))
        if found:
            parts.setdefault(found[1], {})[found[2]] = value
    alpha = Setting(config, "lora_alpha", "alpha_pattern")
    modules = {}
    for name, own in parts.items():
        a, b, magnitude = own.get("A"), own.get("B"), own.get("magnitude_vector")
        plain = len(own) == 2 + (magnitude is not None)
        if a is None or b is None or not (plain and a.ndim == b.ndim == 2 and len(a) == b.shape[1] > 0):
            shapes = ", ".join(f"lora_{part} {value.shape}" for part, value in own.items())
            raise UsageError(
                f"{folder}: {name!r} has {shapes}; expected lora_A (r, d_in) and lora_B (d_out, r) of a linear layer"
            )
        rank = len(a)
        scale = alpha(name) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules[name] = _Module(a, b, scale, magnitude)
    if not modules:
        raise UsageError(f"{folder} has no LoRA factors in it; save the adapter again")
    return modules


def _budget(ratio: float | None, budget: int | None, full: int) -> int:
    if ratio is not None:
        share = real(ratio)
        if share is None or not 0 < share <= 1:
            raise UsageError(
                f"ratio {shown(ratio)} is out of range; expected a share of the {full:,} parameters, above 0 to 1"
            )
        return math.floor(share * full)
    number = whole(budget)
    if number is None or number < 1:
        raise UsageError(f"budget {shown(budget)} cannot be used: expected a whole number of parameters, of {full:,}")
    return number


def _planned(
    modules: Mapping[str, _Module],
    sites: tuple[Site, ...],
    weights: Mapping[str, float],
    budget: int,
    solver: str,
    time_limit: float,
) -> Plan:
    # One type: no kind of module has to stay.
    alike = tuple(dataclasses.replace(site, type="module") for site in sites)
    values = {site.path: weights[name] * x.energy for site, (name, x) in zip(alike, modules.items(), strict=True)}
    if not any(value.any() for value in values.values()):
        raise UsageError(
            "every product s A B in the folder is zero, so nothing tells the modules apart; train it first"
        )
    problem = component_problem(values, alike, budget)
    value, cost = problem.value.copy(), problem.cost.copy()
    for row, x in enumerate(modules.values()):
        if x.extra:  # the magnitude is no component's
            value[row, 0] = -np.inf
        cost[row, 1:] += x.extra
    return dataclasses.replace(
        solve(dataclasses.replace(problem, value=value, cost=cost), solver=solver, time_limit=time_limit), sites=sites
    )


def _weights(importance: Mapping[str, float] | None, modules: Mapping[str, _Module]) -> dict[str, float]:
    if importance is None:
        return dict.fromkeys(modules, 1.0)
    given = {str(path).replace("/", "."): value for path, value in importance.items()}
    if lost := [name for name in modules if name not in given]:
        raise UsageError(f"importance has no entry for {lost[0]!r}; nearest names: {nearest(lost[0], given)}")
    for name in modules:
        number = real(given[name])
        if number is None or not 0 <= number < math.inf:
            raise UsageError(
                f"importance {shown(given[name])} of {name!r} cannot be used: expected a number, 0 or more"
            )
    return {name: float(given[name]) for name in modules}


def _patterned(patterns: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(patterns, Mapping) or not patterns:
        raise UsageError(f"rank_pattern {shown(patterns)} cannot be used: expected {{expression: rank}}")
    found: dict[str, int] = {}
    for key, rank in patterns.items():
        number = whole(rank)
        if number is None or number < 0:
            raise UsageError(f"rank {shown(rank)} of {shown(key)} cannot be used: expected a whole number, 0 or more")
        expression("key of rank_pattern", key)
        matched = [name for name in before if re.match(rf"(.*\.)?({key})$", name)]
        if not matched:
            raise UsageError(f"rank_pattern: {key!r} matches no module; nearest names: {nearest(key, before)}")
        found = {**dict.fromkeys(matched, number), **found}
    ranks = {name: min(found.get(name, rank), rank) for name, rank in before.items()}
    if not any(ranks.values()):
        raise UsageError("rank_pattern leaves no module above rank 0, so there is no adapter to write")
    return ranks


def _write(
    source: Path,
    output: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, _Module],
    before: Mapping[str, int],
    ranks: Mapping[str, int],
) -> None:
    from safetensors.numpy import load_file, save_file

    kept = {}
    for key, value in load_file(source / TENSORS).items():
        name, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if not part or name not in modules:
            kept[key] = value
        elif ranks[name]:
            a, b = modules[name].factors(ranks[name], value.dtype)
            kept[key] = a if part == "A.weight" else b if part == "B.weight" else value
    live = {name: rank for name, rank in ranks.items() if rank}
    # A pattern also matches paths that end in it, and the first match wins: the longer path has to come first.
    pattern = dict(sorted(live.items(), key=lambda item: (-len(item[0]), item[0])))
    top = max(live.values())
    new = {
        **config, "r": top, "lora_alpha": top, "rank_pattern": pattern, "alpha_pattern": pattern, "use_rslora": False,
        "target_modules": sorted(live), "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
        "init_lora_weights": True,
    }  # fmt: skip
    beside = {
        path.name: path.read_bytes()
        for path in sorted(source.iterdir())
        if path.is_file() and path.name not in (CONFIG, TENSORS)
    }
    if _CARD in beside:
        counts = [
            sum(x.cost(rank) for rank, x in zip(of.values(), modules.values(), strict=True)) for of in (before, ranks)
        ]
        beside[_CARD] += (
            f"\nLowered since from {counts[0]:,} to {counts[1]:,} adapter parameters; scores in this card are of before.\n"
        ).encode()
    with new_folder(output, (CONFIG, TENSORS, *beside), "adapter") as folder:
        save_file(kept, folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(new, indent=2) + "\n")
        for name, content in beside.items():
            (folder / name).write_bytes(content)
        _verify(folder, modules, ranks)


def _verify(folder: Path, modules: Mapping[str, _Module], ranks: Mapping[str, int]) -> None:
    """Read the folder back and compare every product with what was meant, to the precision of its dtype."""
    config, tensors = read_folder(folder)
    wrong = []
    for name, back in _modules(folder, config, tensors).items():
        meant = modules[name].energy[: ranks[name]]
        off = np.abs(np.sqrt(back.energy) - np.sqrt(meant)).max() if len(back.energy) == len(meant) else math.inf
        if not off <= 0.02 * math.sqrt(meant[0]):
            wrong.append(name)
    if wrong:
        raise RuntimeError(f"the adapter read back differs from the one written, in {wrong}; nothing was written")
