"""The loop: what it writes, and that a run that was cut off goes on as if it had not been."""

import dataclasses
import json
import resource
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from llm_jax.checkpoint.store import latest_step, read_about, restore_params
from llm_jax.config import ModelConfig, OptimConfig, TrainConfig
from llm_jax.data.loader import PackedLoader
from llm_jax.data.packing import pack
from llm_jax.models import describe
from llm_jax.ops.losses import vocabulary_loss
from llm_jax.sharding import make_mesh
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.memory import buffers
from llm_jax.train.metrics_log import MetricsLog, read_metrics
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import abstract_state
from llm_jax.tree import num_elements


class Interposed:
    """A loader that does something at each step before the batch is made."""

    def __init__(self, loader, at_step):
        self.loader, self.at_step, self.fingerprint = loader, at_step, loader.fingerprint

    def __call__(self, step):
        self.at_step(step)
        return self.loader(step)


def fails(at, message):
    def at_step(step):
        if step == at:
            raise OSError(message)

    return at_step


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
TRAIN = TrainConfig(
    optim=OPTIM, batch_size=4, steps=8, log_every=2, eval_every=4, checkpoint_every=2, keep=2
)


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
    return fit(task, train, mesh, workdir, steps=train.steps, echo=echo), task


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

    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path, loader=Interposed(task.loader, fails(5, "the disk is gone")))
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
    unused = Interposed(whole[2].loader, lambda step: pytest.fail("no batch is needed"))
    again, _ = run(workdir, loader=unused)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert numbers(workdir) == before


def test_a_resume_with_other_data_is_refused_by_name(whole):
    workdir, _, task, _ = whole
    rows = {name: values[1:] for name, values in task.loader.rows.items()}
    other = dataclasses.replace(task, loader=PackedLoader(rows, TRAIN.batch_size, 1))
    with pytest.raises(
        ValueError, match=r"other batches: records: \d+ there, \d+ here; seed: 0 there, 1"
    ):
        fit(other, TRAIN, make_mesh("data:1"), workdir, steps=9)


@pytest.mark.slow
def test_a_run_that_moves_from_8_to_4_to_1_devices_goes_on_within_rounding(whole, tmp_path):
    for mesh, done in (("data:2,fsdp:2,tensor:2", 3), ("fsdp:2,tensor:2", 5)):
        with pytest.raises(OSError, match="lost"):
            run(tmp_path, mesh=mesh, loader=Interposed(whole[2].loader, fails(done, "lost")))
        assert latest_step(tmp_path / "checkpoints") == done - 1
    run(tmp_path, mesh="data:1")
    for ours, expected in zip(numbers(tmp_path), numbers(whole[0]), strict=True):
        # One float32 rounding is 6e-8; sums over devices add up in another order.
        assert ours == pytest.approx(expected, rel=1e-6)


class Poisoned(PackedLoader):
    """Batches with a number "scale" in each row, which `scaled_loss` multiplies the loss by."""

    scales: dict = {}  # position of a batch: its scale, where it is not 1

    def __call__(self, step):
        batch = super().__call__(step)
        scale = np.full(len(batch["tokens"]), self.scales.get(step, 1.0), np.float32)
        return batch | {"scale": scale}


def scaled_loss(net, batch, key):
    loss, count, metrics = bigram_loss(net, batch, key)
    return loss * batch["scale"].mean(), count, metrics


LONG = dataclasses.replace(TRAIN, steps=30, log_every=1, eval_every=0, checkpoint_every=5)


def poisoned(task, workdir, scales, **settings):
    """(what `fit` returns, its loader) with these scales of the losses."""
    loader = Poisoned(task.loader.rows, 4, 0)
    loader.scales = scales
    train = dataclasses.replace(LONG, **settings)
    return run(workdir, loader=loader, objective=scaled_loss, train=train)[0], loader


def finite(state):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.opt_state, state.ema)))


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e3])
def test_abort_stops_at_the_bad_step_and_saves_nothing_later(whole, tmp_path, scale):
    with pytest.raises(FloatingPointError, match=r"step 23 is bad: loss .*batch 22.*on_bad_loss=skip"):
        poisoned(whole[2], tmp_path, {22: scale}, spike_factor=10.0)
    assert latest_step(tmp_path / "checkpoints") == 20
    with np.load(tmp_path / "bad_batches" / "23.npz") as bad:
        np.testing.assert_array_equal(bad["tokens"], whole[2].loader(22)["tokens"])
        np.testing.assert_array_equal(bad["scale"], np.float32(scale))
        assert not bad["metrics/loss"] < 1e3


