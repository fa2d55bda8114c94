"""How cost grows with depth, devices and size, on this machine's CPU: one measurement a process.

    python -m llm_jax.bench.scaling '{"what": "compile", "layers": 8, "devices": 4}'

A process of its own, because the number of devices is settled when JAX starts, and the most memory that
a process ever had is counted from its beginning. `measure` starts one and returns its record.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.checkpoint.store import open_checkpoints, restore
from llm_jax.config import ModelConfig, OptimConfig
from llm_jax.models import Model, describe, init_params
from llm_jax.sharding import batch_sharding, make_mesh, replicated
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import Optimizer, make_optimizer
from llm_jax.train.state import abstract_state, start_state
from llm_jax.train.step import make_train_step
from llm_jax.tree import num_bytes, num_elements

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 64  # of a row


def measure(what: str, *, layers: int = 2, embed: int = 256, devices: int = 1) -> dict[str, Any]:
    """The record of one measurement: what = "compile", "checkpoint" or "memory".

    The model is a Llama with heads of 64 and fsdp over all devices. compile: lower_s and compile_s of
    its train step. checkpoint: save_s and restore_s of its training state, bytes; blocked_s: before
    training goes on. memory: host_bytes, the most that a process has which makes the state on its shards
    and takes a step, beyond what it had before.
    """
    order = {"what": what, "layers": layers, "embed": embed, "devices": devices}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "llm_jax.bench.scaling", json.dumps(order)],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return order | json.loads(done.stdout.splitlines()[-1])


def main(order: dict[str, Any]) -> dict[str, Any]:
    """What a process finds."""
    mesh = make_mesh(f"fsdp:{order['devices']}")
    model = describe(_config(order["layers"], order["embed"]))
    optimizer = make_optimizer(OptimConfig(1e-3), model, 100)
    about = {"parameters": sum(map(num_elements, jax.tree.leaves(model.shapes)))}
    kinds = {"compile": _compile, "checkpoint": _checkpoint, "memory": _memory}
    return about | kinds[order["what"]](model, optimizer, mesh)


def _config(layers: int, embed: int) -> ModelConfig:
    heads = {"num_heads": embed // 64, "num_kv_heads": embed // 64, "head_dim": 64}
    sizes = {"embed_dim": embed, "mlp_dim": 4 * embed, "max_positions": 1024}
    return ModelConfig("llama", vocab_size=8192, num_layers=layers, **heads, **sizes)


def _lowered(model: Model, optimizer: Optimizer, mesh: Any) -> Any:
    names = ("tokens", "targets", "segment_ids", "positions")
    shape = (mesh.size, TOKENS)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, shape))
    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=replicated(mesh))
    step = make_train_step(model, lm_loss, optimizer, mesh)
    return step.lower(abstract_state(model, optimizer, mesh), dict.fromkeys(names, rows), key)


def _compile(model: Model, optimizer: Optimizer, mesh: Any) -> dict[str, Any]:
    start = time.perf_counter()
    lowered = _lowered(model, optimizer, mesh)
    middle = time.perf_counter()
    lowered.compile()
    return {"lower_s": middle - start, "compile_s": time.perf_counter() - middle}


def _checkpoint(model: Model, optimizer: Optimizer, mesh: Any) -> dict[str, Any]:
    state = start_state(init_params(model, mesh, jax.random.key(0)), model, optimizer, mesh)
    items = {"params": state.params, "train": state.opt_state}
    jax.block_until_ready(items)
    abstract = abstract_state(model, optimizer, mesh)
    like = {"params": abstract.params, "train": abstract.opt_state}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        kept = {"keep": 1, "keep_best": 0, "best_metric": "", "keep_every": 0}
        with open_checkpoints(folder, **kept) as checkpoints:
            checkpoints.save(1, items, {})
            blocked = time.perf_counter()
        saved = time.perf_counter()
        jax.block_until_ready(restore(folder, like, 1))
        restored = time.perf_counter()
    times = {"blocked_s": blocked - start, "save_s": saved - start, "restore_s": restored - saved}
    return {"bytes": num_bytes(items)} | times


def _memory(model: Model, optimizer: Optimizer, mesh: Any) -> dict[str, Any]:
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731
    before = peak()
    state = start_state(init_params(model, mesh, jax.random.key(0)), model, optimizer, mesh)
    size = num_bytes(state)
    rows = jnp.ones((mesh.size, TOKENS), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), rows)
    batch = jax.device_put(batch, batch_sharding(mesh, rows.shape))
    step = make_train_step(model, lm_loss, optimizer, mesh)
    jax.block_until_ready(step(state, batch, jax.random.key(0)))
    return {"bytes": size, "host_bytes": peak() - before}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
