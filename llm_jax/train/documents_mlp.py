"""The documents' literal example as a measurement: a tiny network, thousands of seeds, one printed run.

The documents train a 7 -> 10 -> 3 network (weights from N(0, 1), no biases, a sigmoid after each layer)
on a single pair with mean squared error and Adam, and print a loss every 100 steps without naming a
seed. One run of ours could neither confirm nor refute theirs, so `run` trains many seeds at once (a
vmapped `lax.scan`), says where each printed loss lies in the distribution, finds the seed that comes
closest, and checks the printed figures against each other.

Letters: S seeds, I inputs, O outputs, K logged steps (the last one after training).
Weights are [out, in] arrays, first layer first; everything is float32, as in the original.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

Weights = tuple[jax.Array, ...]  # one [out, in] per layer
Rule = Callable[
    [Weights, jax.Array, jax.Array], Weights
]  # (weights, inputs [I], target [O]) -> direction

# What the documents print.
DOCUMENTS_LOSSES = {
    0: 0.248068,
    100: 0.122334,
    200: 0.079896,
    300: 0.054875,
    400: 0.037905,
    500: 0.026012,
    600: 0.017976,
    700: 0.012088,
    800: 0.007986,
    900: 0.004977,
}
DOCUMENTS_TEST_STEP, DOCUMENTS_TEST_LOSS = 1000, 0.001552
DOCUMENTS_ROW = ("0.969514", "0.030486", "0.0000")  # as printed: the third entry has four decimals
DOCUMENTS_TARGET = (1.0, 0.0, 0.0)

PERCENTILES = (5, 25, 50, 75, 95)
PROBES = 500  # seeds whose own nearest neighbour says what a usual distance is


@dataclasses.dataclass(frozen=True)
class DocumentsMLPConfig:
    """Settings of the study; configs/documents_mlp.py holds the documents' values."""

    num_seeds: int  # networks trained at once
    seed: int  # of the study: network s draws from (seed, s)
    num_steps: int
    log_every: int
    learning_rate: float
    beta1: float
    beta2: float
    eps: float  # epsilon hat: see `keras_adam`
    layer_sizes: tuple[int, ...]
    inputs: tuple[float, ...]
    target: tuple[float, ...]

    def __post_init__(self):
        for name in ("num_seeds", "num_steps", "log_every"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive integer")
        _require(self.num_seeds > 1, "num_seeds", self.num_seeds, "two or more, to have a distribution")
        _require(
            self.num_steps % self.log_every == 0,
            "num_steps",
            self.num_steps,
            f"a multiple of log_every={self.log_every}, so that the last step is logged",
        )
        _require(len(self.layer_sizes) > 1, "layer_sizes", self.layer_sizes, "inputs, ..., outputs")
        ends = (self.layer_sizes[0], self.layer_sizes[-1])
        _require(
            ends == (len(self.inputs), len(self.target)),
            "layer_sizes",
            self.layer_sizes,
            f"to begin with {len(self.inputs)} (inputs) and end with {len(self.target)} (target)",
        )


@dataclasses.dataclass(frozen=True)
class LoggedStep:
    """Losses at one logged step: the documents' value (None where they print none) among the seeds'."""

    step: int
    documents: float | None
    percentile: float | None  # percent of seeds whose loss is below the documents'
    nearest: float  # the nearest seed's loss
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float


@dataclasses.dataclass(frozen=True)
class RuleReport:
    """How well training by one backward rule reaches the documents' curve.

    distance: the nearest seed's RMS of ln(loss) - ln(documents' loss) over the steps they log.
    distance_percentile: percent of seeds that have a closer neighbour of their own than that.
    cosine: median over seeds, at the initial weights, between the rule's direction and the gradient.
    """

    rule: str
    nearest_seed: int
    distance: float
    distance_percentile: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class RowReport:
    """The documents' predicted row against their test loss and against the seeds' predictions."""

    losses: dict[str, float]  # what usual losses make of the printed row
    sum: float  # of all entries but the last, which is printed with fewer digits
    closest_sum_error: float  # min over seeds of |the same sum - 1|
    seeds_with_last_below: int  # seeds whose last output would print as 0.0000


@dataclasses.dataclass(frozen=True)
class LastStretch:
    """The documents' fall of the loss from their last logged step to the test, among the seeds'."""

    ratio: float  # documents' test loss / their last logged loss
    previous_ratio: float  # the same, one interval earlier
    extrapolated: float  # the test loss had the loss gone on falling at previous_ratio
    percentile: float  # percent of seeds that fall by more
    abrupt_seeds: int  # seeds whose ratio shrinks by as much from one interval to the next


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything the study finds; `dataclasses.asdict` of it is JSON-ready."""

    num_seeds: int
    steps: tuple[LoggedStep, ...]
    rules: tuple[RuleReport, ...]  # the gradient first
    prediction: tuple[float, ...]  # of the nearest seed after training
    row: RowReport
    last_stretch: LastStretch | None  # None if the documents' last two steps are not both logged
    metrics: str
    plot: str


def run(config: DocumentsMLPConfig, workdir: Path, *, out: Callable[[str], None]) -> Result:
    """Train every seed, compare with the documents, report through `out` (one call per line).

    Writes `workdir/metrics.jsonl` (one `LoggedStep` per line) and `workdir/plots/documents_mlp.png`.
    """
    initial = init_weights(config)
    by_rule = {name: train_seeds(initial, config, rule) for name, rule in RULES.items()}
    curves, predictions = by_rule["gradient"]
    steps = logged_steps(config)
    rules = tuple(
        _rule_report(name, losses, steps, initial, config) for name, (losses, _) in by_rule.items()
    )
    nearest = rules[0].nearest_seed
    metrics, plot = workdir / "metrics.jsonl", workdir / "plots" / "documents_mlp.png"
    result = Result(
        num_seeds=config.num_seeds,
        steps=compare(curves, steps, nearest),
        rules=rules,
        prediction=tuple(predictions[nearest].tolist()),
        row=row_report(predictions),
        last_stretch=last_stretch(curves, steps),
        metrics=str(metrics),
        plot=str(plot),
    )
    plot.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text("".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in result.steps))
    plot_band(result, plot)
    for line in report(result):
        out(line)
    return result


# The network and its training.


def init_weights(config: DocumentsMLPConfig) -> Weights:
    """Weights of every seed, each [S, out, in] from N(0, 1).

    Seed s is `numpy.random.default_rng((config.seed, s))`: the same in a larger study, and anywhere.
    """
    shapes = list(zip(config.layer_sizes[1:], config.layer_sizes[:-1], strict=True))

    def draw(seed):
        rng = np.random.default_rng((config.seed, seed))
        return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)

    layers = zip(*map(draw, range(config.num_seeds)), strict=True)
    return tuple(jnp.asarray(np.stack(layer)) for layer in layers)


def logits(weights: Weights, inputs: jax.Array) -> jax.Array:
    """What the last sigmoid receives, [O], for inputs [I]."""
    hidden = inputs
    for weight in weights[:-1]:
        hidden = jax.nn.sigmoid(weight @ hidden)
    return weights[-1] @ hidden


def mean_squared_error(weights: Weights, inputs: jax.Array, target: jax.Array) -> jax.Array:
    """The loss, a scalar: mean over outputs of (sigmoid(logits) - target) ** 2."""
    return jnp.mean((jax.nn.sigmoid(logits(weights, inputs)) - target) ** 2)


gradient: Rule = jax.grad(mean_squared_error)


def delta_rule(weights: Weights, inputs: jax.Array, target: jax.Array) -> Weights:
    """The backward pass often written by hand: start from output - target and go back from there.

    It leaves out the last sigmoid's derivative and the factor 2 / O, so it is not the gradient of the
    mean squared error; it is exactly the gradient of the summed binary cross entropy.
    """
    z, pull = jax.vjp(lambda w: logits(w, inputs), weights)
    (direction,) = pull(jax.nn.sigmoid(z) - target)
    return direction


RULES: dict[str, Rule] = {"gradient": gradient, "delta rule": delta_rule}


def keras_adam(
    learning_rate: float, beta1: float, beta2: float, eps: float
) -> optax.GradientTransformation:
    """Adam as Keras computes it: step t is lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps).

    This is the rearranged update before section 2.1 of Kingma and Ba (arXiv:1412.6980), where eps is
    their "epsilon hat" and is added to the root of the *uncorrected* v. `optax.adam` follows Algorithm
    1 instead and adds eps to the corrected root; its eps would have to be eps / sqrt(1 - beta2^t), 32
    times larger at the first step for beta2 = 0.999, and its eps_root sits inside the root: neither can
    stand in. It matters here: inputs up to 7 saturate hidden units, with gradients as small as eps.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=zeros, nu=zeros)

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, state.nu, updates)
        t = count.astype(jnp.float32)
        rate = learning_rate * jnp.sqrt(1 - beta2**t) / (1 - beta1**t)
        updates = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def train(weights: Weights, config: DocumentsMLPConfig, rule: Rule) -> tuple[jax.Array, Weights]:
    """Train one network; returns (losses [num_steps + 1], trained weights).

    losses[t] is the loss before update t, as the documents print it; the last is their test loss.
    """
    inputs = jnp.asarray(config.inputs, jnp.float32)
    target = jnp.asarray(config.target, jnp.float32)
    optimizer = keras_adam(config.learning_rate, config.beta1, config.beta2, config.eps)

    def step(carry, _):
        weights, state = carry
        loss = mean_squared_error(weights, inputs, target)
        updates, state = optimizer.update(rule(weights, inputs, target), state)
        return (jax.tree.map(jnp.add, weights, updates), state), loss

    start = (weights, optimizer.init(weights))
    (weights, _), losses = jax.lax.scan(step, start, length=config.num_steps)
    return jnp.append(losses, mean_squared_error(weights, inputs, target)), weights


