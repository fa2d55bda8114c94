"""Rows times the matrix of their group, by the fastest means there are.

Letters: M rows, E groups (experts), K columns of the rows, N columns of the result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from llm_jax.kernels.chips import RULES, ChipRule, chip_rule, device_kind
from llm_jax.kernels.choice import Choice
from llm_jax.kernels.grouped_matmul.loop import loop_matmul
from llm_jax.kernels.grouped_matmul.plan import UNIT
from llm_jax.kernels.grouped_matmul.rules import (
    product_blocks,
    product_plan,
    vmem_limit,
    weight_blocks,
)
from llm_jax.kernels.grouped_matmul.tpu import LANES, Blocks, grouped_product
from llm_jax.kernels.grouped_matmul.tpu_weights import WeightBlocks, weights_gradient

IMPLEMENTATIONS = ("pallas", "xla", "loop")


def choose(x: jax.Array, w: jax.Array, kind: str | None = None) -> Choice:
    """What `grouped_matmul` takes for such arrays (or shapes) on a kind of device, or on ours."""
    kind = device_kind() if kind is None else kind
    if kind == "cpu":
        return Choice("loop", "there is no kernel for cpu, and XLA's product costs E times the work")
    if not kind.startswith("TPU"):
        return Choice("xla", f"there is no kernel for {kind}")
    if kind not in RULES:
        return Choice("xla", f"{kind!r} is not in kernels/chips.py")
    return _choose(x, w, RULES[kind])


def _choose(x: jax.Array, w: jax.Array, rule: ChipRule) -> Choice:
    """`choose` for a TPU."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return Choice("xla", f"the kernel computes in bfloat16 and float32, not {x.dtype}")
    if not x.shape[0]:
        return Choice("xla", "there are no rows")
    if w.shape[1] % LANES or w.shape[2] % LANES:
        return Choice("xla", f"w of {w.shape}: its last two axes are not multiples of {LANES}")
    try:
        _plan(rule, x, w)
    except ValueError as error:
        return Choice("xla", str(error))
    return Choice("pallas", "TPU kernel")


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
    blocks: Blocks | None = None,
    gradient_blocks: tuple[Blocks, WeightBlocks] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """out [M, N] in the dtype of x, with out[i] = w[g] x[i] for row i of group g; sums in float32.

    x [M, K] bfloat16 or float32, rows in the order of their groups; group_sizes [E] integers, how many
    rows each group has, on the device; rows beyond their sum give 0. w [E, N, K], "out, in", in the
    dtype of x, or int8 with scale [E, N] float32, times which each row of w[g] is meant. Groups of any
    size, also none. Of each device's own arrays: sharding is the caller's, by `shard_map`.

    layer: which of w [L, E, N, K] and scale [L, E, N] to take, for scans over layers: a slice of w would
    be copied before the kernel begins.

    Differentiable in x, and in w where it is not int8. In scale, and in w with a layer, not by "pallas".

    implementation: "pallas" (TPU), "xla" (jax.lax.ragged_dot_general), "loop" (for CPUs, see loop.py),
    or None for `choose`. blocks: of the TPU kernel, gradient_blocks: of its two for the gradients of x
    and w; if not given, tuned ones for the product, else by a rule of the chip's memory. interpret: run
    the kernels on a CPU, for tests.

    Raises ValueError for arrays that do not fit each other, for an implementation that cannot run, and
    for a gradient that "pallas" does not have.
    """
    one = w if layer is None else jax.ShapeDtypeStruct(w.shape[1:], w.dtype)
    if layer is not None and scale is not None:
        scale = lax.dynamic_index_in_dim(scale, layer, keepdims=False)
    _check(x, one, group_sizes, scale, implementation)
    if implementation is None:
        implementation = choose(x, one).implementation
    elif implementation == "pallas":
        choice = _choose(x, one, chip_rule(True)) if interpret else choose(x, one)
        if choice.implementation != "pallas":
            raise ValueError(f"implementation='pallas': {choice.reason}; take 'xla' or None")
    sizes = group_sizes.astype(jnp.int32)
    if implementation == "xla":
        return _by_xla(x, w if layer is None else w[layer], sizes, scale)
    first = jnp.asarray(0 if layer is None else layer, jnp.int32) * one.shape[0]
    w = w.reshape(-1, *one.shape[1:])  # of all layers, one after the other; nothing moves
    if implementation == "loop":
        return loop_matmul(x, w, sizes, scale, first)
    rule = chip_rule(interpret)
    forward, backward, weights = _plan(rule, x, one)
    backward, weights = gradient_blocks or (backward, weights)
    spec = _Spec(blocks or forward, backward, weights, rule.cores, vmem_limit(rule), interpret)
    rows = x.shape[0]
    x = jnp.pad(x, ((0, -rows % UNIT), (0, 0)))
    out: jax.Array = _grouped(spec, x, w, sizes, scale, first)
    return out[:rows]


