"""A training run in a process of its own, small enough to be killed many times.

    python tests/train/tiny_run.py WORKDIR [SETTINGS, a JSON object of what main takes]

A model of embedding and head only, with dropout, learns random rows. Every batch that the loader makes
is noted in WORKDIR/batches.txt as "step: records".
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.checkpoint import store
from llm_jax.config import ModelConfig, OptimConfig, TrainConfig
from llm_jax.data.loader import PackedLoader
from llm_jax.data.packing import pack
from llm_jax.models import describe
from llm_jax.ops.losses import vocabulary_loss
from llm_jax.sharding import make_mesh
from llm_jax.train.loop import Task, fit, make_evaluate

MODEL = ModelConfig(
    "llama",
    vocab_size=24,
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
    optim=OPTIM, batch_size=8, steps=24, log_every=1, eval_every=6, checkpoint_every=3, keep=2
)


def bigram_loss(net, batch, key):
    """Quick to compile, and random like a real model."""
    hidden = net.embed(batch["tokens"], batch["positions"], None)
    if key is not None:
        keep = jax.random.bernoulli(key, 0.8, hidden.shape)
        hidden = jnp.where(keep, hidden, 0.0)
    loss, count, correct = vocabulary_loss(net.unembed, hidden, batch["targets"], chunk=0)
    return loss, count, {"accuracy": (correct, count)}


def rows():
    rng = np.random.default_rng(0)
    return pack([rng.integers(0, 24, rng.integers(3, 9)) for _ in range(120)], 8)


class NotedLoader(PackedLoader):
    """Notes the records of every batch that it makes in a file."""

    path = Path("batches.txt")

    def __call__(self, step):
        with self.path.open("a") as file:
            file.write(f"{step}: {' '.join(map(str, self.order.indices(step)))}\n")
        return super().__call__(step)


def die_in_save(step):
    """Have the process killed when the arrays of this step are written and the manifest is not."""
    write = store.write_manifest

    def write_or_die(directory, about):
        if directory.name.split(".")[0] == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        write(directory, about)

    store.write_manifest = write_or_die


def main(workdir, *, mesh="data:1", die_at_save=None, layers=0, linger=0.0, **train):
    """layers: useless ones that take long to compile; linger: seconds that an evaluation takes besides.

    The file WORKDIR/marker appears when these are reached.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if die_at_save is not None:
        die_in_save(die_at_save)
    model, mesh, data = describe(MODEL), make_mesh(mesh), rows()
    config = dataclasses.replace(TRAIN, **train)
    loader = NotedLoader(data, config.batch_size, config.seed)
    loader.path = workdir / "batches.txt"
    held_out = [{name: values[:8] for name, values in data.items()}]
    evaluate = make_evaluate(model, bigram_loss, held_out, mesh)

    def objective(net, batch, key):
        loss, count, metrics = bigram_loss(net, batch, key)
        waste = loss
        for n in range(layers):
            waste = jnp.linalg.qr(jnp.sin(waste * n) + jnp.eye(8 + n % 50))[0].sum()
        if layers:
            (workdir / "marker").touch()
        return loss + 0.0 * waste, count, metrics

    def slow_evaluate(params):
        if linger:
            (workdir / "marker").touch()
            time.sleep(linger)
        return evaluate(params)

    task = Task(model, objective if layers else bigram_loss, loader, slow_evaluate)
    fit(task, config, mesh, workdir, steps=config.steps)


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))
