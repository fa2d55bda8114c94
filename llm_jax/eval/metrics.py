"""Numbers from predictions: confusion matrix, accuracy, precision, recall, F1, perplexity. Plain numpy.

Everything about classes is computed from one confusion matrix [C, C], rows = true class, columns =
predicted class, so matrices of several batches or hosts can be added first. C: classes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """Per-class scores, float64 [C] in [0, 1], and support int64 [C] (examples whose true class it is).

    precision: of the predictions of a class, the part that is right. recall: of the examples of a class,
    the part that was found. f1: their harmonic mean. A score whose denominator is zero is 0.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> np.ndarray:
    """Counts, int64 [C, C]: entry [i, j] = examples of class i predicted as j.

    labels, predictions: integers of the same shape, in [0, num_classes). Raises ValueError otherwise.
    """
    labels, predictions = (
        _classes("labels", labels, num_classes),
        _classes("predictions", predictions, num_classes),
    )
    if labels.shape != predictions.shape:
        raise ValueError(
            f"predictions has shape {predictions.shape}: expected {labels.shape}, the shape of labels"
        )
    pairs = labels.ravel() * num_classes + predictions.ravel()
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(matrix: np.ndarray) -> float:
    """The part of all examples that is predicted rightly, in [0, 1]."""
    if not matrix.sum():
        raise ValueError("matrix counts no example: accuracy needs at least one")
    return float(np.trace(matrix) / matrix.sum())


def class_scores(matrix: np.ndarray) -> ClassScores:
    """Precision, recall, F1 and support of every class of a confusion matrix [C, C]."""
    right = np.diagonal(matrix)
    predicted, support = matrix.sum(axis=0), matrix.sum(axis=1)
    return ClassScores(
        precision=_ratio(right, predicted),
        recall=_ratio(right, support),
        f1=_ratio(2 * right, predicted + support),
        support=support,
    )


def macro_f1(matrix: np.ndarray) -> float:
    """Unweighted mean of F1 over the classes that occur among the labels or the predictions."""
    occurs = matrix.sum(axis=0) + matrix.sum(axis=1) > 0
    if not occurs.any():
        raise ValueError("matrix counts no example: macro-F1 needs at least one")
    return float(class_scores(matrix).f1[occurs].mean())


def classification_report(
    labels: ArrayLike, predictions: ArrayLike, names: Sequence[str]
) -> dict[str, Any]:
    """All of the above, JSON-ready: accuracy, macro_f1, classes {name: scores}, confusion (rows = true).

    names: one per class, in the order of the class ids.
    """
    matrix = confusion_matrix(labels, predictions, len(names))
    scores = class_scores(matrix)
    return {
        "accuracy": accuracy(matrix),
        "macro_f1": macro_f1(matrix),
        "classes": {
            name: {
                "precision": float(scores.precision[i]),
                "recall": float(scores.recall[i]),
                "f1": float(scores.f1[i]),
                "support": int(scores.support[i]),
            }
            for i, name in enumerate(names)
        },
        "confusion": matrix.tolist(),
    }


def calibration_error(labels: ArrayLike, probs: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): how far confidence is from accuracy, in [0, 1].

    labels [n] integers, probs [n, C]. Examples are grouped by the probability of their likeliest class
    into `bins` of equal width (a border belongs to the bin below); the distance between a bin's mean
    probability and its share of right answers counts by the bin's size.
    """
    labels = _classes("labels", labels, probs.shape[1])
    if not len(labels) or labels.shape != probs.shape[:1]:
        raise ValueError(f"labels of shape {labels.shape}: expected one for each of {len(probs)} rows")
    confidence = probs.max(axis=1).astype(np.float64)
    right = probs.argmax(axis=1) == labels
    group = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(group, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def perplexity(nll_sum: float, count: int) -> float:
    """exp(nll_sum / count): nll_sum is the negative log likelihood (nats) summed over `count` tokens."""
    if count <= 0:
        raise ValueError(f"count={count}: expected the positive number of tokens that nll_sum covers")
    return math.exp(nll_sum / count)


def _classes(name: str, values: ArrayLike, num_classes: int) -> np.ndarray:
    """`values` as int64, checked to be integers in [0, num_classes)."""
    values = np.asarray(values)
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} has dtype {values.dtype}: expected integer class ids")
    if values.size and not (0 <= values.min() and values.max() < num_classes):
        raise ValueError(f"{name} spans {values.min()}..{values.max()}: expected 0..{num_classes - 1}")
    return values.astype(np.int64)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole as float64, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(whole.shape), where=whole > 0)
