"""What a finished run leaves behind: summary, pictures, report, and what was trained in a form that loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.run.card import card
from experiments.run.clock import Clock
from experiments.run.config import RunConfig
from experiments.run.console import say
from experiments.run.device import device
from experiments.run.events import Pruner, final_ranks
from experiments.run.folder import Folder
from experiments.run.record import MADE, Recorder, parameters, versions
from experiments.tasks.base import Task
from jaxprune import report
from jaxprune.adapters import Adapters, Bottleneck, MaskedDora, merge, with_weights
from jaxprune.methods import Method
from jaxprune.models import EncoderConfig, Pretrained, PretrainedDecoder
from jaxprune.peft import save_adapters, save_peft
from jaxprune.sites import Site, flatten
from jaxprune.surgery import extract
from jaxprune.train import TrainState

_SPENT = {
    "load": "loading", "train": "training", "compile": "compiling", "score": "scoring", "allocate": "solving", "prune": "pruning",
    "eval": "evaluating", "save": "saving",
}  # fmt: skip


class Saved(NamedTuple):
    """What was trained, as a folder: its name, what it is for, and the sizes of a model that was pruned."""

    name: str
    use: str
    sizes: Mapping[str, int] = {}


class Finished(NamedTuple):
    """A run after its last step.

    Attributes:
      initial: a copy of the adapters at the start, where they were taken out of the kernels.
      kept: what a resumed run must know, from the start of the run.
    """

    config: RunConfig
    folder: Folder
    task: Task
    model: Pretrained | PretrainedDecoder
    initial: Adapters | None
    method: Method
    sites: Sequence[Site]
    kept: dict[str, Any]
    recorder: Recorder
    pruner: Pruner
    clock: Clock
    state: TrainState


def write(run: Finished) -> dict[str, Any]:
    """Write everything, print the end of the run, and return what `summary.json` holds."""
    say("writing", f"what was trained, pictures and report, to {run.folder.path}/")
    folder, plan, events = run.folder, run.kept["plan"], run.pruner.events
    ranks = final_ranks(run.state.masks, run.sites) if plan else run.kept["ranks"]
    summary = {
        "method": run.config.method, "model": run.config.model, "task": run.task.name, "seed": run.config.seed,
        "metric": run.task.metrics[0], "score": run.recorder.last[run.task.metrics[0]], "best_score": run.recorder.best,
        "metrics": run.recorder.last, **parameters(run.state),
        "budget": plan["budget"] if plan else None, "ranks": ranks,
        "layers_adapted": len({site.layer for site in run.sites if ranks[site.path]}) if plan else None,
        "steps": int(run.state.step), "events": events, "device": device(),
        "command": ["python", "-m", run.task.program, "--config", str(folder.path / "config.yaml")],
    }  # fmt: skip
    if run.clock.runs > 1:
        summary["trained_together"] = run.clock.runs
    if plan and plan["gap"] is not None:
        summary["allocation"] = plan
    if events:
        summary |= {"adapter_params_at_start": run.kept["adapter_params"], "ranks_at_start": run.kept["ranks"]}
        title = f"{run.config.method} on {run.task.name}"
        better = ", lower is better" if run.task.lower_is_better else ""
        report.plot_pruning(
            run.recorder.history(), events, folder.own("pruning.png"), title=title + better, metric=run.task.metrics[0],
            budget=events[-1].get("budget"),
        )  # fmt: skip
        report.plot_ranks_before_after(run.kept["ranks"], ranks, run.sites, folder.own("ranks_after.png"), title=title)
    saved = _save(run)
    summary |= {**saved.sizes, "seconds": run.clock.total(), "versions": versions(), "config": run.config.plain()}
    report.write_json(folder.own("summary.json"), summary)
    folder.own("report.html")
    report.write_page(folder.path)
    _conclude(run.task, summary, folder.path, saved)
    return summary


def _save(run: Finished) -> Saved:
    """Save what was trained: as PEFT's LoRA where it is one, else merged into a checkpoint, else in a format of our own."""
    folder, model = run.folder, run.model
    adapters, masks = run.method.seen(run.state.method_state, run.state.adapters, run.state.masks)
    # What the checkpoint lacked was drawn at random: no one could load it again.
    leaves = flatten(model.params)
    weights = {**{path: leaves[path] for path in model.initialised}, **run.state.weights}
    if any(isinstance(adapter, MaskedDora) for adapter in adapters.values()):
        assert isinstance(model.config, EncoderConfig)
        small = extract(model.config, model.params, adapters, masks, weights=weights)
        params = merge(with_weights(small.params, small.weights), small.adapters, masks)
        _save_model(run, small.config, params, None)
        before, after = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (model.params, params))
        sizes = {"model_params_at_start": before, "model_params": after}
        return Saved("model", "it is the smaller model, without the masked channels: give it to --model", sizes)
    if not adapters:
        _save_model(run, model.config, with_weights(model.params, weights), "transformers")
        return Saved("model", f"give it to --model or to {run.task.auto_class}.from_pretrained")
    if any(isinstance(adapter, Bottleneck) for adapter in adapters.values()):
        beside = _about(run, run.config.model, None)
        save_adapters(adapters, masks, folder.own("adapter"), weights=weights, beside=beside)
        folder.complete("adapter")
        return Saved("adapter", "PEFT has no format for it; jp.load_adapters reads it")
    save_peft(
        adapters, masks, folder.own("adapter"), weights=weights, torch_paths=model.torch_paths, params=model.params,
        base_model=run.config.model, initial=run.initial, task_type=run.task.task_type,
        beside=_about(run, run.config.model, "peft"),
    )  # fmt: skip
    folder.complete("adapter")
    return Saved("adapter", "give it to PeftModel.from_pretrained or jp.load_peft")


