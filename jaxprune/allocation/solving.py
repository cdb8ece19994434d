"""From a problem to a plan: pick the solver, check what it returns, say how good it is."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import numpy as np

from jaxprune.allocation.bound import Relaxed, relax
from jaxprune.allocation.clock import TimeModel, make_clock
from jaxprune.allocation.dynamic import MAX_BYTES, knapsack, table_bytes
from jaxprune.allocation.gain import Spectra
from jaxprune.allocation.milp import PACKAGES, Answer, installed, milp
from jaxprune.allocation.problem import Problem, default_budget, rank_problem
from jaxprune.allocation.result import Plan, time_line
from jaxprune.errors import UsageError, nearest, shown
from jaxprune.inputs import check_sites, check_time_limit
from jaxprune.sites import Site

KNAPSACK = "DP"
SOLVERS = ("auto", *PACKAGES, KNAPSACK)
# Fastest first. `python -m experiments.bench allocate --instances 200 --solvers CBC GLPK_MI HIGHS DP`, two busy CPU
# cores, median (mean) seconds at 72 and at 224 sites: CBC 0.020 (0.023), 0.039 (0.132); HIGHS 0.027 (0.034), 0.109
# (0.185); GLPK_MI 0.016 (0.145), 0.031 (0.217), but it left 4 of 400 unproved after 10 s, the other two none.
AUTO = ("CBC", "HIGHS", "GLPK_MI")
# Seconds that the first has before the dynamic programme takes over, which needs a few tenths.
_PATIENCE = 2.0


def allocate(
    scores: Mapping[str, SupportsFloat] | Sequence[SupportsFloat] | np.ndarray | None,
    sites: Sequence[Site],
    budget: int | None = None,
    *,
    ranks: Sequence[int] = tuple(range(17)),
    gain: str = "paper",
    spectra: Spectra | None = None,
    time_budget: float | None = None,
    time_model: TimeModel | None = None,
    solver: str = "auto",
    time_limit: float = 60.0,
) -> Plan:
    """Choose the rank of every site that gains most within a budget (OPLoRA: stage 1 of DPLoRA).

        max sum_l I_l (1 - exp(-r_l / min(d_in, d_out)))   s.t.   sum_l r_l (d_in + d_out) <= budget,
        and some r_l > 0 for each site type

    This gain is almost linear in the rank, so the best plan is nearly all-or-nothing: expect the largest rank at some
    sites, 0 at others and few in between. With the spectra of the gradients, `gain` takes a measured one in its place
    (`jaxprune.allocation.gain`), whose plans are graded.

    A time budget adds   forward + sum_{k >= lowest adapted layer} back_k + own sum_l r_l (d_in + d_out) <= tau T_16

    with the step time T_16 of uniform rank 16: back-propagation stops below the lowest adapted layer, so a short time
    keeps the adapters in the upper layers.

    Args:
      scores: importance of each site: a mapping from path, or a sequence in the order of `sites`. Only ratios matter. None
        where the gain is `energy`.
      sites: the sites to plan.
      budget: adapter parameters that may be spent; half of uniform rank 16 when None.
      ranks: the ranks a site may take, 0 among them.
      gain: `paper` for the one above, `effective` for M_l = the gradient's effective rank in place of min(d_in, d_out), or
        `energy` for the energy of the gradient's r_l largest directions.
      spectra: {site path: singular values}, from `gradient_spectra`; for the last two.
      time_budget: tau, the longest predicted step time relative to uniform rank 16, above 0 and at most 1; None for no
        limit. The forward pass alone takes nearly half.
      time_model: times per parameter, whole numbers; measured ones when None.
      solver: `"CBC"`, `"GLPK_MI"` or `"HIGHS"`, mixed-integer solvers through CVXPY; `"DP"`, the dynamic
        programme; or `"auto"`, the first installed of the mixed-integer solvers, fastest first, and the dynamic programme
        where many ranks stay open after the bound or the solver takes long.
      time_limit: seconds; a plan not proved best by then is returned with its gap, and its status says so.

    Raises:
      UsageError: scores, spectra, ranks, budgets or solver cannot be used; a budget too small names the smallest that is not.

    Returns:
      The plan. Of sites that cannot be told apart (same type, gains and costs) the first by (layer, path) has the
      largest rank, whatever the solver; with a time budget, the first of those that let back-propagation end earliest.
    """
    sites = check_sites(sites)
    clock = None if time_budget is None else make_clock(sites, time_budget, time_model)
    budget = default_budget(sites) if budget is None else budget
    problem = rank_problem(scores, sites, budget, ranks, gain=gain, spectra=spectra, clock=clock)
    return solve(problem, solver=solver, time_limit=time_limit)


def solve(problem: Problem, *, solver: str = "auto", time_limit: float = 60.0) -> Plan:
    """Solve any rank problem; see `allocate` for the solvers, the errors and the ties."""
    if not isinstance(problem, Problem):
        raise UsageError(
            f"problem {shown(problem)} cannot be solved: expected what rank_problem or prune_problem return"
        )
    time_limit = check_time_limit(time_limit)
    names, notes = _candidates(solver)
    start = time.perf_counter()
    relaxed = relax(problem)
    if str(solver).lower() == "auto" and table_bytes(problem) <= MAX_BYTES // 4:
        # Where components have values of their own, hundreds of ranks are nearly as good as each other: a tree search stalls.
        names.insert(int(relaxed.open.sum() <= 2 * len(problem.sites) + 100), KNAPSACK)
    while True:
        name = names.pop(0)
        patience = min(time_limit, _PATIENCE) if names[:1] == [KNAPSACK] else time_limit
        answer = _run(problem, relaxed, name, start + patience)
        spent = time.perf_counter() - start
        if answer.proved or not names or spent >= 0.95 * time_limit:
            break
        notes.append(f"{name} {answer.fault or 'stopped early'}.")

    choice = relaxed.choice
    if answer.choice is not None and problem.worth(answer.choice) >= problem.worth(choice):
        choice = answer.choice
    worth = problem.worth(choice)
    gap = 0.0 if answer.proved else max(0.0, min(relaxed.bound, answer.bound) - worth) / (abs(worth) or 1.0)
    who = f"{name}, chosen by auto," if str(solver).lower() == "auto" else name
    if answer.proved:
        verdict = f"Optimal: {who} proved that no plan within the budget is worth more."
    elif gap == 0:
        verdict = (
            f"Optimal: {who} {answer.fault or 'stopped'}, but the Lagrangian bound proves that no plan is worth more."
        )
    else:
        source = "its best plan" if choice is answer.choice else "the plan of the Lagrangian relaxation"
        late = f" at the time limit of {time_limit:g} s" if spent >= 0.95 * time_limit else f" after {spent:.2g} s"
        verdict = (
            f"Not proved optimal: {who} {answer.fault or 'stopped'}{late}, so this is {source}; no plan is worth over "
            f"{100 * gap:.3g} % more."
        )
    choice = _in_order(problem, choice)
    ranks = {s.path: int(r) for s, r in zip(problem.sites, problem.ranks[choice], strict=True)}
    step = None if problem.clock is None else problem.time(choice) / problem.clock.whole
    timing = [] if step is None else [time_line(step, ranks, problem.sites) + "."]
    return Plan(
        ranks=ranks,
        objective=problem.scale * problem.worth(choice) + 0.0,  # + 0.0: not -0.0
        status=" ".join([verdict, *timing, *notes, *problem.warnings]),
        gap=gap,
        seconds=time.perf_counter() - start,
        solver=name,
        budget=problem.budget,
        cost=problem.spent(choice),
        sites=problem.sites,
        warnings=problem.warnings,
        time=step,
    )


def _candidates(solver: str) -> tuple[list[str], list[str]]:
    """List the solvers to try in order, and a sentence for each faster one that is not installed."""
    asked = {name.lower(): name for name in SOLVERS}.get(str(solver).lower())
    if asked is None:
        raise UsageError(f"solver {shown(solver)} is not known; nearest names: {nearest(str(solver), SOLVERS)}")
    if asked == KNAPSACK:
        return [KNAPSACK], []
    here = installed()
    found = [name for name in (AUTO if asked == "auto" else [asked]) if name in here]
    if not found:
        packages = " or ".join(f"`pip install {PACKAGES[name]}`" for name in (AUTO if asked == "auto" else [asked]))
        missing = "no mixed-integer solver is" if asked == "auto" else f"solver {asked} is not"
        raise UsageError(f"{missing} installed; {packages}, or choose from what is: {', '.join([*here, KNAPSACK])}")
    return found, [f"{name} is not installed." for name in AUTO[: AUTO.index(found[0])] if asked == "auto"]


def _run(problem: Problem, relaxed: Relaxed, name: str, deadline: float) -> Answer:
    """Run one solver; its plan is only believed after exact integers say that it meets every constraint."""
    if name == KNAPSACK:
        choice = knapsack(problem, deadline)
        answer = Answer(choice, choice is not None, np.inf, "returned no plan" if choice is None else None)
    else:
        answer = milp(problem, relaxed, name, max(deadline - time.perf_counter(), 1e-3))
    if answer.choice is None:
        return answer
    if fault := problem.fault(answer.choice):
        return Answer(None, False, answer.bound, f"returned a plan that {fault}")
    known = problem.worth(relaxed.choice)
    if answer.proved and problem.worth(answer.choice) < known - 1e-12 * abs(known):
        return Answer(None, False, np.inf, "returned a plan that is not the best")
    return answer


def _in_order(problem: Problem, choice: np.ndarray) -> np.ndarray:
    """Give the larger ranks to the earlier, by (layer, path), of sites with the same type, values and costs.

    With a clock, back-propagation first ends as early as the sites can be exchanged for.
    """
    alike: dict[tuple[str, bytes, bytes], list[int]] = defaultdict(list)
    for row, site in enumerate(problem.sites):
        alike[site.type, problem.value[row].tobytes(), problem.cost[row].tobytes()].append(row)
    reach = -1
    if problem.clock is not None:  # n sites of a group above rank 0 reach at least down to its n-th highest layer
        layer = problem.clock.layer
        highest = [np.sort(layer[rows])[-n] for rows in alike.values() if (n := np.count_nonzero(choice[rows]))]
        reach = min(highest)
    choice = choice.copy()
    for rows in alike.values():
        rows.sort(key=lambda row: (problem.sites[row].layer < reach, problem.sites[row].layer, problem.sites[row].path))
        choice[rows] = -np.sort(-choice[rows])
    return choice
