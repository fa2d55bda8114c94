"""Rotary position embedding (Su et al. 2021) and the rules that stretch it to longer contexts."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """(radians per token [H/2] float32, factor on cos and sin).

    Sources: linear, Chen et al. 2023; llama3, the Llama 3.1 release; yarn, Peng et al. 2023.
    """
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return inverse.astype(np.float32), 1.0
    if scaling.kind == "linear":
        return (inverse / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        return _llama3(inverse, scaling).astype(np.float32), 1.0
    return _yarn(inverse, head_dim, theta, scaling)


def _llama3(inverse: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones kept, those between blended linearly."""
    turns = scaling.original_max_positions * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


def _yarn(
    inverse: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[np.ndarray, float]:
    """Dimensions that turn often keep their frequency, slow ones are interpolated."""

    def dimension(turns: float) -> float:  # the dimension that makes `turns` turns in the context
        waves = scaling.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    blended = inverse / scaling.factor * ramp + inverse * (1 - ramp)
    attention = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return blended.astype(np.float32), attention


def rotary_tables(
    positions: jax.Array, inverse: np.ndarray, factor: float
) -> tuple[jax.Array, jax.Array]:
    """positions [B, T] -> cos, sin [B, T, H/2] float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse.reshape(1, 1, -1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, T, N, H] by cos, sin [B, T, H/2]; pairs are (i, i + H/2), as Hugging Face has."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
