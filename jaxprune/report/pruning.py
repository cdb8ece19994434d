"""The picture of pruning over time: adapter parameters that are left, the score, and when something was pruned."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxprune.errors import UsageError, shown
from jaxprune.inputs import check_budget
from jaxprune.report.figure import new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion of Okabe and Ito, told apart with any colour vision; events differ by stroke as well.
_PARAMS, _SCORE, _MASKED, _COMPACTED = "#0072b2", "#d55e00", "#a6a6a6", "#404040"


def plot_pruning(
    history: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str = "Pruning",
    metric: str,
    budget: int | None = None,
) -> None:
    """Draw live adapter parameters and the score over optimiser steps as a PNG (Figure 3 of DPLoRA).

    Args:
      history: evaluations, each with `step` and the score under the name `metric`; entries without that name are passed
        over, so the lines of `metrics.jsonl` will do. Entries that differ in `split` become series of their own.
      events: pruning events, each with `step`, `params_before` and `params_after` (numbers of adapter parameters) and
        optionally `compacted` (whether shapes shrank too).
      path: file to write.
      title: the title.
      metric: name of the score.
      budget: number of adapter parameters the run was to come down to.

    Raises:
      UsageError: an event or an evaluation lacks one of its keys, or the file cannot be written.
    """
    write_figure(path, draw_pruning(history, events, title=title, metric=metric, budget=budget))


def draw_pruning(
    history: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    *,
    title: str,
    metric: str,
    budget: int | None = None,
) -> Figure:
    """Return the figure that `plot_pruning` writes."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for name, entries in ("history", history), ("events", events):
        if not isinstance(entries, Sequence) or not all(isinstance(entry, Mapping) for entry in entries):
            raise UsageError(f"{name} {shown(entries)} cannot be used: expected a list of dicts")
    budget = None if budget is None else check_budget(budget)
    history = [entry for entry in history if _is_number(entry.get(metric))]
    for name, entries, keys in ("evaluation", history, ["step"]), ("event", events, ["step", *_COUNTS]):
        for entry, key in itertools.product(entries, keys):
            if not _is_number(entry.get(key)):
                raise UsageError(f"{name} {shown(dict(entry))} has no number {key!r}; expected {', '.join(keys)}")
    events = sorted(events, key=lambda event: event["step"])
    end = max([1, *(entry["step"] for entry in [*history, *events])])

    figure = new_figure((7.2, 4.2))
    left = figure.add_subplot()
    left.set_xlim(0, 1.015 * end)
    left.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    left.set_xlabel("optimiser step")
    drawn = []
    if events:
        drawn += _draw_params(left, events, end, budget)
        drawn += _draw_events(left, events)
        left.yaxis.set_major_formatter(EngFormatter(sep=""))
        left.set_ylabel("adapter parameters", color=_PARAMS)
        left.tick_params(axis="y", colors=_PARAMS)
    else:
        left.yaxis.set_visible(False)
        left.spines["left"].set_visible(False)
    if history:
        right = left.twinx()
        drawn += _draw_scores(right, history, metric)
    if not (events and history):
        missing = [name for name, some in (("pruning events", events), ("evaluations", history)) if not some]
        left.set_title(f"no {' and no '.join(missing)}", fontsize=9)
    left.spines["top"].set_visible(False)
    figure.suptitle(title, fontsize=11, wrap=True)
    if drawn:
        columns = len(drawn) if len(drawn) < 4 else math.ceil(len(drawn) / 2)
        figure.legend(handles=drawn, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
    return figure


_COUNTS = ("params_before", "params_after")


def _draw_params(axes: Axes, events: Sequence[Mapping[str, Any]], end: float, budget: int | None) -> list[Any]:
    steps = [0, *(event["step"] for event in events), end]
    counts = [events[0]["params_before"], *(event["params_after"] for event in events), events[-1]["params_after"]]
    drawn = axes.plot(
        steps, counts, drawstyle="steps-post", color=_PARAMS, lw=1.8, label="adapter parameters", zorder=3
    )
    if budget and budget < 20 * max(*counts, 1):  # one far above would press the curve flat
        drawn.append(axes.axhline(budget, color=_PARAMS, lw=1.1, ls=(0, (1, 1.6)), label=f"budget of {budget:,}"))
        counts.append(budget)
    axes.set_ylim(0, 1.08 * max(*counts, 1))
    return drawn


def _draw_events(axes: Axes, events: Sequence[Mapping[str, Any]]) -> list[Any]:
    drawn = []
    # Many lines are drawn thinner, so that they do not become a wall.
    thin = min(1.0, max(0.35, 40 / len(events)))
    for compacted, colour, what in (False, _MASKED, "masked"), (True, _COMPACTED, "compacted"):
        steps = [event["step"] for event in events if bool(event.get("compacted")) is compacted]
        if not steps:
            continue
        label = f"{len(steps)} pruning event{'s' * (len(steps) > 1)}, {what}"
        lines = axes.vlines(
            steps, 0, 1, transform=axes.get_xaxis_transform(), colors=colour, linestyles="--" if compacted else "-",
            lw=thin * (1.2 if compacted else 0.9), label=label, zorder=2 if compacted else 1,
        )  # fmt: skip
        drawn.append(lines)
    return drawn


def _draw_scores(axes: Axes, history: Sequence[Mapping[str, Any]], metric: str) -> list[Any]:
    series: dict[Any, list[tuple[float, float]]] = {}
    for entry in history:
        series.setdefault(entry.get("split"), []).append((entry["step"], entry[metric]))
    drawn = []
    for marker, (split, points) in zip(itertools.cycle("os^D"), series.items(), strict=False):
        label = f"{metric}, {split}" if len(series) > 1 else f"validation {metric}"
        size = 5 if len(points) <= 40 else 3
        drawn += axes.plot(
            *zip(*sorted(points), strict=True), color=_SCORE, marker=marker, ms=size, mec="white", mew=0.6, lw=0.9, label=label
        )  # fmt: skip
    axes.margins(y=0.12)
    axes.set_ylabel(f"validation {metric}", color=_SCORE)
    axes.tick_params(axis="y", colors=_SCORE)
    axes.spines[["top", "left"]].set_visible(False)
    return drawn


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False
