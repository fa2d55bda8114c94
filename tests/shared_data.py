"""Where the optional real data, tokenizers and weights live; tests that need them skip without."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("LLM_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"


def shared_path(relative: str) -> Path:
    """Path below the shared data folder, or skip the calling test with a message."""
    path = ROOT / relative
    if not path.exists():
        pytest.skip(f"needs {relative} under {ROOT} (set LLM_JAX_SHARED to the folder that holds data/)")
    return path
