"""DPLoRA: OPLoRA's ranks, then further MILPs that prune them while they train.

N events are spread over training, at the steps int(delay + tau (total - delay) / (N + 1)), tau = 1 ... N. At each, with c_l
the present rank of site l and its gradients dA_l, dB_l:

    I_new(l) = rms(dA_l) rms(dB_l) sqrt(c_l),  rms the root of the mean square over live components      (eq. 6)
    I(l) <- beta I(l) + (1 - beta) I_new(l);  the first event takes I_new                                (eq. 5)
    budget = floor(B (1 - p share(tau / N))), B the adapter parameters at the start, share a Bézier curve (eq. 10, 11)
    min sum_l I_l ((c_l - r_l) / c_l + gamma |r_l - c_l| - delta [r_l = c_l]) within the budget           (eq. 7 to 9)

and every site keeps its r_l components of largest |A_j| |B_j|. What is pruned stays exactly zero.

That is `basis="trained", loss="importance"`, which the presets of the paper have. It takes the components of a site in the basis
they happen to be in, and all of them as worth the same. The defaults go beyond it, because they keep the score where it loses
several points (README):

- `basis="svd"` brings every site into its SVD basis first, moments too (`jaxprune.surgery.rotation`), so that its components are
  orthogonal, and what goes with the last of them is the least that can.
- `loss="components"` gives every component a value of its own: in place of I_l (c_l - r_l) / c_l stands the sum over those that
  go of (s |A_j| |B_j|)^2, in the SVD basis the squared distance by which the adapters move (`jaxprune.component_problem`).
  `"fisher"` values a component by the mean over single samples of its gate's squared gradient, (dLoss / dm_j)^2.

Where paper and released code differ, a setting chooses:

- `importance="training"` averages eq. 6 over the gradients of the training steps since the last event, which costs
  nothing; `"samples"` takes it for each of the scoring samples alone and averages, as the released code does: one backward
  pass for each of up to 500 samples at every event.
- `norm="rms"` reads the norms of eq. 6 as the released code does; `"frobenius"` is the printed sqrt(|dA_l| |dB_l|) sqrt(c_l), in
  which a large site has more to say.
- `scaling="grow"` keeps alpha as ranks fall, so that s = alpha / r grows (released code); it costs a compilation at every event.
  By default s stays, and pruning changes nothing about the survivors.

The paper's "recovery steps" are a lock-out: no event within so many steps after one. Events are evenly spaced, so it only has
to be shorter than the interval between them.

An event never ends a run: where nothing was measured (all importances zero or not finite), or no plan within the budget gives
every type a rank, the present ranks stay, and the event's report says why.

Source: "DPLoRA: a dual-pruning framework based on ILP optimization and progressive pruning", section 3.2, algorithm 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, Lora, Masks, count
from jaxprune.allocation import component_problem, prune_problem, solve
from jaxprune.checks import MOST_RANK, MOST_STEPS, Count, NotNegative, OneOf, Range, Share
from jaxprune.errors import UsageError, shown
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.oplora import Seconds, Solver, oplora
from jaxprune.methods.registry import register
from jaxprune.schedules import BUDGETS, Schedule, budget_schedule, event_steps
from jaxprune.scores import component_norms
from jaxprune.sites import Site
from jaxprune.surgery import BASES, Decision, rotate_adapters, svd_bases, trim

# No site has more ranks to lose.
Events = Annotated[int, Range(1, MOST_RANK)]
IMPORTANCES = ("training", "samples")
NORMS = ("rms", "frobenius")
SCALINGS = ("constant", "grow")
LOSSES = ("importance", "components", "fisher")


class DploraState(NamedTuple):
    """What DPLoRA remembers.

    Attributes:
      importance: I_l after the last event.
      total: sum of I_new over the steps since the last event.
      steps: how many those were.
      event: events so far.
      start: adapter parameters at the start.
    """

    importance: dict[str, jax.Array]
    total: dict[str, jax.Array]
    steps: jax.Array
    event: jax.Array
    start: jax.Array


@register(
    paper="DPLoRA: a dual-pruning framework based on ILP optimization and progressive pruning",
    aliases={"target": "prune_ratio", "schedule": "budget_schedule"},
    first=oplora,
)
def dplora(
    first: Method | None = None,
    *,
    total_steps: Count,
    target: Share = 0.6,
    events: Events | None = None,
    delay: Annotated[int, Range(0, MOST_STEPS)] = 0,
    stop: Annotated[float, Range(above=0, high=1)] = 1.0,
    recovery_steps: Annotated[int, Range(0, MOST_STEPS)] | None = None,
    schedule: Annotated[str, OneOf(tuple(BUDGETS))] | Schedule = "bezier",
    basis: Annotated[str, OneOf(BASES)] = "svd",
    loss: Annotated[str, OneOf(LOSSES)] = "components",
    ema_decay: Share | None = None,
    momentum: NotNegative | None = None,
    stability: NotNegative | None = None,
    importance: Annotated[str, OneOf(IMPORTANCES)] | None = None,
    norm: Annotated[str, OneOf(NORMS)] | None = None,
    scaling: Annotated[str, OneOf(SCALINGS)] = "constant",
    solver: Solver = "auto",
    time_limit: Seconds = 60.0,
) -> Method:
    """Choose ranks by a MILP before training, and lower them by further MILPs during it.

    Args:
      first: the method that chooses the ranks and trains with them; None for `oplora()`. Its time budget, if it has one, holds
        for the whole run, because ranks only fall.
      total_steps: optimiser steps of the whole run.
      target: share of the adapter parameters to prune by the last event.
      events: pruning events; None for 10, or in a shorter run as many as fit after the first measurement.
      delay: steps before pruning starts; the learning rate's warm-up in the paper.
      stop: share of the run in which the events lie, so that 0.7 leaves more than the last 30 % to recover; 1 in the paper.
      recovery_steps: steps without an event after one; None for half an interval, at most 100.
      schedule: how the budget falls: `bezier`, `linear`, `early`, or a function from progress to the share of the pruning done.
      basis: judge and keep components of each site's singular value decomposition (`svd`), or of the factors as they were
        `trained`, as in the paper.
      loss: what ranks are worth: by the sizes of their `components`, by the `fisher` information of each, or by the `importance`
        of their site, as in the paper.
      ema_decay: of `importance`: weight of what was measured at earlier events (0.9); 0 for the latest measurement alone.
      momentum: price of a lost rank, 0 for none; None for 0.1, or 0 where components have values of their own.
      stability: reward for leaving a site as it is; None for 0.05, or 0 likewise.
      importance: measured on the gradients of `training`, the usual, or on single `samples` at every event as the released code.
      norm: how gradients are measured for it: `rms` as the released code does, the usual, or `frobenius` as eq. 6 is printed.
      scaling: as ranks fall, `constant` keeps s, and `grow` keeps alpha, so that s grows.
      solver: what solves for the ranks at events; `auto` is the fastest that is installed.
      time_limit: seconds the solver may take at an event; then its best plan so far is used, and said to be so.

    Raises:
      UsageError: a setting is out of range, the events do not fit, `first` does more than choose ranks, or (by `start`) the
        types of sites cannot all keep a rank within the last budget.
    """
    first, share, rescale = _begun(first), _share(schedule), scaling == "grow"
    of_importance = {"ema_decay": ema_decay, "importance": importance, "norm": norm}
    if loss != "importance" and (given := [name for name, value in of_importance.items() if value is not None]):
        raise UsageError(
            f"{given[0]} {of_importance[given[0]]} is a setting of loss=importance, and loss is {loss}; give loss=importance, or "
            f"leave {given[0]} out"
        )
    ema_decay, importance, norm = 0.9 if ema_decay is None else ema_decay, importance or "training", norm or "rms"
    usual = (0.1, 0.05) if loss == "importance" else (0.0, 0.0)
    momentum = usual[0] if momentum is None else momentum
    stability = usual[1] if stability is None else stability
    on_training = loss == "importance" and importance == "training"
    # B starts at 0, where A has no gradient, and the first step of a warm-up changes nothing.
    earliest = 3 if delay else 2
    end = round(stop * total_steps)
    if events is None:
        most = min(10, max(1, end - delay - 1))
        begins = lambda number: event_steps(number, end, delay)[0] if number < end - delay else 0  # noqa: E731
        events = next((number for number in range(most, 0, -1) if begins(number) >= earliest), most)
    steps = event_steps(events, end, delay)
    interval = (end - delay) / (events + 1)
    recovery = min(100, int(interval / 2)) if recovery_steps is None else recovery_steps
    if recovery >= interval:
        raise UsageError(
            f"recovery of {recovery} steps does not fit between events {interval:.0f} steps apart; expected fewer "
            f"recovery steps, fewer events, or a longer run"
        )
    if steps[-1] < earliest and (on_training or loss != "importance"):
        raise UsageError(
            f"the last pruning event comes after step {steps[-1]}, and nothing can be measured before step {earliest}; "
            f"train longer"
        )

    def left(start: int, event: int) -> int:
        return math.floor(start * (1 - target * share(event / events)))

    def start(context: Context) -> Start:
        begun = first.start(context)
        last, least = left(count(begun.adapters, begun.masks), events), _least(begun.adapters, context.sites, 1)
        if last < least:
            raise UsageError(
                f"pruning {target:.0%} would leave {last:,} adapter parameters, and a rank for each type of site takes "
                f"{least:,}; prune less or raise the budget"
            )
        return begun

    def init(adapters: Adapters, masks: Masks) -> DploraState:
        zeros = lambda: {path: jnp.zeros((), jnp.float32) for path in adapters}  # noqa: E731  (a step donates each)
        number = sum(Lora.count(lora, masks[path]) for path, lora in adapters.items())  # a DoRA magnitude is not pruned
        return DploraState(zeros(), zeros(), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.int32(number))

    def observe(state: DploraState, adapters, masks, grads, step, measured) -> DploraState:
        if not on_training:
            return state
        total = {path: state.total[path] + new for path, new in gradient_importance(grads, masks, norm).items()}
        return state._replace(total=total, steps=state.steps + 1)

    def measured(state: DploraState, adapters: Adapters, masks: Masks, step: int, context: Context) -> dict[str, Any]:
        """Average the importances, what was measured since the last event among them."""
        if on_training:
            new = {path: np.asarray(total) / max(int(state.steps), 1) for path, total in state.total.items()}
        else:
            new = _on_samples(context, adapters, masks, step, norm)
        # The first that was measured stands alone.
        blend = ema_decay if any(np.any(value) for value in state.importance.values()) else 0.0
        return {path: blend * np.asarray(state.importance[path]) + (1 - blend) * new[path] for path in state.importance}

    def decide(
        state: DploraState, adapters: Adapters, masks: Masks, step: int, context: Context
    ) -> tuple[DploraState, Decision | None]:
        event = int(state.event) + 1
        sites = [site for site in context.sites if site.path in adapters]
        alive = {site.path: np.asarray(masks[site.path]) > 0 for site in sites}
        current = {path: int(live.sum()) for path, live in alive.items()}
        report: dict[str, Any] = {"event": event, "budget": left(int(state.start), event)}
        merged = measured(state, adapters, masks, step, context) if loss == "importance" else state.importance
        state = DploraState(
            # What is not finite would stay so at every later event.
            {path: jnp.where(jnp.isfinite(value), value, state.importance[path]) for path, value in merged.items()},
            {path: jnp.zeros_like(value) for path, value in state.total.items()},
            jnp.zeros((), jnp.int32),
            jnp.int32(event),
            state.start,
        )
        if loss == "fisher":
            _check_samples(context)
        try:
            bases = svd_bases(adapters, masks) if basis == "svd" else {}
            rotated = rotate_adapters(bases, adapters)
            sizes = {
                path: abs(rotated[path].scale) * np.asarray(norm) for path, norm in component_norms(rotated).items()
            }
            if loss == "importance":
                worth = {site.path: float(merged[site.path]) for site in sites}
                ranks = range(max(current.values()) + 1)
                problem = prune_problem(
                    worth, sites, current, report["budget"], ranks=ranks, momentum=momentum, stability=stability
                )
            else:
                values = {path: np.square(size) for path, size in sizes.items()}
                if loss == "fisher":
                    values = sizes = _on_samples(context, rotated, masks, step, "gates")
                worth = {path: values[path][live] for path, live in alive.items()}
                problem = component_problem(worth, sites, report["budget"], momentum=momentum, stability=stability)
            plan = solve(problem, solver=solver, time_limit=time_limit)
        except UsageError as error:
            return state, Decision({}, report={**report, "status": f"The ranks stay as they are: {error}."})
        fewer = {path: rank for path, rank in plan.ranks.items() if rank < current[path]}
        if not fewer:
            return state, None
        scales = {path: current[path] / rank for path, rank in fewer.items() if rank} if rescale else {}
        said = {name: getattr(plan, name) for name in ("solver", "status", "objective", "gap")}
        report |= {**said, "solve_seconds": plan.seconds}
        turned = {path: bases[path] for path in fewer if path in bases}
        return state, Decision(trim(sizes, masks, fewer), bases=turned, scales=scales, report=report)

    def compact(state: DploraState, kept: dict[str, np.ndarray]) -> DploraState:
        stay = lambda tree: {path: leaf for path, leaf in tree.items() if kept[path].shape[-1]}  # noqa: E731
        return state._replace(importance=stay(state.importance), total=stay(state.total))

    return Method(
        start,
        init=init,
        observe=observe,
        decide=decide,
        events=steps,
        compact=compact,
        name="dplora",
    )


def _begun(first: Method | None) -> Method:
    """Return the method that begins; one that does more than choose ranks is refused."""
    first = oplora() if first is None else first
    parts = {
        "prunes by itself": first.decide, "changes adapters after the update": first.project, "has a view": first.view,
        "has a penalty": first.penalty, "has probes": first.probes,
    }  # fmt: skip
    for what, part in parts.items():
        if part is not None:
            raise UsageError(
                f"first {shown(first.name or 'method')} {what}, and DPLoRA continues only methods that do nothing after "
                f"they have chosen their ranks; give oplora() or lora()"
            )
    return first


def _share(schedule: str | Schedule) -> Schedule:
    return budget_schedule(schedule) if isinstance(schedule, str) else schedule


def gradient_importance(grads: Adapters, masks: Masks, norm: str = "rms") -> dict[str, jax.Array]:
    """Return rms(dA) rms(dB) sqrt(c) of every site with c live components, or sqrt(|dA| |dB|) sqrt(c) (eq. 6).

    Args:
      grads: a tree shaped like the adapters; entries of dead components are zero.
      masks: {site path: (r,)}.
      norm: `rms`, with means over the live components, or `frobenius`.

    Returns:
      {site path: importance}; 0 where nothing is live.
    """
    found = {}
    for path, grad in grads.items():
        alive = jnp.sum(masks[path])
        rows = jnp.maximum(alive, 1)
        # Roots one by one: a product of two mean squares soon is below what float32 holds.
        size_a, size_b = (jnp.sqrt(jnp.sum(jnp.square(leaf))) for leaf in (grad.a, grad.b))
        if norm == "rms":
            size = (size_a / jnp.sqrt(rows * grad.a.shape[0])) * (size_b / jnp.sqrt(rows * grad.b.shape[-1]))
        else:
            size = jnp.sqrt(size_a) * jnp.sqrt(size_b)
        found[path] = size * jnp.sqrt(alive)
    return found


def _check_samples(context: Context) -> None:
    if not context.samples:
        raise UsageError(
            "what single samples say is measured on the context's samples, and it has none; give samples, or another importance "
            "or loss"
        )


def _on_samples(context: Context, adapters: Adapters, masks: Masks, step: int, kind: str) -> dict[str, np.ndarray]:
    """Average what single samples say, in training mode: eq. 6, as the released code does, or squared gradients of `gates`."""
    _check_samples(context)
    measure, key = _measure(context.forward, context.loss_fn, kind), jax.random.fold_in(context.key, step)
    found = [
        jax.device_get(measure(dict(adapters), dict(masks), context.params, part, jax.random.fold_in(key, number)))
        for number, part in enumerate(context.samples)
    ]
    return {path: np.mean([part[path] for part in found], axis=0) for path in found[0]}


@functools.lru_cache
def _measure(forward: Any, loss_fn: Any, kind: str) -> Any:
    def loss(adapters, masks, params, batch, key):
        value = loss_fn(lambda *x, **kw: forward(params, adapters, masks, *x, **kw), batch, key)
        return value[0] if isinstance(value, tuple) else value

    @jax.jit
    def measure(adapters, masks, params, samples, key):
        def one(item):
            if kind == "gates":
                grads = jax.grad(loss, argnums=1)(adapters, masks, params, *item)
                return {path: jnp.square(grad) * (masks[path] > 0) for path, grad in grads.items()}
            return gradient_importance(jax.grad(loss)(adapters, masks, params, *item), masks, kind)

        keys = jax.random.split(key, len(jax.tree.leaves(samples)[0]))  # each sample has dropout of its own
        return jax.tree.map(lambda value: value.mean(0), jax.lax.map(one, (samples, keys)))

    return measure


def _least(adapters: Adapters, sites: Sequence[Site], rank: int) -> int:
    """Count the parameters of the cheapest plan that has a site of each type at `rank`."""
    cheapest: dict[str, int] = {}
    for site in sites:
        if site.path in adapters:
            cheapest[site.type] = min(site.cost(rank), cheapest.get(site.type, site.cost(rank)))
    return sum(cheapest.values())
