"""From settings to a method and an optimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from experiments.run.config import RunConfig
from experiments.run.settings import OF_THE_RUN, complete
from jaxprune.errors import UsageError
from jaxprune.methods import Method
from jaxprune.sites import DEFAULT_EXCLUDE, Site


def make_method(config: RunConfig, total_steps: int, heads: int) -> Method:
    """Make the method that the settings name.

    Args:
      config: with nothing left open.
      total_steps: of the run.
      heads: attention heads of the model.

    Raises:
      UsageError: its settings do not fit together, or not into the run.
    """
    return config.entry.make(method_settings(config, total_steps, heads))


def method_settings(config: RunConfig, total_steps: int, heads: int) -> dict[str, Any]:
    """Return every setting of the method: what is given, what the run decides, and the defaults for the rest.

    Raises:
      UsageError: it would measure before there is anything, or never.
    """
    entry, delay = config.entry, warmup_steps(config, total_steps)
    decided = dict(zip(OF_THE_RUN, (total_steps, delay, heads), strict=True))
    # The first step of a warm-up changes nothing, and before the first change there is no output to measure.
    earliest = 2 if delay else 1
    measured = {"measure_at": max(earliest, total_steps // 10)} if "measure_at" in entry.settings else {}
    settings = complete(entry, {**measured, **config.settings})
    settings |= {name: value for name, value in decided.items() if name in entry.settings}
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


def warmup_steps(config: RunConfig, total_steps: int) -> int:
    """Return the steps over which the learning rate rises."""
    assert config.warmup is not None
    return int(config.warmup * total_steps if config.warmup < 1 else min(config.warmup, total_steps))


def make_schedule(config: RunConfig, total_steps: int, method: Method) -> optax.Schedule:
    """Rise linearly from 0 over the warm-up, then fall to the final rate: linearly, along a cosine, or from stage to stage."""
    peak, final = config.learning_rate, config.final_learning_rate
    assert peak is not None and final is not None
    warmup = warmup_steps(config, total_steps)
    rest = max(total_steps - warmup, 1)
    up = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if config.schedule == "stages":
        # The only event of a method with two stages divides them. In a join, steps count from its boundary.
        down = optax.piecewise_constant_schedule(peak, {method.events[0] - warmup: final / peak})
    elif config.schedule == "cosine":
        down = optax.cosine_decay_schedule(peak, rest, alpha=final / peak)
    else:
        down = optax.linear_schedule(peak, final, rest)
    return optax.join_schedules([up, down], [warmup]) if warmup else down


def make_optimizer(config: RunConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return AdamW behind clipping by the global norm."""
    parts = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    return optax.chain(*parts, optax.adamw(schedule, weight_decay=config.weight_decay or 0.0))
