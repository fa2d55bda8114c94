"""Weights in int8 with a scale for each output: what stands in the tree, and the product with it.

A device multiplies by its own part of a weight, as the Pallas kernel must: sums over a divided axis are
added over "tensor", and what "fsdp" divides is brought together first, as any weight is.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh

from llm_jax.kernels.forms import note
from llm_jax.kernels.quantized_matmul.api import choose, quantized_matmul
from llm_jax.kernels.tuning import bucket, table_key
from llm_jax.sharding import COMPUTE, PARAMS, shardings, spec
from llm_jax.tree import OfLayer

LANES = 128  # columns of a tile on TPUs: XLA copies a matrix [C, O] with other O at every use

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Stands where a weight [*O, C] stood: q int8 [C, O] times scale float32 [O], O as one axis.

    Both may lead with layers; layer [] then says which one is meant, None that all are. out: the sizes
    of the axes that O stands for. axes: the logical names of C and of the first of O. transposed: q is
    [O, C], as XLA prefers it; the TPU kernel loads C first. round_x: products round activations to int8
    too, each token's by itself.
    """

    q: Any
    scale: Any
    out: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axes: tuple[str, str] = dataclasses.field(metadata={"static": True})
    transposed: bool = dataclasses.field(metadata={"static": True})
    round_x: bool = dataclasses.field(metadata={"static": True})
    layer: Any = None


def in_order(inner: T, out: T, transposed: bool) -> tuple[T, T]:
    """What belongs to the two axes of q, as they lie."""
    return (out, inner) if transposed else (inner, out)


def is_quantized(leaf: Any) -> bool:
    """Whether `leaf` is a `QTensor`, for `is_leaf=`."""
    return isinstance(leaf, QTensor)


def places(w: QTensor, mesh: Mesh) -> QTensor:
    """NamedSharding of its parts: the first axis of the outputs is divided, in whole units of it."""
    lead, (inner, out) = ("layers",) * (w.scale.ndim - 1), w.axes
    depth = in_order(*w.q.shape[-2:], w.transposed)[0]
    sizes = in_order(depth, w.out[0], w.transposed)
    names = dataclasses.replace(w, q=(*lead, *in_order(inner, out, w.transposed)), scale=(*lead, out))
    units = dataclasses.replace(
        w,
        q=jax.ShapeDtypeStruct((*w.q.shape[:-2], *sizes), w.q.dtype),
        scale=jax.ShapeDtypeStruct((*w.scale.shape[:-1], w.out[0]), w.scale.dtype),
    )
    return shardings(names, units, mesh)


def lies_for_kernel(w: QTensor, mesh: Mesh | AbstractMesh) -> bool:
    """Whether the TPU kernel is to multiply by it, so that q is [C, O]: a device has whole tiles of
    columns. An abstract mesh, which has no devices, is asked for sizes alone.
    """
    columns = places(w, mesh).scale.shard_shape(w.scale.shape)[-1]
    platform = "" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform
    return platform == "tpu" and columns % LANES == 0


def scannable(layers: Any) -> tuple[Any, Callable[[Any, jax.Array], Any]]:
    """(what a scan over layers slices of stacked parameters, f(slices, layer) -> a layer's parameters).

    A slice of a weight would be copied before a kernel begins, so each `QTensor` and `OfLayer` stays
    whole, and a layer has all of it with its own number.
    """
    is_whole = lambda leaf: isinstance(leaf, (QTensor, OfLayer))  # noqa: E731
    leaves, structure = jax.tree.flatten(layers, is_leaf=is_whole)
    sliced = [None if is_whole(leaf) else leaf for leaf in leaves]

    def of_layer(slices: Any, layer: jax.Array) -> Any:
        own = [
            dataclasses.replace(leaf, layer=layer) if is_whole(leaf) else part
            for leaf, part in zip(leaves, slices, strict=True)
        ]
        return structure.unflatten(own)

    return sliced, of_layer


