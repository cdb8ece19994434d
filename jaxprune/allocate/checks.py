"""Checks of what a user hands in: sites, ranks, budgets, importances; each fault is one UsageError."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np

from jaxprune.errors import UsageError
from jaxprune.sites import Site

# What stands in for a broken importance, relative to the largest finite one: far below and far above all that is real.
TINY, HUGE = 1e-12, 1e6


def check_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return the sites as a tuple; no site, or a path twice, is a UsageError."""
    sites = tuple(sites)
    if not sites:
        raise UsageError("there is no site to plan; expected the sites that find_sites returns")
    seen: set[str] = set()
    twice = [s.path for s in sites if s.path in seen or seen.add(s.path)]
    if twice:
        raise UsageError(f"a site is listed twice: {some(twice)}; list each path once")
    return sites


def check_ranks(ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the ranks as sorted int64 (K,); anything but distinct whole numbers with 0 among them is a UsageError."""
    given = list(ranks)
    steps = [whole(r) for r in given]
    if any(r is None or r < 0 for r in steps) or len(set(steps)) != len(steps) or 0 not in steps or len(steps) < 2:
        raise UsageError(
            f"ranks {given} cannot be used: expected distinct whole numbers, none negative, 0 among them and one above "
            "0, for example range(17)"
        )
    return np.array(sorted(r for r in steps if r is not None), np.int64)


def check_budget(budget: int) -> int:
    """Return the budget as an int; anything but a whole number of adapter parameters, 0 or more, is a UsageError."""
    count = whole(budget)
    if count is None or count < 0:
        raise UsageError(f"budget {budget!r} cannot be used: expected a whole number of adapter parameters, 0 or more")
    return count


def per_site(values: Mapping[str, Any] | Sequence[Any] | np.ndarray, sites: Sequence[Site], noun: str) -> list[Any]:
    """Return one value a site, in their order, from a mapping of paths or a sequence; a missing one is a UsageError."""
    if isinstance(values, Mapping):
        missing = [s.path for s in sites if s.path not in values]
        if missing:
            raise UsageError(f"there is no {noun} for {some(missing)}; give one for each of the {len(sites)} sites")
        return [values[s.path] for s in sites]
    listed = list(values)
    if len(listed) != len(sites):
        raise UsageError(f"got {len(listed)} {noun}s for {len(sites)} sites; give one for each site, in their order")
    return listed


def check_rank_of_each(ranks: Mapping[str, int] | Sequence[int] | np.ndarray, sites: Sequence[Site]) -> np.ndarray:
    """Return the rank of each site as int64 (S,); anything but whole numbers, 0 or more, is a UsageError."""
    given = per_site(ranks, sites, "rank")
    counts = [-1 if (count := whole(rank)) is None else count for rank in given]
    wrong = [f"{rank} at {s.path}" for rank, n, s in zip(given, counts, sites, strict=True) if n < 0]
    if wrong:
        raise UsageError(f"rank {some(wrong)} cannot be used: expected a whole number, 0 or more")
    return np.array(counts, np.int64)


def check_importances(
    scores: Mapping[str, SupportsFloat] | Sequence[SupportsFloat] | np.ndarray, sites: tuple[Site, ...]
) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Return the importances (S,) with the largest finite one at 1, that largest, and what was replaced."""
    raw = per_site(scores, sites, "score")
    try:
        score = np.array([float(x) for x in raw])
    except (TypeError, ValueError):
        raise UsageError("scores must be numbers, one for each site") from None

    def paths(where: np.ndarray) -> str:
        return some([s.path for s, hit in zip(sites, where, strict=True) if hit])

    if (score < 0).any():
        raise UsageError(f"the importance is negative at {paths(score < 0)}; take an absolute value or a square first")
    usable = np.isfinite(score) & (score > 0)
    if not usable.any():
        raise UsageError(
            f"no importance is finite and above 0, so nothing tells the sites apart: {paths(~usable)}; check the "
            "gradients that the scores were taken from"
        )
    scale = float(score[usable].max())
    warnings = []
    nan, infinite = np.isnan(score), np.isinf(score)
    if nan.any():
        warnings.append(f"The importance was NaN and taken as almost nothing at {paths(nan)}.")
    if infinite.any():
        warnings.append(f"The importance was infinite and taken above all others at {paths(infinite)}.")
    relative = np.divide(score, scale, out=np.where(nan, TINY, HUGE), where=np.isfinite(score))
    return relative, scale, tuple(warnings)


def whole(number: object) -> int | None:
    """Return a whole number of any type as an int, None for anything else."""
    try:
        value = float(number)  # pyright: ignore[reportArgumentType]
        return int(number) if math.isfinite(value) and value == int(number) else None  # pyright: ignore
    except (TypeError, ValueError):
        return None


def some(names: Sequence[str], count: int = 3) -> str:
    """List the first few names, and say how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
