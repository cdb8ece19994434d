"""The rank program as a mixed-integer linear program in CVXPY, for CBC, GLPK_MI or HiGHS.

Only the ranks that the relaxation leaves open become variables, and where step time is limited one variable per stage
that says where back-propagation ends. Worths are taken relative to the plan the relaxation found and scaled to 1e6,
costs relative to the cheapest open rank in units of their greatest common divisor: gaps are set to zero, and what
tolerance the solvers keep is then below what float64 tells apart in the worths themselves.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from jaxprune.allocation.bound import Relaxed
from jaxprune.allocation.problem import Problem

PACKAGES = {"CBC": "cylp", "GLPK_MI": "cvxopt", "HIGHS": "highspy"}


class Answer(NamedTuple):
    """What a solver brought back: a choice (S,) or None, whether it proved it best, its upper bound, what failed."""

    choice: np.ndarray | None
    proved: bool
    bound: float
    fault: str | None


def installed() -> tuple[str, ...]:
    """Name the backends that CVXPY can call here."""
    import cvxpy

    return tuple(name for name in PACKAGES if name in cvxpy.installed_solvers())


def milp(problem: Problem, relaxed: Relaxed, solver: str, seconds: float) -> Answer:
    """Solve for one open rank per site with binary x: max value @ x s.t. E x = 1, cost @ x <= budget, T x >= 1.

    With a clock, also for one open stage with binary y: cost @ x <= budgets @ y, sum y = 1, and a site takes a rank
    above 0 only in stages that allow it. (The cumulative sum of y is the monotone chain "layer k is back-propagated";
    in y the time limit and the budget are one constraint, on numbers of parameters.)

    Args:
      problem: the tables.
      relaxed: its relaxation; ranks it closed are left out.
      solver: `"CBC"`, `"GLPK_MI"` or `"HIGHS"`.
      seconds: time limit.

    Returns:
      The answer, one rank a site; budget and types are still to be checked in exact integers.
    """
    import cvxpy
    from cvxpy.error import SolverError
    from scipy import sparse

    row, rank = np.nonzero(relaxed.open)
    column = np.arange(len(row))
    worth = problem.value[row, rank] - problem.value[row, relaxed.choice[row]]
    # The bound keeps it finite, whatever is left to tell apart.
    scale = 1e6 / (max(np.abs(worth).max(), 1e-280) if worth.any() else 1.0)
    cheapest = np.where(relaxed.open, problem.cost, np.iinfo(np.int64).max).min(axis=1)
    weight = problem.cost[row, rank] - cheapest[row]
    unit = int(np.gcd.reduce(weight)) or 1
    # A budget that nothing can use up may lie beyond 64 bits.
    most, least = sum(problem.cost.max(axis=1).tolist()), sum(cheapest.tolist())
    capacity = np.array([(min(stage.budget, most) - least) // unit for stage in relaxed.stages])

    one = sparse.csr_array((np.ones(len(row)), (row, column)), shape=(len(relaxed.choice), len(row)))
    positive = column[problem.ranks[rank] > 0]
    kind = np.zeros(len(relaxed.choice), np.int64)
    for number, rows in enumerate(problem.types.values()):
        kind[rows] = number
    shape = (len(problem.types), len(row))
    some = sparse.csr_array((np.ones(len(positive)), (kind[row[positive]], positive)), shape=shape)
    x = cvxpy.Variable(len(row), boolean=True)
    constraints: list[Any] = [one @ x == 1, some @ x >= 1]
    if len(capacity) == 1:
        constraints.append((weight // unit) @ x <= capacity[0])
    else:
        y = cvxpy.Variable(len(capacity), boolean=True)
        above = problem.ranks > 0
        may = np.stack([np.isfinite(stage.value[:, above]).any(axis=1) for stage in relaxed.stages], axis=1)
        tied = np.unique(row[positive][~may[row[positive]].all(axis=1)])  # sites that some stages leave at rank 0
        used = sparse.csr_array((np.ones(len(positive)), (row[positive], positive)), shape=one.shape)
        constraints += [(weight // unit) @ x <= capacity @ y, cvxpy.sum(y) == 1]
        if len(tied):
            constraints.append(used[tied] @ x <= may[tied].astype(float) @ y)
    if solver == "GLPK_MI":  # it aborts the process where its presolver leaves no variable; it leaves a free choice
        constraints.append(cvxpy.sum(cvxpy.Variable(2, boolean=True)) == 1)
    if solver == "HIGHS":
        _silence_highs()
    program = cvxpy.Problem(cvxpy.Maximize((worth * scale) @ x), constraints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "may be inaccurate" is what the answer says in its own words
        try:
            program.solve(solver=solver, **_options(solver, seconds))
        except SolverError:
            return Answer(None, False, np.inf, "returned no solution")

    # Only HiGHS tells its bound; CVXPY hands it the negated objective, counted from the relaxation's plan.
    dual = getattr(getattr(program.solver_stats, "extra_stats", None), "mip_dual_bound", -np.inf)
    bound = problem.worth(relaxed.choice) + max(-dual / scale, 0.0)
    taken = np.flatnonzero(x.value > 0.5) if x.value is not None else column[:0]
    if not np.array_equal(row[taken], np.arange(len(relaxed.choice))):
        return Answer(None, False, bound, "returned no solution")
    return Answer(rank[taken], program.status == cvxpy.OPTIMAL, bound, None)


def _silence_highs() -> None:
    """Let HiGHS pass the banner that a process's first `Highs` prints, which no option of CVXPY stops."""
    import highspy

    # The banner belongs to the first call of a method, and the constructor of Highs calls one; that of its base does not.
    first = highspy.Highs.__mro__[1]()
    first.setOptionValue("log_to_console", False)
    first.clear()


def _options(solver: str, seconds: float) -> dict[str, float | int | str]:
    """Zero gaps, tight feasibility, one thread, a fixed seed, a time limit: in each backend's own words."""
    if solver == "HIGHS":
        # parallel, not threads: HiGHS refuses another thread count than an earlier solve of the process used.
        tight = dict(mip_feasibility_tolerance=1e-9, primal_feasibility_tolerance=1e-9, dual_feasibility_tolerance=1e-9)
        return dict(mip_rel_gap=0.0, mip_abs_gap=0.0, parallel="off", random_seed=0, time_limit=seconds, **tight)
    if solver == "CBC":  # its seed is fixed; it may overrun the time limit, up to twofold where measured
        gaps = dict(allowableGap=0.0, allowableFractionGap=0.0, allowablePercentageGap=0.0)
        return dict(maximumSeconds=min(seconds, 1e9), numberThreads=0, integerTolerance=1e-9, **gaps)
    milliseconds = int(min(max(1000 * seconds, 1), 2**31 - 1))
    return dict(tm_lim=milliseconds, mip_gap=0.0, tol_int=1e-9, tol_bnd=1e-9, tol_obj=1e-10)
