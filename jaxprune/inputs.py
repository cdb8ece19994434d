"""Checks of what a user hands in: sites, ranks, budgets, importances; each fault is one UsageError."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice
from numbers import Integral
from typing import Any, SupportsFloat

import numpy as np

from jaxprune.checks import MOST_RANK
from jaxprune.errors import UsageError, nearest, shown
from jaxprune.sites import Site

# What stands in for a broken importance, relative to the largest finite one: far below and far above all that is real.
TINY, HUGE = 1e-12, 1e6
_MOST = 2**31  # no model reaches it, in sizes or layers
# An adapter of so many times the parameters of its kernel is a slip of the keyboard, and would fill the memory.
LARGEST = 100


def check_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return the sites as a tuple; anything but sites with whole sizes, each path once, is a UsageError."""
    listed: tuple[Any, ...] = tuple(sites) if isinstance(sites, Iterable) else (None,)
    if not all(isinstance(site, Site) for site in listed):
        raise UsageError(f"sites {shown(sites)} cannot be used: expected a list of Site, from find_sites")
    if not listed:
        raise UsageError("there are no sites; expected those that find_sites returns")
    for s in listed:
        sizes = [whole(n) for n in (s.d_in, s.d_out)]
        if not isinstance(s.path, str) or not all(size and 0 < size < _MOST for size in sizes):
            raise UsageError(f"{shown(s)} cannot be used: expected a path and sizes that are whole numbers above 0")
        if (layer := whole(s.layer)) is None or not 0 <= layer < _MOST or not isinstance(s.type, str):
            raise UsageError(f"{shown(s)} cannot be used: expected a layer number, 0 or more, and a type")
    seen: set[str] = set()
    twice = [s.path for s in listed if s.path in seen or seen.add(s.path)]
    if twice:
        raise UsageError(f"a site is listed twice: {some(twice)}; list each path once")
    return listed


