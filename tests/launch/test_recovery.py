"""A training run through the loss of its slice, by keep.sh: all is real but gcloud and the machines."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from llm_jax.train.metrics_log import read_metrics
from tests.launch.conftest import ROOT

TINY = ROOT / "tests" / "train" / "tiny_run.py"


def curve(workdir):
    """The records without what differs from run to run: the time and the speed."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "time" and "perf/" not in k} for r in records]


def preempt(cloud):
    cloud.states("ACTIVE PREEMPTED")


def stop(cloud):
    """As a slice that says so before it goes: SIGTERM, on which the run saves, and then it is gone."""
    assert cloud.run("stop", "x").stdout == "worker-0: x: exit status 75\n"
    preempt(cloud)


@pytest.mark.slow  # three runs of tests/train/tiny_run.py
@pytest.mark.parametrize("loss", [preempt, stop])
def test_the_curve_is_that_of_an_undisturbed_run(cloud, repository, tmp_path, loss):
    shutil.rmtree(cloud.home(1))
    cloud.environment |= {
        k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "LLM_JAX_"))
    }
    cloud.environment |= {"PYTHONPATH": str(ROOT), "POLL": "1"}
    cloud.states("NONE")
    whole, bucket = tmp_path / "whole", tmp_path / "bucket"
    command = [sys.executable, TINY]
    subprocess.run([*command, whole, "{}"], env=cloud.environment, check=True)
    flags = ["x", "--topology=v5e:2x4", "--spot", "--"]
    with cloud.start("keep", *flags, *map(str, command), bucket, "{}", root=repository) as keep:
        deadline = time.monotonic() + 120
        while not (bucket / "metrics.jsonl").exists() or len(curve(bucket)) < 8:
            assert keep.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        loss(cloud)
        _, said = keep.communicate(timeout=200)
    assert keep.returncode == 0, said
    assert "[keep] x: PREEMPTED" in said
    assert cloud.verbs().count("create") == 2
    assert curve(bucket) == curve(whole)
