"""llm_jax: fast LLM inference and training in JAX from one Flax transformer.

`import llm_jax` costs nothing; the public names below are loaded when first used.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "llm_jax.infer.llm",
    "Engine": "llm_jax.engine.engine",
    "EngineConfig": "llm_jax.config",
    "SamplingParams": "llm_jax.ops.sampling",
    "Taps": "llm_jax.ops.taps",
    "Patch": "llm_jax.ops.taps",
    "ModelConfig": "llm_jax.config",
    "load_tokenizer": "llm_jax.data.tokenizer",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llm_jax' has no attribute {name!r}; it offers {sorted(__all__)}")


def __dir__():
    return sorted(__all__)
