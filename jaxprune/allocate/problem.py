"""The rank program as plain numpy tables: what each rank is worth at each site, and what it costs.

Every solver of this room reads a `Problem` and nothing else, so the first allocation (worth = gain) and a later pruning
event (worth = minus the loss, no rank above the present one) are the same program with other tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsFloat

import numpy as np

from jaxprune.errors import UsageError
from jaxprune.sites import Site

# What stands in for a broken importance, relative to the largest finite one: far below and far above all that is real.
TINY, HUGE = 1e-12, 1e6


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one rank per site: maximise sum_l value[l, k_l] within the budget, every type keeping a rank above 0.

        max  sum_l value[l, k_l]   s.t.   sum_l cost[l, k_l] <= budget,   max_{l of type t} ranks[k_l] > 0 for each t

    Attributes:
      sites: the S sites.
      ranks: (K,) strictly increasing whole numbers, the first of them 0.
      value: (S, K) float64, worth of each rank at each site, in units of `scale`; -inf forbids a rank at a site.
      cost: (S, K) int64, adapter parameters of each rank at each site.
      budget: the number of adapter parameters that may be spent.
      scale: unit of `value`; a plan's objective is reported times it.
      warnings: what was mended on the way here, a sentence each.

    Raises:
      UsageError: a table has the wrong shape, a rank set is unusable, or no plan fits the budget (the message gives the
        smallest budget that one fits).
    """

    sites: tuple[Site, ...]
    ranks: np.ndarray
    value: np.ndarray
    cost: np.ndarray
    budget: int
    scale: float = 1.0
    warnings: tuple[str, ...] = ()

    def __post_init__(self):
        sites = check_sites(self.sites)
        ranks = check_ranks(self.ranks)
        value = np.asarray(self.value, np.float64) + 0.0  # + 0.0 turns -0.0 into 0.0: equal rows have equal bytes
        cost = np.asarray(self.cost)
        shape = (len(sites), len(ranks))
        for name, table in (("value", value), ("cost", cost)):
            if table.shape != shape:
                raise UsageError(f"{name} has shape {table.shape}, expected (sites, ranks) = {shape}")
        if not np.issubdtype(cost.dtype, np.integer) or (cost < 0).any():
            raise UsageError("cost must hold whole numbers of adapter parameters, none negative")
        if np.isnan(value).any() or np.isposinf(value).any():
            raise UsageError("value must hold finite numbers, or -inf for a rank that a site may not take")
        stuck = [s.path for s, row in zip(sites, value, strict=True) if not np.isfinite(row).any()]
        if stuck:
            raise UsageError(f"no rank is allowed at {_some(stuck)}; allow at least one, for example 0")
        for name, entry in (("sites", sites), ("ranks", ranks), ("value", value), ("cost", cost.astype(np.int64))):
            object.__setattr__(self, name, entry)
        object.__setattr__(self, "budget", check_budget(self.budget))
        least = self.smallest_budget()
        if self.budget < least:
            raise UsageError(
                f"no plan fits a budget of {self.budget:,} adapter parameters: one site of each of the "
                f"{len(self.types)} types needs a rank above 0, which takes at least {least:,}; raise the budget to "
                f"{least:,} or more"
            )

    @cached_property
    def types(self) -> dict[str, np.ndarray]:
        """Index the sites of each type, types in alphabetical order."""
        return {t: np.array([i for i, s in enumerate(self.sites) if s.type == t]) for t in sorted(_types(self.sites))}

    def smallest_budget(self) -> int:
        """Return the least number of adapter parameters that any plan takes: the cheapest start of every type."""
        allowed = np.isfinite(self.value)
        never = np.iinfo(np.int64).max
        cheapest = np.where(allowed, self.cost, never).min(axis=1)
        positive = np.where(allowed & (self.ranks > 0), self.cost, never).min(axis=1)
        for name, rows in self.types.items():
            rows = rows[positive[rows] < never]
            if not len(rows):
                raise UsageError(f"no site of type {name!r} may take a rank above 0; each type needs one")
            cheapest[rows[np.argmin(positive[rows] - cheapest[rows])]] += (positive[rows] - cheapest[rows]).min()
        return sum(cheapest.tolist())

    def fault(self, choice: np.ndarray) -> str | None:
        """Say which constraint a choice of rank indices (S,) breaks, in exact integers, or None."""
        rows = np.arange(len(self.sites))
        if not np.isfinite(self.value[rows, choice]).all():
            return "gives a site a rank that is not allowed there"
        if (spent := self.spent(choice)) > self.budget:
            return f"spends {spent:,} of {self.budget:,} adapter parameters"
        bare = [name for name, sites in self.types.items() if not self.ranks[choice[sites]].any()]
        return f"leaves type {bare[0]!r} without a rank above 0" if bare else None

    def spent(self, choice: np.ndarray) -> int:
        """Count the adapter parameters of a choice of rank indices (S,)."""
        return sum(self.cost[np.arange(len(self.sites)), choice].tolist())

    def worth(self, choice: np.ndarray) -> float:
        """Add up, correctly rounded, the value of a choice of rank indices (S,)."""
        return math.fsum(self.value[np.arange(len(self.sites)), choice])


