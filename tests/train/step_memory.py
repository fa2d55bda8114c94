"""Memory that the compiler plans for a train step of GPT-2's shape: loss_chunk, remat, compute_dtype.

    python tests/train/step_memory.py            on this machine's first device
    python tests/train/step_memory.py v5e:2x2    on a TPU that is not there (pip install "jax[tpu]")

Prints a JSON object a case; `temp_bytes` is what the step holds besides the state and the batch.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from llm_jax.config import ModelConfig, OptimConfig
from llm_jax.models import describe
from llm_jax.sharding import batch_sharding, make_mesh, replicated
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import abstract_state
from llm_jax.train.step import make_train_step

GPT2 = ModelConfig(
    "gpt2",
    vocab_size=50257,
    num_layers=12,
    embed_dim=768,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    mlp_dim=3072,
    max_positions=1024,
    positions="learned",
    norm="layer",
    norm_eps=1e-5,
    activation="gelu_tanh",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
    param_dtype="float32",  # master weights
    compute_dtype="float32",
)
REMATS = ("none", "dots", "dots_no_batch", "full")
CASES = [
    *({"loss_chunk": chunk} for chunk in (0, 64)),
    *({"vocab_size": 151_936, "loss_chunk": chunk} for chunk in (0, 64)),
    *(
        {"vocab_size": 151_936, "rows": 8, "length": 1024, "remat": "full", "loss_chunk": chunk}
        for chunk in (0, 128)
    ),
    *(
        {"remat": remat, "compute_dtype": dtype, "loss_chunk": 64}
        for dtype in ("float32", "bfloat16")
        for remat in REMATS
    ),
]


def temporary_bytes(config, mesh, *, rows=4, length=256, loss_chunk=0):
    """Bytes on one device that a step of AdamW holds besides its arguments and results."""
    model = describe(config)
    optimizer = make_optimizer(OptimConfig(1e-3), model, 100)
    step = make_train_step(model, functools.partial(lm_loss, chunk=loss_chunk), optimizer, mesh)
    shape, place = (rows, length), batch_sharding(mesh, (rows, length))
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for name in names}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    analysis = step.lower(abstract_state(model, optimizer, mesh), batch, key).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def main(topology=""):
    devices = jax.devices()
    if topology:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh("data:1", devices[:1])
    for case in CASES:
        fields = {name: case[name] for name in case if hasattr(GPT2, name)}
        others = {name: case[name] for name in case if not hasattr(GPT2, name)}
        size = temporary_bytes(dataclasses.replace(GPT2, **fields), mesh, **others)
        print(json.dumps(case | {"temp_bytes": size}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
