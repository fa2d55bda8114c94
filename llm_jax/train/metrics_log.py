"""Numbers of a run to where people and programs look: metrics.jsonl, TensorBoard, the terminal.

A line of metrics.jsonl is one object: "step", "time" (Unix seconds) and names such as "train/loss",
"train/learning_rate", "train/grad_norm", "eval/loss", "eval/accuracy", "perf/tokens_per_s".
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from absl import logging
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar
from tqdm import tqdm

from llm_jax.distributed import from_main, is_main

Record = dict[str, float]

BRIEF = {  # what stands beside the progress bar, and how it is called there
    "train/loss": "loss",
    "train/learning_rate": "lr",
    "train/grad_norm": "|g|",
    "perf/tokens_per_s": "tok/s",
    "perf/mfu": "mfu",
    "perf/input_wait": "wait",
}


class MetricsLog:
    """Writes records as they come; a context manager.

    start: steps done before; records of later steps, left by a run that was cut off, are dropped.
    echo: called with every record as well (`--json` prints them).
    project: of Weights & Biases, which gets them too; "" = it does not.
    On a terminal a progress bar shows the newest numbers; elsewhere each record is a line on stderr.
    Of several processes the first one does all this, and the others nothing.
    Records that cannot be written, as when the disk is full, are logged as an error, kept, and written
    with the next ones: training goes on.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        start: int,
        steps: int,
        echo: Callable[[Record], None] | None = None,
        project: str = "",
    ):
        workdir = Path(workdir)
        self._echo, self._files, self._bar = echo, list[_File](), None
        if is_main():
            self._files += [_JsonLines(workdir / "metrics.jsonl"), _TensorBoard(workdir / "tb")]
            self._files += [_WeightsAndBiases(project, workdir)] if project else []
            if sys.stderr.isatty():
                self._bar = tqdm(initial=start, total=steps, unit="step")
        self._waiting: list[list[Record]] = [[] for _ in self._files]
        for file in self._files:
            file.rewind(start)
        # Whether the step `start` was evaluated.
        self.judged = from_main("metrics.jsonl", lambda: _judged(workdir / "metrics.jsonl", start))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._flush()
        if lost := max(map(len, self._waiting), default=0):
            logging.error("the last %d records of the metrics could not be written", lost)
        for file in self._files:
            file.close()
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """Count one step on the progress bar."""
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record these numbers as those of `step`."""
        if not is_main():
            return
        record = {"step": step, "time": round(time.time(), 3)} | dict(metrics)
        for waiting in self._waiting:
            waiting.append(record)
        self._flush()
        if self._echo is not None:
            self._echo(record)
        self._show(step, metrics)

    def _flush(self) -> None:
        for file, waiting in zip(self._files, self._waiting, strict=True):
            try:
                file.write(waiting)
                waiting.clear()
            except OSError as error:
                logging.error("%d records of the metrics wait to be written: %s", len(waiting), error)

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        text = "  ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())
        brief = "  ".join(
            f"{label} {metrics[name]:.4g}" for name, label in BRIEF.items() if name in metrics
        )
        if self._bar is None:
            print(f"step {step}  {text}", file=sys.stderr, flush=True)
        elif any(name.startswith("eval/") for name in metrics):
            self._bar.write(f"step {step}  {text}", file=sys.stderr)
        else:
            self._bar.set_postfix_str(brief)


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that was cut off is left out."""
    path = Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _judged(path: Path, step: int) -> bool:
    """Whether the records of a step have an evaluation."""
    records = (record for record in read_metrics(path) if record["step"] == step)
    return any(name.startswith("eval/") for record in records for name in record)


class _File(Protocol):
    """Takes records: all of them, or raises OSError and is as if it had taken none."""

    def write(self, records: list[Record]) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, path: Path):
        self._file = path.open("ab+", buffering=0)

    def write(self, records: list[Record]) -> None:
        end, data = self._file.seek(0, os.SEEK_END), _lines(records)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            self._file.truncate(end)  # half a line would spoil the next one
            raise

    def rewind(self, step: int) -> None:
        """Cut the file before the first line of a later step, or one that is not whole."""
        self._file.seek(0)
        end = 0
        for line in self._file.readlines():
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            end += len(line)
        self._file.truncate(end)

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """An event file, and another one after each failure: a torn event hides those that follow."""

    def __init__(self, directory: Path):
        self._directory, self._number = directory, 0
        self._writer: EventsWriter | None = None
        self._purge: int | None = None

    def write(self, records: list[Record]) -> None:
        try:
            writer = self._open()
            for record in records:
                step, now = int(record["step"]), record["time"]
                for name in record.keys() - {"step", "time"}:
                    event = Event(wall_time=now, step=step, summary=scalar(name, record[name]))
                    writer.write_event(event)
            writer.flush()
        except OSError:
            self._writer = None
            raise

    def rewind(self, step: int) -> None:
        """Tell TensorBoard to forget what it has of later steps."""
        self._purge = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> EventsWriter:
        if self._writer is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._number += 1
            suffix = f".{os.getpid()}.{self._number}"  # two files of one second must not be one
            self._writer = EventsWriter(str(self._directory / "events"), suffix)
        if self._purge is not None:
            begin = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=self._purge, session_log=begin))
            self._purge = None
        return self._writer


class _WeightsAndBiases:
    """A run of Weights & Biases named as the workdir; what it was told of later steps it keeps."""

    def __init__(self, project: str, workdir: Path):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            message = f"wandb_project={project!r} needs Weights & Biases: pip install wandb"
            raise ValueError(message) from error
        name = workdir.resolve().name
        self._run = wandb.init(project=project, name=name, id=name, dir=str(workdir), resume="allow")

    def write(self, records: list[Record]) -> None:
        for record in records:
            step = int(record["step"])
            self._run.log({k: v for k, v in record.items() if k not in ("step", "time")}, step=step)

    def rewind(self, step: int) -> None:
        """Its steps only grow: it drops what comes again by itself."""

    def close(self) -> None:
        self._run.finish()


def _lines(records: list[Record]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
