"""Faults: a process that is killed, a full disk, a poisoned batch; and the run goes on as it should."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.checkpoint.store import latest_step
from llm_jax.train.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24  # of tiny_run


def start(workdir, **settings):
    """A process that trains in `workdir`."""
    command = [sys.executable, ROOT / "tests" / "train" / "tiny_run.py", workdir, json.dumps(settings)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "random"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def finish(workdir, **settings):
    """Train in `workdir` until the end; what was said on standard error."""
    process = start(workdir, **settings)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def signal_at(process, workdir, step, delay, number):
    """Send a signal `delay` seconds after the record of `step` appears; the exit status."""
    while process.poll() is None and step > max(
        (r["step"] for r in read_metrics(workdir / "metrics.jsonl")), default=0
    ):
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(number)
    process.communicate()
    return process.returncode


def numbers(workdir):
    """The records without what differs from run to run: the time and the speed."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "time" and "perf/" not in k} for r in records]


def assert_no_record_is_skipped_or_repeated(workdir):
    """Of every step the same batch in each process; of every epoch each record once."""
    batches = {}
    for line in (workdir / "batches.txt").read_text().splitlines():
        step, records = line.split(": ")
        batches.setdefault(int(step), set()).add(records)
    assert all(len(versions) == 1 for versions in batches.values())
    stream = [int(n) for step in range(STEPS) for n in batches[step].pop().split()]
    size = len(set(stream))
    assert len(stream) > 2 * size, "several epochs"
    for first in range(0, len(stream), size):
        epoch = stream[first : first + size]
        assert len(set(epoch)) == len(epoch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of a run that nobody disturbed, in a process like the others."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(workdir)
    assert [r["step"] for r in numbers(workdir) if "train/loss" in r] == list(range(1, STEPS + 1))
    return numbers(workdir)


def test_a_run_killed_in_a_save_and_at_a_step_gives_bitwise_the_same_curve(whole, tmp_path):
    process = start(tmp_path, die_at_save=9)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert any(p.name.startswith("9.") for p in (tmp_path / "checkpoints").iterdir()), "half a save"
    assert latest_step(tmp_path / "checkpoints") == 6
    assert signal_at(start(tmp_path), tmp_path, 13, 0.0, signal.SIGKILL) == -signal.SIGKILL
    finish(tmp_path)
    assert numbers(tmp_path) == whole
    assert_no_record_is_skipped_or_repeated(tmp_path)


@pytest.mark.slow  # two or three processes each
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_random_gives_bitwise_the_same_curve(whole, tmp_path, seed):
    rng = random.Random(seed)
    killed = signal_at(
        start(tmp_path), tmp_path, rng.randrange(STEPS), rng.uniform(0, 0.1), signal.SIGKILL
    )
    assert killed in (-signal.SIGKILL, 0)  # 0: it was done already
    finish(tmp_path)
    assert numbers(tmp_path) == whole
    assert_no_record_is_skipped_or_repeated(tmp_path)


def signal_at_marker(process, workdir, number):
    """Send a signal when WORKDIR/marker appears; the exit status and what was said on standard error."""
    while process.poll() is None and not (workdir / "marker").exists():
        time.sleep(0.005)
    time.sleep(0.5)  # the marker is set just before
    process.send_signal(number)
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_with_a_checkpoint_and_status_75(whole, tmp_path, number):
    assert signal_at(start(tmp_path, checkpoint_every=0), tmp_path, 4, 0.0, number) == 75
    saved = latest_step(tmp_path / "checkpoints")
    assert 4 <= saved < STEPS, "at the step where it was"
    assert [r["step"] for r in numbers(tmp_path)][-1] == saved
    finish(tmp_path)
    assert numbers(tmp_path) == whole
    assert_no_record_is_skipped_or_repeated(tmp_path)


def test_a_signal_while_the_first_step_compiles_ends_the_run_at_once(tmp_path):
    process = start(tmp_path, layers=400)
    status, errors = signal_at_marker(process, tmp_path, signal.SIGTERM)
    assert status == 75 and "SIGTERM before the first step was done" in errors
    assert latest_step(tmp_path / "checkpoints") is None


@pytest.mark.slow  # two processes
def test_a_signal_breaks_off_an_evaluation_which_is_made_up_for(whole, tmp_path):
    status, errors = signal_at_marker(start(tmp_path, linger=300.0), tmp_path, signal.SIGTERM)
    assert status == 75 and "step 6 is saved" in errors
    assert numbers(tmp_path) == [r for r in whole if r["step"] <= 6 and "eval/loss" not in r]
    finish(tmp_path)
    assert numbers(tmp_path) == whole
