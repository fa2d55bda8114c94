"""The one product of activations with weights.

Weights are "out, in": the axes that are summed over come last, as Hugging Face stores them. XLA:CPU
reads such a matrix at memory bandwidth for one row and packs it fastest for many, and a checkpoint
needs no transpose on its way in. The product is written on two flat matrices, because XLA:CPU would
otherwise transpose a weight of three axes at every call (measured: 59 ms instead of 29 ms for a
decode step of GPT-2's 124M parameters).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """Stands where a weight [O, C] stood: that weight and a low-rank change, base + scale b a.

    base [O, C], a [R, C], b [O, R]; O may be several axes, and all three may lead with layers.
    (LoRA, Hu et al. 2021.) A product never forms the sum.
    """

    base: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})


def is_low_rank(leaf: Any) -> bool:
    """Whether `leaf` is a `LowRank`, for `is_leaf=`."""
    return isinstance(leaf, LowRank)


def linear(x: jax.Array, w: nnx.Param | jax.Array | LowRank) -> jax.Array:
    """x [..., C], w [O, C] -> [..., O] in the dtype of x; O may be several axes."""
    w = w.get_value() if isinstance(w, nnx.Variable) else w
    if isinstance(w, LowRank):
        return linear(x, w.base) + jnp.asarray(w.scale, x.dtype) * linear(linear(x, w.a), w.b)
    rows, inner, out = x.shape[:-1], x.shape[-1], w.shape[:-1]
    assert w.shape[-1] == inner, f"weight {w.shape} does not fit activation {x.shape}"
    flat_w = w.astype(x.dtype).reshape(math.prod(out), inner)
    product = jax.lax.dot_general(x.reshape(-1, inner), flat_w, (((1,), (1,)), ((), ())))
    return product.reshape(*rows, *out)
