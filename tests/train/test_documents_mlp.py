"""The literal example against float64 numpy: gradient, optimizer, training, statistics, text."""

import dataclasses
import functools
import json
import re
import runpy
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import image

from llm_jax.config import from_dict
from llm_jax.train import documents_mlp as study

CONFIG_FILE = Path(__file__).resolve().parents[2] / "configs" / "documents_mlp.py"
X = np.arange(1.0, 8.0)
Y = np.array([1.0, 0.0, 0.0])


def config(**changes) -> study.DocumentsMLPConfig:
    values = dict(runpy.run_path(str(CONFIG_FILE))["get_config"]())
    assert values.pop("task") == "documents_mlp"
    return from_dict(study.DocumentsMLPConfig, values | changes)


@functools.cache
def seed_weights(seed: int, count: int = 8):
    return tuple(w[seed] for w in study.init_weights(config(num_seeds=count)))


def float64(tree):
    return [np.asarray(leaf, np.float64) for leaf in tree]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def numpy_loss(weights) -> float:
    first, second = weights
    return float(np.mean((sigmoid(second @ sigmoid(first @ X)) - Y) ** 2))


def numpy_gradient(weights):
    """Backpropagation by hand: dL/dp = 2 (p - y) / 3, then one factor a (1 - a) per sigmoid."""
    first, second = weights
    hidden = sigmoid(first @ X)
    p = sigmoid(second @ hidden)
    at_output = 2 / 3 * (p - Y) * p * (1 - p)
    at_hidden = second.T @ at_output * hidden * (1 - hidden)
    return [np.outer(at_hidden, X), np.outer(at_output, hidden)]


class KerasAdam:
    """The update of Keras' documentation in float64: epsilon beside the root of the uncorrected v."""

    def __init__(self, weights):
        self.m = [np.zeros_like(w) for w in weights]
        self.v = [np.zeros_like(w) for w in weights]
        self.t = 0

    def update(self, weights, grads, lr=1e-3, b1=0.9, b2=0.999, eps=1e-7):
        self.t += 1
        alpha = lr * np.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        self.m = [m + (g - m) * (1 - b1) for m, g in zip(self.m, grads, strict=True)]
        self.v = [v + (g * g - v) * (1 - b2) for v, g in zip(self.v, grads, strict=True)]
        moments = zip(weights, self.m, self.v, strict=True)
        return [w - alpha * m / (np.sqrt(v) + eps) for w, m, v in moments]


def test_weights_are_standard_normal_and_a_seed_keeps_its_draw():
    many, few = (study.init_weights(config(num_seeds=n)) for n in (2000, 3))
    assert [w.shape for w in many] == [(2000, 10, 7), (2000, 3, 10)]
    for w, part in zip(many, few, strict=True):
        assert abs(float(w.mean())) < 0.02 and abs(float(w.std()) - 1) < 0.02  # 60,000 draws or more
        np.testing.assert_array_equal(w[:3], part)
    other = study.init_weights(config(num_seeds=3, seed=1))
    assert not np.array_equal(other[0], few[0])


@pytest.mark.parametrize("seed", range(4))
def test_gradient_is_hand_backpropagation_and_finite_differences(seed):
    weights = seed_weights(seed)
    ours = jax.jit(study.gradient)(weights, jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32))
    by_hand = numpy_gradient(float64(weights))
    for mine, hand in zip(float64(ours), by_hand, strict=True):
        np.testing.assert_allclose(mine, hand, rtol=2e-4, atol=1e-7)  # float32 sigmoid near saturation
    for layer, index in ((0, (2, 3)), (0, (9, 6)), (1, (0, 4)), (1, (2, 9))):
        ends = []
        for shift in (1e-5, -1e-5):
            moved = float64(weights)
            moved[layer][index] += shift
            ends.append(numpy_loss(moved))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(by_hand[layer][index], rel=1e-5, abs=1e-10)


