"""Whole steps of Llama 3 8B's shape for a slice, as programs of the laboratory."""

import jax
import jax.numpy as jnp

from llm_jax.cache import abstract_cache
from llm_jax.cache.paged import abstract_paged
from llm_jax.compress.quantize import quantized_shapes
from llm_jax.config import ModelConfig
from llm_jax.infer.paged_steps import StepShape, make_paged_forward
from llm_jax.infer.steps import make_forward
from llm_jax.kernels.compiler_options import SERVE, compiler_options
from llm_jax.models import describe
from llm_jax.models.key_heads import served
from llm_jax.sharding import batch_sharding, make_mesh, placed
from llm_jax.tpu.case import Case

CONFIG = ModelConfig(
    "llama",
    vocab_size=128256,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    max_positions=8192,
    rope_theta=5e5,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
    cache_dtype="bfloat16",
)


def decode_step(
    devices, mesh: str = "tensor:8", batch: int = 32, context: int = 4096, weights: str = ""
) -> Case:
    """One token for each of `batch` rows of `context` tokens; lengths are not known to the count.

    weights: "" = bfloat16, or a scheme of `compress.quantize`.
    """
    grid = make_mesh(mesh, devices)
    model = served(describe(CONFIG), grid)
    params = _params(model, grid, weights)
    cache = abstract_cache(model.config, batch, context, grid)
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=batch_sharding(grid, (batch,)))
    forward = make_forward(model)

    def step(params, cache, tokens):
        with jax.sharding.use_abstract_mesh(grid.abstract_mesh):
            return forward(params, cache, tokens)

    options = compiler_options(SERVE, devices)
    return Case(jax.jit(step, donate_argnums=1), (params, cache, tokens), options=options)


def engine_step(
    devices,
    mesh: str = "tensor:8",
    rows: int = 32,
    chunk: int = 0,
    context: int = 4096,
    page: int = 128,
    weights: str = "",
) -> Case:
    """A step of the engine: a token for each of `rows` sequences and `chunk` tokens of a prompt."""
    grid, pages = make_mesh(mesh, devices), context // page
    model = served(describe(CONFIG), grid)
    params = _params(model, grid, weights)
    cache = abstract_paged(model.config, (rows * pages,), page, grid)
    shape = StepShape(rows + chunk, rows, rows, pages, 1)
    packed = jax.ShapeDtypeStruct(
        shape.empty(1)[0].shape, jnp.int32, sharding=batch_sharding(grid, (1, 1))
    )
    newest = jax.ShapeDtypeStruct((1, rows, 1), jnp.int32, sharding=batch_sharding(grid, (1, 1)))
    forward = make_paged_forward(model, shape)

    def step(params, cache, newest, packed):
        with jax.sharding.use_abstract_mesh(grid.abstract_mesh):
            return forward(params, cache, newest, packed)

    options = compiler_options(SERVE, devices)
    return Case(jax.jit(step, donate_argnums=1), (params, cache, newest, packed), options=options)


def _params(model, mesh, weights: str):
    return quantized_shapes(model, mesh, weights) if weights else placed(model.shapes, model.axes, mesh)
