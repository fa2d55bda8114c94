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

from llm_jax.kernels.choice import Choice
from llm_jax.kernels.forms import FORMS, note, pick
from llm_jax.kernels.tuning import bucket, table_key
from llm_jax.ops.quantized import QTensor, quantized_linear
from llm_jax.sharding import sequence_shards

MOST_ROWS = 256  # for which forms are chosen: a training step's are more, and gradients other products


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankBank:
    """Stands where a weight [O, C] stood: that weight and P low-rank changes, of which a token has one.

    base [O, C], a [P rank, C], b [O, P rank] with its scale in it; place p has rows p rank to
    (p + 1) rank - 1 of a and those columns of b. places: of each token [...], as x [..., C] has them; -1
    is none, as is None for all of them. O may be several axes, and all four may lead with layers.

    A product is three ordinary ones: all changes of all tokens are begun, a token's own is kept. alone:
    each token's is computed by itself, so that its place changes no bit; slow.
    """

    base: Any
    a: Any
    b: Any
    places: Any
    rank: int = dataclasses.field(metadata={"static": True})
    alone: bool = dataclasses.field(default=False, metadata={"static": True})


def is_bank(leaf: Any) -> bool:
    """Whether `leaf` is a `LowRankBank`, for `is_leaf=`."""
    return isinstance(leaf, LowRankBank)


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """A product of so many rows (a power of two) as tables of forms have it: [rows, inner] and
    [out, inner].
    """

    operator = "linear"
    dtype: str
    rows: int
    inner: int
    out: int

    @property
    def key(self) -> str:
        return table_key(self.dtype, inner=self.inner, out=self.out, rows=self.rows)

    @property
    def has_forms(self) -> bool:
        """Whether there is a choice."""
        return 1 < self.rows <= MOST_ROWS


def linear(x: jax.Array, w: nnx.Param | jax.Array | LowRank | LowRankBank | QTensor) -> jax.Array:
    """x [..., C], w [O, C] -> [..., O] in the dtype of x; O may be several axes."""
    w = w.get_value() if isinstance(w, nnx.Variable) else w
    if isinstance(w, LowRank):
        return linear(x, w.base) + jnp.asarray(w.scale, x.dtype) * linear(linear(x, w.a), w.b)
    if isinstance(w, LowRankBank):
        return linear(x, w.base) if w.places is None else linear(x, w.base) + _own_change(x, w)
    if isinstance(w, QTensor):
        return quantized_linear(x, w)
    rows, inner, out = x.shape[:-1], x.shape[-1], w.shape[:-1]
    assert w.shape[-1] == inner, f"weight {w.shape} does not fit activation {x.shape}"
    flat_w = w.astype(x.dtype).reshape(math.prod(out), inner)
    if x.ndim == 3 and sequence_shards(x.shape[1]) > 1:
        # As one axis, rows of sequences that are split could not stay where they are.
        product = jax.lax.dot_general(x, flat_w, (((2,), (1,)), ((), ())))
        return product.reshape(*rows, *out)
    product = by_form(_form(x.reshape(-1, inner), flat_w), x.reshape(-1, inner), flat_w)
    return product.reshape(*rows, *out)


def _form(x: jax.Array, w: jax.Array) -> str:
    problem = LinearProblem(str(x.dtype), bucket(x.shape[0]), x.shape[1], w.shape[0])
    if not problem.has_forms:
        return note(problem, Choice("dot", f"other forms are for 2 to {MOST_ROWS} rows")).implementation
    return pick(problem, Choice("dot", "the product as it stands"), FORMS["linear"]).implementation


def by_form(form: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """x [R, C], w [O, C] -> [R, O]. "swapped": the transpose of w x^T, which XLA:CPU computes up to 1.6
    times as fast for 4 to 64 rows; "dot": as it stands.
    """
    left, right = (w, x) if form == "swapped" else (x, w)
    product = jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())))
    return product.T if form == "swapped" else product


def _own_change(x: jax.Array, w: LowRankBank) -> jax.Array:
    """x [..., C] -> [..., O]: the change that the place of each token makes."""
    if w.alone:
        return _change_alone(x, w)
    inner = linear(x, w.a)  # [..., P rank]
    place = jax.lax.broadcasted_iota(jnp.int32, inner.shape, inner.ndim - 1) // w.rank
    # Selected, not multiplied by 0 or 1: what overflows for one adapter must not be NaN for all.
    return linear(jnp.where(place == w.places[..., None], inner, 0), w.b)


def _change_alone(x: jax.Array, w: LowRankBank) -> jax.Array:
    """The same, with the matrices of each token's place gathered."""
    out, at = w.b.shape[:-1], jnp.maximum(w.places, 0)
    a = jnp.take(w.a.astype(x.dtype).reshape(-1, w.rank, x.shape[-1]), at, axis=0)  # [..., rank, C]
    inner = jnp.where(w.places[..., None] < 0, 0, jnp.einsum("...c,...rc->...r", x, a))
    b = jnp.take(w.b.astype(x.dtype).reshape(math.prod(out), -1, w.rank), at, axis=1)  # [O, ..., rank]
    return jnp.einsum("...r,o...r->...o", inner, b).reshape(*x.shape[:-1], *out)
