"""Training time beside uniform rank 16, for plans by parameters and by time: `python -m experiments.bench time`.

Every arrangement of adapters is timed in turn with uniform rank 16, step by step, so that a machine whose speed drifts slows
both. DPLoRA goes through its events on a short run, each phase compacted; what a long run takes follows from the phases'
shares of the steps, with and without what compiling them costs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from experiments.bench.step import Setting, setting
from experiments.run.cli import parse


@dataclass(frozen=True)
class TimeConfig:
    """Time training steps of OPLoRA and DPLoRA relative to uniform rank 16."""

    size: Literal["roberta-base", "minilm"] = "roberta-base"
    """architecture, with random weights"""
    batch: int = 32
    """rows a step"""
    length: int = 64
    """tokens a row"""
    steps: int = 3
    """timed steps of each arrangement, each between two of uniform rank 16"""
    time_budgets: tuple[float, ...] = (0.69, 0.5)
    """time budgets to try"""
    prune_ratio: float = 0.8
    """DPLoRA: share of the parameters to prune"""
    events: int = 5
    """DPLoRA: pruning events"""
    total_steps: int = 5000
    """DPLoRA: steps of the long run that the phases are extrapolated to"""
    only_fit: bool = False
    """time only what the time model is fitted to"""


def main(arguments: list[str]) -> None:
    """Measure, and print a table of predicted and measured times and the time model that fits them best."""
    import jaxprune as jp
    from jaxprune.allocation import step_time

    config = parse(TimeConfig, arguments, "experiments.bench time")
    world = setting(config.size, config.batch, config.length)
    watch = Watch(world, config.steps)
    layers = max(site.layer for site in world.sites) + 1
    print(f"{config.size}, {config.batch} x {config.length} tokens, {config.steps} steps each; 1 is uniform rank 16")
    print(f"{'arrangement':42s} {'predicted':>9s} {'measured':>9s} {'parameters':>11s} {'compiling, s':>12s}")

    def show(name: str, ranks: dict[str, int]) -> tuple[float, float]:
        measured, compiling = watch.ratio(ranks)
        cost = sum(site.cost(ranks[site.path]) for site in world.sites)
        print(
            f"{name:42s} {step_time(ranks, world.sites):9.3f} {measured:9.3f} {cost:11,d} {compiling:12.1f}", flush=True
        )
        return measured, compiling

    def above(layer: int, rank: int) -> dict[str, int]:
        return {site.path: rank if site.layer >= layer else 0 for site in world.sites}

    show("rank 2 everywhere", above(0, 2))
    for top in sorted({layers // 6, layers // 4, layers // 2, 3 * layers // 4}):
        show(f"rank 16 in the top {top} of {layers} layers", above(layers - top, 16))
    if config.only_fit:
        print(watch.fitted())
        return
    scores = jp.site_scores("absolute", world.forward, world.loss_fn, world.params, world.sites, [world.batch])
    for budget in (None, *config.time_budgets):
        which = "parameter budget" if budget is None else f"time budget {budget:g}"
        plan = jp.allocate(scores, world.sites, time_budget=budget)
        show(f"OPLoRA, {which}", plan.ranks)
        phases = dplora_phases(config, world, budget)
        times = [show(f"DPLoRA, {which}, phase {number}", ranks) for number, (_, ranks) in enumerate(phases)]
        shares = [share for share, _ in phases]
        steps = float(np.dot(shares, [measured for measured, _ in times]))
        compiling = sum(seconds for _, seconds in times[1:]) / (config.total_steps * watch.reference())
        print(
            f"DPLoRA, {which}, p = {config.prune_ratio:g}: training time {steps:.3f}; with compiling at every event of a run "
            f"of {config.total_steps} steps {steps + compiling:.3f}",
            flush=True,
        )
    print(watch.fitted())


def dplora_phases(config: TimeConfig, world: Setting, time_budget: float | None) -> list[tuple[float, dict[str, int]]]:
    """Run DPLoRA through its events; return each phase's share of the steps and its ranks."""
    import jax
    import optax

    import jaxprune as jp
    from jaxprune.surgery import live

    total = 2 * (config.events + 1)
    method = jp.dplora(
        jp.oplora(time_budget=time_budget),
        total_steps=total,
        events=config.events,
        target=config.prune_ratio,
        recovery_steps=0,
    )
    context = jp.Context(jax.random.key(0), world.params, world.sites, world.forward, world.loss_fn, [world.batch])
    start = method.start(context)
    optimizer = optax.adamw(1e-3)
    state = jp.init_state(jax.random.key(1), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(world.forward, world.loss_fn, optimizer, method)
    assert start.plan
    phases, since, ranks = [], 0, dict(start.plan.ranks)
    for number in range(1, total + 1):
        state, _ = step(world.params, state, world.batch)
        state, decision = jp.prune(state, method, optimizer, context)
        if decision or number == total:
            phases.append(((number - since) / total, ranks))
            alive = live(state.masks)
            since, ranks = number, {site.path: alive.get(site.path, 0) for site in world.sites}
    return phases


class Watch:
    """Time arrangements in turn with uniform rank 16."""

    def __init__(self, world: Setting, steps: int) -> None:
        self._world, self._steps = world, steps
        self._uniform, _ = self._compiled({site.path: 16 for site in world.sites})
        self._seconds: list[float] = []
        self._seen: list[tuple[dict[str, int], float]] = [({site.path: 16 for site in world.sites}, 1.0)]

    def ratio(self, ranks: dict[str, int]) -> tuple[float, float]:
        """Return the step time relative to uniform rank 16 (ratio of medians) and the seconds of compiling it."""
        run, compiling = self._compiled(ranks)
        theirs, ours = [], []
        for _ in range(self._steps):
            theirs.append(_timed(self._uniform))
            ours.append(_timed(run))
        self._seconds += theirs
        ratio = float(np.median(ours) / np.median(theirs))
        self._seen.append((ranks, ratio))
        return ratio, compiling

    def reference(self) -> float:
        """Return the median seconds of a step with uniform rank 16."""
        return float(np.median(self._seconds))

    def fitted(self) -> str:
        """Fit the time model's three coefficients to everything measured, and say how well it does."""
        import math

        from scipy.optimize import nnls

        from jaxprune.allocation import TimeModel, step_time

        sites = self._world.sites
        kernels = sum(math.prod((site.d_in, site.d_out)) for site in sites)
        rows = []
        for ranks, _ in self._seen:
            low = min((site.layer for site in sites if ranks[site.path]), default=math.inf)
            back = sum(site.d_in * site.d_out for site in sites if site.layer >= low)
            rows.append([kernels, back, sum(site.cost(ranks[site.path]) for site in sites)])
        measured = np.array([ratio for _, ratio in self._seen])
        weights, _ = nnls(np.array(rows, float), measured)
        model = TimeModel(*(max(1, round(float(w) * kernels * 1000)) for w in weights))
        off = [abs(step_time(ranks, sites, model) - ratio) for ranks, ratio in self._seen]
        plain = [abs(step_time(ranks, sites) - ratio) for ranks, ratio in self._seen]
        return (
            f"{self.reference():.3f} s a step with uniform rank 16. Best fit: {model}, off by {np.mean(off):.3f} on average and "
            f"{max(off):.3f} at most; the default model by {np.mean(plain):.3f} and {max(plain):.3f}"
        )

    def _compiled(self, ranks: dict[str, int]) -> tuple[Any, float]:
        import jax
        import optax

        import jaxprune as jp

        world, optimizer = self._world, optax.adamw(1e-3)
        adapters, masks = jp.init_lora(jax.random.key(0), world.sites, ranks)
        state = jp.init_state(jax.random.key(1), adapters, masks, optimizer)
        step = jp.make_step(world.forward, world.loss_fn, optimizer)

        def run() -> None:
            nonlocal state
            state, metrics = step(world.params, state, world.batch)
            jax.block_until_ready((state.adapters, metrics))

        first = _timed(run)
        return run, first - _timed(run)


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
