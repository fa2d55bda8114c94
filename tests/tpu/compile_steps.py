"""Compile the prefill, decode and train steps for TPU chips that are not there.

    python tests/tpu/compile_steps.py TOPOLOGY MESH        e.g. v5e:2x2 data:1,tensor:4

libtpu compiles on any machine. Prints one JSON object per step of the models: `model`, `step`,
`argument_bytes` and `temp_bytes` (of one device), `collectives` and Pallas `kernels` (names in the final
program). A mesh with stages has a train step alone.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from llm_jax.cache import abstract_cache
from llm_jax.compress.quantize import quantized_shapes
from llm_jax.config import ModelConfig, OptimConfig
from llm_jax.infer.steps import DecodeState, make_decode, make_prefill
from llm_jax.models import describe
from llm_jax.models.key_heads import served
from llm_jax.ops.sampling import SamplingParams, pack
from llm_jax.sharding import batch_sharding, make_mesh, replicated
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import abstract_state
from llm_jax.train.step import make_train_step

COLLECTIVE = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
KERNEL = r'%([a-z_]+)[.\d]* = [^\n]* custom-call\([^\n]*custom_call_target="tpu_custom_call"'
BATCH, PROMPT, CACHE = 8, 128, 256
# Of Gemma's type: full and window layers, soft caps, norms before and after.
CONFIG = ModelConfig(
    family="gemma2",
    vocab_size=1024,
    num_layers=4,
    embed_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=512,
    max_positions=1024,
    windows=(128, 0, 128, 0),
    attn_softcap=50.0,
    final_softcap=30.0,
    norm_position="sandwich",
    tie_embeddings=True,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
    cache_dtype="bfloat16",
)

# Every layer alike, so that attention within a batch is a Pallas kernel.
PLAIN = dataclasses.replace(
    CONFIG,
    family="llama",
    windows=(),
    attn_softcap=None,
    final_softcap=None,
    norm_position="pre",
)

MIXTURE = dataclasses.replace(PLAIN, family="mixtral", num_experts=8, experts_per_token=2)


def lowered(config: ModelConfig, mesh, weights: str = ""):
    """(step, what to compile) of one model; without training where `weights` are rounded."""
    if mesh.shape["stage"] == 1:
        yield from lowered_generation(config, mesh, weights)
    if not weights:
        yield "train", lowered_training(config, mesh)


def lowered_generation(config: ModelConfig, mesh, weights: str):
    """("prefill" and "decode", what to compile)."""
    model, whole = served(describe(config), mesh), replicated(mesh)
    params = jax.tree.map(_placed, model.shapes, model.shardings(mesh))
    params = quantized_shapes(model, mesh, weights) if weights else params
    cache = abstract_cache(model.config, BATCH, CACHE, mesh)
    with jax.set_mesh(mesh):
        tokens, lengths = _rows(mesh, BATCH, PROMPT), _rows(mesh, BATCH)
        yield "prefill", make_prefill(model).lower(params, cache, tokens, lengths)

    ids = [[1, 2, 3]] * BATCH
    packed, features = pack(
        [SamplingParams(temperature=0.7, top_p=0.9, top_k=50)] * BATCH,
        ids,
        vocab_size=config.vocab_size,
        sample_index=[0] * BATCH,
        stop_ids=[[2]] * BATCH,
        default_seed=0,
    )
    zeros = np.zeros(BATCH, np.int32)
    state = DecodeState(zeros, zeros > 0, zeros, zeros[:, None], packed)
    state = jax.tree.map(lambda x: _placed(x, batch_sharding(mesh, x.shape)), state)
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    with jax.set_mesh(mesh):
        yield "decode", make_decode(model, features, 8).lower(params, cache, state, steps)


def lowered_training(config: ModelConfig, mesh):
    """The train step."""
    master = describe(dataclasses.replace(config, param_dtype="float32"))
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-3), master, 100)
    batch = {k: _rows(mesh, BATCH, PROMPT) for k in ("tokens", "targets", "segment_ids", "positions")}
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(master, lm_loss, optimizer, mesh)
    state = abstract_state(master, optimizer, mesh)
    return step.lower(state, batch, _placed(key, replicated(mesh)))


def _rows(mesh, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, shape))


def _placed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def main(topology: str, shape: str) -> None:
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}  # one device a chip
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    mesh = make_mesh(shape, found.devices)
    models = {"gemma2": (CONFIG,), "llama": (PLAIN,), "mixtral": (MIXTURE,)}
    models |= {"int8": (PLAIN, "int8"), "w8a8": (PLAIN, "w8a8")}
    if topology.startswith(
        "tpu7x"
    ):  # libtpu 0.0.42 crashes there; tests/plan has a newer one compile it
        del models["mixtral"]
    for name, model in models.items():
        for step, program in lowered(model[0], mesh, *model[1:]):
            compiled = program.compile()
            memory, text = compiled.memory_analysis(), compiled.as_text()
            record = {
                "model": name,
                "step": step,
                "argument_bytes": memory.argument_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
                "collectives": sorted(set(re.findall(COLLECTIVE, text))),
                "kernels": sorted(set(re.findall(KERNEL, text))),
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