@dataclasses.dataclass(frozen=True)
class QuantizedProblem:
    """A product of so many rows (a power of two) with int8 weights, of one device."""

    operator = "quantized_linear"
    dtype: str
    round_x: bool
    rows: int
    inner: int
    out: int

    @property
    def key(self) -> str:
        words = ("rounded",) if self.round_x else ()
        return table_key(self.dtype, *words, inner=self.inner, out=self.out, rows=self.rows)


def quantized_linear(x: jax.Array, w: QTensor) -> jax.Array:
    """x [..., C] -> [..., *O] in the dtype of x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _product(x, w)
    inner, out = w.axes
    layers = (None,) * (w.scale.ndim - 1)
    sizes = in_order(x.shape[-1], w.out[0], w.transposed)
    of_q = spec((*layers, *in_order(inner, out, w.transposed)), PARAMS, (*w.q.shape[:-2], *sizes), mesh)
    of_scale = spec((*layers, out), PARAMS, (*w.scale.shape[:-1], w.out[0]), mesh)
    # Of activations only "tensor" divides what is not a row.
    tensor = {name: "tensor" if PARAMS[name] == "tensor" else None for name in w.axes}
    rules = {**COMPUTE, **tensor}
    rows = ("batch", "seq") if x.ndim == 3 else ("batch", *(None,) * (x.ndim - 2))
    of_x = spec((*rows, inner), rules, x.shape, mesh)
    y_axes, y_shape = (*rows, out, *(None,) * (len(w.out) - 1)), (*x.shape[:-1], *w.out)
    of_y = spec(y_axes, rules, y_shape, mesh)
    summed = in_order(*of_q[-2:], w.transposed)[0] == "tensor"

    def local(x, w):
        y = _product(x, _gathered(w, *of_q[-2:]))
        return jax.lax.psum(y, "tensor") if summed else y

    of_w = dataclasses.replace(w, q=of_q, scale=of_scale)
    if w.layer is not None:
        of_w = dataclasses.replace(of_w, layer=spec((), rules, (), mesh))
    return jax.shard_map(local, in_specs=(of_x, of_w), out_specs=of_y, check_vma=False)(x, w)


def _gathered(w: QTensor, *divided: Any) -> QTensor:
    """What a device multiplies by: q, whose axes are divided by these mesh axes, whole along "fsdp"."""
    if "fsdp" not in divided:
        return w
    q, scale = w.q, w.scale
    if w.layer is not None:
        q, scale = (jax.lax.dynamic_index_in_dim(p, w.layer, keepdims=False) for p in (q, scale))
    for axis, name in enumerate(divided):
        if name == "fsdp":
            q = jax.lax.all_gather(q, name, axis=axis, tiled=True)
    if in_order(*divided, w.transposed)[1] == "fsdp":
        scale = jax.lax.all_gather(scale, "fsdp", axis=0, tiled=True)
    return dataclasses.replace(w, q=q, scale=scale, layer=None)


def _product(x: jax.Array, w: QTensor) -> jax.Array:
    """As `quantized_linear`, of what this device has."""
    depth, columns = in_order(*w.q.shape[-2:], w.transposed)
    assert x.shape[-1] == depth, f"weight {w.q.shape} does not fit activation {x.shape}"
    one = jax.ShapeDtypeStruct((depth, columns), w.q.dtype)
    options: dict[str, Any] = {"transposed": w.transposed, "quantize_x": w.round_x}
    choice = choose(x, one, jax.ShapeDtypeStruct((columns,), w.scale.dtype), **options)
    rows = bucket(math.prod(x.shape[:-1]))
    note(QuantizedProblem(str(x.dtype), w.round_x, rows, depth, columns), choice)
    options |= {"layer": w.layer, "implementation": choice.implementation}
    y = quantized_matmul(x, w.q, w.scale, **options)
    return y.reshape(*x.shape[:-1], -1, *w.out[1:])
