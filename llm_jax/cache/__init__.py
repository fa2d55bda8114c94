"""Key/value caches: contexts that remember keys between calls of the model."""

from llm_jax.cache.choice import Cache, abstract_cache, init_cache
from llm_jax.cache.dense import DenseCache, Prefill
from llm_jax.cache.paged import PagedCache
from llm_jax.cache.tiled import TiledCache

__all__ = [
    "Cache",
    "DenseCache",
    "PagedCache",
    "Prefill",
    "TiledCache",
    "abstract_cache",
    "init_cache",
]