def test_skip_leaves_the_state_as_if_the_step_had_not_been(whole, tmp_path):
    """The last step is bad: its state is that of the step before, but for the count."""
    poisoned(whole[2], tmp_path / "good", {}, checkpoint_every=29)
    model, mesh, saved = describe(MODEL), make_mesh("data:1"), tmp_path / "good" / "checkpoints" / "29"
    for name, scale in (("nan", np.nan), ("spike", 1e3)):
        rules = {"on_bad_loss": "skip", "spike_factor": 10.0}
        state, _ = poisoned(whole[2], tmp_path / name, {29: scale}, **rules)
        for item, ours in (("params", state.params), ("ema", state.ema)):
            expected = restore_params(saved, model, mesh, item=item)
            jax.tree.map(np.testing.assert_array_equal, ours, expected)
        assert int(state.step) == 30 and np.isnan(state.losses[29])
        found = numbers(tmp_path / name)
        assert found[:29] == numbers(tmp_path / "good")[:29]
        assert found[29]["train/skipped_steps"] == 1 and "train/skipped_steps" not in found[28]


def test_a_run_that_skips_steps_is_resumed_exactly(whole, tmp_path):
    bad = {"scales": {7: np.nan, 11: np.nan, 23: 1e3}, "on_bad_loss": "skip", "spike_factor": 10.0}
    state, loader = poisoned(whole[2], tmp_path / "whole", **bad)
    finite(state)
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl")[-2]["train/skipped_steps"] == 3
    train = dataclasses.replace(LONG, on_bad_loss="skip", spike_factor=10.0)
    cut = Interposed(loader, fails(18, "lost"))
    with pytest.raises(OSError, match="lost"):
        run(tmp_path / "cut", loader=cut, objective=scaled_loss, train=train)
    again, _ = poisoned(whole[2], tmp_path / "cut", **bad)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_when_every_step_is_bad_skipping_ends_too(whole, tmp_path):
    with pytest.raises(FloatingPointError, match="step 50 is bad"):
        poisoned(whole[2], tmp_path, dict.fromkeys(range(90), np.nan), steps=90, on_bad_loss="skip")
    assert len(list((tmp_path / "bad_batches").iterdir())) == 20


def test_rollback_goes_on_from_the_checkpoint_with_the_batch_after_the_bad_one(whole, tmp_path):
    state, loader = poisoned(whole[2], tmp_path / "a", {12: np.nan}, on_bad_loss="rollback")
    finite(state)
    records = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [r["step"] for r in records if r.get("train/rollbacks") == 1] == list(range(11, 31))
    assert [r["step"] for r in records if "train/loss" in r] == list(range(1, 31))
    assert read_about(tmp_path / "a" / "checkpoints", 30)["position"] == 33
    # The same as a run to step 10 that goes on with a loader whose batches come 3 earlier.
    with pytest.raises(OSError, match="lost"):
        run(
            tmp_path / "b",
            loader=Interposed(loader, fails(10, "lost")),
            objective=scaled_loss,
            train=LONG,
        )

    class Later(Poisoned):
        def __call__(self, step):
            return super().__call__(step + 3)

    expected, _ = run(tmp_path / "b", loader=Later(loader.rows, 4, 0), objective=scaled_loss, train=LONG)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_rollbacks_are_bounded(whole, tmp_path):
    bad = {position: np.nan for position in (12, 16, 20, 24)}
    rules = {"on_bad_loss": "rollback", "checkpoint_every": 30}
    with pytest.raises(FloatingPointError, match="batch 20"):
        poisoned(whole[2], tmp_path / "two", bad, max_rollbacks=2, **rules)
    finite(poisoned(whole[2], tmp_path / "four", bad, max_rollbacks=4, **rules)[0])


