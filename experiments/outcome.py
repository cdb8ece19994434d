"""What a finished run leaves behind: summary, pictures, report, and the adapter or the smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.config import STAGED, GlueConfig
from experiments.folder import Folder
from experiments.pruning import Pruner, final_ranks
from experiments.recording import Clock, Recorder, versions
from experiments.tasks import Task
from jaxprune import report
from jaxprune.adapters import Adapters, Masks, count, merge
from jaxprune.methods import Method
from jaxprune.models import Pretrained, save_classifier
from jaxprune.peft import save_peft
from jaxprune.prune import extract
from jaxprune.sites import Site
from jaxprune.train import TrainState

# What the PEFT LoRA format cannot express.
_NO_LORA = ("full", "bitfit", "houlsby", "pfeiffer")
_SPENT = {
    "train": "training", "compile": "compiling", "allocate": "allocating", "prune": "pruning", "eval": "evaluating",
    "save": "saving",
}  # fmt: skip
# What is saved beside the summary, as the last lines name it, and what it is good for.
_SAVED = {
    "adapter": ("adapter/, ", ", or load {}/adapter with PeftModel.from_pretrained or jp.load_peft"),
    "model": ("model/, ", "; {}/model is the smaller model, without the masked channels: give it to --model"),
    "": ("", ""),
}


class Finished(NamedTuple):
    """A run after its last step.

    Attributes:
      initial: a copy of the adapters at the start, where they were taken out of the kernels.
      kept: what a resumed run must know, from the start of the run.
    """

    config: GlueConfig
    folder: Folder
    task: Task
    model: Pretrained
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
    folder, plan, events = run.folder, run.kept["plan"], run.pruner.events
    ranks = final_ranks(run.state.masks, run.sites) if plan else run.kept["ranks"]
    summary = {
        "method": run.config.method, "model": run.config.model, "task": run.task.name, "seed": run.config.seed,
        "metric": run.task.metric, "score": run.recorder.last[run.task.metric], "best_score": run.recorder.best,
        "metrics": run.recorder.last, "adapter_params": trained(run.state.adapters, run.state.masks),
        "head_params": trained(run.state.adapters, run.state.masks, head=True),
        "budget": plan["budget"] if plan else None, "ranks": ranks,
        "layers_adapted": len({site.layer for site in run.sites if ranks[site.path]}) if plan else None,
        "steps": int(run.state.step), "events": events,
    }  # fmt: skip
    if plan and plan["gap"] is not None:
        summary["allocation"] = plan
    if events:
        summary |= {"adapter_params_at_start": run.kept["adapter_params"], "ranks_at_start": run.kept["ranks"]}
        title = f"{run.config.method} on {run.task.name}"
        report.plot_pruning(
            run.recorder.history(), events, folder.own("pruning.png"), title=title, metric=run.task.metric,
            budget=events[-1].get("budget"),
        )  # fmt: skip
        report.plot_ranks_before_after(run.kept["ranks"], ranks, run.sites, folder.own("ranks_after.png"), title=title)
    saved, sizes = _save(run)
    summary |= {**sizes, "seconds": run.clock.total(), "versions": versions(), "config": run.config.plain()}
    report.write_json(folder.own("summary.json"), summary)
    folder.own("report.html")
    report.write_page(folder.path)
    _conclude(summary, folder.path, saved)
    return summary


def trained(adapters: Adapters, masks: Masks, *, head: bool = False) -> int:
    """Count the trained parameters of the adapters, or those of the head."""
    return count({path: x for path, x in adapters.items() if path.startswith("head/") == head}, masks)


def _save(run: Finished) -> tuple[str, dict[str, int]]:
    """Save what was trained; return the name of its folder, if any, and the sizes of a model that was pruned."""
    folder, model = run.folder, run.model
    adapters, masks = run.method.seen(run.state.adapters, run.state.masks)
    if run.config.method in STAGED:
        small = extract(model.config, model.params, adapters, masks)
        params = merge(small.params, small.adapters, masks)
        save_classifier(folder.own("model"), small.config, params, tokenizer=model.folder)
        folder.complete("model")
        before, after = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (model.params, params))
        return "model", {"model_params_at_start": before, "model_params": after}
    if run.config.method in _NO_LORA:
        return "", {}
    save_peft(
        adapters, masks, folder.own("adapter"),
        torch_paths=model.torch_paths, params=model.params, base_model=run.config.model, initial=run.initial,
    )  # fmt: skip
    folder.complete("adapter")
    return "adapter", {}


def _conclude(summary: dict[str, Any], folder: Path, saved: str) -> None:
    best, seconds = f" (best {summary['best_score']:.2f})", summary["seconds"]
    metrics = {summary["metric"]: summary["score"], **summary["metrics"]}
    scores = (f"{name} {value:.2f}{best if name == summary['metric'] else ''}" for name, value in metrics.items())
    print(f"\nscore      {'; '.join(scores)}")
    events = summary["events"]
    if "model_params" in summary:
        kept = (f"{kind} {100 * part['kept'] / part['of']:.0f} %" for kind, part in events[-1]["channels"].items())
        print(
            f"pruned     the model from {summary['model_params_at_start']:,} to {summary['model_params']:,} parameters; "
            f"channels kept: {', '.join(kept)}"
        )
    elif events:
        compactions, plural = sum(event["compacted"] for event in events), "" if len(events) == 1 else "s"
        print(
            f"pruned     {summary['adapter_params_at_start']:,} to {summary['adapter_params']:,} adapter parameters in "
            f"{len(events)} event{plural}, {compactions} of them compacted"
        )
    spent = ", ".join(f"{said} {seconds[name]:.1f}" for name, said in _SPENT.items() if seconds[name] >= 0.05)
    made, use = _SAVED[saved]
    print(
        f"time       {seconds['total']:.1f} s: {spent}\n"
        f"files      {folder}/: report.html, summary.json, metrics.jsonl, checkpoints/, {made}pictures\n"
        f"next       open {folder}/report.html{use.format(folder)}"
    )
