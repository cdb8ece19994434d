"""From settings to a method and an optimizer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from experiments.run.config import USES, GlueConfig
from experiments.run.settings import further, kinds
from jaxprune import methods, schedules
from jaxprune.errors import UsageError
from jaxprune.methods import Method
from jaxprune.methods.channelmask import stage_end
from jaxprune.models import EncoderConfig
from jaxprune.sites import DEFAULT_EXCLUDE, Site


def make_method(config: GlueConfig, total_steps: int, encoder: EncoderConfig) -> Method:
    """Make the method that the settings name.

    Raises:
      UsageError: its settings do not fit together, or not into the run.
    """
    return getattr(methods, config.method)(**method_settings(config, total_steps, encoder))


def method_settings(config: GlueConfig, total_steps: int, encoder: EncoderConfig) -> dict[str, Any]:
    """Return every setting that the method's factory takes: from flags, from the run, and from `--set`.

    Raises:
      UsageError: LoRA-drop would measure before there is anything, or never.
    """
    accepts = kinds(config.method)
    assert config.rank and config.budget_schedule
    delay = warmup_steps(config, total_steps)
    # The first step of a warm-up changes nothing, and before the first change there is no output to measure.
    earliest = 2 if delay else 1
    offered: dict[str, Any] = {
        "rank": config.rank, "ranks": range(config.rank + 1), "target_rank": config.rank,
        "init_rank": -(-3 * config.rank // 2), "alpha": config.alpha, "dropout": config.lora_dropout,
        "total_steps": total_steps, "delay": delay, "solver": config.solver,
        "time_limit": config.time_limit, "heads": encoder.num_heads, "measure_at": max(earliest, total_steps // 10),
        "target": config.prune_ratio, "schedule": schedules.budget_schedule(config.budget_schedule),
        "rescale": config.scaling == "grow",
    }  # fmt: skip
    # These flags have the names of settings, which in another method may mean something else.
    offered |= {name: getattr(config, name) for name in USES if name in accepts and name not in offered}
    flags = {"target": "prune_ratio", "schedule": "budget_schedule", "rescale": "scaling", "ranks": "rank"}
    given = {
        name: value
        for name, value in offered.items()
        if name in accepts and config.method in USES.get(flags.get(name, name), (config.method,))
    }
    if config.method == "prunedlora":
        given["target"] = max(1, config.rank // 2)
    settings = {**given, **further(config.method, config.set)}
    at = settings.get("measure_at", earliest)
    if at >= 1 and not earliest <= at <= max(earliest, total_steps):  # below 1 it is a share of the run
        raise UsageError(
            f"measure_at {at:g} is out of range; expected a step from {earliest}, the first that changes "
            f"anything, to {total_steps}, the last"
        )
    return settings


def check_sites(sites: Sequence[Site], settings: Mapping[str, Any], trained_whole: str = DEFAULT_EXCLUDE) -> None:
    """Refuse sites that are trained whole, and ranks that no site can have.

    Args:
      sites: from `find_sites`.
      settings: of the method, from `method_settings`.
      trained_whole: regular expression of the paths that need no adapter.

    Raises:
      UsageError: as said.
    """
    inside = [site.path for site in sites if re.search(trained_whole, site.path)]
    if inside:
        raise UsageError(
            f"--targets matches {inside[0]!r}, which belongs to the head and takes no adapter; give more of the paths that "
            f"are meant, such as attention/out"
        )
    # A pair of factors at each site has a scale alpha / rank; a pair that all sites share has none and may be of any rank.
    rank = max(settings.get("init_rank", 0), settings.get("rank", 0), *settings.get("ranks", ()))
    most = max((min(site.d_in, site.d_out) for site in sites), default=0)
    if "alpha" in settings and rank > most:
        raise UsageError(
            f"rank {rank} is out of range; no kernel here has a rank above {most}, its smaller side; lower --rank"
        )


def warmup_steps(config: GlueConfig, total_steps: int) -> int:
    """Return the steps over which the learning rate rises."""
    assert config.warmup is not None
    return int(config.warmup * total_steps if config.warmup < 1 else min(config.warmup, total_steps))


def make_schedule(config: GlueConfig, total_steps: int) -> optax.Schedule:
    """Rise linearly from 0 over the warm-up, then fall to the final rate: linearly, along a cosine, or from stage to stage."""
    peak, final = config.learning_rate, config.final_learning_rate
    assert peak is not None and final is not None
    warmup = warmup_steps(config, total_steps)
    rest = max(total_steps - warmup, 1)
    up = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if config.schedule == "stages":
        default = inspect.signature(getattr(methods, config.method)).parameters["stage"].default
        share = further(config.method, config.set).get("stage", default)
        # In a join, steps count from its boundary.
        down = optax.piecewise_constant_schedule(peak, {stage_end(total_steps, share) - warmup: final / peak})
    elif config.schedule == "cosine":
        down = optax.cosine_decay_schedule(peak, rest, alpha=final / peak)
    else:
        down = optax.linear_schedule(peak, final, rest)
    return optax.join_schedules([up, down], [warmup]) if warmup else down


def make_optimizer(config: GlueConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return AdamW behind clipping by the global norm."""
    parts = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    return optax.chain(*parts, optax.adamw(schedule, weight_decay=config.weight_decay or 0.0))
