"""Activations times int8, int4 or float8 weights, by the fastest means there are.

Letters: M rows, K depth (summed over), N columns, G rows of weights with a scale of their own.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.chips import chip_rule, device_kind
from llm_jax.kernels.choice import Choice
from llm_jax.kernels.quantized_matmul.integers import MOST_DEPTH, integer_matmul
from llm_jax.kernels.quantized_matmul.plan import GROUP, TRAITS, Problem, check_blocks, decoding, plan
from llm_jax.kernels.quantized_matmul.reference import (
    ACTIVATIONS,
    dequantize,
    finish,
    quantize_rows,
    reference_matmul,
)
from llm_jax.kernels.quantized_matmul.tpu import Stream, stream
from llm_jax.kernels.quantized_matmul.tpu_tiles import Tiles, tiles

IMPLEMENTATIONS = ("pallas", "integers", "xla")
INTEGERS = (jnp.dtype(jnp.int8), jnp.dtype(jnp.int4))
WEIGHTS = (*INTEGERS, jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


def choose(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    kind: str | None = None,
    *,
    quantize_x: bool = False,
    transposed: bool = False,
) -> Choice:
    """What `quantized_matmul` takes for such arrays (or shapes) on a kind of device, or on ours.

    w: [K, N], whatever `transposed` says.
    """
    kind = device_kind() if kind is None else kind
    refusal = _not_by_kernel(x, w, scale, kind, transposed)
    if not refusal:
        return Choice("pallas", "TPU kernel")
    if (kind == "cpu" or quantize_x) and not _not_by_integers(w, scale):
        return Choice("integers", f"{refusal}, and products of integers are fast")
    return Choice("xla", refusal)


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: str | None = None,
    quantize_x: bool = False,
    layer: jax.Array | int | None = None,
    transposed: bool = False,
    implementation: str | None = None,
    blocks: Stream | Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """activation(x w + bias) + residual [..., N] in the dtype of x.

    x [..., K] bfloat16 or float32. w [K, N] int8, int4, float8_e4m3fn or float8_e5m2; K comes first,
    because the matrix units are loaded by rows of K. scale float32: [N], or [K / G, N] for groups of G
    rows that follow each other; a weight is w times its scale. bias [N], residual [..., N], added last;
    activation: "silu", "gelu" (by erf), "gelu_tanh" or "relu". Sums are float32, and so is the epilogue.

    layer: which of w [L, K, N] and scale [L, N] or [L, K / G, N] to take, for scans over layers: a slice
    of w would be copied before the kernel begins.

    transposed: w is [N, K] instead, or [L, N, K]; not for "pallas", and faster with "integers".

    quantize_x: round each row of x to int8 by its largest element first (integers w only), and multiply
    integers where the chip does (v5e, v5p, v6e); elsewhere the result is the same and not faster.
    Where many rows meet groups, and on v4, a weight is rounded to the dtype of x after its scale.

    implementation: "pallas" (TPU), "integers" (int8 and int4 w without groups, see integers.py), "xla",
    or None for `choose`. blocks: of a TPU kernel, `Stream` for few rows or `Tiles` for many; by a rule
    of the chip if not given. interpret: run the kernel on a CPU, for tests. Gradients: of x (as if it
    were not rounded), bias and residual; w and scale are constants.

    Raises ValueError for arrays that do not fit each other, for blocks that do not fit them, and for an
    implementation that cannot run.
    """
    if layer is None:
        w, scale, layer = w[None], scale[None], 0
    _check_weights(w, scale, layer)
    scale = jax.lax.dynamic_index_in_dim(scale, layer, keepdims=False)
    one = jax.ShapeDtypeStruct(w.shape[:0:-1] if transposed else w.shape[1:], w.dtype)
    _check(x, one, scale, bias, residual, activation, quantize_x, implementation)
    implementation = _named(x, one, scale, quantize_x, transposed, implementation, interpret)
    spec = _Spec(implementation, activation, quantize_x, transposed, blocks, interpret)
    rows, columns = x.reshape(-1, x.shape[-1]), one.shape[1]
    flat = None if residual is None else residual.reshape(-1, columns)
    y: Any = _multiply(spec, jnp.asarray(layer, jnp.int32), rows, w, scale, bias, flat)
    return y.reshape(*x.shape[:-1], columns)


def _named(x, w, scale, quantize_x, transposed, implementation, interpret) -> str:
    """The implementation that runs; ValueError where that cannot be."""
    if implementation is None:
        options = {"quantize_x": quantize_x, "transposed": transposed}
        return "pallas" if interpret else choose(x, w, scale, **options).implementation
    kind = "TPU" if interpret else device_kind()
    refusal = ""
    if implementation == "pallas":
        refusal = _not_by_kernel(x, w, scale, kind, transposed)
    if implementation == "integers":
        refusal = _not_by_integers(w, scale)
    if refusal:
        raise ValueError(f"implementation={implementation!r}: {refusal}; take 'xla' or None")
    return implementation


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What a product is told besides arrays."""

    implementation: str
    activation: str | None
    quantize_x: bool
    transposed: bool
    blocks: Stream | Tiles | None
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(spec: _Spec, layer, x, w, scale, bias, residual):
    if spec.implementation == "pallas":
        return _pallas(spec, layer, x, w, scale, bias, residual)
    w = _of_layer(w, layer)
    options: dict[str, Any] = {"activation": spec.activation, "quantize_x": spec.quantize_x}
    if spec.implementation == "integers":
        return integer_matmul(x, w, scale, bias, residual, transposed=spec.transposed, **options)
    return reference_matmul(x, w.T if spec.transposed else w, scale, bias, residual, **options)


