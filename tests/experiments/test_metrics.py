"""Every metric against its formula, worked out by hand."""

import warnings

import numpy as np
import pytest

from experiments.tasks import get_task
from experiments.tasks.classification import TASKS
from jaxprune.errors import UsageError

PREDICTED = np.array([1, 1, 1, 1, 0, 0, 0, 1, 0, 1])
LABELS = np.array([1, 1, 1, 0, 0, 0, 1, 0, 0, 1])
TP, TN, FP, FN = 4, 3, 2, 1


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_accuracy_and_f1():
    got = get_task("mrpc").score(PREDICTED, LABELS)
    assert got == pytest.approx({"accuracy": 70.0, "f1": 100 * 2 * TP / (2 * TP + FP + FN)})


def test_matthews():
    expected = (TP * TN - FP * FN) / np.sqrt((TP + FP) * (TP + FN) * (TN + FP) * (TN + FN))
    assert get_task("cola").score(PREDICTED, LABELS)["matthews"] == pytest.approx(100 * expected)


def test_pearson_and_spearman():
    x, y = np.array([0.1, 2.0, 3.5, 3.6, 9.0]), np.array([1.0, 2.0, 4.0, 3.0, 5.0])
    dx, dy = x - x.mean(), y - y.mean()
    got = get_task("stsb").score(x.astype(np.float32)[:, None], y.astype(np.float32))
    assert got["pearson"] == pytest.approx(100 * (dx @ dy) / np.sqrt((dx @ dx) * (dy @ dy)), rel=1e-6)
    # ranks 1 2 3 4 5 against 1 2 4 3 5: 1 - 6 * sum d^2 / (n (n^2 - 1))
    assert got["spearman"] == pytest.approx(100 * (1 - 6 * 2 / (5 * 24)))


def test_logits_are_classes():
    logits = np.eye(3)[[2, 0, 1, 1]] * 3 - 1
    assert get_task("mnli").score(logits, np.array([2, 0, 1, 0])) == {"accuracy": 75.0}


@pytest.mark.parametrize(("predicted", "labels"), [([1, 1, 1], [0, 1, 1]), ([0, 1, 0], [1] * 3), ([1] * 3, [1] * 3)])
def test_matthews_of_a_single_class_is_zero(predicted, labels):
    assert get_task("cola").score(np.array(predicted), np.array(labels))["matthews"] == 0.0


def test_constant_predictions_do_not_correlate():
    got = get_task("stsb").score(np.full(4, 2.5), np.array([1.0, 2.0, 3.0, 4.0]))
    assert got == {"pearson": 0.0, "spearman": 0.0}


def test_f1_without_a_positive_is_zero():
    assert get_task("qqp").score(np.zeros(3, int), np.array([0, 1, 0]))["f1"] == 0.0


def test_every_task_reports_its_score():
    for name, task in TASKS.items():
        classes = np.array([0.0, 1.0, 1.0, 0.0] if task.regression else [0, 1, 1, 0])
        assert get_task(name).score(classes, classes)[task.metrics[0]] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (np.zeros(3), np.zeros(4), r"shape \(3,\) for labels of shape \(4,\)"),
        (np.zeros((4, 3)), np.zeros(4), r"expected \(n,\) or \(n, 2\)"),
        (np.zeros(0), np.zeros(0), "n >= 1"),
        (np.array([0.0, np.nan]), np.zeros(2), "diverged"),
    ],
)
def test_what_cannot_be_scored(predictions, labels, message):
    with pytest.raises(UsageError, match=message):
        get_task("rte").score(predictions, labels)