def train_seeds(
    initial: Weights, config: DocumentsMLPConfig, rule: Rule
) -> tuple[np.ndarray, np.ndarray]:
    """Train all seeds in one program: logged losses [S, K] and predictions [S, O] after training."""
    inputs = jnp.asarray(config.inputs, jnp.float32)

    def one(weights):
        losses, weights = train(weights, config, rule)
        return losses[:: config.log_every], jax.nn.sigmoid(logits(weights, inputs))

    losses, predictions = jax.jit(jax.vmap(one))(initial)
    return np.asarray(losses), np.asarray(predictions)


def logged_steps(config: DocumentsMLPConfig) -> list[int]:
    """The steps at which losses are kept: every `log_every`, and after the last update."""
    return list(range(0, config.num_steps + 1, config.log_every))


# The comparison with the documents.


def compare(curves: np.ndarray, steps: Sequence[int], nearest: int) -> tuple[LoggedStep, ...]:
    """Per logged step, the documents' value within curves [S, K] and the percentiles of the curves."""
    documents = {**DOCUMENTS_LOSSES, DOCUMENTS_TEST_STEP: DOCUMENTS_TEST_LOSS}
    rows = []
    for step, losses in zip(steps, curves.T, strict=True):
        value = documents.get(step)
        below = None if value is None else 100 * float(np.mean(losses < value))
        band = (float(p) for p in np.percentile(losses, PERCENTILES))
        rows.append(LoggedStep(step, value, below, float(losses[nearest]), *band))
    return tuple(rows)


