"""What a quantized matmul computes, in plain jax.numpy."""

import jax
import jax.numpy as jnp

ACTIVATIONS = {  # by the names of a model's config; float32
    "silu": lambda x: x * jax.nn.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": lambda x: jnp.maximum(x, 0.0),
}


def dequantize(w: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The weights [K, N] in `dtype`: w [K, N] times scale [N], or [K / group, N] for groups of rows."""
    if scale.ndim == 2:
        scale = jnp.repeat(scale, w.shape[0] // scale.shape[0], axis=0)
    else:
        scale = scale[None]
    return (w.astype(jnp.float32) * scale).astype(dtype)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [M, K], scale [M, 1] float32) of x [M, K]: the largest of each row becomes 127."""
    exact = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(exact), axis=-1, keepdims=True) * (1 / 127)
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    return jnp.round(exact * inverse).astype(jnp.int8), scale


def finish(
    y: jax.Array, bias: jax.Array | None, residual: jax.Array | None, activation: str | None
) -> jax.Array:
    """activation(y + bias) + residual, float32; y [M, N], bias [1, N], residual [M, N]."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.astype(jnp.float32)


def reference_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: str | None = None,
    quantize_x: bool = False,
) -> jax.Array:
    """activation(x w + bias) + residual [M, N] in the dtype of x, sums in float32.

    x [M, K]; w [K, N] and scale as in `dequantize`; bias [N], residual [M, N]. quantize_x: each row of x
    is rounded to int8 first (`quantize_rows`).
    """
    if quantize_x:
        rows, row_scale = quantize_rows(x)
        weights = dequantize(w, scale, jnp.float32)
        y = jnp.matmul(rows.astype(jnp.float32), weights, precision="highest") * row_scale
    elif scale.ndim == 1:  # what is common to a column is multiplied in last, so the weights stay exact
        y = jnp.matmul(x, w.astype(x.dtype), precision="highest", preferred_element_type=jnp.float32)
        y = y * scale[None]
    else:
        weights = dequantize(w, scale, x.dtype)
        y = jnp.matmul(x, weights, precision="highest", preferred_element_type=jnp.float32)
    return finish(y, None if bias is None else bias[None], residual, activation).astype(x.dtype)
