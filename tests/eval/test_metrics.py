"""Classification scores and perplexity against values worked out by hand."""

import json
import math
import random

import numpy as np
import pytest

from llm_jax.eval.metrics import (
    accuracy,
    calibration_error,
    class_scores,
    classification_report,
    confusion_matrix,
    macro_f1,
    perplexity,
)

LABELS = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
PREDICTIONS = [0, 0, 1, 2, 1, 1, 0, 2, 2, 2]
MATRIX = np.array([[2, 1, 1], [1, 2, 0], [0, 0, 3]])


def test_confusion_matrix_rows_are_true_classes():
    np.testing.assert_array_equal(confusion_matrix(LABELS, PREDICTIONS, 3), MATRIX)


def test_scores_by_hand():
    scores = class_scores(MATRIX)
    np.testing.assert_allclose(scores.precision, [2 / 3, 2 / 3, 3 / 4])
    np.testing.assert_allclose(scores.recall, [2 / 4, 2 / 3, 3 / 3])
    np.testing.assert_allclose(scores.f1, [4 / 7, 2 / 3, 6 / 7])  # 2 tp / (predicted + true)
    np.testing.assert_array_equal(scores.support, [4, 3, 3])
    assert accuracy(MATRIX) == 0.7
    assert macro_f1(MATRIX) == pytest.approx((4 / 7 + 2 / 3 + 6 / 7) / 3)


def test_f1_is_the_harmonic_mean_on_random_matrices():
    matrix = np.random.default_rng(0).integers(1, 50, (5, 5))
    scores = class_scores(matrix)
    harmonic = 2 / (1 / scores.precision + 1 / scores.recall)
    np.testing.assert_allclose(scores.f1, harmonic)


def test_scores_without_denominator_are_zero():
    """Class 1 is never predicted; class 2 neither occurs nor is predicted, so macro-F1 leaves it out."""
    matrix = confusion_matrix([0, 0, 1], [0, 0, 0], 3)
    scores = class_scores(matrix)
    np.testing.assert_allclose(scores.precision, [2 / 3, 0, 0])
    np.testing.assert_allclose(scores.recall, [1, 0, 0])
    np.testing.assert_allclose(scores.f1, [4 / 5, 0, 0])
    assert macro_f1(matrix) == pytest.approx(2 / 5)


def test_matrices_of_batches_add_up():
    rng = random.Random(1)
    labels = [rng.randrange(4) for _ in range(100)]
    predictions = [rng.randrange(4) for _ in range(100)]
    halves = [confusion_matrix(labels[s], predictions[s], 4) for s in (slice(50), slice(50, 100))]
    np.testing.assert_array_equal(sum(halves), confusion_matrix(labels, predictions, 4))


def test_classification_report_is_json_and_agrees():
    report = json.loads(json.dumps(classification_report(LABELS, PREDICTIONS, ["积极", "消极", "中性"])))
    assert report["accuracy"] == 0.7
    assert report["confusion"] == MATRIX.tolist()
    assert report["classes"]["积极"] == {
        "precision": pytest.approx(2 / 3),
        "recall": 0.5,
        "f1": pytest.approx(4 / 7),
        "support": 4,
    }


def test_calibration_error_by_hand():
    # Bins of a tenth: 0.55 is wrong, of 0.65 and 0.7 in one bin the first is right, and so is 1.0.
    best = np.array([0.55, 0.65, 0.7, 1.0])
    probs = np.stack([best, 1.0 - best], axis=1)
    expected = (0.55 + abs(0.65 + 0.7 - 1.0) + 0.0) / 4
    assert calibration_error([1, 0, 1, 0], probs, bins=10) == pytest.approx(expected)


def test_a_calibrated_guess_has_no_calibration_error():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([1.0, 1.0, 1.0], 200_000)
    labels = (rng.random((len(probs), 1)) > probs.cumsum(axis=1)).sum(axis=1)
    assert calibration_error(labels, probs) < 0.005
    squared = probs**2 / (probs**2).sum(axis=1, keepdims=True)  # the same guesses, too sure
    assert calibration_error(labels, squared) > 0.05
    with pytest.raises(ValueError, match="one for each of 3"):
        calibration_error([0, 1], probs[:3])


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    assert perplexity(20 * math.log(512), 20) == pytest.approx(512)
    assert perplexity(0.0, 3) == 1.0


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 3], [0, 1], "labels spans 0..3: expected 0..2"),
        ([0, 1], [-1, 1], "predictions spans -1..1"),
        ([0, 1], [0, 1, 2], "predictions has shape"),
        ([0, 1], [0.5, 0.5], "predictions has dtype float64"),
    ],
)
def test_bad_classes_are_refused(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(labels, predictions, 3)


def test_nothing_to_score_is_refused():
    empty = confusion_matrix([], [], 3)
    for score in (accuracy, macro_f1):
        with pytest.raises(ValueError, match="at least one"):
            score(empty)
    with pytest.raises(ValueError, match="count=0"):
        perplexity(1.0, 0)