def rank_problem(
    scores: Mapping[str, SupportsFloat] | Sequence[SupportsFloat] | np.ndarray,
    sites: Sequence[Site],
    budget: int,
    ranks: Sequence[int] = tuple(range(17)),
) -> Problem:
    """Tabulate gain and cost of every rank at every site (DPLoRA, equations 2 and 4, with one count per parameter).

        gain(l, r) = I_l (1 - exp(-r / min(d_in, d_out))),   cost(l, r) = r (d_in + d_out)

    The importances are divided by the largest: the best plan does not change, and solver tolerances stop mattering.

    Args:
      scores: importance of each site, any unit: a mapping from path, or a sequence in the order of `sites`.
      sites: the sites to plan.
      budget: adapter parameters that may be spent.
      ranks: the ranks a site may take, 0 among them.

    Raises:
      UsageError: a score is missing, negative, or all of them are unusable; ranks or budget are; nothing fits.

    Returns:
      The problem; its `warnings` name the sites whose NaN or infinite importance was replaced.
    """
    sites = check_sites(sites)
    steps = check_ranks(ranks)
    importance, scale, warnings = _importances(scores, sites)
    smaller = np.array([min(s.d_in, s.d_out) for s in sites], np.float64)
    gain = importance[:, None] * -np.expm1(-steps / smaller[:, None])
    cost = np.array([[s.cost(int(r)) for r in steps] for s in sites], np.int64)
    return Problem(sites, steps, gain, cost, budget, scale, warnings)


def default_budget(sites: Sequence[Site]) -> int:
    """Return half of what uniform rank 16 takes: the budget when none is given, in adapter parameters."""
    return sum(s.cost(16) for s in check_sites(sites)) // 2


def check_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return the sites as a tuple; no site, or a path twice, is a UsageError."""
    sites = tuple(sites)
    if not sites:
        raise UsageError("there is no site to plan; expected the sites that find_sites returns")
    seen: set[str] = set()
    twice = [s.path for s in sites if s.path in seen or seen.add(s.path)]
    if twice:
        raise UsageError(f"a site is listed twice: {_some(twice)}; list each path once")
    return sites


def check_ranks(ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the ranks as sorted int64 (K,); anything but distinct whole numbers with 0 among them is a UsageError."""
    given = list(ranks)
    whole = [_whole(r) for r in given]
    if any(r is None or r < 0 for r in whole) or len(set(whole)) != len(whole) or 0 not in whole or len(whole) < 2:
        raise UsageError(
            f"ranks {given} cannot be used: expected distinct whole numbers, none negative, 0 among them and one above "
            "0, for example range(17)"
        )
    return np.array(sorted(r for r in whole if r is not None), np.int64)


def check_budget(budget: int) -> int:
    """Return the budget as an int; anything but a whole number of adapter parameters, 0 or more, is a UsageError."""
    whole = _whole(budget)
    if whole is None or whole < 0:
        raise UsageError(f"budget {budget!r} cannot be used: expected a whole number of adapter parameters, 0 or more")
    return whole


def _importances(
    scores: Mapping[str, SupportsFloat] | Sequence[SupportsFloat] | np.ndarray, sites: tuple[Site, ...]
) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Return the importances (S,) with the largest finite one at 1, that largest, and what was replaced."""
    if isinstance(scores, Mapping):
        missing = [s.path for s in sites if s.path not in scores]
        if missing:
            raise UsageError(f"there is no score for {_some(missing)}; give one for each of the {len(sites)} sites")
        raw = [scores[s.path] for s in sites]
    else:
        raw = list(scores)
        if len(raw) != len(sites):
            raise UsageError(f"got {len(raw)} scores for {len(sites)} sites; give one for each site, in their order")
    try:
        score = np.array([float(x) for x in raw])
    except (TypeError, ValueError):
        raise UsageError("scores must be numbers, one for each site") from None

    def paths(where: np.ndarray) -> str:
        return _some([s.path for s, hit in zip(sites, where, strict=True) if hit])

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


def _types(sites: Sequence[Site]) -> set[str]:
    return {s.type for s in sites}


def _whole(number: object) -> int | None:
    try:
        value = float(number)  # pyright: ignore[reportArgumentType]
        return int(number) if math.isfinite(value) and value == int(number) else None  # pyright: ignore
    except (TypeError, ValueError):
        return None


def _some(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
