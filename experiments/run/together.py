"""Several runs of one method and task in one compiled step, mapped over a leading axis of their states.

They differ in their seed, or in the ranks they start with: a run of smaller ranks has room up to the largest, masked for good.
What does not depend on the seed is held once. A decision is the matter of each run: at an event its state is taken out, `decide`
runs as ever, and the states are stacked again, in the shapes they had; nothing is compacted before the end. A step takes the
largest shape of batch that any of the runs needs. Every run leaves the folder that it would leave alone, equal to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.packing import Batch
from experiments.run import settings_file
from experiments.run.clock import Clock
from experiments.run.config import RunConfig
from experiments.run.console import say
from experiments.run.folder import Folder
from experiments.run.loading import for_seed, load
from experiments.run.loop import inputs
from experiments.run.one import Room, Run
from experiments.run.record import MADE
from experiments.run.settings import flag_text
from experiments.run.stopping import Stop, Stopped
from experiments.tasks.base import Task
from jaxprune.checkpoint import Checkpoints
from jaxprune.errors import UsageError
from jaxprune.methods import Method, Start
from jaxprune.train import TrainState, fit

PROGRAM = "experiments.together"
# Settings in which runs that train together may differ.
OWN = ("seed", "rank", "budget", "output_dir", "overwrite")
# The axis of the runs; they are all at the same step.
_AXES = TrainState._make((0, 0, 0, 0, 0, None, 0))


def check(configs: Sequence[RunConfig]) -> None:
    """Refuse settings, with nothing left open, that runs cannot have together, or not with each other.

    Raises:
      UsageError: as said.
    """
    first = configs[0]
    if first.resume:
        raise UsageError("--resume is for runs in turn: runs together begin anew; leave out --resume or --together")
    if first.accumulate != 1:
        raise UsageError(
            f"--accumulate {first.accumulate} is for runs in turn: it saves the memory that runs together take; leave out one"
        )
    if first.compact == "always":
        raise UsageError(
            "--compact always is for runs in turn: runs together keep their shapes; leave out one of the two"
        )
    for other in configs[1:]:
        for name, value in first.plain().items():
            if name not in OWN and other.plain().get(name) != value:
                raise UsageError(
                    f"runs together differ in {' and '.join(OWN[:3])} alone, and these have {flag_text(name)} {value} and "
                    f"{other.plain().get(name)}; run them in turn"
                )


def run(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Run several fine-tunings at once, print what happens, and return what the `summary.json` of each holds."""
    clock = Clock(len(configs))
    given, configs = configs, [config.resolve() for config in configs]
    check(configs)
    first, task = configs[0], configs[0].chosen()
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(Folder(config.output_dir, MADE)) for config in configs if config.output_dir]
        for config, folder in zip(configs, folders, strict=True):
            folder.check(resume=False, overwrite=config.overwrite, inputs=inputs(config))
        say("together", f"{len(configs)} runs in one step, uncompacted; seconds are the share of each")
        loaded = load(first, task, clock)
        runs = []
        for config, folder, said in zip(configs, folders, given, strict=True):
            with clock.timing("load"):
                own = for_seed(loaded, config, task)
            runs.append(
                Run(
                    config, settings_file.written(said, config), task, own, folder,
                    Checkpoints(folder.path / "checkpoints", keep=config.keep or 1), clock, name=_name(config), compact="never",
                )
            )  # fmt: skip
        starts = [one.plan() for one in runs]
        wide = rooms(starts)
        _check_method(runs, wide)
        for one, room in zip(runs, wide, strict=True):
            _check_shapes(wide[0].adapters, room.adapters, one.config, 0)
        states = [one.begin(start, room) for one, start, room in zip(runs, starts, wide, strict=True)]
        step, params = _mapped(runs)
        say("compiling", f"the training step of {len(runs)} runs; {runs[0].steps:,} steps follow")
        for one in runs:
            stack.enter_context(one.checkpoints)
        with Stop("stopping after this step; runs together begin anew") as stop, clock.timing("train"):
            state = fit(
                step, params, _stack(states), _batches(runs, task), total_steps=runs[0].steps,
                log=lambda number, metrics: _log(runs, number, metrics),
                pause_at=runs[0].pauses, pause=lambda number, state: (_pause(runs, number, state), ""), stop=stop,
            )  # fmt: skip
        if stop() and int(state.step) < runs[0].steps:
            raise Stopped(stop.signal, f"after step {int(state.step)}; runs together begin anew")
        states = _taken(state, len(runs))
        for one, own in zip(runs, states, strict=True):
            one.close(own)
        return [one.write(own) for one, own in zip(runs, states, strict=True)]