def log_distances(curves: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """RMS difference of natural logarithms of curves [S, K] and reference [R, K]: [R, S] float64."""
    a, b = np.log(curves.astype(np.float64)), np.log(reference.astype(np.float64))
    return np.stack([np.sqrt(np.mean((a - row) ** 2, axis=1)) for row in b])


def nearest_seed(curves: np.ndarray, steps: Sequence[int]) -> tuple[int, float, float]:
    """(seed, distance, percentile) of the curve in [S, K] nearest to the documents' logged losses.

    The percentile is of the distance among the distances from seeds to *their* nearest other seed
    (the first `PROBES` seeds): near 50, the documents' curve is as usual as one of ours.
    """
    kept = [k for k, step in enumerate(steps) if step in DOCUMENTS_LOSSES]
    documents = np.array([[DOCUMENTS_LOSSES[steps[k]] for k in kept]])
    (distances,) = log_distances(curves[:, kept], documents)
    between = log_distances(curves[:, kept], curves[:PROBES, kept])
    np.fill_diagonal(between, np.inf)
    seed = int(np.argmin(distances))
    percentile = 100 * float(np.mean(between.min(axis=1) < distances[seed]))
    return seed, float(distances[seed]), percentile


def row_losses(row: Sequence[float], target: Sequence[float]) -> dict[str, float]:
    """What each usual loss makes of a predicted row, in float64."""
    p, y = np.asarray(row, np.float64), np.asarray(target, np.float64)
    squares = (p - y) ** 2
    return {
        "mean squared error": float(squares.mean()),
        "summed squared error": float(squares.sum()),
        "half the summed squared error": float(squares.sum() / 2),
        "cross entropy": float(-np.log(p[y == 1]).sum()),
        "mean binary cross entropy": float(-np.log(np.where(y == 1, p, 1 - p)).mean()),
    }


def row_report(predictions: np.ndarray) -> RowReport:
    """The documents' predicted row beside the predictions [S, O] of the seeds."""
    row = [float(text) for text in DOCUMENTS_ROW]
    return RowReport(
        losses=row_losses(row, DOCUMENTS_TARGET),
        sum=round(sum(row[:-1]), 6),
        closest_sum_error=float(np.abs(predictions[:, :-1].astype(np.float64).sum(axis=1) - 1).min()),
        seeds_with_last_below=int(np.sum(predictions[:, -1] < 5e-5)),
    )


def last_stretch(curves: np.ndarray, steps: Sequence[int]) -> LastStretch | None:
    """The documents' last fall (900 -> 1000) beside that of curves [S, K]; None if not logged."""
    wanted = (800, 900, DOCUMENTS_TEST_STEP)
    if not set(wanted) <= set(steps):
        return None
    before, last, test = (curves[:, steps.index(step)] for step in wanted)
    previous = DOCUMENTS_LOSSES[900] / DOCUMENTS_LOSSES[800]
    ratio = DOCUMENTS_TEST_LOSS / DOCUMENTS_LOSSES[900]
    return LastStretch(
        ratio=ratio,
        previous_ratio=previous,
        extrapolated=DOCUMENTS_LOSSES[900] * previous,
        percentile=100 * float(np.mean(test / last < ratio)),
        abrupt_seeds=int(np.sum((test / last) / (last / before) < ratio / previous)),
    )


def _rule_report(
    name: str,
    curves: np.ndarray,
    steps: Sequence[int],
    initial: Weights,
    config: DocumentsMLPConfig,
) -> RuleReport:
    inputs = jnp.asarray(config.inputs, jnp.float32)
    target = jnp.asarray(config.target, jnp.float32)

    def cosine(weights):
        pair = (gradient(weights, inputs, target), RULES[name](weights, inputs, target))
        a, b = (jnp.concatenate([leaf.ravel() for leaf in tree]) for tree in pair)
        return a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b))

    cosines = jax.jit(jax.vmap(cosine))(initial)
    return RuleReport(name, *nearest_seed(curves, steps), float(np.median(np.asarray(cosines))))


