"""The one product of activations with weights.

Weights are "out, in": the axes that are summed over come last, as Hugging Face stores them. XLA:CPU
reads such a matrix at memory bandwidth for one row and packs it fastest for many, and a checkpoint
needs no transpose on its way in. The product is written on two flat matrices, because XLA:CPU would
otherwise transpose a weight of three axes at every call (measured: 59 ms instead of 29 ms for a
decode step of GPT-2's 124M parameters).
"""

import math

import jax
from flax import nnx


def linear(x: jax.Array, w: nnx.Param | jax.Array, *, contract: int = 1) -> jax.Array:
    """x [..., C], w [O, C] -> [..., O] in the dtype of x; C is the last `contract` axes, O the rest."""
    w = w.get_value() if isinstance(w, nnx.Variable) else w
    rows, inner = x.shape[: x.ndim - contract], x.shape[x.ndim - contract :]
    out = w.shape[: w.ndim - contract]
    assert w.shape[w.ndim - contract :] == inner, f"weight {w.shape} does not fit activation {x.shape}"
    flat_x = x.reshape(math.prod(rows), math.prod(inner))
    flat_w = w.astype(x.dtype).reshape(math.prod(out), math.prod(inner))
    product = jax.lax.dot_general(flat_x, flat_w, (((1,), (1,)), ((), ())))
    return product.reshape(*rows, *out)
