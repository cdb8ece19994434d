"""The rank program as plain numpy tables: what each rank is worth at each site, and what it costs.

Every solver of this room reads a `Problem` and nothing else, so the first allocation (worth = gain) and a later pruning
event (worth = minus the loss, no rank above the present one) are the same program with other tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import SupportsFloat

import numpy as np

from jaxprune.allocation.clock import Clock
from jaxprune.allocation.gain import GAINS, Spectra, check_spectra, gain_curve
from jaxprune.checks import one_of
from jaxprune.errors import UsageError
from jaxprune.inputs import check_budget, check_importances, check_ranks, check_sites, per_site, some
from jaxprune.sites import Site


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one rank per site: maximise sum_l value[l, k_l] within the budget, every type keeping a rank above 0.

        max  sum_l value[l, k_l]   s.t.   sum_l cost[l, k_l] <= budget,   max_{l of type t} ranks[k_l] > 0 for each t
                                   and, with a clock, the predicted step time <= clock.limit

    A type with no site that may take a rank above 0 has nothing to keep and is left out.

    Attributes:
      sites: the S sites.
      ranks: (K,) strictly increasing whole numbers, the first of them 0.
      value: (S, K) float64, worth of each rank at each site, in units of `scale`; -inf forbids a rank at a site.
      cost: (S, K) int64, adapter parameters of each rank at each site.
      budget: the number of adapter parameters that may be spent.
      clock: predicts the time of a training step and limits it; None for no limit.
      scale: unit of `value`; a plan's objective is reported times it, so a loss has a negative one.
      warnings: what was mended on the way here, a sentence each.

    Raises:
      UsageError: a table has the wrong shape, a rank set is unusable, or no plan fits the budget or the time budget
        (the message gives the smallest that one fits).
    """

    sites: tuple[Site, ...]
    ranks: np.ndarray
    value: np.ndarray
    cost: np.ndarray
    budget: int
    clock: Clock | None = None
    scale: float = 1.0
    warnings: tuple[str, ...] = ()

    def __post_init__(self):
        sites = check_sites(self.sites)
        ranks = check_ranks(self.ranks)
        value, cost = np.asarray(self.value), np.asarray(self.cost)
        shape = (len(sites), len(ranks))
        for name, table in (("value", value), ("cost", cost)):
            if table.shape != shape:
                raise UsageError(f"{name} has shape {table.shape}, expected (sites, ranks) = {shape}")
        # NumPy makes objects of integers beyond 64 bits.
        if cost.dtype == object or (cost.dtype.kind in "iu" and sum(map(max, cost.tolist())) >= 2**62):
            raise UsageError(
                "the largest ranks take more adapter parameters than 64 bits can count; allow smaller ones"
            )
        if cost.dtype.kind not in "iu" or (cost < 0).any():
            raise UsageError("cost must hold whole numbers of adapter parameters, none negative")
        if value.dtype.kind not in "fiu":
            raise UsageError(f"value is of type {value.dtype}; expected finite numbers, or -inf")
        value = value.astype(np.float64) + 0.0  # + 0.0 turns -0.0 into 0.0: equal rows have equal bytes
        if np.isnan(value).any() or np.isposinf(value).any():
            raise UsageError("value must hold finite numbers, or -inf for a rank that a site may not take")
        stuck = [s.path for s, row in zip(sites, value, strict=True) if not np.isfinite(row).any()]
        if stuck:
            raise UsageError(f"no rank is allowed at {some(stuck)}; allow at least one, for example 0")
        for name, entry in (("sites", sites), ("ranks", ranks), ("value", value), ("cost", cost.astype(np.int64))):
            object.__setattr__(self, name, entry)
        object.__setattr__(self, "budget", check_budget(self.budget))
        if not self.types:
            raise UsageError("no site may take a rank above 0, so there is nothing to plan")
        if self.clock is not None and self.clock.layer.shape != (len(sites),):
            raise UsageError(f"the clock knows {len(self.clock.layer)} sites, expected {len(sites)}")
        least = min(self._needed.values())
        if self.budget < least:
            raise UsageError(
                f"no plan fits a budget of {self.budget:,} adapter parameters: one site of each of the "
                f"{len(self.types)} types needs a rank above 0, which takes at least {least:,}; raise the budget to "
                f"{least:,} or more"
            )
        if self.clock is not None:
            self.clock.check({reach: least for reach, least in self._needed.items() if least <= self.budget})

    @cached_property
    def types(self) -> dict[str, np.ndarray]:
        """Index the sites of each type that may take a rank above 0, types in alphabetical order."""
        may = np.isfinite(self.value[:, self.ranks > 0]).any(axis=1)
        rows: dict[str, list[int]] = {}
        for row in np.flatnonzero(may).tolist():
            rows.setdefault(self.sites[row].type, []).append(row)
        return {name: np.array(rows[name]) for name in sorted(rows)}

    @cached_property
    def stages(self) -> tuple[Problem, ...]:
        """Split into problems without a clock, one for each layer where back-propagation may end, the last layer first.

        What an adapter adds to the step time is proportional to its parameters, so once the end of back-propagation is
        fixed the time limit is a smaller budget. The stage of layer k forbids ranks above 0 below k. A plan whose
        lowest adapted layer is k is feasible here exactly if it is feasible in stage k, and what is feasible in a stage
        is feasible here: it may reach less deep than the stage, never deeper.
        """
        if self.clock is None:
            return (self,)
        stages: list[Problem] = []
        for reach, least in self._needed.items():
            budget = min(self.budget, self.clock.budget(reach))
            if least <= budget:
                stages.append(replace(self, value=self._above(reach), budget=budget, clock=None))
        return tuple(stages)

    def smallest_budget(self) -> int:
        """Return the least number of adapter parameters that any plan takes: the cheapest start of every type.

        With a clock, only plans within its limit count.
        """
        clock = self.clock
        return min(n for reach, n in self._needed.items() if clock is None or n <= clock.budget(reach))

    @cached_property
    def _needed(self) -> dict[int, int]:
        """Map each layer where back-propagation may end, the last first, to the cheapest start of every type.

        Left out are layers above which a type has no site, or below which a site may not take rank 0.
        """
        never = np.iinfo(np.int64).max
        needed: dict[int, int] = {}
        for reach in [0] if self.clock is None else sorted(self.clock.back, reverse=True):
            value = self._above(reach)
            cheapest = np.where(np.isfinite(value), self.cost, never).min(axis=1)
            positive = np.where(np.isfinite(value) & (self.ranks > 0), self.cost, never).min(axis=1)
            starts = [rows[positive[rows] < never] for rows in self.types.values()]
            if (cheapest < never).all() and all(map(len, starts)):
                extra = sum(int((positive[rows] - cheapest[rows]).min()) for rows in starts)
                needed[reach] = sum(cheapest.tolist()) + extra
        return needed

    def _above(self, reach: int) -> np.ndarray:
        """Return the values with every rank above 0 forbidden below the layer where back-propagation ends."""
        if self.clock is None:
            return self.value
        return np.where((self.clock.layer < reach)[:, None] & (self.ranks > 0), -np.inf, self.value)

    def fault(self, choice: np.ndarray) -> str | None:
        """Say which constraint a choice of rank indices (S,) breaks, in exact integers, or None."""
        rows = np.arange(len(self.sites))
        if not np.isfinite(self.value[rows, choice]).all():
            return "gives a site a rank that is not allowed there"
        if (spent := self.spent(choice)) > self.budget:
            return f"spends {spent:,} of {self.budget:,} adapter parameters"
        if self.clock is not None and (time := self.time(choice)) > self.clock.limit:
            limit, whole = self.clock.limit, self.clock.whole
            return (
                f"takes {time / whole:.6g} of the step time of uniform rank 16, over the limit of {limit / whole:.6g}"
            )
        bare = [name for name, sites in self.types.items() if not self.ranks[choice[sites]].any()]
        return f"leaves type {bare[0]!r} without a rank above 0" if bare else None

    def spent(self, choice: np.ndarray) -> int:
        """Count the adapter parameters of a choice of rank indices (S,)."""
        return sum(self.cost[np.arange(len(self.sites)), choice].tolist())

    def time(self, choice: np.ndarray) -> int:
        """Predict the step time of a choice of rank indices (S,), in units of the clock."""
        assert self.clock is not None
        return self.clock.time(self.ranks[choice], self.spent(choice))

    def worth(self, choice: np.ndarray) -> float:
        """Add up, correctly rounded, the value of a choice of rank indices (S,)."""
        return math.fsum(self.value[np.arange(len(self.sites)), choice])


