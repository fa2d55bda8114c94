"""Steps of models for tests/kernels/gpu_compiler.py: Llama 3 8B with fewer layers, on one GPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import SamplingParams
from llm_jax.cache.choice import abstract_cache
from llm_jax.cache.paged import abstract_paged
from llm_jax.config import EngineConfig, ModelConfig
from llm_jax.engine.programs import Buckets
from llm_jax.infer.generate import _first_state
from llm_jax.infer.paged_steps import make_paged_forward
from llm_jax.infer.steps import make_decode, make_prefill
from llm_jax.kernels.cases import KernelCase
from llm_jax.models import Model, describe
from llm_jax.sharding import make_mesh
from llm_jax.tree import PerLayer

PAGE = 32
LLAMA = ModelConfig(
    "llama",
    128256,
    2,
    4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    max_positions=16384,
    tie_embeddings=False,
)


def step(
    which: str, layers: int = 2, batch: int = 1, context: int = 1024, apart: bool = True
) -> KernelCase:
    """which: "engine", a step of single tokens through pages; "decode", eight tokens of a fixed batch;
    "prefill", prompts of `context` tokens. apart: each layer has arrays of its own, as `LLM` has them.
    """
    config = dataclasses.replace(LLAMA, num_layers=layers).with_dtypes("gpu")
    model, mesh = describe(config), make_mesh("data:1", jax.devices())
    function, args = {"engine": engine, "decode": decode, "prefill": prefill}[which](
        model, mesh, batch, context
    )
    params: dict[str, Any] = dict(model.shapes)
    if apart:
        params["layers"] = jax.tree.map(split, params["layers"])

    def run(params, cache, *rest):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(params, cache, *rest)

    return KernelCase(jax.jit(run, donate_argnums=1), (params, *args))


def split(x: jax.ShapeDtypeStruct) -> PerLayer:
    return PerLayer(tuple(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for _ in range(x.shape[0])))


def engine(model: Model, mesh: Any, batch: int, context: int):
    pages = -(-context // PAGE)
    config = EngineConfig(max_rows=batch, token_budget=2048, page_size=PAGE)
    alignment = Buckets.row_alignment(jax.devices()[0].device_kind, model.config)
    shape = Buckets.of(config, pages, 1, alignment).shape(batch, 0)
    cache = abstract_paged(model.config, (batch * pages,), PAGE, mesh)
    newest, packed = jnp.zeros((1, shape.rows, 1), jnp.int32), shape.empty(1)[0]
    return make_paged_forward(model, shape), (cache, newest, packed)


def decode(model: Model, mesh: Any, batch: int, context: int):
    asked = [SamplingParams(max_new_tokens=64, temperature=0)] * batch
    rows = [(i, 0) for i in range(batch)]
    state, features = _first_state(model, [[1]] * batch, asked, [[2]] * batch, rows, batch, 0)
    cache = abstract_cache(model.config, batch, context, mesh)
    return make_decode(model, features, 8), (cache, state, jnp.zeros((), jnp.int32))


def prefill(model: Model, mesh: Any, batch: int, context: int):
    cache = abstract_cache(model.config, batch, context + 256, mesh)
    tokens = jnp.zeros((batch, context), jnp.int32)
    return make_prefill(model), (cache, tokens, jnp.zeros(batch, jnp.int32))
