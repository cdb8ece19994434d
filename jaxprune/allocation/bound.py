"""An upper bound on every plan, a good plan, and the few ranks that are still open between the two.

Pricing the budget (a Lagrange multiplier on it) leaves one independent choice per site, so the bound and the plan next
to it take under a millisecond. Their distance settles most sites: a rank that costs more than that distance cannot be
in a better plan. A solver is then left with tens of binary variables instead of thousands, with the same optimum.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxprune.allocation.problem import Problem


class Relaxed(NamedTuple):
    """What the relaxation tells: an upper `bound`, a feasible `choice` (S,), and where a better plan can be, `open`.

    Attributes:
      bound: no plan is worth more, in the units of `Problem.value`.
      choice: (S,) indices into the ranks of a plan that meets every constraint.
      open: (S, K) bool, the ranks that a plan better than `choice` may still take; holds `choice` itself.
      stages: the stages of the problem that a better plan may lie in, and that of `choice`.
    """

    bound: float
    choice: np.ndarray
    open: np.ndarray
    stages: tuple[Problem, ...]


def relax(problem: Problem) -> Relaxed:
    """Relax every stage of the problem; without a clock it has one.

    Each plan of the problem is a plan of some stage, so the largest of their bounds bounds it, and each plan of a stage
    is one of the problem, so the best of their choices may be taken. A plan better than that choice is a plan of some
    stage s better than that choice; it takes only ranks that s leaves open against that choice. The union of the open
    ranks over the stages therefore holds every better plan, and a stage whose bound is below that choice holds none.
    """
    priced = [_price(stage) for stage in problem.stages]
    worths = [problem.worth(choice) for _, _, choice in priced]
    first = int(np.argmax(worths))  # of equals the stage where back-propagation ends first
    choice = priced[first][2]
    keep = np.zeros(problem.value.shape, bool)
    keep[np.arange(len(keep)), choice] = True
    stages: list[Problem] = []
    for number, (stage, (bound, price, _)) in enumerate(zip(problem.stages, priced, strict=True)):
        room = bound - worths[first] + _rounding(problem)
        if room >= 0 or number == first:
            keep |= _open(stage, price, room)
            stages.append(stage)
    return Relaxed(max(bound for bound, _, _ in priced), choice, keep, tuple(stages))


def _price(problem: Problem) -> tuple[float, float, np.ndarray]:
    """Minimise over prices p >= 0 the bound L(p) = p B + max_k sum_l (value - p cost)[l, k_l], types still kept.

    L is convex and piecewise linear in p: the price at which the best plan under the budget and the best over it are
    worth the same is tried next, until no other plan beats both there (exact after finitely many steps). Returns the
    bound, its price and the best plan under the budget that was met.
    """
    value, cost, budget = problem.value, problem.cost, problem.budget
    allowed = np.isfinite(value)

    def spent_worth(choice: np.ndarray) -> tuple[int, float]:
        return problem.spent(choice), problem.worth(choice)

    price, best = 0.0, _choose(problem, value)
    over, over_worth = spent_worth(best)
    bound = over_worth
    if over > budget:
        best = _choose(problem, np.where(allowed, -cost, -np.inf))
        under, under_worth = spent_worth(best)
        for _ in range(200):  # about a dozen steps; the end only keeps rounding from going round in circles
            price = max(0.0, (over_worth - under_worth) / (over - under))
            choice = _choose(problem, value - price * cost)
            spent, worth = spent_worth(choice)
            bound = worth + price * (budget - spent)
            if bound <= under_worth + price * (budget - under) + _rounding(problem):
                break
            if spent <= budget:
                best, under, under_worth = choice, spent, worth
            else:
                over, over_worth = spent, worth
    return bound, price, _fill(problem, best)


def _open(problem: Problem, price: float, room: float) -> np.ndarray:
    """Tell (S, K) which ranks a plan can take that is worth at most `room` less than the bound at this price."""
    regret = problem.value - price * problem.cost
    regret = regret.max(axis=1, keepdims=True) - regret
    rooms = np.full(len(regret), room)
    for rows in problem.types.values():  # the bound holds this much less where a type had to be given its rank
        rooms[rows] += regret[rows][:, problem.ranks > 0].min()
    return np.isfinite(problem.value) & (regret <= rooms[:, None])


def _choose(problem: Problem, worth: np.ndarray) -> np.ndarray:
    """Take the best rank at each site alone; a type left with none gets one where that costs least."""
    choice = worth.argmax(axis=1)
    positive = problem.ranks > 0
    for rows in problem.types.values():
        if not positive[choice[rows]].any():
            regret = worth[rows].max(axis=1, keepdims=True) - np.where(positive, worth[rows], -np.inf)
            row, rank = np.unravel_index(regret.argmin(), regret.shape)
            choice[rows[row]] = rank
    return choice


def _fill(problem: Problem, choice: np.ndarray) -> np.ndarray:
    """Spend what is left, one site after another, where it is worth most."""
    rows, choice = np.arange(len(choice)), choice.copy()
    while True:
        left = problem.budget - problem.spent(choice)
        gain = problem.value - problem.value[rows, choice][:, None]
        fits = problem.cost - problem.cost[rows, choice][:, None] <= left
        gain = np.where(fits & (problem.ranks > 0), gain, 0.0)
        row, rank = np.unravel_index(gain.argmax(), gain.shape)
        if gain[row, rank] <= 0:
            return choice
        choice[row] = rank


def _rounding(problem: Problem) -> float:
    """What sums of float64 values can be off by, with room to spare."""
    return 1e-12 * float(np.abs(problem.value[np.isfinite(problem.value)]).max())
