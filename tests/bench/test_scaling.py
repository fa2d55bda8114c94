"""Measurements of how cost grows: what can be known of them beforehand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.bench.scaling import measure

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 2 * 8192 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 256 + 2 * 64)  # of 2 layers of width 64


def test_a_checkpoint_has_parameters_and_two_moments():
    found = measure("checkpoint", embed=64)
    assert found["parameters"] == PARAMETERS
    assert found["bytes"] == pytest.approx(3 * 4 * PARAMETERS, rel=1e-4)
    assert 0 < found["blocked_s"] <= found["save_s"]


@pytest.mark.slow
def test_the_script_and_what_grows_with_devices():
    command = [sys.executable, "scripts/scaling.py", "--embed=512", "--devices=1,8", "--repeats=1"]
    run = lambda what: subprocess.run(  # noqa: E731
        [*command, f"--what={what}"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    one, eight = map(json.loads, run("memory"))
    assert one["host_bytes"] > one["bytes"]
    # Each device gathers whole weights for its products.
    assert eight["host_bytes"] > one["host_bytes"] + 4 * one["parameters"]
    assert [json.loads(line)["devices"] for line in run("compile")] == [1, 8]
