import math

import numpy as np
import pytest
from matplotlib.image import imread

from jaxprune.errors import UsageError
from jaxprune.report import plot_pruning
from jaxprune.report.pruning import draw_pruning

EVENTS = [
    {"step": 10, "params_before": 1_300_000, "params_after": 900_000, "compacted": False},
    {"step": 20, "params_before": 900_000, "params_after": 700_000, "compacted": True, "solver": "HIGHS"},
    {"step": 30, "params_before": 700_000, "params_after": 650_000},
]
HISTORY = [{"step": 15, "accuracy": 60.0}, {"step": 40, "accuracy": 71.5}]


def draw(history, events, **kwargs):
    return draw_pruning(history, events, title="DPLoRA on RTE", metric="accuracy", **kwargs)


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def event_steps(axes):
    return [[segment[0, 0] for segment in lines.get_segments()] for lines in axes.collections]


def test_parameters_fall_at_the_events_and_scores_stand_at_their_steps():
    left, right = draw(HISTORY, EVENTS, budget=650_000).axes
    params, budget = left.lines
    assert params.get_drawstyle() == "steps-post"
    # A post step holds its value until the next one: before 10 it is what the first event found.
    x, y = params.get_data()
    held = {step: y[np.searchsorted(x, step, side="right") - 1] for step in (0, 9, 10, 19, 20, 29, 30, 39)}
    assert held == {
        0: 1_300_000, 9: 1_300_000, 10: 900_000, 19: 900_000, 20: 700_000, 29: 700_000, 30: 650_000, 39: 650_000
    }  # fmt: skip
    assert x[-1] == 40 and set(budget.get_ydata()) == {650_000}
    assert left.get_ylim()[0] == 0 and left.get_ylim()[1] > 1_300_000
    (score,) = right.lines
    assert [list(values) for values in score.get_data()] == [[15, 40], [60.0, 71.5]]
    assert score.get_marker() != "None"


def test_events_are_marked_by_kind_and_named():
    figure = draw(HISTORY, EVENTS, budget=650_000)
    left = figure.axes[0]
    assert event_steps(left) == [[10, 30], [20]]
    masked, compacted = left.collections
    assert masked.get_linestyle() != compacted.get_linestyle()
    assert not np.array_equal(masked.get_color(), compacted.get_color())
    assert set(legend(figure)) == {
        "adapter parameters", "budget of 650,000", "2 pruning events, masked", "1 pruning event, compacted",
        "validation accuracy",
    }  # fmt: skip


def test_thousands_and_millions_are_short():
    figure = draw(HISTORY, EVENTS)
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"0", "200k", "1.2M"} <= set(labels)


@pytest.mark.parametrize("events", [0, 1, 150])
@pytest.mark.parametrize("evaluations", [0, 1, 60])
def test_nothing_overlaps_or_leaves_the_picture(tmp_path, drawn, events, evaluations):
    log = [
        {"step": 7 * i, "params_before": 2_000_000 - 9_000 * i, "params_after": 1_991_000 - 9_000 * i, "compacted": i % 9 == 0}
        for i in range(1, events + 1)
    ]  # fmt: skip
    history = [{"step": 20 * i, "accuracy": 50 + math.sqrt(i)} for i in range(1, evaluations + 1)]
    title = "DPLoRA on stsb, sentence-transformers/all-MiniLM-L6-v2, seed 42, a title longer than the picture is wide"
    plot_pruning(history, log, tmp_path / "pruning.png", title=title, metric="accuracy", budget=700_000)
    figure = drawn[0]
    assert imread(tmp_path / "pruning.png").shape[:2] == (figure.bbox.height, figure.bbox.width)
    left = figure.axes[0]
    texts = [left.title, left.xaxis.label, *(figure.legends[0].get_texts() if figure.legends else []), *figure.texts]
    shown = [axes for axes in figure.axes if axes.yaxis.get_visible()]
    assert len(shown) == (events > 0) + (evaluations > 0)
    texts += [label for axes in shown for label in (axes.yaxis.label, *axes.get_yticklabels())]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes)
    own = left.get_window_extent()
    for text in (left.xaxis.label, *figure.texts, *(figure.legends[0].get_texts() if figure.legends else [])):
        assert not own.overlaps(text.get_window_extent()), text
    missing = [name for name, count in (("pruning events", events), ("evaluations", evaluations)) if not count]
    assert left.get_title() == (f"no {' and no '.join(missing)}" if missing else "")
    assert sum(map(len, event_steps(left))) == events


def test_training_lines_and_lost_scores_are_passed_over_and_splits_kept_apart():
    lines = [
        {"step": 5, "loss": 0.7},
        {"step": 10, "split": "matched", "accuracy": 60.0},
        {"step": 10, "split": "mismatched", "accuracy": 61.0},
        {"step": 20, "split": "matched", "accuracy": None},
        {"step": 20, "split": "mismatched", "accuracy": 63.0},
    ]
    figure = draw(lines, [])
    scores = [list(map(list, line.get_data())) for line in figure.axes[1].lines]
    assert scores == [[[10], [60.0]], [[10, 20], [61.0, 63.0]]]
    assert legend(figure) == ["accuracy, matched", "accuracy, mismatched"]
    assert len({line.get_marker() for line in figure.axes[1].lines}) == 2


def test_events_out_of_order_are_sorted():
    params = draw([], EVENTS[::-1]).axes[0].lines[0]
    assert list(params.get_xdata()) == [0, 10, 20, 30, 30]


@pytest.mark.parametrize("key", ["step", "params_before", "params_after"])
def test_an_event_without_its_numbers_is_an_error(key):
    event = {name: value for name, value in EVENTS[0].items() if name != key}
    with pytest.raises(UsageError, match=f"event .* has no number '{key}'; expected step, params_before, params_after"):
        draw(HISTORY, [event])
