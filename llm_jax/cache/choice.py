"""Which contiguous cache a fixed batch gets: tiles where there is a kernel, else heads-major arrays."""

from jax.sharding import Mesh

from llm_jax.cache.dense import DenseCache, abstract_dense
from llm_jax.cache.tiled import TiledCache, abstract_tiled, why_not_tiled
from llm_jax.config import ModelConfig
from llm_jax.kernels.choice import kernel_refusal
from llm_jax.sharding import zeros

Cache = DenseCache | TiledCache


def abstract_cache(
    config: ModelConfig, batch: int, size: int, mesh: Mesh, *, per_layer: bool = False
) -> Cache:
    """Shapes, dtypes and shardings of what `init_cache` allocates, for compiling ahead of time."""
    kind = mesh.devices.flat[0].device_kind
    tensor = mesh.shape["tensor"]
    why_not = kernel_refusal(kind, config.head_dim) or why_not_tiled(config, size)
    if not why_not and config.num_heads % tensor:  # lanes would be split where heads are not
        why_not = f"tensor={tensor} does not divide num_heads={config.num_heads}"
    if config.attention == "pallas" and why_not:
        raise ValueError(f"attention='pallas': {why_not}; take 'auto' or 'xla'")
    if config.attention == "xla" or why_not:
        return abstract_dense(config, batch, size, mesh, per_layer=per_layer)
    return abstract_tiled(config, batch, size, mesh)


def init_cache(
    config: ModelConfig, batch: int, size: int, mesh: Mesh, *, per_layer: bool = False
) -> Cache:
    """An empty cache for `batch` sequences of up to `size` tokens, born on its shards.

    per_layer: one array per layer instead of a stack, for unrolled layers (see `tree.PerLayer`).
    Raises ValueError when windowed layers differ in their window, and for `attention` that cannot be.
    """
    return zeros(abstract_cache(config, batch, size, mesh, per_layer=per_layer))
