"""The same product by multiplying int8 with int8 alone, which XLA:CPU does as fast as it reads weights.

Converting weights to floats takes a CPU longer than the product itself where rows are few. Activations
become integers instead: rounded once if that is asked for, else as numbers of base 254 with three digits
(float32; two for 16 bits), as exact as their sum in their own dtype. The digits are rows of one product.
"""

import jax
import jax.numpy as jnp

from llm_jax.kernels.quantized_matmul.reference import finish, quantize_rows

BASE = 254  # what a digit leaves over is at most half of it: 127 after multiplying
MOST_DEPTH = (2**31 - 1) // (127 * 128)  # of a sum that int32 holds


def integer_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    activation: str | None = None,
    quantize_x: bool = False,
    transposed: bool = False,
) -> jax.Array:
    """As `reference_matmul`, for int8 and int4 w [K, N], K up to `MOST_DEPTH`, and scale [N].

    transposed: w is [N, K], which XLA:CPU multiplies by up to twice as fast.
    """
    digits, row_scale = split_rows(x, 1 if quantize_x else digits_of(x.dtype))
    rows = jnp.concatenate(digits)
    if len(rows) == 1:  # a single one takes XLA:CPU ten times as long as two
        rows = jnp.repeat(rows, 2, axis=0)
    inner = ((1,), (1 if transposed else 0,))
    products = jax.lax.dot_general(
        rows, w.astype(jnp.int8), (inner, ((), ())), preferred_element_type=jnp.int32
    )
    products = products[: len(digits) * len(x)].astype(jnp.float32)
    first, *lower = jnp.split(products, len(digits))
    rest = jnp.zeros_like(first)
    for part in reversed(lower):
        rest = (part + rest) * (1 / BASE)
    y = (first + rest) * row_scale * scale[None]
    return finish(y, None if bias is None else bias[None], residual, activation).astype(x.dtype)


def digits_of(dtype: jnp.dtype) -> int:
    """How many digits hold numbers of a dtype, beside the largest of their row."""
    return 2 if jnp.dtype(dtype).itemsize == 2 else 3


def split_rows(x: jax.Array, count: int) -> tuple[list[jax.Array], jax.Array]:
    """(digits int8 [M, K], the first one the highest; scale [M, 1] float32) of x [M, K].

    x is the scale times the sum of the digits, each over `BASE` to the power of its place.
    """
    first, scale = quantize_rows(x)
    rest = x.astype(jnp.float32) * jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    digits = [first]
    for _ in range(count - 1):
        rest = (rest - digits[-1].astype(jnp.float32)) * BASE
        digits.append(jnp.round(rest).astype(jnp.int8))
    return digits, scale
