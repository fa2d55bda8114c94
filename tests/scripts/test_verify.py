"""scripts/verify.py: passes on a good checkpoint, fails on one that differs, says what is wrong."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests import tiny  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # each run imports torch, transformers and jax


def verify(directory, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / "verify.py"), f"--model={directory}", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("name", ["gemma3", "roberta classifier", "bert"])
def test_good_checkpoint(name, tmp_path):
    tiny.ALL[name].save(tmp_path)
    run = verify(tmp_path, "--json", "--mesh=tensor:2")
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert all(result["ok"] for result in results)
    last = {
        "gemma3": "32 greedy tokens",
        "bert": "sentence vectors",
        "roberta classifier": "class logits",
    }
    assert results[-1]["quantity"].startswith(last[name])


def test_missing_checkpoint(tmp_path):
    run = verify(tmp_path)
    assert run.returncode == 2
    assert "config.json is missing" in run.stderr and not run.stdout


def test_difference_is_an_error(tmp_path):
    """Parameters that are off by a thousandth."""
    tiny.DECODERS["llama"].save(tmp_path)
    program = """
        import jax, verify
        from llm_jax import cli
        from llm_jax.eval import parity
        load = parity.load_hf
        parity.load_hf = lambda *args: jax.tree.map(lambda p: p * 1.001, load(*args))
        cli.run(verify.main)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), f"--model={tmp_path}"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 1, run.stderr
    assert "DIFFERS" in run.stdout
