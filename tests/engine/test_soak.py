"""An engine under everything that callers do, for seconds and minutes; the script does so for hours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax import Engine, EngineConfig
from llm_jax.bench.soaking import soak
from tests.engine.test_engine import short

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "soak_engine.py"
SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 96, "page_size": 16, "pages": [14]}


@pytest.fixture(scope="module")
def llm():
    return short()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"speculation": "prompt_lookup"},
        {"preemption": "offload", "host_pages": 40},
        {"preemption": "offload", "host_pages": 4, "prefix_host_pages": 40},
    ],
)
def test_nothing_is_lost(llm, more):
    settings = SIZES | {"pages": (14,), "compile_ahead": False} | more
    *_, last = soak(llm, Engine(llm, EngineConfig(**settings)), 12)
    assert last["finished"] > 5 < last["cancelled"] and last["error"] > 0
    assert last["wrong"] == last["unrefused"] == last["leaked"] == 0


@pytest.mark.slow
def test_five_minutes():
    """The script's own verdict: tokens, pages, programs, and memory that does not grow by 1%."""
    settings = json.dumps(SIZES | {"max_rows": 2})
    command = [sys.executable, SCRIPT, "--seconds=300", "--json", f"--settings={settings}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["finished"] > 500 and last["leaked"] == last["compiled"] == 0