def _pallas(spec: _Spec, layer, x, w, scale, bias, residual):
    rule = chip_rule(spec.interpret)
    traits = TRAITS[rule.name]
    scale = scale[None] if scale.ndim == 1 else scale
    bias = None if bias is None else bias.astype(jnp.float32)[None]
    (rows, depth), columns = x.shape, w.shape[2]
    group = depth // scale.shape[0]
    problem = Problem(rows, depth, columns, group, x.dtype, w.dtype, spec.quantize_x)
    blocks = plan(problem, rule) if spec.blocks is None else spec.blocks
    check_blocks(blocks, problem)
    options: dict[str, Any] = {
        "blocks": blocks,
        "decode": decoding(problem, rule, isinstance(blocks, Tiles)),
        "activation": spec.activation,
        "vmem_limit": rule.vmem_bytes * 7 // 8,
        "interpret": spec.interpret,
    }
    if isinstance(blocks, Stream):
        return stream(
            layer[None],
            x,
            w,
            scale,
            bias,
            residual,
            cores=rule.cores,
            int8=spec.quantize_x,
            int8_units=traits.int8_units,
            **options,
        )
    units, row_scale = problem.units(traits), None
    if spec.quantize_x:
        x, row_scale = quantize_rows(x)
    x = x.astype(units)
    options |= {"dtype": problem.x, "units": units}
    return tiles(layer[None], x, row_scale, w, scale, bias, residual, **options)


def _forward(spec: _Spec, layer, x, w, scale, bias, residual):
    """As `_multiply`; what goes into an activation is kept for its gradient."""
    if spec.activation is None:
        y = _multiply(spec, layer, x, w, scale, bias, residual)
        return y, (layer, None, w, scale, bias, residual)
    linear = dataclasses.replace(spec, activation=None)
    before: Any = _multiply(linear, layer, x, w, scale, bias, None)
    y = finish(before.astype(jnp.float32), None, residual, spec.activation).astype(x.dtype)
    return y, (layer, before, w, scale, bias, residual)


