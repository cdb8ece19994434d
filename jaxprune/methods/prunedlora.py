"""PrunedLoRA: start with a rank far above the target, and every K1 steps remove the K2 worst components of each adapter.

Each adapter is pruned on its own, down to the same rank. With F a factor whose row j is component j (B, or A transposed), g
its gradient and H its curvature over the live components, the score of a component is the sum over both factors of

    1/2 |(F - H^-1 g)_j|^2 / [H^-1]_jj

the increase of the quadratic model of the loss when row j goes and the others adjust at their best. The K2 lowest go at
once, and the survivors of one factor may be adjusted by that optimum, without its gradient part:

    F <- F - H^-1[:, S] ([H^-1]_SS)^-1 F[S],  |update|_F capped at |F[S]|_F

Values, gradients and moments of what is pruned stay zero. s = alpha / r with alpha = r at the start, so s = 1 throughout.

Where this differs from the paper and its released code, and why:

- The curvature is damped by a hundredth of its mean diagonal. The released 1e-6 makes the score turn, with the scale of the
  gradients, into the sign of a first-order term or into a gradient norm.
- By default (`score="obs"`) there is no first-order term, and H is the average over steps of g g^T / d. The step -H^-1 g is
  many times the weights, and is never taken. `score="paper_score"` is the released score: H = g g^T of one batch plus 1e-6,
  with the first-order term, and no adjustment (the released one cannot run, and the paper's formula is not public).
- Only one factor is ever adjusted. Each adjustment restores the product A B by itself; both together restore it twice.

`basis="svd"` goes beyond the paper: before an event every adapter is brought into its SVD basis, with its moments and curvatures
(`jaxprune.surgery.rotation`), so that components are orthogonal. With `score="norm"`, |A_j| |B_j|, the smallest singular values
go there.

To compare: LLM-Pruner's scores (`element1`, `element2`, `taylor2`), Wanda's sqrt(E z_j^2) |B_j| with z = x A, and SparseGPT's,
as released (a_j^T (E[x x^T] + 1e-6 I)^-1 a_j: d_in^3 operations a site) and done properly (`sparsegpt_obs`: H = E[z^T z],
with B adjusted).

Source: "PrunedLoRA: Robust Gradient-Based Structured Pruning for Low-Rank Adaptation in Fine-Tuning" (arXiv 2510.00192).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, Masks
from jaxprune.checks import Count, OneOf, Positive, Rank, Share
from jaxprune.errors import UsageError
from jaxprune.methods.base import Context, Method, Probes
from jaxprune.methods.lora import lora
from jaxprune.methods.registry import Components, register
from jaxprune.scores import component_norms
from jaxprune.scores.probe import InputProbe, inverse_second_moment, second_moment
from jaxprune.scores.surgeon import (
    COMPONENT_SCORES,
    Factor,
    compensation,
    component_score,
    damped_inverse,
    rotated,
    surgery_score,
)
from jaxprune.surgery import BASES, Basis, Decision, rotate_adapters, svd_bases

CURVATURES = ("gtg", "fisher", "act")
COMPENSATIONS = ("none", "B", "A")


class Surgery(NamedTuple):
    """A score that is made of curvatures."""

    curvature: str
    first_order: bool
    compensate: str
    relative: float
    absolute: float = 0.0


_PAPER = Surgery("gtg", True, "none", 0.0, 1e-6)
_INPUT_SCORES: dict[str, Callable] = {"wanda": second_moment, "sparsegpt_released": inverse_second_moment}
PRUNED_SCORES = ("obs", "paper_score", "norm", *COMPONENT_SCORES, "wanda", "sparsegpt_released", "sparsegpt_obs")
# What is known of these can be brought into another basis.
_TURNED = ("obs", "paper_score", "norm")


class PrunedLoraState(NamedTuple):
    """{site path: scores (r,), or {factor: what surgery needs}}, and how many steps went into an average over steps."""

    sites: dict[str, Any]
    count: jax.Array


@register(
    paper="PrunedLoRA: Robust Gradient-Based Structured Pruning for Low-Rank Adaptation in Fine-Tuning",
    # Half as many stay. The 128 of the paper is more than small models can have.
    defaults={"rank": 16},
    components=Components(
        lambda rank: {"rank": rank, "target": max(1, rank // 2)},
        128,
        "components at each site at the start, and half as many in the end",
    ),
)
def prunedlora(
    *,
    rank: Rank = 128,
    target: Rank = 64,
    alpha: Positive | None = None,
    dropout: Share = 0.0,
    interval: Count | None = None,
    remove: Count | None = None,
    start_step: Count | None = None,
    total_steps: Count | None = None,
    score: Annotated[str, OneOf(PRUNED_SCORES)] = "obs",
    basis: Annotated[str, OneOf(BASES)] = "trained",
    curvature: Annotated[str, OneOf(CURVATURES)] | None = None,
    first_order: bool | None = None,
    compensate: Annotated[str, OneOf(COMPENSATIONS)] | None = None,
    damping: Positive | None = None,
    decay: Share = 0.9,
) -> Method:
    """Train LoRA of a high rank and prune every adapter, a few components at a time, to a low one.

    Args:
      rank: components at each site at the start.
      target: components at each site in the end.
      alpha: numerator of s = alpha / rank; None for `rank`, that is s = 1.
      dropout: rate of the dropout on the adapters' inputs.
      interval: K1, optimiser steps between events; None for events spread over the first half of the run, or 10 where
        `total_steps` is not given.
      remove: K2, components each site loses at an event; None for 2, or as many as a short run needs.
      start_step: the first event comes after this many optimiser steps, at least K1; None for K1, but no sooner than 2.
      total_steps: optimiser steps of the whole run; where given, the events must fit.
      score: what decides which components go, see the top of this file; the last five settings are for `obs` alone.
      basis: judge components of the `trained` factors, or of each adapter's singular value decomposition (`svd`); for the scores
        `obs`, `paper_score` and `norm`.
      curvature: `fisher`, the average over steps of g g^T / d (the default); `gtg`, the same of one step, as a sum over d;
        `act`, E[z^T z] of z = x A, for B alone.
      first_order: whether the score has the term H^-1 g (default: no).
      compensate: the factor whose survivors are adjusted: `B` (the default), `A` or `none`.
      damping: what is added to H, as a fraction of its mean diagonal (default 1e-2).
      decay: weight of earlier steps in the average over steps.

    Raises:
      UsageError: a setting is out of range or not one that the score has, or the events do not fit into the run.

    Source: PrunedLoRA, algorithm 1.
    """
    surgery = _surgery(score, curvature, first_order, compensate, damping)
    if basis == "svd" and (score not in _TURNED or (surgery and surgery.curvature == "act")):
        what = "a curvature of activations" if score == "obs" else f"score {score!r}"
        raise UsageError(f'{what} knows one basis alone; with basis "svd" expected score obs, paper_score or norm')
    if target > rank:
        raise UsageError(f"target {target} is out of range; expected 1 to the initial rank, {rank}")
    half = None if total_steps is None else total_steps // 2
    # B starts at 0, where A has no gradient, so that the first step measures one factor only.
    if remove is None:
        begin, step = start_step or max(2, interval or 2), interval or 1
        remove = 2 if half is None else max(2, -(-(rank - target) // max(1, (half - begin) // step + 1)))
    events = -(-(rank - target) // remove)
    if interval is None:
        interval = 10 if half is None else max(1, half // max(1, events))
    first = max(2, interval) if start_step is None else start_step
    if first < interval:
        raise UsageError(f"start_step {first} is out of range; expected at least the interval, {interval}")
    last = first + (events - 1) * interval
    if events and total_steps is not None and last > total_steps:
        raise UsageError(
            f"from rank {rank} to {target} by {remove} every {interval} steps takes {last} steps, and the run has "
            f"{total_steps}; lower the rank or the interval, or remove more at once"
        )
    reduce_input = _INPUT_SCORES.get(score) or (second_moment if surgery and surgery.curvature == "act" else None)

    def due(number: Any) -> Any:
        return (number >= first) & (number <= last) & ((number - first) % interval == 0)

    def init(adapters: Adapters, masks: Masks) -> PrunedLoraState:
        known = {path: _nothing(surgery, adapter.rank) for path, adapter in adapters.items()}
        return PrunedLoraState(known, jnp.zeros((), jnp.int32))

    def observe(state: PrunedLoraState, adapters: Adapters, masks: Masks, grads, step, measured) -> PrunedLoraState:
        def one(path: str, known: Any) -> Any:
            adapter, grad = adapters[path], grads[path]
            a, b, grad_a, grad_b = (leaf.astype(jnp.float32) for leaf in (adapter.a, adapter.b, grad.a, grad.b))
            if surgery:
                moment = None if measured is None else measured[path]
                return _factors(surgery, known, decay, a, b, grad_a, grad_b, moment)
            if score == "norm":  # it is taken when it is needed
                return known
            if score == "wanda":
                moment = jnp.diagonal(measured[path], axis1=-2, axis2=-1)
                return jnp.sqrt(moment) * jnp.linalg.norm(b, axis=-1)
            return measured[path] if score in _INPUT_SCORES else component_score(score, a, b, grad_a, grad_b)

        def measure() -> PrunedLoraState:
            return PrunedLoraState({path: one(path, known) for path, known in state.sites.items()}, state.count + 1)

        if reduce_input:
            return state if measured is None else measure()
        every_step = surgery and surgery.curvature == "fisher"
        return jax.lax.cond(step <= last if every_step else due(step), measure, lambda: state)

    def decide(
        state: PrunedLoraState, adapters: Adapters, masks: Masks, step: int, context: Context
    ) -> tuple[PrunedLoraState, Decision | None]:
        began = time.perf_counter()
        before = jax.device_get({path: masks[path] for path in state.sites})
        # What a skipped event left over goes at the next one.
        planned = max(target, rank - remove * ((step - first) // interval + 1))
        correction = 1 - decay ** int(state.count) if surgery and surgery.curvature == "fisher" else 1.0
        over = {path: int((mask > 0).sum()) - planned for path, mask in before.items()}
        over = {path: count for path, count in over.items() if count > 0}
        bases = svd_bases({path: adapters[path] for path in over}, masks) if basis == "svd" else {}
        adapters = rotate_adapters(bases, adapters)
        sites = {**state.sites, **{path: _turned(state.sites[path], adapters[path], bases[path]) for path in bases}}
        if score == "norm":
            sites = component_norms({path: adapters[path] for path in over})
        found, changed = {}, {}
        for path, count in over.items():
            chosen = _choose(surgery, count, sites[path], masks[path], correction)
            found[path] = chosen._replace(inverse=None)
            if surgery and surgery.compensate != "none":
                name = surgery.compensate.lower()
                changed[path] = _adjust(getattr(adapters[path], name), chosen, name == "a")
        settled = jax.device_get(found)
        if not settled:
            return state, None
        cut = {path: chosen for path, chosen in settled.items() if chosen.finite}
        report: dict[str, Any] = {
            "rank": planned,
            "removed": sum(int(((before[path] > 0) & (chosen.mask <= 0)).sum()) for path, chosen in cut.items()),
            "skipped": len(settled) - len(cut),
        }
        adjusted = {}
        if surgery and surgery.compensate != "none":
            hits = jax.device_get([changed[path][1] for path in cut])
            report["cap_hits"] = int(sum(hits))
            name = surgery.compensate.lower()
            adjusted = {path: dataclasses.replace(adapters[path], **{name: changed[path][0]}) for path in cut}
        report["seconds"] = time.perf_counter() - began
        bases = {path: bases[path] for path in cut if path in bases}
        new = {path: sites[path] if path in bases else known for path, known in state.sites.items()}
        masked = {path: chosen.mask for path, chosen in cut.items()}
        return state._replace(sites=new), Decision(masked, adjusted, bases=bases, report=report)

    def compact(state: PrunedLoraState, kept: dict[str, np.ndarray]) -> PrunedLoraState:
        left = {path: known for path, known in state.sites.items() if kept[path].shape[-1]}
        take = lambda path: lambda leaf: _take(leaf, jnp.asarray(kept[path]), leaf.ndim)  # noqa: E731
        return state._replace(sites={path: jax.tree.map(take(path), known) for path, known in left.items()})

    probes = None
    if reduce_input:

        def zeros(adapters: Adapters) -> dict[str, jax.Array]:
            axes = 1 if score == "sparsegpt_released" else 2
            return {path: jnp.zeros((lora.rank,) * axes, jnp.float32) for path, lora in adapters.items()}

        def wrap(adapters: Adapters, zeros: dict[str, jax.Array]) -> dict[str, Any]:
            return {**adapters, **{path: InputProbe(adapters[path], tau, reduce_input) for path, tau in zeros.items()}}

        probes = Probes(zeros, wrap, due)
    return Method(
        lora(rank=rank, alpha=rank if alpha is None else alpha, dropout=dropout).start,
        init=init,
        observe=observe,
        decide=decide,
        events=tuple(range(first, last + 1, interval)),
        probes=probes,
        compact=compact,
        name="prunedlora",
    )


def _surgery(
    score: str, curvature: str | None, first_order: bool | None, compensate: str | None, damping: float | None
) -> Surgery | None:
    """Settle what kind of surgery a score is, and refuse settings that it does not have."""
    settings = {"curvature": curvature, "first_order": first_order, "compensate": compensate, "damping": damping}
    given = [name for name, value in settings.items() if value is not None]
    if score != "obs":
        if given:
            raise UsageError(f'score {score!r} has no setting {given[0]!r}; leave it out, or use score "obs"')
        if score == "paper_score":
            return _PAPER
        return Surgery("act", False, "B", 1e-2) if score == "sparsegpt_obs" else None
    curvature = "fisher" if curvature is None else curvature
    compensate = "B" if compensate is None else compensate
    if curvature == "act" and compensate == "A":
        raise UsageError('curvature "act" is one of B alone; expected compensate "B" or "none"')
    return Surgery(curvature, bool(first_order), compensate, 1e-2 if damping is None else damping)


def _nothing(surgery: Surgery | None, rank: int) -> Any:
    """Return zeros shaped as what `observe` will find."""
    if surgery is None:
        return jnp.zeros(rank, jnp.float32)
    square = lambda: jnp.zeros((rank, rank), jnp.float32)  # noqa: E731

    def factor() -> Factor:
        cross = square() if surgery.first_order else None
        gram = square() if surgery.first_order and surgery.curvature != "gtg" else None
        return Factor(square(), jnp.zeros(rank, jnp.float32), cross, gram)

    return {name: factor() for name in ("b" if surgery.curvature == "act" else "ab")}


def _factors(
    surgery: Surgery, known: dict[str, Factor], decay: float, a, b, grad_a, grad_b, moment
) -> dict[str, Factor]:
    """Measure both factors, or B alone with the curvature of activations."""
    rows = {"a": (a.T, grad_a.T), "b": (b, grad_b)}
    found = {}
    for name, old in known.items():
        value, grad = rows[name]
        gram = grad @ grad.T
        if surgery.curvature == "act":
            new = moment
        elif surgery.curvature == "fisher":
            new = decay * old.curvature + (1 - decay) * gram / grad.shape[-1]
        else:
            new = gram
        cross = grad @ value.T if surgery.first_order else None
        kept = gram if surgery.first_order and surgery.curvature != "gtg" else None
        found[name] = Factor(new, jnp.sum(jnp.square(value), axis=-1), cross, kept)
    return found


def _turned(known: dict[str, Factor] | jax.Array, adapter: Any, basis: Basis) -> Any:
    """Bring what is known of an adapter's factors into the basis that the adapter is in now."""
    if not isinstance(known, dict):
        return known
    into, back = (jnp.asarray(matrix, jnp.float32) for matrix in (basis.into, basis.back))
    of = {"a": (adapter.a.T, into.T, back), "b": (adapter.b, back, into.T)}
    return {name: rotated(factor, *of[name]) for name, factor in known.items()}


