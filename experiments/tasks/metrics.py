"""The figures that GLUE reports, in percent."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from jaxprune.errors import UsageError


class Scored(Protocol):
    """What the figures must know of a task."""

    @property
    def name(self) -> str: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    @property
    def num_labels(self) -> int: ...
    @property
    def regression(self) -> bool: ...


def compute(task: Scored, predictions, labels) -> dict[str, float]:
    """Compute every metric of a task, in percent; the first one is the score.

    Where a figure is undefined it is 0, without a warning: Matthews when predictions or labels are all of one class,
    Pearson and Spearman when either side is constant, F1 without any true positive.

    Args:
        task: what they are figures of.
        predictions: classes `(n,)` or logits `(n, num_labels)`; for regression values `(n,)` or `(n, 1)`.
        labels: `(n,)`.

    Raises:
        UsageError: predictions and labels do not match, are empty or hold a value that is not finite.

    Returns:
        metric name -> percent.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape not in ((len(labels),), (len(labels), task.num_labels)) or not len(labels):
        raise UsageError(
            f"{task.name}: predictions of shape {predictions.shape} for labels of shape {labels.shape}; "
            f"expected (n,) or (n, {task.num_labels}) for n >= 1 labels"
        )
    if not np.isfinite(predictions).all():
        raise UsageError(f"{task.name}: predictions are not finite; training diverged, try a smaller learning rate")
    if predictions.ndim == 2:
        predictions = predictions[:, 0] if task.regression else predictions.argmax(1)
    return {name: 100.0 * _METRICS[name](predictions, labels) for name in task.metrics}


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))  # pyright: ignore[reportArgumentType]


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return 0.0 if _constant(predictions, labels) else float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr

    # float64: in float32 the deviations of nearly equal predictions cancel.
    x, y = predictions.astype(float), labels.astype(float)
    return 0.0 if _constant(x, y) else float(pearsonr(x, y).statistic)  # pyright: ignore


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return 0.0 if _constant(predictions, labels) else float(spearmanr(predictions, labels).statistic)  # pyright: ignore


def _constant(*arrays: np.ndarray) -> bool:
    return any(np.ptp(x) == 0 for x in arrays)


_METRICS = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman}
