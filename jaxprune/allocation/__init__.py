"""Rank allocation: scores, costs and a budget in, an integer rank per site out. Numpy on the host, no JAX."""

from jaxprune.allocation.bound import Relaxed, relax
from jaxprune.allocation.clock import FLOPS, MEASURED, Clock, TimeModel, make_clock, step_time
from jaxprune.allocation.dynamic import knapsack
from jaxprune.allocation.gain import GAINS, captured_energy
from jaxprune.allocation.problem import Problem, default_budget, rank_problem
from jaxprune.allocation.pruning import component_problem, prune_problem
from jaxprune.allocation.result import Plan, uniform_plan
from jaxprune.allocation.solving import SOLVERS, allocate, solve

__all__ = [
    "FLOPS",
    "GAINS",
    "MEASURED",
    "SOLVERS",
    "Clock",
    "Plan",
    "Problem",
    "Relaxed",
    "TimeModel",
    "allocate",
    "captured_energy",
    "component_problem",
    "default_budget",
    "knapsack",
    "make_clock",
    "prune_problem",
    "rank_problem",
    "relax",
    "solve",
    "step_time",
    "uniform_plan",
]