class _Chosen(NamedTuple):
    """The new mask (r,), whether every score is finite, what goes (k,), and H^-1 of what is adjusted."""

    mask: Any
    finite: Any
    removed: Any
    inverse: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def _choose(surgery: Surgery | None, count: int, known: Any, mask: jax.Array, correction: float) -> _Chosen:
    scores, inverse = known, None
    if surgery:
        scores = jnp.zeros(())
        for name, factor in known.items():
            factor = factor._replace(curvature=factor.curvature / correction)
            inverted = damped_inverse(factor.curvature, mask, surgery.relative, surgery.absolute)
            scores = scores + surgery_score(inverted, factor)
            inverse = inverted if name == surgery.compensate.lower() else inverse
    alive = mask > 0
    # A stable sort: of equal scores the lower index goes.
    removed = jnp.argsort(jnp.where(alive, scores, jnp.inf))[:count]
    gone = jnp.zeros_like(alive).at[removed].set(True)
    finite = jnp.all(jnp.isfinite(scores) | ~alive)
    return _Chosen(jnp.where(gone, 0, mask), finite, removed, inverse)


@functools.partial(jax.jit, static_argnums=2)
def _adjust(value: jax.Array, chosen: _Chosen, turn: bool) -> tuple[jax.Array, jax.Array]:
    """Return the factor with its survivors adjusted, and whether the cap held the adjustment back."""
    rows = value.T if turn else value
    lost = rows[chosen.removed].astype(jnp.float32)
    update = compensation(chosen.inverse, chosen.removed) @ lost
    size, cap = jnp.linalg.norm(update), jnp.linalg.norm(lost)
    update = update * jnp.where(size > cap, cap / size, 1.0)
    return value + (update.T if turn else update).astype(value.dtype), size > cap


@functools.partial(jax.jit, static_argnums=2)
def _take(leaf: jax.Array, kept: jax.Array, axes: int) -> jax.Array:
    """Gather the survivors of a site along every rank axis of a leaf, one or two."""
    return leaf[kept] if axes == 1 else leaf[kept][:, kept]
