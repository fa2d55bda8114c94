"""The one product of activations with weights.

Weights keep the dimension that is summed over last ("out, in", as Hugging Face stores them):
XLA:CPU reads such a matrix at memory bandwidth for one row and packs it fastest for many, and a
checkpoint needs no transpose on its way in.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def einsum(equation: str, x: jax.Array, w: nnx.Param | jax.Array) -> jax.Array:
    """`jnp.einsum(equation, x, w)` in the dtype of x; w is a parameter or a plain array."""
    w = w.get_value() if isinstance(w, nnx.Variable) else w
    return jnp.einsum(equation, x, w.astype(x.dtype))