def test_delta_rule_is_not_the_gradient_but_that_of_the_binary_cross_entropy():
    weights = seed_weights(1)
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)

    def cross_entropy(w):
        z = study.logits(w, x)
        return optax.sigmoid_binary_cross_entropy(z, y).sum()

    rule = study.delta_rule(weights, x, y)
    for a, b in zip(rule, jax.grad(cross_entropy)(weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    trees = (float64(rule), numpy_gradient(float64(weights)))
    flat = [np.concatenate([g.ravel() for g in tree]) for tree in trees]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert cosine < 0.999


def test_keras_adam_is_the_formula_and_not_optax_adam():
    """Gradients down to 1e-7, the size of epsilon, where the two placements of it part."""
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.integers(-7, 1, (5, 4))
    grads = rng.normal(size=(50, 5, 4)) * scale
    reference, expected = KerasAdam([scale]), [np.zeros((5, 4))]
    ours, theirs = jnp.zeros((5, 4)), jnp.zeros((5, 4))
    adam, algorithm1 = study.keras_adam(1e-3, 0.9, 0.999, 1e-7), optax.adam(1e-3, 0.9, 0.999, 1e-7)
    state, other = adam.init(ours), algorithm1.init(theirs)
    for g in grads:
        expected = reference.update(expected, [g])
        g = jnp.asarray(g, jnp.float32)
        updates, state = adam.update(g, state)
        ours = optax.apply_updates(ours, updates)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
            updates, other = algorithm1.update(g, other)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours, expected[0], rtol=2e-3, atol=1e-7)  # float32 of 1 - 0.999**t
    large = scale > 1e-3
    np.testing.assert_allclose(theirs[large], ours[large], rtol=2e-3, atol=1e-7)
    assert np.max(np.abs(theirs - ours)[scale < 1e-6]) > 1e-3


def test_training_is_the_float64_run():
    weights = seed_weights(2)
    losses, trained = study.train(weights, config(num_steps=300), study.gradient)
    reference = float64(weights)
    adam, expected = KerasAdam(reference), []
    for _ in range(300):
        expected.append(numpy_loss(reference))
        reference = adam.update(reference, numpy_gradient(reference))
    expected.append(numpy_loss(reference))
    assert losses.shape == (301,)
    np.testing.assert_allclose(losses, expected, rtol=5e-3)  # float32 against float64 over 300 updates
    np.testing.assert_allclose(trained[1], reference[1], atol=2e-3)


def test_many_seeds_at_once_are_the_single_runs():
    settings = config(num_seeds=6, num_steps=200)
    initial = study.init_weights(settings)
    losses, predictions = study.train_seeds(initial, settings, study.gradient)
    assert losses.shape == (6, 3) and predictions.shape == (6, 3)
    for seed in (0, 5):
        alone = tuple(w[seed] for w in initial)
        single, trained = study.train(alone, settings, study.gradient)
        np.testing.assert_allclose(losses[seed], single[::100], rtol=1e-3)
        output = jax.nn.sigmoid(study.logits(trained, jnp.asarray(X, jnp.float32)))
        np.testing.assert_allclose(predictions[seed], output, rtol=1e-3, atol=1e-6)


def test_percentiles_are_those_of_sorted_losses():
    curves = np.random.default_rng(0).uniform(0.0, 0.5, (101, 3))
    first, middle, last = study.compare(curves, [0, 50, 1000], nearest=7)
    order = np.sort(curves[:, 0])
    assert (first.p5, first.p25, first.p50, first.p75, first.p95) == pytest.approx(
        (order[5], order[25], order[50], order[75], order[95])
    )
    assert first.percentile == pytest.approx(100 * np.searchsorted(order, 0.248068) / 101)
    assert first.nearest == curves[7, 0]
    assert (middle.documents, middle.percentile) == (None, None)
    assert last.documents == 0.001552


def test_nearest_seed_is_found_at_its_distance():
    documents = np.array([list(study.DOCUMENTS_LOSSES.values())])
    curves = documents * np.exp(np.array([[0.9], [-0.1], [0.5], [0.35]]))
    seed, distance, percentile = study.nearest_seed(curves, list(study.DOCUMENTS_LOSSES))
    assert (seed, percentile) == (1, 0.0)
    assert distance == pytest.approx(0.1)
    seed, distance, percentile = study.nearest_seed(curves[[0, 2, 3]], list(study.DOCUMENTS_LOSSES))
    assert (seed, percentile) == (2, pytest.approx(200 / 3))  # neighbours: 0.4, 0.15, 0.15 against 0.35
    assert distance == pytest.approx(0.35)


def test_printed_row_implies_another_loss():
    """In exact fractions: no rounding of the six printed digits leads from 0.000620 to 0.001552."""
    row = [Fraction(text) for text in study.DOCUMENTS_ROW]
    half = Fraction(1, 2_000_000)
    off = [abs(p - y) for p, y in zip(row, (1, 0, 0), strict=True)]
    implied = sum(d**2 for d in off) / 3
    report = study.row_report(np.array([[0.9, 0.2, 0.2], [0.7, 0.29, 1e-5]]))
    assert report.losses["mean squared error"] == pytest.approx(float(implied), rel=1e-12)
    assert round(float(implied), 6) == 0.000620
    largest = ((off[0] + half) ** 2 + (off[1] + half) ** 2 + Fraction(5, 100_000) ** 2) / 3
    assert float(largest) < 0.00062
    assert min(abs(v - study.DOCUMENTS_TEST_LOSS) for v in report.losses.values()) > 3e-4
    assert report.sum == float(sum(row[:2])) == 1.0
    assert report.closest_sum_error == pytest.approx(0.01)
    assert report.seeds_with_last_below == 1


def test_usual_losses_of_a_row():
    losses = study.row_losses([0.5, 0.25, 0.25], [1, 0, 0])
    assert losses == {
        "mean squared error": pytest.approx(0.125),
        "summed squared error": pytest.approx(0.375),
        "half the summed squared error": pytest.approx(0.1875),
        "cross entropy": pytest.approx(np.log(2)),
        "mean binary cross entropy": pytest.approx((np.log(2) + 2 * np.log(4 / 3)) / 3),
    }


def test_last_stretch():
    curves = np.array([[4.0, 2.0, 0.2], [4.0, 2.0, 1.0], [4.0, 2.0, 1.8], [8.0, 1.0, 0.3]])
    stretch = study.last_stretch(curves, [800, 900, 1000])
    assert stretch.ratio == pytest.approx(0.3118, abs=1e-4)
    assert stretch.previous_ratio == pytest.approx(0.6232, abs=1e-4)
    assert stretch.extrapolated == pytest.approx(0.003102, abs=1e-6)
    assert (stretch.percentile, stretch.abrupt_seeds) == (
        50.0,
        1,
    )  # 0.1, 0.3; then 0.1 / 0.5
    assert study.last_stretch(curves, [700, 900, 1000]) is None


def test_documents_format():
    assert study.step_line(900, 0.004977) == "Step 900: Loss = 0.004977"
    assert study.predicted_line((0.969514, 0.030486, 0.0)) == "Predicted: [[0.969514 0.030486 0.000000]]"


def test_run_reports_and_writes(tmp_path):
    lines = []
    result = study.run(config(num_seeds=20), tmp_path, out=lines.append)
    text = "\n".join(lines)
    number = r"\d\.\d{6}"
    for step, loss in study.DOCUMENTS_LOSSES.items():
        row = rf"^Step {step}: Loss = {loss:.6f} +Step {step}: Loss = {number} +[\d.]+%$"
        assert re.search(row, text, re.M)
    assert "Predicted: [[0.969514 0.030486 0.0000]]" in text
    assert re.search(r"^Test Loss: 0.001552 +Test Loss: \d\.\d{6} +[\d.]+%$", text, re.M)
    assert "0.000620, not 0.001552" in text
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [dataclasses.asdict(step) for step in result.steps]
    assert [line["step"] for line in written] == list(range(0, 1001, 100))
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    assert image.imread(result.plot).std() > 0.05
    assert result.plot == str(tmp_path / "plots" / "documents_mlp.png")
    first, second = result.rules
    assert (first.rule, second.rule) == ("gradient", "delta rule")
    assert first.cosine == pytest.approx(1, abs=1e-6) and second.cosine < 0.9999


def test_a_study_of_other_steps_reports_what_it_can(tmp_path):
    lines = []
    result = study.run(config(num_seeds=5, num_steps=150, log_every=50), tmp_path, out=lines.append)
    assert [step.documents for step in result.steps] == [0.248068, None, 0.122334, None]
    assert result.last_stretch is None
    assert any("Step 50: Loss" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_seeds": 0}, "num_seeds=0: expected a positive integer"),
        ({"num_seeds": 1}, "num_seeds=1: expected two or more"),
        ({"log_every": 300}, "num_steps=1000: expected a multiple of log_every=300"),
        ({"layer_sizes": (6, 10, 3)}, r"layer_sizes=\(6, 10, 3\): expected to begin with 7"),
        ({"layer_sizes": (7,)}, r"layer_sizes=\(7,\): expected inputs"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
