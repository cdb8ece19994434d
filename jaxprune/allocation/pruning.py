"""The programs of a pruning event: the same tables as the first allocation, ranks only downwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import numpy as np

from jaxprune.allocation.clock import TimeModel, make_clock
from jaxprune.allocation.problem import Problem
from jaxprune.errors import UsageError, shown
from jaxprune.inputs import check_importances, check_rank_of_each, check_ranks, check_sites, per_site, real, some
from jaxprune.sites import Site


def prune_problem(
    importance: Mapping[str, SupportsFloat] | Sequence[SupportsFloat] | np.ndarray,
    sites: Sequence[Site],
    current: Mapping[str, int] | Sequence[int] | np.ndarray,
    budget: int,
    *,
    ranks: Sequence[int] | None = None,
    momentum: float = 0.1,
    stability: float = 0.05,
    time_budget: float | None = None,
    time_model: TimeModel | None = None,
) -> Problem:
    """Tabulate what it loses to lower each site from its current rank c_l (DPLoRA, equations 7 to 9).

        min sum_l I_l ((c_l - r_l) / c_l + momentum |r_l - c_l| - stability [r_l = c_l])
        s.t. r_l <= c_l,  sum_l r_l (d_in + d_out) <= budget,  some r_l > 0 for each type that has a site above rank 0

    A site at rank 0 stays there and loses nothing. `solve` answers with the minimised loss as its objective. The
    importances are divided by the largest: the best plan does not change, and solver tolerances stop mattering.

    Args:
      importance: importance of each site, any unit: a mapping from path, or a sequence in the order of `sites`. That of
        a site at rank 0 is not looked at, and a mapping need not hold it.
      sites: all sites, those at rank 0 among them.
      current: rank of each site now: a mapping from path, or a sequence in the order of `sites`.
      budget: adapter parameters that may be left.
      ranks: the ranks a site may take, 0 among them; its current rank is always one. All when None.
      momentum: weight of the number of ranks that a site loses.
      stability: reward for leaving a site as it is.
      time_budget: longest predicted step time relative to uniform rank 16, as in `allocate`; None for no limit.
      time_model: times per parameter; measured ones when None.

    Raises:
      UsageError: no site is above rank 0; a rank, weight or budget cannot be used; the importances of the sites above
        rank 0 are missing, negative, or all unusable; nothing fits.

    Returns:
      The problem; its `warnings` name the sites whose NaN or infinite importance was replaced.
    """
    sites = check_sites(sites)
    now = check_rank_of_each(current, sites)
    if not isinstance(importance, Mapping):
        importance = dict(zip((s.path for s in sites), per_site(importance, sites, "score"), strict=True))
    lost = lambda row, ranks: (now[row] - ranks) / now[row]  # noqa: E731
    return _lowered(
        importance, lost, sites, now, budget, ranks, momentum, stability, time_budget, time_model
    )  # fmt: skip


def component_problem(
    values: Mapping[str, Sequence[float] | np.ndarray],
    sites: Sequence[Site],
    budget: int,
    *,
    ranks: Sequence[int] | None = None,
    momentum: float = 0.0,
    stability: float = 0.0,
    time_budget: float | None = None,
    time_model: TimeModel | None = None,
) -> Problem:
    """Tabulate what it loses to lower each site, from what each of its components is worth.

        min sum_l ( sum_{j > r_l} value_lj + V_l (momentum |r_l - c_l| - stability [r_l = c_l]) ),   V_l = sum_j value_lj
        s.t. r_l <= c_l,  sum_l r_l (d_in + d_out) <= budget,  some r_l > 0 for each type that has a site above rank 0

    with the components of a site, c_l of them, in the order of their values, largest first. The first term falls in ever
    smaller steps as r_l rises, so that plans are graded, where `prune_problem` takes a site's components as worth the same
    each. With value = (s sigma_j)^2 of a site in its SVD basis (`jaxprune.surgery.svd_bases`) the loss is the squared Frobenius
    distance to the present adapters, and no other adapters of these ranks are nearer.

    Args:
      values: {site path: worth of each of its components, any unit, none negative}; sites that are absent are at rank 0.
      sites: all sites, those at rank 0 among them.
      budget: adapter parameters that may be left.
      ranks, momentum, stability, time_budget, time_model: as in `prune_problem`.

    Raises:
      UsageError: as `prune_problem`, or a value is negative or not finite.

    Returns:
      The problem.
    """
    sites = check_sites(sites)
    ordered = {path: -np.sort(-np.asarray(value, np.float64).ravel()) for path, value in values.items()}
    if wrong := [path for path, value in ordered.items() if not (np.isfinite(value) & (value >= 0)).all()]:
        raise UsageError(f"the components of {some(wrong)} have values that are negative or not finite")
    tails = {path: np.append(np.cumsum(value[::-1])[::-1], 0.0) for path, value in ordered.items()}
    worth = {path: float(tail[0]) for path, tail in tails.items()}
    now = check_rank_of_each({site.path: len(ordered.get(site.path, ())) for site in sites}, sites)

    def lost(row: int, ranks: np.ndarray) -> np.ndarray:
        path = sites[row].path
        return tails[path][np.minimum(ranks, now[row])] / (worth[path] or 1.0)

    return _lowered(worth, lost, sites, now, budget, ranks, momentum, stability, time_budget, time_model)


def _lowered(importance, lost, sites, now, budget, ranks, momentum, stability, time_budget, time_model) -> Problem:
    """Tabulate importance (lost(row, ranks) + momentum |r - c| - stability [r = c]), no rank above the present one."""
    live = np.flatnonzero(now)
    if not len(live):
        raise UsageError("every site is at rank 0 already, so there is nothing to prune")
    for name, weight in (("momentum", momentum), ("stability", stability)):
        number = real(weight)
        if number is None or not 0 <= number < math.inf:
            raise UsageError(f"{name} {shown(weight)} cannot be used: expected a number, 0 or more")
    allowed = np.arange(now.max() + 1) if ranks is None else check_ranks(ranks)
    steps = np.union1d(allowed, now)
    relative, scale, warnings = check_importances(importance, tuple(sites[row] for row in live))
    value = np.where(steps == 0, 0.0, np.full((len(sites), 1), -np.inf))
    for row, worth in zip(live, relative, strict=True):
        fewer = now[row] - steps
        loss = lost(row, steps) + momentum * np.abs(fewer) - stability * (fewer == 0)
        may = (fewer == 0) | ((fewer > 0) & np.isin(steps, allowed))
        value[row] = np.where(may, -worth * loss, -np.inf)
    cost = np.array([[s.cost(int(r)) for r in steps] for s in sites])
    clock = None if time_budget is None else make_clock(sites, time_budget, time_model)
    return Problem(sites, steps, value, cost, budget, clock, -scale, warnings)
