"""The knee of a rate of arrivals, found for a queue whose capacity is known."""

import dataclasses

import numpy as np
import pytest

from llm_jax.bench import serving_cases
from llm_jax.bench.arrivals import KEEPS_UP, completed_share, knee, plot_rates
from llm_jax.bench.serving import Times

SERVICE_S = 0.5  # of one request: two a second are what the queue below can do
RATES = [0.5, 1.5, 4.0, 8.0]


def queue(_, traffic):
    """One request after the other, each in SERVICE_S; its first token comes halfway."""
    free, tokens = 0.0, []
    for came in traffic.arrivals:
        start = max(free, came)
        free = start + SERVICE_S
        tokens.append([start + SERVICE_S / 2 - came, free - came])
    return Times(tokens, free)


@dataclasses.dataclass
class Setup:
    """What the case reads of a benchmark's setup."""

    llm: None = None
    name: str = "queue"
    requests: int = 64
    max_rows: int = 1
    rates: tuple[float, ...] = (1.5, 8.0, 0.5, 4.0)
    ttft_bound_s: float = 5.0
    plot: str | None = None


@pytest.fixture
def arrivals(monkeypatch):
    monkeypatch.setattr(serving_cases, "engine_for", lambda *_: None)
    monkeypatch.setattr(serving_cases, "serve", queue)
    return lambda **changes: list(serving_cases.arrivals(Setup(**changes)))


def test_the_knee_is_the_highest_rate_below_the_capacity(arrivals, tmp_path):
    *rates, last = arrivals(plot=str(tmp_path / "pictures" / "arrivals.png"))
    assert [each["rate"] for each in rates] == RATES, "by growing rate"
    assert last == {"case": "arrivals/queue/knee", "rate": 1.5, "ttft_bound_s": 5.0}
    traffic = [serving_cases.mixed(64, 100, seed, rate) for seed, rate in enumerate(RATES)]
    offered = [1 / np.diff(np.quantile(each.arrivals, (0.1, 0.9)))[0] * 0.8 * 63 for each in traffic]
    shares = [each["completed_share"] for each in rates]
    np.testing.assert_allclose(shares, [1, 1, *1 / SERVICE_S / np.array(offered[2:])], rtol=0.05)
    picture = (tmp_path / "pictures" / "arrivals.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_first_token_that_comes_late_is_not_keeping_up(arrivals):
    slow, slower = (1e-3 * each["ttft_p99_ms"] for each in arrivals()[:2])
    assert slow < slower
    at = [arrivals(ttft_bound_s=bound)[-1]["rate"] for bound in (slow / 2, (slow + slower) / 2, 100)]
    assert at == [None, 0.5, 1.5]


def test_a_rate_above_one_that_failed_is_not_the_knee():
    good, late = {"completed_share": 1.0, "ttft_p99_ms": 1.0}, {"completed_share": 0.5, "ttft_p99_ms": 1}
    found = [{"rate": 1.0} | good, {"rate": 2.0} | late, {"rate": 3.0} | good]
    assert knee(found, 1.0) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": 7}, "requests=7: expected at least 8"),
        ({"rates": (0.5, 0.0)}, r"rates=\(0.5, 0.0\): expected one or more, above 0"),
        ({"rates": ()}, "rates="),
    ],
)
def test_what_tells_nothing_is_refused(arrivals, changes, message):
    with pytest.raises(ValueError, match=message):
        arrivals(**changes)


def test_the_share_counts_neither_beginning_nor_end():
    came = np.arange(100.0)
    for delay in (0.0, 30.0):
        np.testing.assert_allclose(completed_share(came, came + delay), 1.0)
    last_are_slow = came + np.where(came >= 95, 500, 1)
    assert completed_share(came, last_are_slow[::-1]) >= KEEPS_UP
    np.testing.assert_allclose(completed_share(came, 1.25 * came), 0.8)


def test_a_plot_without_a_knee(tmp_path):
    figures = {"completed_share": 0.5, "ttft_p50_ms": 5, "ttft_p99_ms": 9, "tokens_per_s": 1}
    plot_rates([{"rate": 1.0} | figures], 1.0, tmp_path / "a.png", "tiny")
    assert (tmp_path / "a.png").stat().st_size > 1000
