"""Programs in several processes, by launch/local.sh: what they say, and whether they train alike."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.train.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5  # sums over devices are taken in another order


@dataclasses.dataclass
class Running:
    """A program that was started, and the folder of its output."""

    process: subprocess.Popen
    folder: Path

    def finish(self, timeout=240):
        """Its exit status, when it has ended by itself."""
        return self.process.wait(timeout)

    def said(self, stream="err"):
        """What it has said so far."""
        return (self.folder / stream).read_text()

    def wait_for(self, ready, timeout=120):
        """Wait until `ready()`; AssertionError, with what was said, when the program ends before."""
        end = time.monotonic() + timeout
        while not ready():
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)


def start(folder, count, devices, *command, **env):
    """Start a Python program in `count` processes of `devices` CPU devices; output goes to `folder`."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)} | env
    launch = [ROOT / "launch" / "local.sh", f"--devices={devices}", str(count)]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [*launch, sys.executable, *command], env=env, stdout=out, stderr=err, cwd=ROOT
        )
    return Running(process, folder)


def run(folder, count, devices, *command, **env):
    """The same, and wait for its end, which must be a good one; what it wrote to standard output."""
    running = start(folder, count, devices, *command, **env)
    assert running.finish() == 0, running.said()
    return running.said("out")


def numbers(workdir):
    """The records without what differs from run to run: the time and the speed."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "time" and "perf/" not in k} for r in records]


def assert_same_curve(workdir, other):
    found, wanted = numbers(workdir), numbers(other)
    assert [r["step"] for r in found] == [r["step"] for r in wanted]
    for one, two in zip(found, wanted, strict=True):
        norms = [r.pop("train/grad_norm", 0.0) for r in (one, two)]
        assert one == pytest.approx(two, rel=TOLERANCE, abs=1e-8)
        # Adam divides by the root of squared gradients: what rounds otherwise is soon a little apart.
        assert norms[0] == pytest.approx(norms[1], rel=10 * TOLERANCE)
