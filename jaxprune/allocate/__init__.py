"""Rank allocation: scores, costs and a budget in, an integer rank per site out. Numpy on the host, no JAX."""

from jaxprune.allocate.bound import Relaxed, relax
from jaxprune.allocate.clock import FLOPS, MEASURED, Clock, TimeModel, make_clock, step_time
from jaxprune.allocate.knapsack import knapsack
from jaxprune.allocate.problem import Problem, default_budget, rank_problem
from jaxprune.allocate.pruning import prune_problem
from jaxprune.allocate.result import Plan, uniform_plan
from jaxprune.allocate.solve import SOLVERS, allocate, solve

__all__ = [
    "FLOPS",
    "MEASURED",
    "SOLVERS",
    "Clock",
    "Plan",
    "Problem",
    "Relaxed",
    "TimeModel",
    "allocate",
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
