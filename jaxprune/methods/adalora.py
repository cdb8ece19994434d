"""AdaLoRA (Zhang et al. 2023): a budget of components that shrinks over training and goes to where it matters.

Every site trains s A diag(e) B. For each number w of A, e and B, with g its gradient and t the number of the step (1, 2, ...):

    I(t) = |w g|,   I_bar <- beta1 I_bar + (1 - beta1) I,   U_bar <- beta2 U_bar + (1 - beta2) |I - I_bar|
    score(w) = I_bar U_bar,   score of component j = score(e_j) + mean score(A[:, j]) + mean score(B[j, :])

The components kept, of all sites together, fall from C0 = matrices * init_rank to C1 = matrices * target_rank:

    C(t) = int(C1 + (C0 - C1) (1 - (t - tinit) / (T - tfinal - tinit))^3),  tinit < t < T - tfinal

and every `interval` steps e_j <- 0 in the C0 - C(t) components of lowest score. That can be undone: e_j is trained on, and a
component that earns a better score is spared at the next event. At t = T - tfinal the C1 best are chosen for good, by the last
scores, and the others die. Throughout, the loss has the penalty weight * mean |A^T A - I|_F, over the A and B of all sites.

`weights` says whose w enters I. `"before"` the update is the paper's algorithm 1. `"after"` is what the released code
and Hugging Face PEFT do, where the allocator runs after `optimizer.step()`: the new w with the gradient that led to it, and
before the masking.

The scale is larger than LoRA's, and has to be. Adam moves every number by up to its rate, eta, a step. In t steps a component
of LoRA becomes s |A_j| eta t sqrt(d_out), with |A_j| near 0.6; here, with A_j and B_j of length 1, it becomes s eta t. So s = 16
learns as fast as LoRA with s = 2 where d_out is in the hundreds, and s = 2 hardly moves in some hundred steps. The default
tinit and tfinal are shares of the run like those of the scripts: 9 to 17 % and 46 to 58 %.

Differences, and why:
- PEFT masks e alone in the last phase and trains the A and B of what is masked on, with the penalty; here what dies is zero and
  can be compacted, and the penalty leaves it out. Outputs and gradients of the survivors are the same but for the penalty.
- The released code ranks again in the last phase, but with frozen scores, so it masks the same components.
- Exactly C0 - C(t) components are masked. Both codes mask all whose score ties with the threshold, and PEFT fails where
  nothing is to be masked. Here, of equal scores, sites first in the order of their paths stay, and low components.
- Gradients enter before clipping; in both codes after, where the user clips.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.adapters import Adapters, Masks, Svd, init_svd
from jaxprune.allocation import uniform_plan
from jaxprune.checks import Count, NotNegative, OneOf, Positive, Range, Rank, Share
from jaxprune.errors import UsageError
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import Components, register
from jaxprune.schedules import Stage, cubic, stage_steps
from jaxprune.surgery import Decision, gather
from jaxprune.surgery.components import host

WEIGHTS = ("before", "after")
# That of the scripts whose init_rank is 2 and alpha 32.
_SCALE = 16.0


class AdaLoraState(NamedTuple):
    """What AdaLoRA remembers, trees shaped like the adapters.

    Attributes:
      sensitivity: I_bar.
      uncertainty: U_bar.
    """

    sensitivity: dict[str, Svd]
    uncertainty: dict[str, Svd]


@register(
    paper="Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    components=Components(
        lambda rank: {"target_rank": rank, "init_rank": -(-3 * rank // 2)},
        8,
        "components a site at the end, on average, of 1.5 times as many at the start",
    ),
)
def adalora(
    *,
    total_steps: Count,
    init_rank: Rank = 12,
    target_rank: Rank = 8,
    tinit: Stage = 0.15,
    tfinal: Stage = 0.5,
    interval: Count | None = None,
    beta1: Annotated[float, Range(above=0, below=1)] = 0.85,
    beta2: Annotated[float, Range(above=0, below=1)] = 0.85,
    orthogonal: NotNegative = 0.1,
    weights: Annotated[str, OneOf(WEIGHTS)] = "before",
    alpha: Positive | None = None,
    dropout: Share = 0.0,
) -> Method:
    """Train all sites at one rank, and keep the components that matter.

    Args:
      total_steps: steps of the run, T.
      init_rank: components at each site at the start.
      target_rank: components a site at the end, on average.
      tinit: steps before anything is masked; below 1 a fraction of the run.
      tfinal: steps at the end in which the choice is fixed; below 1 a fraction of the run.
      interval: steps between two choices; None for a thousandth of the run.
      beta1: decay of I_bar, in (0, 1).
      beta2: decay of U_bar, in (0, 1).
      orthogonal: weight of the penalty, 0 for none; 0.1 as in most of the scripts. It is a norm, not a square, so that its pull
        on each of n factors is weight / n however near they are: a model of few sites needs less.
      weights: take the weights of a score from `before` or `after` the update.
      alpha: numerator of s = alpha / (init_rank + 1e-5); None for 16 * init_rank, that is s = 16.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range.
    """
    begin, last = stage_steps("tinit", tinit, total_steps), total_steps - stage_steps("tfinal", tfinal, total_steps)
    if begin >= last:
        raise UsageError(
            f"tinit {tinit} and tfinal {tfinal} leave none of the {total_steps} steps to prune in; "
            f"expected tinit + tfinal < total_steps"
        )
    if last < 3:
        raise UsageError(
            f"tfinal {tfinal} of {total_steps} steps puts the last choice after step {last}, and nothing can be scored before "
            f"step 2, as e starts at 0; train longer or lower tfinal"
        )
    every = max(1, total_steps // 1000) if interval is None else interval
    if target_rank > init_rank:
        raise UsageError(f"target_rank {target_rank} is out of range; expected 1 to init_rank {init_rank}")
    after = weights == "after"

    def start(context: Context) -> Start:
        plan = uniform_plan(context.sites, init_rank)
        adapters, masks = init_svd(
            context.key,
            context.sites,
            plan.ranks,
            alpha=_SCALE * init_rank if alpha is None else alpha,
            dropout=dropout,
        )
        return Start(adapters, {}, masks, plan, context.params)

    def init(adapters, masks) -> AdaLoraState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, dict(adapters))  # noqa: E731  (own buffers: a step donates them)
        return AdaLoraState(zeros(), zeros())

    def scored(state: AdaLoraState, adapters, grads, step) -> AdaLoraState:
        ipt = jax.tree.map(lambda w, g: jnp.abs(w * g), adapters, grads)
        mean = jax.tree.map(lambda old, new: beta1 * old + (1 - beta1) * new, state.sensitivity, ipt)
        spread = jax.tree.map(
            lambda old, new, m: beta2 * old + (1 - beta2) * jnp.abs(new - m), state.uncertainty, ipt, mean
        )
        return jax.tree.map(lambda new, old: jnp.where(step < last, new, old), AdaLoraState(mean, spread), state)

    def observe(state, adapters, masks, grads, step, measured) -> AdaLoraState:
        return state if after else scored(state, adapters, grads, step)

    def project(state, adapters, masks, grads, step):
        if after:
            state = scored(state, adapters, grads, step)
        total = sum(x.e.size for x in adapters.values())
        # The steps at which the budget falls, one for each component that goes. Computed here, in double precision, since the
        # truncation to integers is sharp.
        final = len(adapters) * target_rank
        left = lambda n: int(cubic(n, begin, last, total, final))  # noqa: E731
        falls = [bisect.bisect_left(range(last), -c, key=lambda n: -left(n)) for c in range(total - 1, final - 1, -1)]

        def masked():
            budget = total - jnp.searchsorted(jnp.asarray(falls, jnp.int32), step, side="right")
            kept = keep(triplets(state), masks, budget)
            return {path: jnp.where(kept[path], x.e, 0) for path, x in adapters.items()}

        due = (step > begin) & (step < last) & (step % every == 0)
        e = jax.lax.cond(due, masked, lambda: {path: x.e for path, x in adapters.items()})
        return state, {path: dataclasses.replace(x, e=e[path]) for path, x in adapters.items()}

    def decide(state, adapters, masks, step, context):
        budget = target_rank * len(state.sensitivity)
        kept: dict[str, Any] = host(jax.jit(lambda: keep(triplets(state), masks, budget))())
        return state, Decision(kept, report={"components": budget})

    def compact(state, kept):
        return AdaLoraState(*(gather(tree, kept) for tree in state))

    return Method(
        start,
        init=init,
        observe=observe,
        decide=decide,
        events=(last,),
        penalty=(lambda state, adapters, masks: orthogonal * orthogonality(adapters)) if orthogonal else None,
        project=project,
        compact=compact,
        name="adalora",
    )


def triplets(state: AdaLoraState) -> dict[str, jax.Array]:
    """Score the components of every site: score(e_j) + mean score(A[:, j]) + mean score(B[j, :]), shaped as e."""
    scores = jax.tree.map(jnp.multiply, state.sensitivity, state.uncertainty)
    return {path: x.e + x.a.mean(0) + x.b.mean(1) for path, x in scores.items()}


def keep(scores: Mapping[str, jax.Array], masks: Masks, budget: jax.Array | int) -> dict[str, jax.Array]:
    """Tell the `budget` best components of all sites from the rest; works inside `jax.jit`.

    Args:
      scores: {site path: (r,)}.
      masks: of the same shapes; the dead are chosen last.
      budget: components to keep.

    Returns:
      {site path: booleans}. Of equal scores, the path first in alphabetical order stays, then the lower index.
    """
    paths = sorted(scores)
    flat = jnp.concatenate([jnp.where(masks[p] > 0, scores[p], -jnp.inf) for p in paths])
    order = jnp.argsort(-flat, stable=True)
    kept = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size) < budget)
    parts, begin = {}, 0
    for path in paths:
        size = scores[path].size
        parts[path] = kept[begin : begin + size]
        begin += size
    return parts


def orthogonality(adapters: Adapters) -> jax.Array:
    """Return the mean of |A^T A - I|_F and |B B^T - I|_F over all sites.

    Components that are exactly zero are dead and left out, so that compaction changes nothing.
    """
    norms, counted = jnp.zeros(()), jnp.zeros(())
    for adapter in adapters.values():
        for rows in (adapter.a.T, adapter.b):
            alive = jnp.any(rows != 0, axis=-1)
            square = jnp.sum(jnp.square(jnp.matmul(rows, rows.T) - jnp.eye(len(rows)) * alive[:, None]))
            # The root has no derivative at 0, where a site has no component left.
            norms += jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
            counted += jnp.any(alive)
    return norms / jnp.maximum(counted, 1)
