"""One run between what was loaded and its files: what comes before the first step, at pauses, and at the end.

Who trains is another matter: `loop` steps one run, `together` several in one program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data.packing import Batch
from experiments.run.build import check_sites, make_method, make_optimizer, make_schedule, method_settings
from experiments.run.clock import Clock
from experiments.run.config import RunConfig, total_steps
from experiments.run.console import Waits, say
from experiments.run.events import Pruner
from experiments.run.folder import Folder
from experiments.run.loading import Loaded
from experiments.run.outcome import Finished, write
from experiments.run.planning import planned
from experiments.run.record import Recorder, parameters, rewind, said
from experiments.tasks.base import Task
from jaxprune import methods, report
from jaxprune.adapters import Adapters, Masks, init_weights
from jaxprune.allocation import Plan
from jaxprune.checkpoint import Checkpoints
from jaxprune.errors import UsageError
from jaxprune.files import write_whole
from jaxprune.models import Pretrained
from jaxprune.train import TrainState, compacted, init_state, make_step

HEAD = r"^head/"


class Room(NamedTuple):
    """Adapters with room for more components than a run has.

    Attributes:
      adapters: {site path: adapter}, zero where there is room.
      masks: {site path: mask}.
      own: 1 for the components that are the run's own, which come first; None where all are.
    """

    adapters: Adapters
    masks: Masks
    own: Masks | None


class Run:
    """Plan, begin or resume, then pause after the steps that ask for it, and write what is left behind.

    Args:
      config: with nothing left open.
      settings: the content of config.yaml.
      task: what is learned.
      loaded: the model and the task's tokens.
      folder: checked, and not begun.
      checkpoints: those in the folder.
      clock: counts the seconds.
      name: stands before what is said of it, where several runs speak.
      compact: in place of the settings'.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: bytes,
        task: Task,
        loaded: Loaded,
        folder: Folder,
        checkpoints: Checkpoints,
        clock: Clock,
        *,
        name: str = "",
        compact: str | None = None,
    ) -> None:
        self.config, self.folder, self.checkpoints = config, folder, checkpoints
        self._own: Masks | None = None
        self._settings, self._task, self._loaded, self._clock, self._name = settings, task, loaded, clock, name
        self.train, self._waits, self._compact = loaded.data.train, Waits(), compact or config.compact or "auto"
        self.steps = total_steps(config, self.train.steps_per_epoch)
        self._every = config.eval_steps or self.train.steps_per_epoch
        if "channels" in config.entry.settings and not isinstance(loaded.model, Pretrained):
            raise UsageError(
                f"--method {config.method} takes channels out of encoders, and {config.model} is a decoder; choose another method"
            )
        heads = loaded.model.config.num_heads
        check_sites(loaded.sites, method_settings(config, self.steps, heads))
        self.method = make_method(config, self.steps, heads)
        self._schedule = make_schedule(config, self.steps, self.method)
        self.optimizer = make_optimizer(config, self._schedule)
        self.step = make_step(loaded.forward, task.loss, self.optimizer, self.method, accumulate=config.accumulate or 1)
        key, self._key = jax.random.split(jax.random.key(config.seed))
        data, params = loaded.data, loaded.model.params
        self._context = methods.Context(
            key, params, loaded.sites, loaded.forward, task.loss, data.scoring, data.samples
        )

    # Before the first step

    def plan(self) -> methods.Start:
        """Start the method."""
        return planned(self.method, self._context, self._clock, self.config.method)

    def begin(self, start: methods.Start, room: Room | None = None) -> TrainState:
        """Make the state of step 0, and the folder.

        Args:
          start: from `plan`.
          room: adapters and masks with more than the run's own components, for states of one shape; what is saved is without.
        """
        model, plan = self._loaded.model, start.plan
        adapters, masks, self._own = room or Room(start.adapters, start.masks, None)
        # A decoder has no head of the task.
        weights = init_weights(model.params, HEAD) if "head" in model.params else {}
        if self.config.train_head:
            weights = {**start.weights, **weights}
        else:
            weights = {path: weight for path, weight in start.weights.items() if path not in weights}
        state = init_state(self._key, adapters, masks, self.optimizer, self.method, weights=weights)
        kept = {
            "config": self.config.plain(),
            "ranks": {site.path: plan.ranks[site.path] if plan else 0 for site in self._loaded.sites},
            "plan": _about(plan), "events": [], "adapter_params": parameters(state)["adapter_params"],
            "changes_params": start.params is not model.params,
        }  # fmt: skip
        if plan is not None:
            self._say("plan", plan.status)
            print(f"\n{plan.table()}\n")
        self.folder.begin(clear=True)
        if plan is not None:
            title = f"{self.config.method} on {self.config.task}"
            report.plot_ranks(
                kept["ranks"], self._loaded.sites, self.folder.own("ranks.png"), title=title, budget=plan.budget
            )
        self._follow(state, kept, start)
        return state

    def resume(self, kept: dict[str, Any]) -> TrainState:
        """Take up the state that was saved last; `kept` was saved with it."""
        start = self.plan() if kept["changes_params"] else None
        state = self.checkpoints.restore(self.optimizer, self.method)
        self.folder.begin(clear=False)
        rewind(self.folder.own("metrics.jsonl"), int(state.step))
        self._clock.add(kept["seconds"])
        self._say("resumed", f"after step {int(state.step)} of {self.steps}, from {self.checkpoints.folder}")
        self._follow(state, kept, start)
        return state

    def _follow(self, state: TrainState, kept: dict[str, Any], start: methods.Start | None) -> None:
        """Begin to write down what happens from this state on."""
        self.params, self._initial = self._loaded.model.params, None
        if start is not None and kept["changes_params"]:
            # A copy: the first step donates its state.
            self.params, self._initial = start.params, jax.tree.map(lambda leaf: np.array(leaf), start.adapters)
        write_whole(self.folder.own("config.yaml"), self._settings)
        counted = parameters(state)
        self._say("trained", f"{said(counted)}, and {counted['head_params']:,} in the head")
        self._kept = kept
        self.recorder = Recorder(
            self.config,
            self.folder,
            self._task,
            self._loaded,
            self.params,
            self.method,
            self._schedule,
            self._clock,
            kept,
        )
        self._pruner = Pruner(
            self.method, self.optimizer, self._context._replace(params=self.params), self._clock, self.steps, self._compact,
            kept["events"], self.config.event_losses,
        )  # fmt: skip
        self.folder.own("checkpoints")
        self._pruner.begin(int(state.step))

    def batches(self, done: int) -> Iterator[Batch]:
        """Yield the batches of the steps after `done`."""
        while done < self.steps:
            epoch, first = divmod(done, self.train.steps_per_epoch)
            for batch in self.train.epoch(epoch, first):
                if done == self.steps:
                    return
                yield self._task.finish(batch)
                done += 1

    # Pauses

    def pauses(self, number: int) -> bool:
        """Say whether there is something to do after a step."""
        return self.method.triggers(number) or self._evaluates(number) or self._saves(number)

    def pause(self, number: int, state: TrainState) -> tuple[TrainState, str]:
        """Prune, evaluate and save after a step, each where it is due; return the state to go on with."""
        found, loss = [], self.recorder.loss_so_far()
        if self.method.triggers(number):
            known = len(self._pruner.events)
            with self._waits.announced("pruning", f"after step {number:,}: measuring, deciding, and removing"):
                state = self._pruner.after(number, state)
            found += [_event(event) for event in self._pruner.events[known:]]
        if self._evaluates(number):
            with self._waits.announced("evaluating", f"on {' and '.join(self._task.validation)}"):
                found.append(self.recorder.evaluate(number, state))
        if number < self.steps and self._saves(number):
            self.save(state)
        if found:
            found[-1] += loss
        for text in found:
            self._say(f"step {number:,}", text)
        return state, ""

    def save(self, state: TrainState) -> None:
        """Save a checkpoint."""
        with self._clock.timing("save"):
            known = {**self._kept, **self.recorder.kept(), "events": self._pruner.events}
            self.checkpoints.save(self._trimmed(state), known, method=self.method, score=self.recorder.worth)

    def _trimmed(self, state: TrainState) -> TrainState:
        """Remove the components that are not the run's own."""
        if self._own is None:
            return state
        small = compacted(state._replace(masks=self._own), self.method, self.optimizer)
        return small._replace(masks={path: state.masks[path][: mask.size] for path, mask in small.masks.items()})

    def _evaluates(self, number: int) -> bool:
        return number % self._every == 0 or number == self.steps

    def _saves(self, number: int) -> bool:
        return number % self.config.save_steps == 0 if self.config.save_steps else self._evaluates(number)

    # The end

    def close(self, state: TrainState) -> None:
        """Close measurements and files after the last step of this process, and see to it that its state is saved."""
        self._pruner.finish(int(state.step))
        self.recorder.close()
        if int(state.step) not in self.checkpoints.steps():
            self.save(state)
            self.checkpoints.wait()

    def write(self, state: TrainState) -> dict[str, Any]:
        """Write what a finished run leaves behind; return the summary."""
        return write(
            Finished(
                self.config, self.folder, self._task, self._loaded.model, self._initial, self.method, self._loaded.sites,
                self._kept, self.recorder, self._pruner, self._clock, self._trimmed(state),
            )
        )  # fmt: skip

    def _say(self, word: str, text: str) -> None:
        say(word, f"{self._name}: {text}" if self._name else text)


def _about(plan: Plan | None) -> dict[str, Any] | None:
    """Return what a plan says of itself as JSON can hold it."""
    if plan is None:
        return None
    names = ("budget", "solver", "status", "objective", "gap", "seconds", "time")
    told = {name: getattr(plan, name) for name in names}
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in told.items()}


def _event(event: dict[str, Any]) -> str:
    """Say what a pruning event did."""
    before, after = event["params_before"], event["params_after"]
    if before == after and "channels" not in event:
        return f"pruned nothing, {after:,} adapter parameters" + (f": {event['status']}" if "status" in event else "")
    told = f"pruned from {before:,} to {after:,} adapter parameters"
    if "loss_before" in event:
        told += f", loss of the scoring batches {event['loss_before']:.4f} to {event['loss_after']:.4f}"
    return told + (", and compacted" if event["compacted"] else "")
