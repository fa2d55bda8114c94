"""scripts/soak.py kills a run as users have it, and notices when its curve is not the same."""

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    words, rng = "ab cde fgh ijk lm nop q rst uvw xyz".split(), random.Random(0)
    lines = [" ".join(rng.choice(words) for _ in range(12)) for _ in range(200)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    source = f"""
        from llm_jax.config import LanguageModelConfig, ModelConfig, OptimConfig, to_config_dict
        SHAPE = dict(vocab_size=320, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8)
        def get_config():
            model = ModelConfig("llama", mlp_dim=32, max_positions=16, dropout=0.1, **SHAPE)
            return to_config_dict(LanguageModelConfig(
                data=(("{tmp_path}/text.txt", "", 1.0),), model=model, optim=OptimConfig(0.01), steps=1,
                batch_size=4, row_tokens=16, tokenizer_kind="bpe", eval_fraction=0.1))
    """
    (tmp_path / "config.py").write_text(textwrap.dedent(source))
    return tmp_path / "config.py"


def soak(config, kills, *flags):
    command = [
        *(sys.executable, ROOT / "scripts" / "soak.py", f"--config={config}", "--json", *flags),
        *(f"--workdir={config.parent}/soak", f"--kills={kills}", "--steps=12"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow  # seven runs of scripts/train.py
def test_killed_runs_are_the_same_and_a_difference_is_noticed(config):
    status, report = soak(config, 2)
    assert status == 0 and report["different"] == 0
    assert report["kills"] == 2 and report["records"] == 16
    metrics = config.parent / "soak" / "whole" / "metrics.jsonl"
    first, rest = metrics.read_text().split("\n", 1)
    record = json.loads(first)
    record["train/loss"] += 1e-7  # less than the rounding of float32
    metrics.write_text(json.dumps(record) + "\n" + rest)
    status, report = soak(config, 0)
    assert status == 1 and report["different"] == 1
