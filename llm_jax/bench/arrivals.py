"""Requests that come at random moments: up to which rate an engine keeps up, and a plot of it.

An engine keeps up with a rate when both hold:

    it ends requests as fast as they come: at least `KEEPS_UP` times as fast;
    the first token comes in time: the 99th percentile of TTFT is within a bound.

The knee is the highest rate with which it keeps up, as it does with all lower ones that were tried.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

KEEPS_UP = 0.95
MIDDLE = (0.1, 0.9)  # of the requests, by their time


def completed_share(arrivals: Sequence[float], ends: Sequence[float]) -> float:
    """How fast requests ended, in parts of how fast they came. Seconds, both in any order.

    Both by the time that the middle 80% of them took. So neither the beginning counts, when the engine
    was empty, nor the end, when nothing came any more: a queue that grows makes the share less than 1
    however few requests there are.
    """
    came, ended = (float(np.ptp(np.quantile(times, MIDDLE))) for times in (arrivals, ends))
    return came / ended


def keeps_up(figures: dict[str, Any], ttft_bound_s: float) -> bool:
    """Of the figures of one rate: "completed_share" and "ttft_p99_ms"."""
    return figures["completed_share"] >= KEEPS_UP and figures["ttft_p99_ms"] <= 1e3 * ttft_bound_s


def knee(records: Sequence[dict[str, Any]], ttft_bound_s: float) -> float | None:
    """The rate of the knee; None where the lowest is too much. records: by growing "rate"."""
    found = None
    for each in records:
        if not keeps_up(each, ttft_bound_s):
            break
        found = each["rate"]
    return found


def plot_rates(
    records: Sequence[dict[str, Any]], ttft_bound_s: float, path: str | Path, title: str
) -> None:
    """Draw requests and tokens per second and TTFT over the rate of arrivals, and mark the knee."""
    rates = [each["rate"] for each in records]
    series = lambda key, scale=1.0: [scale * each[key] for each in records]  # noqa: E731
    figure = Figure(figsize=(8, 8), layout="constrained")
    panels = requests, tokens, first = figure.subplots(3, sharex=True)
    requests.plot(rates, rates, color="#888888", lw=1, ls="--", label="offered")
    ended = [each["rate"] * each["completed_share"] for each in records]
    requests.plot(rates, ended, color="#4477aa", marker="o", ms=4, label="ended")
    tokens.plot(rates, series("tokens_per_s"), color="#228833", marker="o", ms=4)
    for percent, color in ((50, "#4477aa"), (99, "#cc3311")):
        key = f"ttft_p{percent}_ms"
        first.plot(rates, series(key, 1e-3), color=color, marker="o", ms=4, label=f"P{percent}")
    first.axhline(ttft_bound_s, color="#888888", lw=1, ls="--", label="bound")
    first.set_yscale("log")
    first.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    first.yaxis.set_major_formatter("{x:g}")
    first.yaxis.set_minor_formatter("")
    requests.set(ylabel="requests/s", ylim=(0, None))
    tokens.set(ylabel="tokens/s", ylim=(0, None))
    first.set(ylabel="time to the first token, s", xlabel="arrivals, requests/s")
    at = knee(records, ttft_bound_s)
    requests.set_title(f"{title}: knee at {at:g}/s" if at else f"{title}: too slow for {rates[0]:g}/s")
    for panel in panels:
        if at:
            panel.axvline(at, color="#ee9900", lw=1.5)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in (requests, first):
        panel.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
