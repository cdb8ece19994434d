"""The rank program solved exactly by a dynamic programme over the budget: no solver, only numpy.

Costs are counted in their greatest common divisor, so a model with round dimensions has a table of some thousand
columns. It proves its optimum without bounds or tolerances, which makes it the check on the MILP backends.
"""

from __future__ import annotations

import time

import numpy as np

from jaxprune.allocation.problem import Problem
from jaxprune.errors import UsageError

MAX_BYTES = 2**30


def knapsack(problem: Problem, deadline: float = np.inf) -> np.ndarray | None:
    """Solve a multiple-choice knapsack in which every type must hold a rank above 0, one for each stage of the problem.

    Of stages worth the same the one where back-propagation ends first is taken. In a stage, sites are taken type by
    type. For every amount b of budget, `some[b]` is the best worth with this type served, `none[b]` the best with all
    ranks of this type 0 so far:

        some'[b] = max( max_{r > 0} max(some, none)[b - cost_r] + value_r,  some[b - cost_0] + value_0 )
        none'[b] = none[b - cost_0] + value_0,        and none = some of the type before where a type begins

    Args:
      problem: the tables; a stage takes O(S K B / gcd) time, 2 S B / gcd bytes.
      deadline: `time.perf_counter()` value after which to give up.

    Raises:
      UsageError: the table would take more than 1 GiB.

    Returns:
      (S,) indices into the ranks, the smallest rank where worths tie; None when the deadline passed.
    """
    best = None
    for stage in problem.stages:
        choice = _stage(stage, deadline)
        if choice is None:
            return None
        if best is None or problem.worth(choice) > problem.worth(best):
            best = choice
    return best


def table_bytes(problem: Problem) -> int:
    """Return the bytes of the largest table that `knapsack` needs for a problem."""
    return max(_table(stage)[-1] for stage in problem.stages)


def _table(problem: Problem) -> tuple[np.ndarray, int, int, int]:
    """Return the costs above the cheapest rank in units, the unit, the budget in units, and the bytes of the table."""
    allowed = np.isfinite(problem.value)
    cheapest = np.where(allowed, problem.cost, np.iinfo(np.int64).max).min(axis=1)
    above = np.where(allowed, problem.cost - cheapest[:, None], 0)
    unit = int(np.gcd.reduce(above, axis=None)) or 1
    weight = above // unit
    width = min((problem.budget - sum(cheapest.tolist())) // unit, sum(weight.max(axis=1).tolist()))
    rows = sum(map(len, problem.types.values()))
    return weight, unit, width, rows * (width + 1) * (1 + np.dtype(_index(problem)).itemsize)


def _index(problem: Problem) -> type[np.unsignedinteger]:
    return np.uint8 if len(problem.ranks) <= 256 else np.uint16


def _stage(problem: Problem, deadline: float) -> np.ndarray | None:
    """Solve one problem without a clock; sites that may only take rank 0 are left at it."""
    weight, unit, width, size = _table(problem)
    allowed, most, index = np.isfinite(problem.value), weight.max(axis=1), _index(problem)
    types = list(problem.types.values())
    order = np.concatenate(types)
    if size > MAX_BYTES:
        raise UsageError(
            f"the knapsack table takes {size:,} bytes ({len(order)} sites by {width + 1:,} budget steps of {unit} "
            f"parameters), over the limit of {MAX_BYTES:,}; choose solver 'HIGHS', 'CBC' or 'GLPK_MI'"
        )

    opens = np.concatenate([np.arange(len(rows)) == 0 for rows in types])  # is it the first site of its type?
    # Only amounts that matter are computed: what the sites so far can spend at most (hi; beyond it nothing changes),
    # and what the sites to come cannot spend (lo).
    hi = np.minimum(np.cumsum(most[order]), width)
    lo = np.maximum(width - (most.sum() - np.cumsum(most[order])), 0)
    rank_at = np.zeros((len(order), width + 1), index)
    from_none = np.zeros((len(order), width + 1), bool)
    some = np.zeros(width + 1)
    none = np.full(width + 1, -np.inf)
    buffer, better = np.empty(width + 1), np.empty(width + 1, bool)
    for step, row in enumerate(order):
        if time.perf_counter() > deadline:
            return None
        if opens[step]:
            none, some = some, np.full(width + 1, -np.inf)
        np.greater(none, some, out=from_none[step])
        either = np.maximum(none, some)
        new_some, new_none = np.full(width + 1, -np.inf), np.full(width + 1, -np.inf)
        end = hi[step] + 1
        for k in np.flatnonzero(allowed[row]):
            w, v, before = weight[row, k], problem.value[row, k], some if k == 0 else either
            start = max(lo[step], w)
            if start >= end:
                continue
            total = np.add(before[start - w : end - w], v, out=buffer[: end - start])
            wins = np.greater(total, new_some[start:end], out=better[: end - start])
            np.copyto(new_some[start:end], total, where=wins)
            np.copyto(rank_at[step, start:end], index(k), where=wins)
            if k == 0:
                new_none[start:end] = none[start - w : end - w] + v
        new_some[end:], new_none[end:] = new_some[end - 1], new_none[end - 1]
        some, none = new_some, new_none

    choice = np.zeros(len(weight), np.int64)
    left, served = width, True  # the last type must be served
    for step in range(len(order) - 1, -1, -1):
        row, left = order[step], min(left, hi[step])
        k = int(rank_at[step, left]) if served else 0
        choice[row] = k
        left -= weight[row, k]
        if k > 0:
            served = not from_none[step, left]
        if opens[step]:
            served = True  # `none` at a type's first site is `some` of the type before
    return choice
