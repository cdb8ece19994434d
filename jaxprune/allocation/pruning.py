"""The program of a pruning event (DPLoRA, stage 2): the same tables as the first allocation, ranks only downwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import numpy as np

from jaxprune.allocation.clock import TimeModel, make_clock
from jaxprune.allocation.problem import Problem
from jaxprune.errors import UsageError, shown
from jaxprune.inputs import check_importances, check_rank_of_each, check_ranks, check_sites, per_site, real
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
    live = np.flatnonzero(now)
    if not len(live):
        raise UsageError("every site is at rank 0 already, so there is nothing to prune")
    for name, weight in (("momentum", momentum), ("stability", stability)):
        number = real(weight)
        if number is None or not 0 <= number < math.inf:
            raise UsageError(f"{name} {shown(weight)} cannot be used: expected a number, 0 or more")
    allowed = np.arange(now.max() + 1) if ranks is None else check_ranks(ranks)
    steps = np.union1d(allowed, now)

    if not isinstance(importance, Mapping):
        importance = dict(zip((s.path for s in sites), per_site(importance, sites, "score"), strict=True))
    relative, scale, warnings = check_importances(importance, tuple(sites[row] for row in live))
    lost = now[live, None] - steps
    loss = lost / now[live, None] + momentum * np.abs(lost) - stability * (lost == 0)
    may = (lost == 0) | ((lost > 0) & np.isin(steps, allowed))
    value = np.where(steps == 0, 0.0, np.full((len(sites), 1), -np.inf))
    value[live] = np.where(may, -relative[:, None] * loss, -np.inf)
    cost = np.array([[s.cost(int(r)) for r in steps] for s in sites])
    clock = None if time_budget is None else make_clock(sites, time_budget, time_model)
    return Problem(sites, steps, value, cost, budget, clock, -scale, warnings)
