"""OPLoRA, the first stage of DPLoRA: a MILP decides the ranks before training.

Every site l is scored once by the gradient of the loss with respect to its frozen kernel, I_l. A rank r at site l is
taken to gain I_l (1 - exp(-r / min(d_in, d_out))) and costs r (d_in + d_out) parameters; the ranks maximise the total gain
within the budget, with at least one positive rank for every type of site. Sites of rank 0 get no adapter.

Departures from the paper: a parameter is counted once (the paper counts it twice, so its 2.5M is a budget of 1.25M),
and scores are divided by their largest before solving, which changes no optimum and keeps solver tolerances meaningful.

Source: "DPLoRA: a dual-pruning framework based on ILP optimization and progressive pruning", section 3.1, eq. 1 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxprune.adapters import init_lora
from jaxprune.allocate import allocate
from jaxprune.methods.base import Context, Method, Start
from jaxprune.scores import site_scores


def oplora(
    *,
    budget: int | None = None,
    time_budget: float | None = None,
    score: str = "absolute",
    ranks: Sequence[int] = range(17),
    solver: str = "auto",
    time_limit: float = 60.0,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> Method:
    """Choose each site's rank by a MILP, then train plain LoRA.

    Args:
      budget: adapter parameters; None for half of uniform rank 16.
      time_budget: longest predicted step time, relative to uniform rank 16 at every site; None for no limit.
      score: one of `jaxprune.scores.SCORES`; `squared` is taken per sample, as in the released code.
      ranks: candidate ranks.
      solver: `auto`, `CBC`, `GLPK_MI`, `HIGHS` or `DP`.
      time_limit: seconds the solver may take.
      alpha: numerator of s = alpha / r at each site; None for twice the rank, that is s = 2 everywhere.
      dropout: rate of the dropout on the adapters' inputs.
    """

    def start(context: Context) -> Start:
        per_sample = score == "squared"
        data = context.samples if per_sample else context.batches
        scores = site_scores(
            score, context.forward, context.loss_fn, context.params, context.sites, data, per_sample=per_sample
        )
        plan = allocate(
            scores, context.sites, budget, ranks=ranks, solver=solver, time_limit=time_limit, time_budget=time_budget
        )
        return Start(*init_lora(context.key, context.sites, plan.ranks, alpha=alpha, dropout=dropout), plan)

    return Method(start, name="oplora")