def rooms(starts: Sequence[Start]) -> list[Room]:
    """Give every site the largest number of components that it has in any of the starts."""
    most: dict[str, int] = {}
    known: dict[str, Any] = {}
    for start in starts:
        for path, mask in start.masks.items():
            most[path] = max(most.get(path, 0), mask.size)
            known.setdefault(path, start.adapters[path])
    found = []
    for start in starts:
        if {path: mask.size for path, mask in start.masks.items()} == most:
            found.append(Room(start.adapters, start.masks, None))
            continue
        adapters, masks, own = dict(start.adapters), dict(start.masks), {}
        for path, rank in most.items():
            # A site without an adapter is one without live components.
            mask = masks.get(path, jnp.zeros(0))
            adapters[path] = _widened(adapters.get(path) or _widened(known[path], 0), rank)
            masks[path] = jnp.zeros(rank, mask.dtype).at[: mask.size].set(mask)
            own[path] = jnp.zeros(rank).at[: mask.size].set(1)
        found.append(Room(adapters, masks, own))
    return found


def _widened(adapter: Any, rank: int) -> Any:
    """Return an adapter with `rank` components: further ones are zero, and the last ones go."""

    def one(leaf: jax.Array, axis: int) -> jax.Array:
        leaf = jax.lax.slice_in_dim(leaf, 0, min(rank, leaf.shape[axis]), axis=axis % leaf.ndim)
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, rank - leaf.shape[axis])
        return jnp.pad(leaf, widths)

    return dataclasses.replace(
        adapter, **{name: one(getattr(adapter, name), axis) for name, axis in adapter.rank_axes.items()}
    )


def _check_method(runs: Sequence[Run], given: Sequence[Room]) -> None:
    """Refuse what a method does in a step where that may depend on what runs do not share."""
    method, config = runs[0].method, runs[0].config
    parts = {"view": method.view, "penalty": method.penalty, "project": method.project, "probes": method.probes}
    if any(one.config.settings != config.settings for one in runs):
        parts["observe"] = None if method.observe is Method._field_defaults["observe"] else method.observe
    elif all(room.own is None for room in given):
        return
    if does := [name for name, part in parts.items() if part is not None]:
        raise UsageError(
            f"{config.method} does more in a step than train what is not masked ({', '.join(does)}), so that runs of different "
            f"ranks or budgets are different programs; run them in turn"
        )


def _check_shapes(first: Any, other: Any, config: RunConfig, number: int) -> None:
    """Refuse a run whose state, or adapters, cannot be stacked with those of the first after a step."""
    shapes = [jax.tree.map(jnp.shape, one) for one in (first, other)]
    if jax.tree.structure(first) != jax.tree.structure(other) or shapes[0] != shapes[1]:
        raise UsageError(
            f"after step {number} the adapters of the run with {_name(config)} have other shapes or scales than those of the "
            f"first, so that {config.method} with these settings cannot train together; run them in turn"
        )


def _mapped(runs: Sequence[Run]) -> tuple[Callable[..., Any], Any]:
    """Return the step of all runs, and their frozen parameters: those that they share once, others stacked."""
    given = [one.params for one in runs]
    shared = jax.tree.map(lambda *leaves: all(leaf is leaves[0] for leaf in leaves), *given)
    params = jax.tree.map(lambda same, *leaves: leaves[0] if same else jnp.stack(leaves), shared, *given)
    axes = jax.tree.map(lambda same: None if same else 0, shared)

    def step(params: Any, state: TrainState, batch: Batch) -> Any:
        return runs[0].step(params, state, batch)

    return jax.jit(jax.vmap(step, (axes, _AXES, 0), (_AXES, 0)), donate_argnums=1), params


def _batches(runs: Sequence[Run], task: Task) -> Iterator[Batch]:
    for done in range(runs[0].steps):
        at = divmod(done, runs[0].train.steps_per_epoch)
        shape = max(one.train.shape(*at) for one in runs)
        parts = [task.finish(one.train.batch(*at, shape)) for one in runs]
        yield {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def _log(runs: Sequence[Run], number: int, metrics: dict[str, list[float]]) -> None:
    for i, one in enumerate(runs):
        one.recorder.log(number, {name: values[i] for name, values in metrics.items()})


def _pause(runs: Sequence[Run], number: int, state: TrainState) -> TrainState:
    after = [one.pause(number, own)[0] for one, own in zip(runs, _taken(state, len(runs)), strict=True)]
    if not runs[0].method.triggers(number):
        return state
    for one, own in zip(runs, after, strict=True):
        _check_shapes(after[0], own, one.config, number)
    return _stack(after)


@jax.jit
def _stacked(states: Sequence[TrainState]) -> TrainState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _stack(states: Sequence[TrainState]) -> TrainState:
    return _stacked([state._replace(step=None) for state in states])._replace(step=states[0].step)


def _taken(state: TrainState, count: int) -> list[TrainState]:
    """Take the states of single runs out, as copies: a step donates what it is given."""
    return [own._replace(step=jnp.copy(state.step)) for own in _parts(state._replace(step=None), count)]


@jax.jit(static_argnums=1)
def _parts(state: TrainState, count: int) -> list[TrainState]:
    return [jax.tree.map(operator.itemgetter(i), state) for i in range(count)]


def _name(config: RunConfig) -> str:
    own = {"seed": config.seed, **config.settings}
    return ", ".join(f"{name} {own[name]}" for name in OWN if name in own)