# The report.


def step_line(step: int, loss: float) -> str:
    """One line as the documents print it."""
    return f"Step {step}: Loss = {loss:.6f}"


def predicted_line(row: Sequence[float]) -> str:
    """The prediction as the documents print it: a batch of one row."""
    return f"Predicted: [[{' '.join(f'{p:.6f}' for p in row)}]]"


def report(result: Result) -> list[str]:
    """The text for people: the two tables side by side, then what the figures allow to be said."""
    gradient_report = result.rules[0]
    ours = f"seed {gradient_report.nearest_seed}, nearest of {result.num_seeds}"
    lines = [_columns("the documents", ours, "seeds below the documents' loss")]
    for row in result.steps[:-1]:
        theirs = "" if row.documents is None else step_line(row.step, row.documents)
        lines.append(_columns(theirs, step_line(row.step, row.nearest), _percent(row.percentile)))
    last = result.steps[-1]
    theirs = f"Predicted: [[{' '.join(DOCUMENTS_ROW)}]]"
    lines.append(_columns(theirs, predicted_line(result.prediction), ""))
    theirs = f"Test Loss: {DOCUMENTS_TEST_LOSS:.6f}"
    lines.append(_columns(theirs, f"Test Loss: {last.nearest:.6f}", _percent(last.percentile)))
    return [*lines, "", *findings(result), "", f"Plot: {result.plot}", f"Metrics: {result.metrics}"]


