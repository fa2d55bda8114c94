"""The directory of a run: what config.json says, and that another run does not mix with it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import store
from llm_jax.checkpoint.workdir import begin_run, load_trained
from llm_jax.config import ModelConfig, OptimConfig, TrainConfig
from llm_jax.models import describe
from llm_jax.sharding import make_mesh

MODEL = ModelConfig(
    "bert",
    vocab_size=11,
    num_layers=1,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=8,
    max_positions=8,
    causal=False,
    head="classifier",
    num_classes=2,
    labels=("好", "坏"),
)
SETTINGS = OptimConfig(learning_rate=1e-3, b2=0.97)


def test_config_json_says_what_ran(tmp_path):
    begin_run(tmp_path / "run", SETTINGS, MODEL)
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    assert found["config"]["b2"] == 0.97
    assert found["model"]["labels"] == ["好", "坏"]
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"].keys() >= {"python", "flax", "numpy", "optax"}
    assert "git" in found


def test_the_same_settings_resume_and_others_are_refused_with_the_difference(tmp_path):
    begin_run(tmp_path, SETTINGS, MODEL)
    before = (tmp_path / "config.json").read_bytes()
    begin_run(tmp_path, SETTINGS, MODEL)
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"config\.b2: 0\.97 there, 0\.5 here") as error:
        begin_run(tmp_path, dataclasses.replace(SETTINGS, b2=0.5), MODEL)
    assert "learning_rate" not in str(error.value) and "--workdir" in str(error.value)
    with pytest.raises(ValueError, match=r"model\.vocab_size: 11 there, 12 here"):
        begin_run(tmp_path, SETTINGS, dataclasses.replace(MODEL, vocab_size=12))


@pytest.fixture
def trained(tmp_path):
    """A workdir with steps 5 (parameters) and 9 (parameters and their average)."""
    begin_run(tmp_path, SETTINGS, MODEL)
    rng = np.random.default_rng(0)
    draw = lambda s: rng.normal(size=s.shape).astype(s.dtype)  # noqa: E731
    params, average = (jax.tree.map(draw, describe(MODEL).shapes) for _ in range(2))
    rules = {"keep": 2, "keep_best": 0, "best_metric": "eval/loss", "keep_every": 0}
    with store.open_checkpoints(tmp_path / "checkpoints", **rules) as checkpoints:
        checkpoints.save(5, {"params": params}, {})
        checkpoints.save(9, {"params": params, "ema": average}, {})
    return tmp_path, params, average


def test_load_trained_takes_the_newest_step_and_its_average(trained):
    workdir, params, average = trained
    newest = load_trained(workdir, make_mesh("tensor:2"))
    jax.tree.map(np.testing.assert_array_equal, newest.params, average)
    assert (newest.step, newest.labels) == (9, ("好", "坏"))
    assert newest.model.config.vocab_size == 11 and newest.tokenizer == workdir / "tokenizer"
    older = load_trained(workdir / "checkpoints" / "5", make_mesh("data:1"), param_dtype="bfloat16")
    assert older.step == 5 and older.model.config.param_dtype == "bfloat16"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float32(a), b, rtol=2**-8), older.params, params
    )


def test_load_trained_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*--workdir"):
        load_trained(tmp_path, make_mesh("data:1"))
    begin_run(tmp_path, SETTINGS, MODEL)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load_trained(tmp_path, make_mesh("data:1"))
    with pytest.raises(FileNotFoundError, match="'params'"):
        load_trained(tmp_path / "checkpoints" / "3", make_mesh("data:1"))
    (tmp_path / "config.json").write_text('{"model": ')
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        load_trained(tmp_path, make_mesh("data:1"))
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_trained(tmp_path / "checkpoints" / "1", make_mesh("data:1"))


def test_a_damaged_checkpoint_is_never_loaded_unnoticed(trained, caplog):
    workdir = trained[0]
    mesh = make_mesh("data:1")
    path = max((workdir / "checkpoints" / "9" / "ema" / "d").iterdir(), key=lambda p: p.stat().st_size)
    path.write_bytes(bytes(len(path.read_bytes())))
    assert load_trained(workdir, mesh).step == 5
    assert "DAMAGED" in caplog.text and path.name in caplog.text
    with pytest.raises(ValueError, match=f"9 is damaged: ema/.*{path.name}"):
        load_trained(workdir / "checkpoints" / "9", mesh)
    (workdir / "checkpoints" / "5" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"(?s)no checkpoint is whole.*/9: .*/5: no manifest"):
        load_trained(workdir, mesh)
    assert load_trained(workdir / "checkpoints" / "5", mesh).step == 5, "when it is asked for by name"


def test_how_a_run_is_watched_may_change_when_it_is_resumed(tmp_path):
    train = TrainConfig(optim=SETTINGS, batch_size=4, steps=8)
    begin_run(tmp_path, train, MODEL)
    begin_run(tmp_path, dataclasses.replace(train, log_every=1, keep_best=2), MODEL)
    with pytest.raises(ValueError, match=r"config\.batch_size: 4 there, 2 here"):
        begin_run(tmp_path, dataclasses.replace(train, batch_size=2), MODEL)
