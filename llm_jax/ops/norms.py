"""Normalisation over the last axis, computed in float32 and returned in the dtype of x."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float, plus_one: bool) -> jax.Array:
    """x [..., D], scale [D] -> [..., D] (Zhang & Sennrich 2019); plus_one scales by 1 + scale."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    weight = scale.astype(jnp.float32) + (1.0 if plus_one else 0.0)
    return (y * _like(weight, y)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float) -> jax.Array:
    """x [..., D], scale and bias [D] -> [..., D] (Ba et al. 2016)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y * _like(scale.astype(jnp.float32), y) + _like(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """[D] -> [1, ..., D], explicit because rank promotion is an error in our tests."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