def test_a_trace_of_the_named_steps_is_written(tmp_path):
    run(tmp_path, train=dataclasses.replace(TRAIN, profile_steps="2-3"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match=r"profile_steps='3'.*10-12"):
        dataclasses.replace(TRAIN, profile_steps="3")
    with pytest.raises(ValueError, match="profile_steps='9-10': expected steps of the run's 8"):
        run(tmp_path, train=dataclasses.replace(TRAIN, profile_steps="9-10"))


def test_a_trace_ends_with_the_run_and_goes_on_when_that_is_resumed(whole, tmp_path):
    train = dataclasses.replace(TRAIN, profile_steps="5-30")
    with pytest.raises(OSError, match="gone"):
        run(tmp_path, train=train, loader=Interposed(whole[2].loader, fails(6, "gone")))
    run(tmp_path, train=train)  # from step 6, amid those that are named
    assert numbers(tmp_path) == numbers(whole[0])
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 2


def test_weights_and_biases_gets_the_records(tmp_path, monkeypatch):
    told = []

    class Run:
        log = lambda self, numbers, step: told.append((step, numbers))  # noqa: E731
        finish = lambda self: told.append("finished")  # noqa: E731

    module = types.SimpleNamespace(init=lambda **settings: told.append(settings["project"]) or Run())
    monkeypatch.setitem(sys.modules, "wandb", module)
    with MetricsLog(tmp_path, start=0, steps=1, project="mine") as log:
        log.write(1, {"train/loss": 0.5})
    assert told == ["mine", (1, {"train/loss": 0.5}), "finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
    with pytest.raises(ValueError, match="wandb_project='mine'.*pip install wandb"):
        MetricsLog(tmp_path, start=0, steps=1, project="mine")


def test_metrics_wait_for_room_on_the_disk(tmp_path, caplog):
    """A file size limit is a full disk of a single file: writes are cut short, then refused."""
    log = MetricsLog(tmp_path, start=0, steps=3)
    log.write(1, {"train/loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        log.write(2, {"train/loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "wait to be written" in caplog.text
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert (tmp_path / "metrics.jsonl").stat().st_size == size, "no half a line"
    with log:
        log.write(3, {"train/loss": 3.0})
    assert [r["train/loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]
    found = {
        e.step: e.summary.value[0].simple_value
        for p in (tmp_path / "tb").iterdir()
        for e in _events(p.read_bytes())
        if e.summary.value
    }
    assert found == {1: 1.0, 2: 2.0, 3: 3.0}


def test_a_full_disk_does_not_stop_training_and_is_counted(whole, tmp_path):
    """No file may grow beyond 1000 bytes at the save of step 4; later there is room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def at_step(step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        if step == 7:  # batches are made two steps ahead
            time.sleep(1.0)  # so that the save has met the limit
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        state, _ = run(tmp_path, loader=Interposed(whole[2].loader, at_step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    jax.tree.map(np.testing.assert_array_equal, state, whole[1])
    found = numbers(tmp_path)
    failures = [record.pop("checkpoint/failures", 0) for record in found]
    assert found == numbers(whole[0]) and max(failures) >= 1
    assert latest_step(tmp_path / "checkpoints") == 8
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_a_run_whose_last_checkpoint_is_lost_says_so(whole, tmp_path):
    """The directory goes away; training ends, and so does its log, but not as if all was well."""

    def at_step(step):
        if step == 5:
            time.sleep(1.0)  # so that the save of step 2 is committed
            (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
            (tmp_path / "checkpoints").write_text("no directory")

    with pytest.raises(OSError, match="not saved: the checkpoint of step 8 could not be written"):
        run(tmp_path, loader=Interposed(whole[2].loader, at_step))
    assert [r["step"] for r in numbers(tmp_path)] == [r["step"] for r in numbers(whole[0])]
    assert latest_step(tmp_path / "elsewhere") in (2, 4)


def test_out_of_memory_names_the_largest_buffers_and_what_shrinks_them(whole, tmp_path):
    """A product of 2^46 numbers, which no machine has: XLA's own error."""

    def enormous(net, batch, key):
        loss, count, metrics = bigram_loss(net, batch, key)
        many = jnp.broadcast_to(loss, (1 << 23,)) * jnp.arange(1.0, 1 + (1 << 23))
        table = jnp.outer(many, many)
        return loss + (table @ table)[3, 5], count, metrics

    message = (
        r"(?s)does not fit.*activations: .*accumulate.*optimizer state: .*fsdp.*says: RESOURCE_EXHAUSTED"
    )
    with pytest.raises(MemoryError, match=message):
        run(tmp_path, loader=whole[2].loader, objective=enormous)


def test_buffers_are_exact_where_shapes_tell(whole):
    """On one device and on two: the parameters, as many gradients, and Adam's two moments."""
    model = describe(MODEL)
    train = dataclasses.replace(TRAIN, optim=OptimConfig(0.1))
    optimizer, numbers = make_optimizer(train.optim, model, 8), num_elements(model.shapes)
    held = {}
    for mesh in ("data:1", "fsdp:2"):
        on = make_mesh(mesh)
        held[mesh] = buffers(model, abstract_state(model, optimizer, on), train, on, 8)
    assert held["data:1"]["parameters and gradients"][0] == 2 * 4 * numbers
    assert 2 * 4 * numbers <= held["data:1"]["optimizer state"][0] < 2 * 4 * numbers + 64
    assert held["data:1"]["logits"][0] == 2 * 4 * (4 * 8) * 20
    assert held["fsdp:2"]["logits"][0] == held["data:1"]["logits"][0] / 2
    half = held["fsdp:2"]["parameters and gradients"][0] / held["data:1"]["parameters and gradients"][0]
    assert 0.5 <= half < 0.6, "small leaves stay whole"


def test_without_a_terminal_each_record_is_a_line_on_stderr(tmp_path, capsys):
    with MetricsLog(tmp_path, start=0, steps=2) as log:
        log.advance()
        log.write(1, {"train/loss": 0.5, "eval/loss": 2.0})
    out, err = capsys.readouterr()
    assert out == "" and err == "step 1  loss 0.5  eval/loss 2\n"
