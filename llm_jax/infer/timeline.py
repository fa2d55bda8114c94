"""The clock-cycle view of a generation: every step with its phase, start, duration and token.

Written as a Chrome trace (JSON, opens in Perfetto or chrome://tracing) and drawn as a PNG.
Source of the format: the Trace Event Format, "X" (complete) events, times in microseconds.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

PHASES = ("tokenize", "prefill", "sample", "decode", "detokenize")
COLORS = ("#7a9e7e", "#31688e", "#e0a458", "#b5485d", "#8a7ca8")


@dataclasses.dataclass
class Event:
    """One step. Times are seconds since the timeline began; `tick` counts generated tokens."""

    phase: str
    start: float
    duration: float
    tick: int
    label: str = ""


class Timeline:
    """Collects events; `disabled` costs one attribute test per phase."""

    def __init__(self, enabled: bool = True):
        self.enabled, self.events, self._origin = enabled, [], time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str, tick: int = 0, label: str = "") -> Iterator[None]:
        """Record the block as one event. The block must wait for its own device work."""
        if not self.enabled:
            yield
            return
        if name not in PHASES:
            raise ValueError(f"phase {name!r}: expected one of {PHASES}")
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.events.append(Event(name, start - self._origin, end - start, tick, label))

    def label(self, tick: int, text: str) -> None:
        """Name the token of one tick, known once it is detokenized."""
        for event in self.events:
            if event.tick == tick and event.phase in ("prefill", "decode", "sample", "detokenize"):
                event.label = text

    def write(self, path: str | Path) -> tuple[Path, Path]:
        """Write PATH (Chrome trace) and its PNG beside it; returns both paths."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        trace = [
            {
                "name": e.phase,
                "cat": "generate",
                "ph": "X",
                "ts": e.start * 1e6,
                "dur": e.duration * 1e6,
                "pid": 0,
                "tid": PHASES.index(e.phase),
                "args": {"tick": e.tick, "token": e.label},
            }
            for e in self.events
        ]
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": name}}
            for i, name in enumerate(PHASES)
        ]
        path.write_text(json.dumps({"traceEvents": names + trace}, ensure_ascii=False))
        image = path.with_suffix(".png")
        self._draw(image)
        return path, image

    def _draw(self, path: Path) -> None:
        """One lane a phase; the tokens along the decode lane where they fit."""
        figure = Figure(figsize=(12, 3.2), layout="constrained")
        axes = figure.subplots()
        for lane, (name, color) in enumerate(zip(PHASES, COLORS, strict=True)):
            spans = [(e.start * 1e3, e.duration * 1e3) for e in self.events if e.phase == name]
            axes.broken_barh(spans, (lane - 0.4, 0.8), facecolors=color, edgecolor="white", lw=0.3)
            total = sum(duration for _, duration in spans)
            axes.text(1.005, lane, f"{total:.1f} ms", transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(PHASES)), PHASES)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        ticks = max((e.tick for e in self.events), default=0)
        axes.set_title(f"One generation, {ticks + 1} tokens, step by step", loc="left")
        axes.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=150)
