"""Orbax checkpoints: onto another mesh, whole or not at all, and errors that say what is wrong."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import store
from llm_jax.config import ModelConfig, OptimConfig
from llm_jax.models import describe
from llm_jax.sharding import make_mesh
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import abstract_state, start_state

CONFIG = ModelConfig(
    "llama",
    vocab_size=24,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    mlp_dim=8,
    max_positions=8,
    param_dtype="float32",
)


def random_params(model, mesh, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s, sharding: jax.device_put(rng.normal(size=s.shape).astype(s.dtype), sharding),
        model.shapes,
        model.shardings(mesh),
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory with steps 3 and 4, the state saved there on data:2,tensor:2, model, optimizer)."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    model = describe(CONFIG)
    optimizer = make_optimizer(OptimConfig(1e-3, ema_decay=0.9), model, 10)
    mesh = make_mesh("data:2,tensor:2")
    state = start_state(random_params(model, mesh), model, optimizer, mesh)
    with opened(directory, keep=2) as checkpoints:
        for step in (2, 3, 4):
            checkpoints.save(step, items(state), {"position": step})
    return directory, state, model, optimizer


def opened(directory, *, keep=1, keep_best=0, best_metric="eval/loss", keep_every=0):
    rules = {"keep": keep, "keep_best": keep_best, "best_metric": best_metric, "keep_every": keep_every}
    return store.open_checkpoints(directory, **rules)


def items(state):
    rest = {"step": state.step, "opt_state": state.opt_state}
    return {"params": state.params, "ema": state.ema, "train": rest}


@pytest.mark.parametrize("mesh", ["tensor:4", "data:1", "data:2,fsdp:2,tensor:2"])
def test_state_is_restored_onto_another_mesh(saved, mesh):
    directory, state, model, optimizer = saved
    like = items(abstract_state(model, optimizer, make_mesh(mesh)))
    restored = store.restore(directory, like, 4)
    assert jax.tree.structure(restored) == jax.tree.structure(items(state))
    equal(restored, items(state))
    jax.tree.map(lambda x, s: _placed(x, s), restored, like)


def _placed(x, like):
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim) and x.dtype == like.dtype


def test_only_the_newest_are_kept_and_any_of_them_is_read(saved):
    directory, state, model, _ = saved
    assert sorted(p.name for p in directory.iterdir()) == ["3", "4"]
    assert store.latest_step(directory) == 4
    like = {"params": store.abstract_params(model, make_mesh("data:1"))}
    equal(store.restore(directory, like, 3)["params"], state.params)
    assert store.read_about(directory, 3) == {"position": 3}


def test_inference_reads_the_parameters_alone_in_its_own_dtype(saved):
    directory, state, _, _ = saved
    model = describe(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
    params = store.restore_params(directory / "4", model, make_mesh("tensor:2"), item="ema")
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float32(a), b, rtol=2**-8), params, state.ema
    )


def test_parameters_alone_are_saved_and_restored(tmp_path):
    model, mesh = describe(CONFIG), make_mesh("fsdp:2")
    params = random_params(model, mesh, 1)
    store.save_params(tmp_path, params)
    equal(store.restore_params(tmp_path, model, make_mesh("tensor:4")), params)


def test_a_save_that_did_not_end_is_not_seen(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    half = directory / "9.orbax-checkpoint-tmp" / "params.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    assert store.latest_step(directory) is None
    like = {"params": store.abstract_params(saved[2], make_mesh("data:1"))}
    with pytest.raises(FileNotFoundError, match=r"no step 9 in .*9\.orbax-checkpoint-tmp"):
        store.restore(directory, like, 9)
    with pytest.raises(FileNotFoundError, match="no directory"):
        store.restore(tmp_path / "nowhere", like, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_dim": 12}, r"mlp/down.*\(2, 16, 8\).*\(2, 16, 12\)"),
        ({"qkv_bias": True}, "lacks.*attn/bq"),
    ],
)
def test_another_model_is_refused_by_name(saved, change, message):
    model = describe(dataclasses.replace(CONFIG, **change))
    with pytest.raises(ValueError, match=message):
        store.restore_params(saved[0] / "4", model, make_mesh("data:1"))


def test_a_missing_item_is_refused(saved, tmp_path):
    store.save_params(tmp_path, random_params(saved[2], make_mesh("data:1")))
    with pytest.raises(FileNotFoundError, match=r"holds no 'ema'.*found.*params"):
        store.restore_params(tmp_path, saved[2], make_mesh("data:1"), item="ema")


def test_saving_something_else_is_refused(saved, tmp_path):
    with opened(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"\['weights'\].*params"):
            checkpoints.save(1, {"weights": saved[1].params}, {})
    assert os.listdir(tmp_path) == []


ONES = {"params": {"w": np.ones((64, 64), np.float32)}}  # quick to write


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("eval/loss", {1: 0.9, 2: 0.2, 3: 0.8, 4: 0.3, 5: 0.7, 6: 0.6}, [2, 4]),
        ("eval/accuracy", {1: 0.9, 2: 0.2, 3: 0.8, 4: 0.3, 5: 0.7, 6: 0.6}, [1, 3]),
        ("eval/accuracy", {2: 0.2}, [2]),  # the others were not evaluated
        ("eval/loss", {1: float("nan"), 2: 0.5, 3: float("nan")}, [2]),
    ],
)
def test_the_best_the_newest_and_the_multiples_stay(tmp_path, metric, values, best):
    rules = {"keep": 1, "keep_best": 2, "best_metric": metric, "keep_every": 5}
    for steps in ((1, 2, 3, 4), (5, 6)):  # opened twice: the scores are read from the manifests
        with opened(tmp_path, **rules) as checkpoints:
            for step in steps:
                about = {"metrics": {metric: values[step]} if step in values else {}}
                checkpoints.save(step, ONES, about)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == sorted({*best, 5, 6})


def test_a_metric_that_the_evaluation_does_not_have_is_refused(tmp_path):
    with opened(tmp_path, keep_best=1, best_metric="eval/f1") as checkpoints:
        with pytest.raises(ValueError, match=r"best_metric='eval/f1'.*\['eval/loss'\]"):
            checkpoints.save(1, ONES, {"metrics": {"eval/loss": 1.0}})


@pytest.fixture
def three(tmp_path):
    with opened(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, ONES, {"position": step})
    return tmp_path


def flip(path):
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_damage_to_any_file_is_noticed_and_the_step_before_is_taken(three, caplog):
    """Each file of the newest step in turn: one bit of it flipped, cut to its half, removed."""
    files = [p for p in (three / "3").rglob("*") if p.is_file() and p.parent != three / "3"]
    files.append(three / "3" / "manifest.json")
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        for spoil in (flip, lambda p: os.truncate(p, p.stat().st_size // 2), os.unlink):
            if not whole:
                continue  # nothing to flip or to cut
            caplog.clear()
            spoil(path)
            assert store.latest_step(three) == 2, path
            assert path.name in caplog.text and "DAMAGED" in caplog.text
            path.write_bytes(whole)
    assert store.latest_step(three) == 3


def test_a_damaged_step_is_put_aside_and_its_number_is_free_again(three):
    (three / "3" / "params" / "_METADATA").unlink()
    with opened(three, keep=3) as checkpoints:
        assert checkpoints.newest == 2
        checkpoints.save(3, ONES, {"position": 30})
    assert store.read_about(three, 3) == {"position": 30}
    assert (three / "3.damaged").is_dir() and store.latest_step(three) == 3


def test_damage_to_what_only_orbax_reads_is_no_hindrance(three):
    """Its notes on the step are written after the manifest; nothing of ours is read from them."""
    (three / "3" / "_CHECKPOINT_METADATA").write_text("{")
    with opened(three, keep=3) as checkpoints:
        assert checkpoints.newest == 3


def test_when_no_step_is_whole_the_error_names_them_all(three):
    flip(three / "1" / "manifest.json")
    (three / "2" / "manifest.json").unlink()
    os.truncate(three / "3" / "params" / "manifest.ocdbt", 3)
    message = r"(?s)/3: params/manifest\.ocdbt: 3 bytes.*/2: no manifest.*/1: manifest\.json.*anew"
    with pytest.raises(ValueError, match=message):
        store.latest_step(three)
    with pytest.raises(ValueError, match=message):
        opened(three)
    assert sorted(os.listdir(three)) == ["1", "2", "3"], "nothing is thrown away"


def test_a_step_that_is_named_is_checked_too(three, caplog):
    store.check_step(three, 3)
    assert not caplog.text
    (three / "2" / "manifest.json").unlink()
    store.check_step(three, 2)
    assert "no manifest" in caplog.text
    flip(three / "3" / "params" / "_METADATA")
    with pytest.raises(ValueError, match=r"3 is damaged: params/_METADATA: its checksum"):
        store.check_step(three, 3)


def test_a_save_that_fails_midway_leaves_nothing_and_harms_nothing(three, monkeypatch, caplog):
    """The manifest is the last file: with it, the disk is full."""

    def full(directory, about):
        assert sum(p.stat().st_size for p in directory.rglob("*")) > 10_000, "the arrays are written"
        raise OSError(28, "No space left on device")

    with opened(three, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_manifest", full)
            checkpoints.save(4, ONES, {})
            checkpoints.wait()
            assert checkpoints.failures == 1
            assert "step 4" in checkpoints.lost and "No space left" in checkpoints.lost
            assert "No space left" in caplog.text
            assert store.latest_step(three) == 3 and "4" not in "".join(os.listdir(three))
        checkpoints.save(5, ONES, {})
        checkpoints.wait()
        assert (checkpoints.failures, checkpoints.lost) == (1, "")
    assert os.listdir(three) == ["5"], "what was to go when step 4 was there has gone now"


def test_an_unwritable_place_is_refused_when_it_is_opened(tmp_path):
    (tmp_path / "checkpoints").write_text("a file, not a directory")
    with pytest.raises(OSError, match="checkpoints"):
        opened(tmp_path / "checkpoints")
