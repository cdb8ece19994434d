"""Time the rank solvers on random instances of real shapes, and hold their answers against one another.

Importances are log-normal, budgets uniform between 5 % and 95 % of rank 16 everywhere, or with --prune of random
current ranks. Every solver gets the same tables in turn, and proof of optimality is asked of all. PuLP with CBC joins
as the outside yardstick where it is installed: the whole program as the DPLoRA paper states it, and a time budget as a
chain of binary variables with a row of step times; gaps zero, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxprune.allocation import Problem, make_clock, prune_problem, rank_problem, solve
from jaxprune.errors import UsageError
from jaxprune.sites import Site

OURS = ("CBC", "GLPK_MI", "HIGHS", "DP")
PEER = "PuLP"


def roberta_base() -> tuple[Site, ...]:
    """List the 72 sites of RoBERTa-base: 12 layers of six kernels, width 768, feed-forward 3072."""
    shapes = {n: (768, 768) for n in ("query", "key", "value", "out")} | {"fc1": (768, 3072), "fc2": (3072, 768)}
    return tuple(Site(f"layer_{i}/{n}", *shape, i, n) for i in range(12) for n, shape in shapes.items())


def llama_3_8b() -> tuple[Site, ...]:
    """List the 224 sites of Llama-3-8B: 32 layers of seven kernels, width 4096, kv 1024, feed-forward 14336."""
    shapes = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096)}
    shapes |= {"gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096)}
    return tuple(Site(f"layer_{i}/{n}", *shape, i, n) for i in range(32) for n, shape in shapes.items())


@dataclass
class Tally:
    """What one solver did over the instances of one shape."""

    seconds: list[float] = field(default_factory=list)
    proved: int = 0
    off: float = 0.0  # largest relative distance of a proved objective from the best one of the instance


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench allocate", description=__doc__)
    parser.add_argument("--instances", type=int, default=200, help="instances of each shape (default 200)")
    parser.add_argument("--solvers", nargs="+", default=None, help=f"any of {', '.join((*OURS, PEER))} (default all)")
    parser.add_argument("--time-budget", type=float, default=None, help="of uniform rank 16's step time (default none)")
    parser.add_argument("--prune", action="store_true", help="pruning events instead of first allocations")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds per solver and instance (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="file to write the table to as well")
    args = parser.parse_args(argv)
    if args.instances < 1:
        raise UsageError(f"--instances {args.instances} cannot be used: expected 1 or more")
    solvers = {name: _solver(name, args.time_limit) for name in args.solvers or _available()}

    tallies: dict[tuple[int, str], Tally] = defaultdict(Tally)
    for sites in (roberta_base(), llama_3_8b()):
        for run in solvers.values():  # imports and other first-call costs
            run(instance(sites, np.random.default_rng(args.seed), args.time_budget, args.prune))
        for number in range(args.instances):
            rng = np.random.default_rng((args.seed, len(sites), number))
            problem = instance(sites, rng, args.time_budget, args.prune)
            worths: dict[str, float] = {}
            for name, run in solvers.items():
                start = time.perf_counter()
                worth, proved = run(problem)
                tally = tallies[len(sites), name]
                tally.seconds.append(time.perf_counter() - start)
                tally.proved += proved
                if proved:
                    worths[name] = worth
            for name, worth in worths.items():
                best = max(worths.values())
                tally = tallies[len(sites), name]
                tally.off = max(tally.off, (best - worth) / abs(best))
    text = _table(tallies, args)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


def instance(
    sites: tuple[Site, ...], rng: np.random.Generator, time_budget: float | None = None, prune: bool = False
) -> Problem:
    """Draw log-normal importances (sigma 1) and a budget of 5 % to 95 % of the ranks now: 16, or random to prune."""
    scores = list(rng.lognormal(size=len(sites)))
    now = rng.integers(0, 17, len(sites)) if prune else np.full(len(sites), 16)
    budget = int(rng.uniform(0.05, 0.95) * sum(s.cost(int(r)) for s, r in zip(sites, now, strict=True)))
    if prune:
        return prune_problem(scores, sites, now, budget, time_budget=time_budget)
    clock = None if time_budget is None else make_clock(sites, time_budget)
    return rank_problem(scores, sites, budget, clock=clock)


def _available() -> list[str]:
    try:
        import pulp  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return list(OURS)
    return [*OURS, PEER]


def _solver(name: str, time_limit: float) -> Callable[[Problem], tuple[float, bool]]:
    """Return a function from a problem to (worth of the plan found, whether it is proved best)."""
    if name not in (*OURS, PEER):
        raise UsageError(f"--solvers {name} is not known; expected {', '.join((*OURS, PEER))}")
    if name == PEER:
        return lambda problem: _pulp(problem, time_limit)

    def ours(problem: Problem) -> tuple[float, bool]:
        plan = solve(problem, solver=name, time_limit=time_limit)
        return plan.objective / problem.scale, plan.gap == 0

    return ours


def _pulp(problem: Problem, time_limit: float) -> tuple[float, bool]:
    import pulp  # pyright: ignore[reportMissingImports]

    rows, columns = range(len(problem.sites)), range(len(problem.ranks))
    program = pulp.LpProblem("ranks", pulp.LpMaximize)
    x = [[pulp.LpVariable(f"x_{i}_{k}", cat="Binary") for k in columns] for i in rows]
    may = np.isfinite(problem.value)
    program += pulp.lpSum(float(problem.value[i, k]) * x[i][k] for i in rows for k in columns if may[i, k])
    for i, k in np.argwhere(~may):
        program += x[i][k] == 0
    program += pulp.lpSum(int(problem.cost[i, k]) * x[i][k] for i in rows for k in columns) <= problem.budget
    for i in rows:
        program += pulp.lpSum(x[i]) == 1
    for sites in problem.types.values():
        program += pulp.lpSum(int(problem.ranks[k]) * x[i][k] for i in sites for k in columns) >= 1
    if clock := problem.clock:
        layers = sorted(clock.back)
        z = {layer: pulp.LpVariable(f"z_{layer}", cat="Binary") for layer in layers}  # is it back-propagated?
        for i in rows:
            program += pulp.lpSum(x[i][1:]) <= z[int(clock.layer[i])]
        for below, above in itertools.pairwise(layers):
            program += z[below] <= z[above]
        own, back = clock.own * problem.cost, np.array([clock.back[k] for k in layers])
        unit = int(np.gcd.reduce([*own.ravel(), *back]))  # small numbers suit its tolerances
        terms = [int(own[i, k]) // unit * x[i][k] for i in rows for k in columns]
        terms += [int(time) // unit * z[layer] for layer, time in zip(layers, back, strict=True)]
        program += pulp.lpSum(terms) <= (clock.limit - clock.forward) // unit
    solver = pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, gapAbs=0.0, threads=1, timeLimit=time_limit)
    program.solve(solver)
    choice = np.array([[x[i][k].value() or 0.0 for k in columns] for i in rows]).argmax(axis=1)
    proved = program.sol_status == pulp.LpSolutionOptimal and problem.fault(choice) is None
    return problem.worth(choice), proved


def _table(tallies: dict[tuple[int, str], Tally], args: argparse.Namespace) -> str:
    lines = [
        f"{args.instances} {'pruning events' if args.prune else 'instances'} of each shape, 17 ranks, time budget "
        f"{args.time_budget or 'none'}, seed {args.seed}, limit {args.time_limit:g} s a solve",
        "sites  solver     median s     mean s      max s     proved  worst difference",
    ]
    for (sites, name), tally in tallies.items():
        times = np.array(tally.seconds)
        lines.append(
            f"{sites:5}  {name:8}  {np.median(times):9.4f}  {times.mean():9.4f}  {times.max():9.4f}  "
            f"{tally.proved:4}/{len(times):<4}  {tally.off:16.1e}"
        )
    return "\n".join([*lines, "worst difference: how far a proved objective lies below the best proved one, relative"])