def check_ranks(ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the ranks as sorted int64 (K,); anything but distinct whole numbers with 0 among them is a UsageError."""
    steps = [whole(r) for r in islice(ranks, MOST_RANK + 2)] if isinstance(ranks, Iterable) else []
    usable = all(r is not None and 0 <= r <= MOST_RANK for r in steps) and len(set(steps)) == len(steps)
    if not usable or 0 not in steps or len(steps) < 2:
        raise UsageError(
            f"ranks {shown(ranks)} cannot be used: expected distinct whole numbers up to {MOST_RANK}, none negative, 0 among "
            "them and one above 0, for example range(17)"
        )
    return np.array(sorted(r for r in steps if r is not None), np.int64)


def check_budget(budget: int) -> int:
    """Return the budget as an int; anything but a whole number of adapter parameters, 0 or more, is a UsageError."""
    count = whole(budget)
    if count is None or count < 0:
        raise UsageError(
            f"budget {shown(budget)} cannot be used: expected a whole number of adapter parameters, 0 or more"
        )
    return count


def per_site(values: Mapping[str, Any] | Sequence[Any] | np.ndarray, sites: Sequence[Site], noun: str) -> list[Any]:
    """Return one value a site, in their order, from a mapping of paths or a sequence; a missing one is a UsageError."""
    if isinstance(values, Mapping):
        missing = [s.path for s in sites if s.path not in values]
        if missing:
            raise UsageError(f"there is no {noun} for {some(missing)}; give one for each of the {len(sites)} sites")
        return [values[s.path] for s in sites]
    # A set has no order, and text is no list of numbers.
    if isinstance(values, str | bytes | Set) or not isinstance(values, Iterable):
        raise UsageError(
            f"{noun}s {shown(values)} cannot be used: expected a mapping from site paths, or a list in their order"
        )
    if getattr(values, "ndim", 1) != 1:
        shape = tuple(getattr(values, "shape", ()))
        raise UsageError(f"{noun}s have shape {shape}, expected ({len(sites)},): one for each site")
    listed = list(values)
    if len(listed) != len(sites):
        raise UsageError(f"got {len(listed)} {noun}s for {len(sites)} sites; give one for each site, in their order")
    return listed


def check_rank_of_each(ranks: Mapping[str, int] | Sequence[int] | np.ndarray, sites: Sequence[Site]) -> np.ndarray:
    """Return the rank of each site as int64 (S,); anything but whole numbers, 0 or more, is a UsageError."""
    if isinstance(ranks, Mapping):
        check_paths(ranks, sites, "ranks")
    given = per_site(ranks, sites, "rank")
    counts = [-1 if (count := whole(rank)) is None or count > MOST_RANK else count for rank in given]
    wrong = [f"{shown(rank)} at {s.path}" for rank, n, s in zip(given, counts, sites, strict=True) if n < 0]
    if wrong:
        raise UsageError(f"rank {some(wrong)} cannot be used: expected a whole number, 0 to {MOST_RANK}")
    return np.array(counts, np.int64)


def check_plan(ranks: Mapping[str, int], sites: Sequence[Site], noun: str = "rank") -> dict[str, int]:
    """Return the ranks above 0 by site path, in the order of the sites, for adapters to be made of them."""
    if not isinstance(ranks, Mapping):
        raise UsageError(f"{noun}s {shown(ranks)} cannot be used: expected {{site path: {noun}}}, such as plan.ranks")
    check_paths(ranks, sites, f"{noun}s")
    counts = {s.path: whole(ranks.get(s.path, 0)) for s in sites}
    wrong = [path for path, count in counts.items() if count is None or count < 0]
    if wrong:
        raise UsageError(f"{noun}s must be whole numbers, 0 or more, got {shown(ranks[wrong[0]])} at {shown(wrong[0])}")
    for s in sites:
        count = counts[s.path] or 0
        if count * (s.d_in + s.d_out) > LARGEST * s.d_in * s.d_out:
            raise UsageError(
                f"{noun} {shown(count)} at {shown(s.path)} makes an adapter over {LARGEST} times the size of its "
                f"{s.d_in} by {s.d_out} kernel; lower it to {min(s.d_in, s.d_out)} or less"
            )
    if not any(counts.values()):
        raise UsageError(f"every {noun} of the plan is 0, so there is nothing to train; raise the budget or the {noun}")
    return {path: count for path, count in counts.items() if count}


def check_paths(named: Mapping[str, Any], sites: Sequence[Site], noun: str) -> None:
    """Raise where a mapping names paths that are no sites."""
    known = {site.path for site in sites}
    unknown = [path for path in named if path not in known]
    if unknown:
        raise UsageError(
            f"{noun} name {len(unknown)} paths that are not sites, first {shown(unknown[0])}; use find_sites' paths, such as "
            f"{nearest(str(unknown[0]), known, 1)}"
        )


def check_time_limit(seconds: float) -> float:
    """Return a time limit in seconds; anything but a number above 0, which may be infinite, is a UsageError."""
    limit = real(seconds)
    if limit is None or not limit > 0:
        raise UsageError(f"time_limit {shown(seconds)} cannot be used: expected seconds, more than 0")
    return limit


def check_dropout(rate: float) -> float:
    """Return a dropout rate; anything but a number from 0 to below 1 is a UsageError."""
    number = real(rate)
    if number is None or not 0 <= number < 1:
        raise UsageError(f"dropout {shown(rate)} cannot be used: expected a rate of 0 or more and below 1")
    return number


def check_factor(name: str, factor: float) -> float:
    """Return alpha or a scale; anything but a number above 0 that float32 can hold is a UsageError."""
    number = real(factor)
    if number is None or not float(np.finfo(np.float32).tiny) <= number <= float(np.finfo(np.float32).max):
        raise UsageError(f"{name} {shown(factor)} cannot be used: expected a number above 0, in the range of float32")
    return number


def check_importances(
    scores: Mapping[str, SupportsFloat] | Sequence[SupportsFloat] | np.ndarray, sites: tuple[Site, ...]
) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Return the importances (S,) with the largest finite one at 1, that largest, and what was replaced."""
    raw = per_site(scores, sites, "score")
    wrong = [f"{shown(x)} at {s.path}" for x, s in zip(raw, sites, strict=True) if real(x) is None]
    if wrong:
        raise UsageError(f"scores must be numbers, one for each site, got {some(wrong)}")
    score = np.array([real(x) for x in raw], np.float64)

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
    """Return a whole number of any type as an int, None for anything else: text and truth values are no numbers."""
    if isinstance(number, Integral) and not isinstance(number, bool):
        return int(number)
    value = real(number)
    return int(value) if value is not None and value.is_integer() else None


def real(number: object) -> float | None:
    """Return a real number of any type as a float, None for anything else; beyond float64 it is infinite."""
    if isinstance(number, bool | np.bool_ | str | bytes) or getattr(number, "ndim", 0):
        return None
    try:
        return float(number)  # pyright: ignore[reportArgumentType]
    except OverflowError:
        return math.inf if number > 0 else -math.inf  # pyright: ignore[reportOperatorIssue]
    except (TypeError, ValueError):
        return None


def some(names: Sequence[str], count: int = 3) -> str:
    """List the first few names, and say how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
