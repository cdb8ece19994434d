"""OPLoRA, the first stage of DPLoRA: a MILP decides the ranks before training.

Every site l is scored once by the gradient of the loss with respect to its frozen kernel, I_l. A rank r at site l is
taken to gain I_l (1 - exp(-r / min(d_in, d_out))) and costs r (d_in + d_out) parameters; the ranks maximise the total gain
within the budget, with at least one positive rank for every type of site. Sites of rank 0 get no adapter.

Departures from the paper: a parameter is counted once (the paper counts it twice, so its 2.5M is a budget of 1.25M),
and scores are divided by their largest before solving, which changes no optimum and keeps solver tolerances meaningful.

Source: "DPLoRA: a dual-pruning framework based on ILP optimization and progressive pruning", section 3.1, eq. 1 to 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from jaxprune.adapters import init_lora
from jaxprune.allocation import SOLVERS, allocate
from jaxprune.checks import MOST_RANK, HostOnly, OneOf, Positive, Range, Share
from jaxprune.errors import UsageError
from jaxprune.inputs import check_ranks
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import Components, register
from jaxprune.scores import site_scores
from jaxprune.scores.gradient import SCORES

Budget = Annotated[int, Range(1)]
TimeBudget = Annotated[float, Range(above=0, high=1)]
Score = Annotated[str, OneOf(SCORES)]
Ranks = Sequence[Annotated[int, Range(0, MOST_RANK)]]
Solver = Annotated[str, OneOf(SOLVERS, fold=True)]
Seconds = Annotated[float, Range(above=0), HostOnly()]


@register(
    paper="DPLoRA: a dual-pruning framework based on ILP optimization and progressive pruning, section 3.1",
    components=Components(lambda rank: {"ranks": range(rank + 1)}, 16, "the most components that a site may get"),
)
def oplora(
    *,
    budget: Budget | None = None,
    time_budget: TimeBudget | None = None,
    score: Score = "absolute",
    per_sample: bool | None = None,
    ranks: Ranks = range(17),
    solver: Solver = "auto",
    time_limit: Seconds = 60.0,
    alpha: Positive | None = None,
    dropout: Share = 0.0,
) -> Method:
    """Choose each site's rank by a MILP, then train plain LoRA.

    Args:
      budget: the most adapter parameters that the plan may have; None for half of uniform rank 16.
      time_budget: longest predicted step time, relative to uniform rank 16 at every site; None for no limit.
      score: what sites are scored by before training, see `jaxprune.site_scores`.
      per_sample: take the score of each sample's gradient and average, as eq. 1 says, on the context's `samples`, and not that
        of a batch's mean gradient, which is cheaper and ranks sites nearly alike; None for samples where the score is
        `squared`, as in the released code. The plan's status says which.
      ranks: candidate ranks, 0 among them.
      solver: what solves for the ranks; `auto` is the fastest that is installed.
      time_limit: seconds the solver may take; then its best plan so far is used, and said to be so.
      alpha: numerator of s = alpha / r at each site; None for twice the rank, that is s = 2 everywhere.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range.
    """
    check_ranks(ranks)
    alone = score == "squared" if per_sample is None else per_sample and score != "weight"

    def start(context: Context) -> Start:
        data = context.samples if alone else context.batches
        if alone and not data:
            raise UsageError(f"score {score!r} of single samples needs the context's samples, and it has none")
        scores = site_scores(
            score, context.forward, context.loss_fn, context.params, context.sites, data, per_sample=alone
        )
        plan = allocate(
            scores, context.sites, budget, ranks=ranks, solver=solver, time_limit=time_limit, time_budget=time_budget
        )
        if score != "weight":
            of = "single samples, averaged" if alone else "batches"
            plan = dataclasses.replace(plan, status=f"{plan.status} Sites scored by {score!r} of {of}.")
        adapters, masks = init_lora(context.key, context.sites, plan.ranks, alpha=alpha, dropout=dropout)
        return Start(adapters, {}, masks, plan, context.params)

    return Method(start, name="oplora")