def _backward(spec: _Spec, saved, grad):
    layer, before, w, scale, bias, residual = saved
    inner = grad
    if spec.activation is not None:
        _, back = jax.vjp(ACTIVATIONS[spec.activation], before.astype(jnp.float32))
        inner = back(grad.astype(jnp.float32))[0].astype(grad.dtype)
    w = _of_layer(w, layer)
    weights = dequantize(w.T if spec.transposed else w, scale, grad.dtype)
    x_grad = jax.lax.dot_general(
        inner, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    bias_grad = None if bias is None else inner.astype(jnp.float32).sum(axis=0).astype(bias.dtype)
    residual_grad = None if residual is None else grad.astype(residual.dtype)
    return None, x_grad.astype(grad.dtype), None, None, bias_grad, residual_grad


_multiply.defvjp(_forward, _backward)


def _of_layer(w: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(w, layer, keepdims=False)


def _not_by_kernel(x: jax.Array, w: jax.Array, scale: jax.Array, kind: str, transposed: bool) -> str:
    """Why the kernel does not take such arrays; "" = it does."""
    if not kind.startswith("TPU"):
        return f"there is no kernel for {kind}"
    if transposed:
        return "the kernel takes w [K, N], not [N, K]"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel takes bfloat16 and float32, not {x.dtype}"
    if not math.prod(x.shape) or not w.shape[1]:
        return f"x {x.shape} times w {w.shape} is empty"
    if scale.ndim == 2 and scale.shape[0] > 1 and (w.shape[0] // scale.shape[0]) % GROUP:
        return f"groups of {w.shape[0] // scale.shape[0]} rows, no multiple of {GROUP}"
    return ""


def _not_by_integers(w: jax.Array, scale: jax.Array) -> str:
    """Why `integer_matmul` does not take such weights [K, N]; "" = it does."""
    if w.dtype not in INTEGERS or scale.ndim == 2:
        return f"w of {w.dtype} with scale {scale.shape} is not int8 or int4 with one scale a column"
    return f"K={w.shape[0]} is more than {MOST_DEPTH}" if w.shape[0] > MOST_DEPTH else ""


def _check_weights(w, scale, layer) -> None:
    if w.ndim != 3 or scale.ndim not in (2, 3) or w.shape[0] != scale.shape[0]:
        shapes = f"w {w.shape} and scale {scale.shape}, layers first"
        raise ValueError(
            f"{shapes}: expected [K, N] and [N] or [K / G, N], or with `layer` [L, ...] both"
        )
    if isinstance(layer, int) and not 0 <= layer < w.shape[0]:
        raise ValueError(f"layer={layer} of w {w.shape}: expected 0 to {w.shape[0] - 1}")


def _check(x, w, scale, bias, residual, activation, quantize_x, implementation) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS} or None")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {tuple(ACTIVATIONS)} or None")
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x {x.shape} does not fit w {w.shape}: expected [..., K] and [K, N]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x of {x.dtype}: expected floating-point numbers")
    if w.dtype not in WEIGHTS:
        raise ValueError(f"w of {w.dtype}: expected one of {', '.join(map(str, WEIGHTS))}")
    if quantize_x and w.dtype not in INTEGERS:
        raise ValueError(f"quantize_x=True with w of {w.dtype}: expected int8 or int4 weights, or False")
    depth, columns = w.shape
    groups = scale.shape[0] if scale.ndim == 2 else 1
    if scale.dtype != jnp.float32 or scale.shape not in ((columns,), (groups, columns)):
        wanted = f"float32 [{columns}] or [K / G, {columns}]"
        raise ValueError(f"scale {scale.shape} of {scale.dtype} for w {w.shape}: expected {wanted}")
    if not groups or depth % groups:
        raise ValueError(f"scale {scale.shape} for w {w.shape}: {groups} groups do not divide K={depth}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias {bias.shape} for w {w.shape}: expected [{columns}]")
    if residual is not None and residual.shape != (*x.shape[:-1], columns):
        wanted = (*x.shape[:-1], columns)
        raise ValueError(f"residual {residual.shape} for x {x.shape} and w {w.shape}: expected {wanted}")
