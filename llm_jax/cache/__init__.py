"""Key/value caches: contexts that remember keys between calls of the model."""

from llm_jax.cache.dense import DenseCache, DensePrefill, init_dense

__all__ = ["DenseCache", "DensePrefill", "init_dense"]
