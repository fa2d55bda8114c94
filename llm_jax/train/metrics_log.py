"""Numbers of a run to where people and programs look: metrics.jsonl, TensorBoard, the terminal.

A line of metrics.jsonl is one object: "step", "time" (Unix seconds) and names such as "train/loss",
"train/learning_rate", "train/grad_norm", "eval/loss", "eval/accuracy", "perf/tokens_per_s".
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

Record = dict[str, float]


class MetricsLog:
    """Writes records as they come; a context manager.

    start: steps done before; records of later steps, left by a run that was cut off, are dropped.
    echo: called with every record as well (`--json` prints them).
    On a terminal a progress bar shows the newest numbers; elsewhere each record is a line on stderr.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        start: int,
        steps: int,
        echo: Callable[[Record], None] | None = None,
    ):
        workdir = Path(workdir)
        self._path, self._echo = workdir / "metrics.jsonl", echo
        kept = [r for r in read_metrics(self._path) if r["step"] <= start]
        self._path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a")
        purge = start + 1 if start else None
        self._board = SummaryWriter(str(workdir / "tb"), purge_step=purge)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(initial=start, total=steps, unit="step") if terminal else None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._board.close()
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """Count one step on the progress bar."""
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record these numbers as those of `step`."""
        record = {"step": step, "time": round(time.time(), 3)} | dict(metrics)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._echo is not None:
            self._echo(record)
        self._show(step, metrics)

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        text = "  ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())
        if self._bar is None:
            print(f"step {step}  {text}", file=sys.stderr, flush=True)
        elif any(name.startswith("eval/") for name in metrics):
            self._bar.write(f"step {step}  {text}", file=sys.stderr)
        else:
            self._bar.set_postfix_str(f"loss {metrics.get('train/loss', float('nan')):.4f}")


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that was cut off is left out."""
    path = Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