def _plan(rule: ChipRule, x, w) -> tuple[Blocks, Blocks, WeightBlocks]:
    """Of the product, of the gradient of x and of that of w; only the product's may be tuned ones."""
    (groups, columns, depth), of_x, of_w = w.shape, x.dtype.itemsize, w.dtype.itemsize
    return (
        product_plan(rule, x.shape[0], groups, depth, columns, x.dtype, w.dtype),
        product_blocks(rule, x.shape[0], groups, columns, depth, of_x, of_w),
        weight_blocks(rule, x.shape[0], columns, depth, of_x),
    )


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What the three kernels are told besides arrays."""

    blocks: Blocks
    backward: Blocks
    weights: WeightBlocks
    cores: int
    vmem_limit: int
    interpret: bool

    def product(self, x, w, sizes, scale, first, axis: int) -> jax.Array:
        """`tpu.grouped_product` over this axis of w."""
        return grouped_product(
            x,
            w,
            sizes,
            scale,
            first,
            axis=axis,
            blocks=self.blocks if axis == 2 else self.backward,
            cores=self.cores,
            vmem_limit=self.vmem_limit,
            interpret=self.interpret,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(spec: _Spec, x, w, sizes, scale, first):
    return spec.product(x, w, sizes, scale, first, 2)


def _grouped_forward(spec: _Spec, x, w, sizes, scale, first):
    if scale is not None and scale.perturbed:
        raise ValueError(
            "scale: 'pallas' has no gradient for it; take jax.lax.stop_gradient(scale), or 'xla'"
        )
    if w.perturbed and w.value.shape[0] != sizes.value.shape[0]:
        raise ValueError("w: 'pallas' has no gradient for it with a layer; take w[layer] without one")
    x, w, sizes, scale, first = (None if a is None else a.value for a in (x, w, sizes, scale, first))
    return spec.product(x, w, sizes, scale, first, 2), (x, w, sizes, scale, first)


def _grouped_backward(spec: _Spec, saved, grad):
    x, w, sizes, scale, first = saved
    of_x = spec.product(grad, w, sizes, scale, first, 1)
    of_w = None
    if w.dtype == x.dtype and w.shape[0] == sizes.shape[0]:
        of_w = weights_gradient(
            grad,
            x,
            sizes,
            blocks=spec.weights,
            cores=spec.cores,
            vmem_limit=spec.vmem_limit,
            interpret=spec.interpret,
        )
    return of_x, of_w, None, None, None


_grouped.defvjp(_grouped_forward, _grouped_backward, symbolic_zeros=True)


def _by_xla(x, w, sizes, scale) -> jax.Array:
    """The same by jax.lax.ragged_dot_general, which computes in the dtype of x."""
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = lax.ragged_dot_general(
        x, w.astype(x.dtype), sizes, dims, precision=exact, preferred_element_type=jnp.float32
    )
    ends, row = jnp.cumsum(sizes), jnp.arange(x.shape[0])
    if scale is not None:
        group = jnp.searchsorted(ends, row, side="right")
        out *= jnp.take(scale, group, axis=0, mode="clip")
    return jnp.where((row < ends[-1])[:, None], out, 0.0).astype(x.dtype)


def _check(x, w, group_sizes, scale, implementation) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS} or None")
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"x {x.shape}, w {w.shape}: expected [M, K] and [E, N, K]")
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        found = f"{group_sizes.dtype} {group_sizes.shape}"
        raise ValueError(
            f"group_sizes {found}: expected integers of {w.shape[:1]}, one for each matrix of w"
        )
    if w.dtype not in (x.dtype, jnp.int8):
        raise ValueError(f"w of {w.dtype}: expected {x.dtype}, as x, or int8; cast it with w.astype")
    if (scale is not None) != (w.dtype == jnp.int8):
        raise ValueError(
            f"scale={scale if scale is None else scale.shape} with w of {w.dtype}: "
            "expected scale [E, N] with int8 weights, None with others"
        )
    if scale is not None and (scale.shape != w.shape[:2] or scale.dtype != jnp.float32):
        raise ValueError(f"scale of {scale.dtype} {scale.shape}: expected float32 {w.shape[:2]}")
