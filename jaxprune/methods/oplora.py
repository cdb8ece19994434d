"""OPLoRA, the first stage of DPLoRA: a MILP decides the ranks before training.

Every site l is scored once by the gradient of the loss with respect to its frozen kernel, I_l. A rank r at site l is
taken to gain I_l (1 - exp(-r / min(d_in, d_out))) and costs r (d_in + d_out) parameters; the ranks maximise the total gain
within the budget, with at least one positive rank for every type of site. Sites of rank 0 get no adapter.

That gain is the paper's. It is linear for all ranks that matter, and its plans capture less of the gradients' energy than uniform
ranks do. `gain="effective"` puts the effective rank of the site's measured gradient in place of min(d_in, d_out), and
`gain="energy"` takes the energy of the gradient's r largest directions (`jaxprune.allocation.gain`). Both read the spectra of a
sketch, of one more backward pass a batch; `energy` needs no scores, and its sketch is all that is measured.

`init="gradient"` starts from a step of gradient descent, with U S V^T the sketched gradient (GoRA; a plan that measured it
measures no more):

    A = U_r / sqrt(3),    B = -init_rate sqrt(3) / s S_r V_r^T,    so that s A B = -init_rate U_r S_r V_r^T

with columns of A as long as LoRA's. GoRA draws A at random, fits B to -G by least squares, and scales A B, which then holds
r / d_in of G's energy, up by sqrt(d_in / r) to the length of the step. Here it holds what the rank captures: MiniLM on MRPC,
validation loss before training 0.701; with a rate of 0.5 and 2 it is 0.682 and 0.645, and with A at random 0.698 and 0.688.

Departures from the paper: a parameter is counted once (the paper counts it twice, so its 2.5M is a budget of 1.25M),
and scores are divided by their largest before solving, which changes no optimum and keeps solver tolerances meaningful.

Source: "DPLoRA: a dual-pruning framework based on ILP optimization and progressive pruning", section 3.1, eq. 1 to 4; He et al.
2025, "GoRA: Gradient-driven Adaptive Low Rank Adaptation", arXiv 2502.12171.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Lora, init_lora
from jaxprune.allocation import GAINS, SOLVERS, Plan, allocate, captured_energy
from jaxprune.checks import MOST_RANK, HostOnly, OneOf, Positive, Range, Share
from jaxprune.errors import UsageError
from jaxprune.inputs import check_ranks
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import Components, register
from jaxprune.scores import SCORES, LowRank, gradient_svd, site_scores
from jaxprune.scores.sketch import COLUMNS

Budget = Annotated[int, Range(1)]
TimeBudget = Annotated[float, Range(above=0, high=1)]
Score = Annotated[str, OneOf(SCORES)]
Ranks = Sequence[Annotated[int, Range(0, MOST_RANK)]]
Solver = Annotated[str, OneOf(SOLVERS, fold=True)]
Seconds = Annotated[float, Range(above=0), HostOnly()]
INITS = ("zero", "gradient")


@register(
    paper="DPLoRA: a dual-pruning framework based on ILP optimization and progressive pruning, section 3.1",
    components=Components(lambda rank: {"ranks": range(rank + 1)}, 16, "the most components that a site may get"),
)
def oplora(
    *,
    budget: Budget | None = None,
    time_budget: TimeBudget | None = None,
    gain: Annotated[str, OneOf(GAINS)] = "paper",
    score: Score = "absolute",
    per_sample: bool | None = None,
    ranks: Ranks = range(17),
    solver: Solver = "auto",
    time_limit: Seconds = 60.0,
    init: Annotated[str, OneOf(INITS)] = "zero",
    init_rate: Positive = 0.05,
    alpha: Positive | None = None,
    dropout: Share = 0.0,
) -> Method:
    """Choose each site's rank by a MILP, then train plain LoRA.

    Args:
      budget: the most adapter parameters that the plan may have; None for half of uniform rank 16.
      time_budget: longest predicted step time, relative to uniform rank 16 at every site; None for no limit.
      gain: what a rank gains at a site: `paper` as in eq. 2, `effective` with the effective rank of the site's gradient in it,
        `energy` for the energy of the gradient's largest directions, which needs no score. The plan's status says which.
      score: what sites are scored by before training, see `jaxprune.site_scores`.
      per_sample: take the score of each sample's gradient and average, as eq. 1 says, on the context's `samples`, and not that
        of a batch's mean gradient, which is cheaper and ranks sites nearly alike; None for samples where the score is
        `squared`, as in the released code. The plan's status says which.
      ranks: candidate ranks, 0 among them.
      solver: what solves for the ranks; `auto` is the fastest that is installed.
      time_limit: seconds the solver may take; then its best plan so far is used, and said to be so.
      init: `zero` for B = 0 as in LoRA, or `gradient` for factors that make a step of gradient descent on the kernels, as far as
        their ranks go.
      init_rate: learning rate of that step, GoRA's gamma.
      alpha: numerator of s = alpha / r at each site; None for twice the rank, that is s = 2 everywhere.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range.
    """
    check_ranks(ranks)
    alone = score == "squared" if per_sample is None else per_sample and score != "weight"

    # A sketch as wide as the ranks would leave out part of the largest.
    columns = max(COLUMNS, 2 * max(ranks))

    def start(context: Context) -> Start:
        measured = (context.forward, context.loss_fn, context.params, context.sites)
        scores, gradients = None, {}
        if gain != "energy":
            data = context.samples if alone else context.batches
            if alone and not data:
                raise UsageError(f"score {score!r} of single samples needs the context's samples, and it has none")
            scores = site_scores(score, *measured, data, per_sample=alone)
        if gain != "paper" or init == "gradient":
            gradients = gradient_svd(*measured, context.batches, key=context.key, columns=columns)
        spectra = {path: gradient.s for path, gradient in gradients.items()}
        plan = allocate(
            scores, context.sites, budget, ranks=ranks, gain=gain, spectra=None if gain == "paper" else spectra,
            solver=solver, time_limit=time_limit, time_budget=time_budget,
        )  # fmt: skip
        said = f"Gain {gain!r}"
        if scores and score != "weight":
            said += f", sites scored by {score!r} of {'single samples, averaged' if alone else 'batches'}"
        plan = dataclasses.replace(plan, status=f"{plan.status} {said}.{_captured(plan, spectra, max(ranks))}")
        adapters, masks = init_lora(context.key, context.sites, plan.ranks, alpha=alpha, dropout=dropout)
        if init == "gradient":
            adapters = {path: _step(lora, gradients[path], init_rate) for path, lora in adapters.items()}
        return Start(adapters, {}, masks, plan, context.params)

    return Method(start, name="oplora")


def _captured(plan: Plan, spectra: Mapping[str, np.ndarray], most: int) -> str:
    """Say what a plan captures of the gradients' energy, and the largest uniform rank that the budget and `most` allow."""
    if not spectra:
        return ""
    share = lambda ranks: f"{100 * captured_energy(ranks, spectra):.1f} %"  # noqa: E731
    rank = min(plan.budget // sum(site.cost() for site in plan.sites), most)
    uniform = f"; uniform rank {rank}: {share(dict.fromkeys(spectra, rank))}" if rank else ""
    return f" The ranks capture {share(plan.ranks)} of the gradients' energy{uniform}."


def _step(lora: Lora, gradient: LowRank, rate: float) -> Lora:
    """Return factors that make a step against a gradient; components beyond its rank stay as they are drawn."""
    number = min(lora.rank, len(gradient.s))
    length = 1 / math.sqrt(3)  # of a column that init_lora draws
    a = length * gradient.u[:, :number]
    b = -rate / (lora.scale * length) * gradient.s[:number, None] * gradient.vt[:number]
    return dataclasses.replace(
        lora, a=lora.a.at[:, :number].set(jnp.float32(a)), b=lora.b.at[:number].set(jnp.float32(b))
    )
