"""The loop: what it writes, and that a run that was cut off goes on as if it had not been."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from llm_jax.checkpoint.store import latest_step
from llm_jax.config import ModelConfig, OptimConfig, TrainConfig
from llm_jax.data.loader import PackedLoader
from llm_jax.data.packing import pack
from llm_jax.models import describe
from llm_jax.ops.losses import vocabulary_loss
from llm_jax.sharding import make_mesh
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.metrics_log import MetricsLog, read_metrics

MODEL = ModelConfig(
    "llama",
    vocab_size=20,
    num_layers=1,
    embed_dim=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=8,
    max_positions=8,
)
OPTIM = OptimConfig(0.05, warmup_fraction=0.2, ema_decay=0.9)
TRAIN = TrainConfig(batch_size=4, steps=8, log_every=2, eval_every=4, save_every=2, keep=2)


def bigram_loss(net, batch, key):
    """A model of embedding and head only, with dropout: quick to compile, and random like a real one."""
    hidden = net.embed(batch["tokens"], batch["positions"], None)
    if key is not None:
        keep = jax.random.bernoulli(key, 0.8, hidden.shape)
        hidden = jnp.where(keep, hidden, 0.0)
    loss, count, correct = vocabulary_loss(net.unembed, hidden, batch["targets"], chunk=0)
    return loss, count, {"accuracy": (correct, count)}


def run(workdir, *, loader=None, objective=bigram_loss, mesh="data:1", train=TRAIN, echo=None):
    rng = np.random.default_rng(0)
    rows = pack([rng.integers(0, 20, rng.integers(3, 9)) for _ in range(30)], 8)
    model, mesh = describe(MODEL), make_mesh(mesh)
    held_out = [{name: values[:4] for name, values in rows.items()}]
    task = Task(
        model,
        objective,
        loader or PackedLoader(rows, train.batch_size, train.seed),
        make_evaluate(model, bigram_loss, held_out, mesh),
    )
    return fit(task, train, OPTIM, mesh, workdir, steps=train.steps, echo=echo), task


def numbers(workdir):
    """The records without what differs from run to run: the time and the speed."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "time" and "perf/" not in k} for r in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir, echoed = tmp_path_factory.mktemp("whole"), []
    with jax.numpy_dtype_promotion("strict"):  # set for tests only, not for fixtures of a module
        state, task = run(workdir, echo=echoed.append)
    return workdir, state, task, echoed


def test_it_writes_what_it_promises(whole):
    workdir, state, task, echoed = whole
    records = read_metrics(workdir / "metrics.jsonl")
    assert records == echoed
    train = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in train] == [2, 4, 6, 8]
    assert train[-1].keys() >= {"time", "train/learning_rate", "train/grad_norm", "perf/tokens_per_s"}
    assert [r["step"] for r in records if "eval/loss" in r] == [4, 8]
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["6", "8"]
    assert records[-1]["eval/loss"] == task.evaluate(state.ema)["eval/loss"], "the average is judged"
    assert int(state.step) == 8


def test_tensorboard_holds_the_same_scalars(whole):
    workdir = whole[0]
    (path,) = (workdir / "tb").iterdir()
    found = {}
    for event in _events(path.read_bytes()):
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    for record in read_metrics(workdir / "metrics.jsonl"):
        for name, value in record.items():
            if "/" in name:
                assert found[name, record["step"]] == pytest.approx(value, rel=1e-6)


def _events(data):
    """TFRecord: length (8 bytes), its checksum (4), data, checksum (4)."""
    while data:
        size = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_a_run_that_was_cut_off_gives_bitwise_the_same_curve(whole, tmp_path):
    workdir, state, task, _ = whole

    def failing(step):
        if step == 5:
            raise OSError("the disk is gone")
        return task.loader(step)

    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path, loader=failing)
    assert latest_step(tmp_path / "checkpoints") == 4
    # A record after the checkpoint, and half a line: as left by a process that was killed.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "train/loss": 0.0}) + '\n{"step": 6, "tr')
    resumed, _ = run(tmp_path)
    assert numbers(tmp_path) == numbers(workdir)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


def test_a_finished_run_is_not_trained_again(whole):
    workdir, state, _, _ = whole
    before = numbers(workdir)
    again, _ = run(workdir, loader=lambda step: pytest.fail("no batch is needed"))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert numbers(workdir) == before


def test_resuming_on_another_mesh_goes_on_within_rounding(whole, tmp_path):
    def failing(step):
        if step == 4:
            raise OSError("lost")
        return whole[2].loader(step)

    with pytest.raises(OSError, match="lost"):
        run(tmp_path, loader=failing)
    run(tmp_path, mesh="data:2,fsdp:2,tensor:2")
    for ours, expected in zip(numbers(tmp_path), numbers(whole[0]), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def broken(net, batch, key):
        total = jnp.nan * net.norm.scale.get_value().sum()
        return total, jnp.ones(()), {}

    with pytest.raises(FloatingPointError, match=r"nan at step 2.*learning_rate"):
        run(tmp_path, objective=broken)


def test_without_a_terminal_each_record_is_a_line_on_stderr(tmp_path, capsys):
    with MetricsLog(tmp_path, start=0, steps=2) as log:
        log.advance()
        log.write(1, {"train/loss": 0.5, "eval/loss": 2.0})
    out, err = capsys.readouterr()
    assert out == "" and err == "step 1  loss 0.5  eval/loss 2\n"
