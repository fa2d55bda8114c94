"""Key/value caches: contexts that remember keys between calls of the model."""

from llm_jax.cache.choice import Cache, abstract_cache, init_cache
from llm_jax.cache.dense import DenseCache, DensePrefill, init_dense
from llm_jax.cache.tiled import TiledCache, TiledPrefill

__all__ = [
    "Cache",
    "DenseCache",
    "DensePrefill",
    "TiledCache",
    "TiledPrefill",
    "abstract_cache",
    "init_cache",
    "init_dense",
]