def _save_model(run: Finished, config: Any, params: Any, library: str | None) -> None:
    """Save a checkpoint that needs no other."""
    run.task.save(run.folder.own("model"), config, params, _about(run, None, library))
    run.folder.complete("model")


def _about(run: Finished, base_model: str | None, library: str | None) -> dict[str, bytes]:
    """Return the tokenizer, and the files that say what the folder beside them does, for programs and for people."""
    config, task = run.config, run.task
    assert config.max_length and config.dtype
    reading = task.reading(base_model, config.max_length, config.dtype)
    return {**run.model.tokenizer_files(), **reading, **card(config, task, run.recorder.last, library=library)}


def _conclude(task: Task, summary: dict[str, Any], folder: Path, saved: Saved) -> None:
    best, seconds = f" (best {summary['best_score']:.2f})", summary["seconds"]
    metrics = {summary["metric"]: summary["score"], **summary["metrics"]}
    scores = (f"{name} {value:.2f}{best if name == summary['metric'] else ''}" for name, value in metrics.items())
    say("score", "; ".join(scores))
    events = summary["events"]
    if "model_params" in summary:
        kept = (f"{kind} {100 * part['kept'] / part['of']:.0f} %" for kind, part in events[-1]["channels"].items())
        say(
            "pruned",
            f"the model from {summary['model_params_at_start']:,} to {summary['model_params']:,} parameters; "
            f"channels kept: {', '.join(kept)}",
        )
    elif events:
        compactions, plural = sum(event["compacted"] for event in events), "" if len(events) == 1 else "s"
        say(
            "pruned",
            f"{summary['adapter_params_at_start']:,} to {summary['adapter_params']:,} adapter parameters in "
            f"{len(events)} event{plural}, {compactions} of them compacted",
        )
    spent = ", ".join(f"{name} {seconds[kind]:.1f}" for kind, name in _SPENT.items() if seconds[kind] >= 0.05)
    say("time", f"{seconds['total']:.1f} s: {spent}")
    say("files", f"{folder}/: {', '.join(name for name in MADE if (folder / name).exists())}")
    say("next", f"open {folder}/report.html, or {task.use(folder)}")
    say(f"{saved.name}/", saved.use)