def findings(result: Result) -> list[str]:
    """What the comparison shows, one sentence or two per line, each computed from `result`."""
    gradient_report, delta_report = result.rules
    row, stretch = result.row, result.last_stretch
    lines = [
        f"Distance of the nearest seed: RMS of ln(loss) differences {gradient_report.distance:.3f}; "
        f"{gradient_report.distance_percentile:.0f}% of our seeds have a neighbour closer than that.",
        f"The predicted row implies a mean squared error of {row.losses['mean squared error']:.6f}, not "
        f"{DOCUMENTS_TEST_LOSS:.6f}; no usual loss gives that value ("
        + ", ".join(f"{name} {value:.6f}" for name, value in row.losses.items())
        + ").",
        f"The predicted row sums to {row.sum:.6f} before its 0.0000, as a softmax must and sigmoids "
        f"need not: the closest of {result.num_seeds} seeds misses 1 by {row.closest_sum_error:.1e}, "
        f"and in {row.seeds_with_last_below} would the last output print as 0.0000.",
    ]
    if stretch is not None:
        lines.append(
            f"From step 900 to the test their loss falls by a factor of {stretch.ratio:.3f} after "
            f"{stretch.previous_ratio:.3f} in the interval before (at that pace: "
            f"{stretch.extrapolated:.6f}); {stretch.percentile:.1f}% of our seeds fall by more, and "
            f"{stretch.abrupt_seeds} of {result.num_seeds} quicken as suddenly."
        )
    lines.append(
        f"output - target carried back without the last sigmoid's derivative is not the gradient: "
        f"median cosine {delta_report.cosine:.2f} at the start. Trained by that rule the nearest seed "
        f"is {delta_report.nearest_seed}, at {delta_report.distance:.3f}."
    )
    return [f"- {line}" for line in lines]


def plot_band(result: Result, path: Path) -> None:
    """Draw the seeds' percentile band, the documents' points and the nearest seed, log scale, as PNG."""
    steps = [row.step for row in result.steps]
    band = {p: [getattr(row, f"p{p}") for row in result.steps] for p in PERCENTILES}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    blue = "#4477aa"
    for low, high, alpha in ((5, 95, 0.15), (25, 75, 0.3)):
        label = f"{low}-{high}% of seeds"
        axes.fill_between(steps, band[low], band[high], color=blue, alpha=alpha, lw=0, label=label)
    axes.plot(steps, band[50], color=blue, lw=1.5, label="median seed")
    nearest = [row.nearest for row in result.steps]
    label = f"nearest seed ({result.rules[0].nearest_seed})"
    axes.plot(steps, nearest, color="#228833", lw=1.5, ls="--", label=label)
    theirs = [np.nan if row.documents is None else row.documents for row in result.steps]
    axes.plot(steps, theirs, "o", color="#cc3311", zorder=3, clip_on=False, label="the documents")
    axes.set(xlabel="Adam step", ylabel="mean squared error", yscale="log", xlim=(0, steps[-1]))
    axes.set_title(f"The documents' run among {result.num_seeds} seeds", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _columns(theirs: str, ours: str, note: str) -> str:
    return f"{theirs:<44}{ours:<44}{note}".rstrip()


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}%"


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r}: expected {expected}")