def rank_problem(
    scores: Mapping[str, SupportsFloat] | Sequence[SupportsFloat] | np.ndarray | None,
    sites: Sequence[Site],
    budget: int,
    ranks: Sequence[int] = tuple(range(17)),
    *,
    gain: str = "paper",
    spectra: Spectra | None = None,
    clock: Clock | None = None,
) -> Problem:
    """Tabulate gain and cost of every rank at every site (DPLoRA, equations 2 and 4, with one count per parameter).

        cost(l, r) = r (d_in + d_out);   gain(l, r): see `jaxprune.allocation.gain`

    The importances are divided by the largest: the best plan does not change, and solver tolerances stop mattering.

    Args:
      scores: importance of each site, any unit: a mapping from path, or a sequence in the order of `sites`; None where the
        gain is `energy`, whose importance is the energy of the spectrum.
      sites: the sites to plan.
      budget: adapter parameters that may be spent.
      ranks: the ranks a site may take, 0 among them.
      gain: `paper`, `effective` or `energy`.
      spectra: {site path: singular values of its gradient}, for the last two.
      clock: limits the predicted step time; None for no limit.

    Raises:
      UsageError: a score or a spectrum is missing, negative, or all of them are unusable; ranks or budget are; nothing fits.

    Returns:
      The problem; its `warnings` name the sites whose NaN or infinite importance was replaced.
    """
    sites = check_sites(sites)
    steps = check_ranks(ranks)
    gain = one_of("gain", gain, GAINS)
    energies: Mapping[str, np.ndarray] = {}
    if gain != "paper":
        energies = check_spectra(spectra)
        per_site(energies, sites, "spectrum")
    elif spectra is not None:
        raise UsageError("spectra go with gain 'effective' or 'energy'; leave them out, or say which of the two")
    if gain == "energy":
        scores = {s.path: energies[s.path].sum() for s in sites}
    importance, scale, warnings = check_importances(scores, sites)  # pyright: ignore[reportArgumentType]  (None is refused)
    curves = np.array([gain_curve(gain, s, steps, energies.get(s.path)) for s in sites])
    cost = np.array([[s.cost(int(r)) for r in steps] for s in sites])
    return Problem(sites, steps, importance[:, None] * curves, cost, budget, clock, scale, warnings)


def default_budget(sites: Sequence[Site]) -> int:
    """Return half of what uniform rank 16 takes: the budget when none is given, in adapter parameters."""
    return sum(s.cost(16) for s in check_sites(sites)) // 2
