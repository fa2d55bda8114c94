"""Key heads that a "tensor" axis does not divide: repeated in the weights of a model that serves.

A device computes the queries of its own heads, and needs the key heads that they read. Where there are
8 of these on tensor:16 they cannot be divided, and with all of them on every device each would hold,
read and multiply by 8 to keep one. So a model that serves has each key head r times, side by side (head
i becomes heads i r to i r + r - 1, as grouped queries read them), and a device has those that it needs.

    held = served(model, mesh)                        what stands on the devices, as shapes
    params = load_hf(directory, held, mesh)           born so: no device ever has all heads
    params = repeat_key_heads(params, model, mesh)    of parameters at hand, which stay as they are

`Model.config` is that of the model whatever is repeated; checkpoints, adapters and what `ops/taps.py`
shows have each head once. So has training: copies would have gradients of their own and drift apart.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.models.describe import Model, Params
from llm_jax.ops.quantized import QTensor, is_quantized, lies_for_kernel, places
from llm_jax.sharding import is_axes, key_heads
from llm_jax.tree import flatten, is_parameter, unflatten

AXIS = "kv_heads"


def served(model: Model, mesh: Any) -> Model:
    """The model as it serves on a mesh, abstract or not: itself where nothing has to be repeated."""
    return _with_heads(model, key_heads(model.config.num_heads, model.config.num_kv_heads, mesh))


def own(model: Model) -> Model:
    """The model with each key head once, as checkpoints and adapters have it."""
    return _with_heads(model, model.config.num_kv_heads)


@functools.lru_cache(maxsize=64)
def _with_heads(model: Model, heads: int) -> Model:
    def resized(shape: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        sizes = tuple(heads if a == AXIS else n for a, n in zip(axes, shape.shape, strict=True))
        return jax.ShapeDtypeStruct(sizes, shape.dtype)

    shapes = jax.tree.map(resized, model.shapes, model.axes)
    return model if shapes == model.shapes else dataclasses.replace(model, shapes=shapes)


def repeat_key_heads(params: Params, model: Model, mesh: Mesh) -> Params:
    """`params` of `model`, arrays or `QTensor`s, as those of `served(model, mesh)`, on their shards.

    Weights without key heads are the same arrays. ValueError for heads that were repeated for another
    mesh and do not fit this one, and for LoRA's weights.
    """
    held = served(model, mesh)
    if held is model:
        return params
    flat, before = flatten(params, is_leaf=is_parameter), flatten(model.shapes)
    axes, shardings = flatten(model.axes, is_leaf=is_axes), flatten(held.shardings(mesh))
    times = {}
    for path, shape in flatten(held.shapes).items():
        if shape.shape == before[path].shape:
            continue
        axis = axes[path].index(AXIS)
        have, wanted = before[path].shape[axis], shape.shape[axis]
        if wanted % have:
            raise ValueError(
                f"params have {have} key heads at {path}, repeated for another mesh; expected "
                f"{wanted} or a divisor: give the params that they come from"
            )
        if not isinstance(flat[path], jax.Array | QTensor):
            raise ValueError(
                f"params have a {type(flat[path]).__name__} at {path}, whose key heads are to be "
                "repeated: expected an array; merge adapters (LoraModel.merge), or let an engine serve "
                "them (EngineConfig.adapters)"
            )
        times[path] = wanted // have

    def make(weights: Params) -> Params:
        return {p: _repeated(w, axes[p].index(AXIS), times[p], mesh) for p, w in weights.items()}

    few = {path: flat[path] for path in times}
    made = jax.eval_shape(make, few)
    where = {p: places(w, mesh) if is_quantized(w) else shardings[p] for p, w in made.items()}
    with jax.set_mesh(mesh):
        return unflatten(flat | jax.jit(make, out_shardings=where)(few))


def _repeated(w: jax.Array | QTensor, axis: int, times: int, mesh: Mesh) -> jax.Array | QTensor:
    if not isinstance(w, QTensor):
        return jnp.repeat(w, times, axis=axis)
    q = w.q if w.transposed else w.q.swapaxes(-1, -2)  # [..., O, C]

    def rows(x: jax.Array, at: int) -> jax.Array:
        apart = x.reshape(*x.shape[:at], w.out[0], -1, *x.shape[at + 1 :])
        return jnp.repeat(apart, times, axis=at).reshape(*x.shape[:at], -1, *x.shape[at + 1 :])

    lead = w.scale.ndim - 1
    out = (times * w.out[0], *w.out[1:])
    new = dataclasses.replace(w, q=rows(q, lead), scale=rows(w.scale, lead), out=out, transposed=True)
    if not lies_for_kernel(new, mesh):
        return new
    return dataclasses.replace(new, q=new.q.swapaxes(-1, -2), transposed=False)
