"""Interleaved timing: rivals take turns, so that a busy machine disturbs all of them alike."""

import statistics
from collections.abc import Callable, Mapping


def interleaved(rivals: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of each rival's own figure over `repeats` rounds, each round running all of them once.

    A rival returns its figure (e.g. tokens per second). One unrecorded round warms up.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: expected at least 1")
    for run in rivals.values():
        run()
    figures: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            figures[name].append(run())
    return {name: statistics.median(values) for name, values in figures.items()}
