"""Squeeze: train at a high rank, and lower it in the SVD basis, step by step, to a budget.

N events are spread over training. At each, every site is brought into its SVD basis and the ranks become those that lose least,

    min sum_l sum_{j > r_l} (s sigma_lj)^2    within the budget,

solved to proof as the knapsack it is, with the true cost of every site; one threshold on all singular values is the case of equal
costs. It is what `dplora(lora(), basis="svd", loss="components")` does, with a uniform start and a schedule of its own.

Source: ours; LoRA-Squeeze (arXiv 2602.10993) lowers one rank for all sites, and PARA (arXiv 2604.27796) has the threshold.
"""

from __future__ import annotations

from typing import Annotated

from jaxprune.checks import MOST_STEPS, Count, OneOf, Range, Share
from jaxprune.methods.base import Method
from jaxprune.methods.dplora import Events, Seconds, Solver, dplora
from jaxprune.methods.lora import lora
from jaxprune.methods.registry import register
from jaxprune.schedules import BUDGETS


@register(
    paper="LoRA in its SVD basis, lowered to a budget (compare LoRA-Squeeze, arXiv 2602.10993)",
    defaults={"rank": 16},
    aliases={"target": "prune_ratio", "schedule": "budget_schedule"},
    first=lora,
)
def squeeze(
    first: Method | None = None,
    *,
    total_steps: Count,
    target: Share = 0.75,
    events: Events | None = None,
    delay: Annotated[int, Range(0, MOST_STEPS)] = 0,
    stop: Annotated[float, Range(above=0, high=1)] = 0.7,
    schedule: Annotated[str, OneOf(tuple(BUDGETS))] = "early",
    solver: Solver = "auto",
    time_limit: Seconds = 60.0,
) -> Method:
    """Train LoRA of a high rank, and lower ranks where that loses least.

    Args:
      first: the method that is lowered; None for `lora(rank=16)`.
      total_steps: optimiser steps of the whole run.
      target: share of the adapter parameters to remove by the last event.
      events: how many times ranks are lowered; None for 10, or in a shorter run as many as fit.
      delay: steps before the first; the learning rate's warm-up.
      stop: share of the run in which the events lie; the rest recovers.
      schedule: how the budget falls: `bezier`, `linear` or `early`.
      solver: what solves for the ranks at events; `auto` is the fastest that is installed.
      time_limit: seconds the solver may take at an event; then its best plan so far is used, and said to be so.

    Raises:
      UsageError: a setting is out of range, the events do not fit, `first` does more than choose ranks, or (by `start`) the
        types of sites cannot all keep a rank within the last budget.
    """
    return dplora(
        lora(rank=16) if first is None else first,
        total_steps=total_steps,
        target=target,
        events=events,
        delay=delay,
        stop=stop,
        recovery_steps=0,
        schedule=schedule,
        basis="svd",
        loss="components",
        solver=solver,
        time_limit=time_limit,
    )._replace(name="squeeze")
