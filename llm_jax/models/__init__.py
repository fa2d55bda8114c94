"""The model: configuration in, pure functions of parameters out."""

from llm_jax.models.describe import (
    Model,
    Params,
    Trainable,
    complete_params,
    describe,
    init_params,
)

__all__ = ["Model", "Params", "Trainable", "complete_params", "describe", "init_params"]
