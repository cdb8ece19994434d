"""G2R2: whole LoRA modules go, the most redundant first, after a warm-up that only measures.

With L = A B the module (d, k) of a site and G = dLoss/dL, on every step that measures

    S = sum |G o L|,  R = d k / S                                                                      (eq. 5, 7)
    Rbar <- b1 Rbar + (1 - b1) R;  Ubar <- b2 Ubar + (1 - b2) |R - Rbar|;  Rhat = Rbar Ubar             (eq. 8 to 10)

Warm-up measures. Progressive pruning keeps the ceil(p M) of all M modules with the lowest Rhat, while p falls from p0 to
pf by a cubic schedule; what is pruned stays zero. Refinement trains what is left, and measures nothing.

Where this differs from the paper, and why:

- Its eq. 6 for G from dA and dB does not hold. `score` chooses: `exact` (the default) forms G itself inside the backward
  pass, a block of rows at a time, on one step in `interval`; `tangent` projects it on what dA and dB can tell; `as_written`
  and `as_written_b` are the two unequal sides of eq. 6; `bound` and `free` are |G|_F |L|_F and |<A, dA>|; `factors` (R(A)
  R(B)) and `random` are the ablation of table 4.
- Its eq. 12 has (t - t_i - t_f) in the numerator, which starts far above 1; the usual t - t_i is meant.
- Eq. 10 prunes noisy modules first, where the methods it follows keep them: `combine="div"` is Rbar / Ubar, `"none"` Rbar.
- The decays are b1^m and b2^m where m steps lie between measurements, so that an average reaches back as many steps whatever m
  is; averages start from 0 with their bias corrected, and nothing is measured while the learning rate warms up (`delay`).
- R is a reciprocal, so that a batch of tiny S is a spike in Rbar; `robust=True` smooths S before it is inverted.
- A measurement with S = 0 (as at step 0, where B = 0) or not finite is skipped and counted. Nothing is pruned before every
  module was measured.
- S is not additive over microbatches: with accumulation `exact` and `bound` are means over microbatches, and the other
  scores see the accumulated gradient.

Compaction drops the sites whose modules are pruned.

`unit="ranks"` goes beyond the paper: ranks are lowered instead of whole modules. Every site is brought into its SVD basis, and
within the fraction p of the adapter parameters the ranks are those that lose least of

    sum_l (1 / Rhat_l) (sum_{j > r_l} sigma_lj^2) / (sum_j sigma_lj^2)

Source: "Enhancing PEFT Efficiency by Adaptively Reducing Low-Rank Modules" (G2R2), sections 3.2 and 3.3, tables 4 and 9 to 11.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, Lora, Masks, count
from jaxprune.adapters.base import key_for
from jaxprune.allocation import component_problem, solve
from jaxprune.checks import MOST_STEPS, Count, OneOf, Positive, Range, Rank, Seed, Share
from jaxprune.errors import UsageError
from jaxprune.methods.base import Context, Method, Probes
from jaxprune.methods.lora import lora
from jaxprune.methods.registry import register
from jaxprune.schedules import Stage, cubic, stage_steps, thinned
from jaxprune.scores import component_norms, redundancy
from jaxprune.scores.probe import GradientProbe
from jaxprune.surgery import Decision, rotate_adapters, svd_bases, trim

# Of x, the gradient at the product's output and the factors, reduced inside the backward pass; the same of a dense G.
_INSIDE: dict[str, tuple[Callable, Callable]] = {
    "exact": (redundancy.sensitivity, redundancy.dense_sensitivity),
    "bound": (redundancy.bound, redundancy.dense_bound),
}
# Of (A, B, dA, dB).
_OF_FACTORS: dict[str, Callable] = {
    "tangent": redundancy.tangent,
    "as_written": redundancy.as_written_a,
    "as_written_b": redundancy.as_written_b,
    "free": redundancy.free,
    "factors": redundancy.factors,
}
REDUNDANCY_SCORES = (*_INSIDE, *_OF_FACTORS, "random")
COMBINES = ("mul", "none", "div")
UNITS = ("modules", "ranks")
Fraction = Annotated[float, Range(above=0, high=1)]
_TINY = np.finfo(np.float64).tiny


class Redundancy(NamedTuple):
    """What is known of a site's module.

    Attributes:
      smooth: Rbar, before its bias is corrected.
      uncertainty: Ubar, likewise.
      sensitivity: the same average of S.
      count: measurements that went in.
      skipped: measurements that did not, being zero or not finite.
    """

    smooth: jax.Array
    uncertainty: jax.Array
    sensitivity: jax.Array
    count: jax.Array
    skipped: jax.Array


class G2R2State(NamedTuple):
    """{site path: what is known of its module}, and what there is at the start: M modules, or the adapter parameters."""

    sites: dict[str, Redundancy]
    start: jax.Array


@register(paper="Enhancing PEFT Efficiency by Adaptively Reducing Low-Rank Modules")
def g2r2(
    *,
    rank: Rank = 8,
    alpha: Positive | None = None,
    dropout: Share = 0.0,
    total_steps: Count | None = None,
    delay: Annotated[int, Range(0, MOST_STEPS)] = 0,
    warmup: Stage = 0.1,
    progressive: Stage = 0.1,
    initial: Fraction = 1.0,
    final: Fraction = 0.2,
    score: Annotated[str, OneOf(REDUNDANCY_SCORES)] = "exact",
    interval: Count | None = None,
    beta1: Share = 0.85,
    beta2: Share = 0.95,
    combine: Annotated[str, OneOf(COMBINES)] = "mul",
    robust: bool = False,
    abrupt: bool = False,
    unit: Annotated[str, OneOf(UNITS)] = "modules",
    seed: Seed = 0,
) -> Method:
    """Train LoRA of one rank, and prune whole modules down to a fraction of them.

    Args:
      rank: components at each site.
      alpha: numerator of s = alpha / rank; None for 2 * rank, that is s = 2.
      dropout: rate of the dropout on the adapters' inputs.
      total_steps: optimiser steps of the whole run, needed where a stage is a fraction of it.
      delay: the learning rate's warm-up, in which nothing is measured.
      warmup: T_w, optimiser steps that only measure; below 1 a fraction of `total_steps`.
      progressive: T_p, optimiser steps over which modules go; below 1 a fraction of `total_steps`.
      initial: p0, the fraction of modules kept when pruning begins.
      final: pf, the fraction kept at its end.
      score: how redundancy is measured, see the top of this file.
      interval: steps from one measurement, and the pruning that may follow it, to the next; None for a twentieth of both stages,
        at most 10.
      beta1: decay of Rbar.
      beta2: decay of Ubar.
      combine: Rhat is Rbar Ubar (`mul`), Rbar (`none`) or Rbar / Ubar (`div`).
      robust: smooth S before inverting it.
      abrupt: prune all at once, at the end of the progressive stage; for comparison.
      unit: what goes: whole `modules`, or `ranks` in the SVD basis, where p is a fraction of the adapter parameters.
      seed: of `score=random`.

    Raises:
      UsageError: a setting is out of range, the stages do not fit into the run, or nothing would be measured before the
        last pruning.

    Source: G2R2, algorithm 1.
    """
    if final > initial:
        raise UsageError(f"fractions kept, {initial} to {final}, are out of range; expected 0 < final <= initial <= 1")
    first = stage_steps("warmup", warmup, total_steps)
    last = first + stage_steps("progressive", progressive, total_steps)
    if total_steps is not None and last > total_steps:
        raise UsageError(f"warm-up and pruning take {last} steps, and the run has {total_steps}; shorten them")
    if last <= first:
        raise UsageError(f"progressive {progressive} is no whole step; expected at least one step of pruning")
    begin = max(1, delay)  # in the first step B is 0
    if begin >= last:
        raise UsageError(
            f"pruning ends at step {last}, and nothing can be measured in the first {begin}"
            f"{', in which the learning rate warms up' if delay else ''}; lengthen warmup or progressive"
        )
    every = max(1, min(10, last // 20, last - begin)) if interval is None else interval
    earliest = -(-begin // every) * every
    if earliest >= last:
        raise UsageError(
            f"interval {every} measures nothing before pruning ends at step {last}; expected 1 to {last - begin}"
        )
    decays = beta1**every, beta2**every

    def due(step: Any) -> Any:
        # One step after every `every`, and none before B has changed and the learning rate is up.
        return (step > begin) & (step <= last) & ((step - 1) % every == 0)

    early = range(-(-max(first, begin) // every) * every + 1, last, every)
    events = (*(() if abrupt else thinned(early)), last)

    def init(adapters: Adapters, masks: Masks) -> G2R2State:
        dtypes = (jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.int32)
        known = {path: Redundancy(*(jnp.zeros((), dtype) for dtype in dtypes)) for path in adapters}
        return G2R2State(known, jnp.int32(len(adapters) if unit == "modules" else count(adapters, masks)))

    def update(state: G2R2State, adapters: Adapters, masks: Masks, measured: dict[str, jax.Array]) -> G2R2State:
        new = {
            path: _averaged(
                known, measured[path], masks[path], adapters[path].a.shape[0] * adapters[path].b.shape[-1],
                *decays, robust,
            )
            for path, known in state.sites.items()
        }  # fmt: skip
        return state._replace(sites=new)

    def observe(state: G2R2State, adapters: Adapters, masks: Masks, grads, step, measured) -> G2R2State:
        if score in _INSIDE:
            return state if measured is None else update(state, adapters, masks, measured)

        def measure() -> G2R2State:
            if score == "random":
                key = jax.random.fold_in(jax.random.key(seed), step)
                drawn = {path: _random(key, path, adapters[path]) for path in state.sites}
                return update(state, adapters, masks, drawn)
            return update(state, adapters, masks, factor_scores(score, adapters, grads, state.sites))

        return jax.lax.cond(due(step), measure, lambda: state)

    def decide(
        state: G2R2State, adapters: Adapters, masks: Masks, step: int, context: Context
    ) -> tuple[G2R2State, Decision | None]:
        began = time.perf_counter()
        known, before = jax.device_get((state.sites, {path: masks[path] for path in state.sites}))
        # Modules in the order of layers: of equally redundant ones the earlier stays.
        order = {site.path: (site.layer, site.path) for site in context.sites}
        modules = sorted(known, key=order.__getitem__)
        alive = np.array([(before[path] > 0).any() for path in modules], bool)
        share = final if step >= last else cubic(step, first, last, initial, final)
        report = {
            "share": share,
            "modules": int(alive.sum()),
            "skipped": sum(int(site.skipped) for site in known.values()),
        }
        measured = np.array([known[path].count > 0 for path in modules], bool)
        if not measured[alive].all():
            late = {"status": f"nothing pruned: {int((alive & ~measured).sum())} modules could not be measured"}
            return state, Decision({}, report={**report, **late}) if step >= last else None
        redundant = np.array([_combined(combine, known[path], decays) for path in modules])
        if unit == "ranks":
            living = {path: value for path, value, live in zip(modules, redundant, alive, strict=True) if live}
            return state, _lowered(living, adapters, masks, context, math.floor(share * int(state.start)), report)
        # The 1e-9 keeps a product such as 0.1 * 30 from being rounded up to the next module.
        keep = max(1, math.ceil(share * int(state.start) - 1e-9))
        # With one measurement Ubar is 0; of equal Rhat the larger Rbar goes.
        smooth = np.array([_corrected(known[path], decays)[0] for path in modules])
        ranked = np.lexsort((smooth, redundant, ~alive))
        gone = [modules[i] for i in ranked[keep:] if alive[i]]
        if not gone:
            return state, None
        after = {path: np.zeros_like(before[path]) for path in gone}
        report |= {"modules": int(alive.sum()) - len(gone), "seconds": time.perf_counter() - began}
        return state, Decision(after, report=report)

    def compact(state: G2R2State, kept: dict[str, np.ndarray]) -> G2R2State:
        return state._replace(sites={path: site for path, site in state.sites.items() if kept[path].shape[-1]})

    probes = None
    if score in _INSIDE:

        def wrap(adapters: Adapters, zeros: dict[str, jax.Array]) -> dict[str, Any]:
            probed = {path: GradientProbe(adapters[path], tau, *_INSIDE[score]) for path, tau in zeros.items()}
            return {**adapters, **probed}

        probes = Probes(lambda adapters: {p: jnp.zeros((), jnp.float32) for p in adapters}, wrap, due)
    return Method(
        lora(rank=rank, alpha=alpha, dropout=dropout).start,
        init=init,
        observe=observe,
        decide=decide,
        events=events,
        probes=probes,
        compact=compact,
        removes="sites" if unit == "modules" else "components",
        name="g2r2",
    )


def _lowered(
    redundant: dict[str, float], adapters: Adapters, masks: Masks, context: Context, budget: int, report: dict[str, Any]
) -> Decision | None:
    """Lower ranks to a budget, what is redundant first."""
    bases = svd_bases({path: adapters[path] for path in redundant}, masks)
    rotated = rotate_adapters(bases, adapters)
    energy = {path: np.square(np.asarray(norm)) for path, norm in component_norms(rotated).items() if path in bases}
    least = min((value for value in redundant.values() if value > 0), default=1.0)
    values = {
        # With one measurement Ubar is 0, and so is Rhat.
        path: energy[path][np.asarray(masks[path]) > 0] / (energy[path].sum() or 1.0) / (value if value > 0 else least)
        for path, value in redundant.items()
    }
    try:
        plan = solve(component_problem(values, [site for site in context.sites if site.path in adapters], budget))
    except UsageError as error:
        return Decision({}, report={**report, "status": f"The ranks stay as they are: {error}."})
    fewer = {path: rank for path, rank in plan.ranks.items() if rank < len(values.get(path, ()))}
    if not fewer:
        return None
    report |= {"modules": sum(rank > 0 for rank in plan.ranks.values()), "status": plan.status, "solver": plan.solver}
    return Decision(trim(energy, masks, fewer), bases={path: bases[path] for path in fewer}, report=report)


def factor_scores(score: str, adapters: Adapters, grads: Adapters, paths: Any) -> dict[str, jax.Array]:
    """Return S of every site by one of the scores that need the factors and their gradients alone.

    Returns:
      {site path: S}.
    """
    found = {}
    for path in paths:
        leaves = [leaf.astype(jnp.float32) for tree in (adapters, grads) for leaf in (tree[path].a, tree[path].b)]
        found[path] = _OF_FACTORS[score](*leaves)
    return found


def _averaged(
    known: Redundancy, measured: jax.Array, mask: jax.Array, entries: int, decay1: float, decay2: float, robust: bool
) -> Redundancy:
    alive = jnp.any(mask > 0, axis=-1)
    redundancy_now = entries / measured
    valid = alive & jnp.isfinite(measured) & (measured > 0) & jnp.isfinite(redundancy_now)
    count = known.count + valid
    weight = 1 - decay1 ** count.astype(jnp.float32)  # what an average from 0 has of its weights so far
    sensitivity = decay1 * known.sensitivity + (1 - decay1) * measured
    if robust:
        redundancy_now = entries * weight / sensitivity
    smooth = decay1 * known.smooth + (1 - decay1) * redundancy_now
    uncertainty = decay2 * known.uncertainty + (1 - decay2) * jnp.abs(redundancy_now - smooth / weight)
    keep = functools.partial(jnp.where, valid)
    return Redundancy(
        keep(smooth, known.smooth),
        keep(uncertainty, known.uncertainty),
        keep(sensitivity, known.sensitivity),
        count,
        known.skipped + (alive & ~valid),
    )


def _corrected(known: Redundancy, decays: tuple[float, float]) -> tuple[float, float]:
    """Return Rbar and Ubar without the bias of averages that began at 0."""
    count = max(1, int(known.count))
    return float(known.smooth) / (1 - decays[0] ** count), float(known.uncertainty) / (1 - decays[1] ** count)


def _combined(combine: str, known: Redundancy, decays: tuple[float, float]) -> float:
    smooth, uncertainty = _corrected(known, decays)
    if combine == "mul":
        return smooth * uncertainty
    return smooth if combine == "none" else smooth / max(uncertainty, _TINY)


def _random(key: jax.Array, path: str, adapter: Lora) -> jax.Array:
    """Draw S = d k u, u uniform, so that R does not know the module's size."""
    entries = adapter.a.shape[0] * adapter.b.shape[-1]
    return entries * jax.random.uniform(key_for(key, path), (), minval=1e-6, maxval=1.0)
