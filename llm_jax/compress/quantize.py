"""Weights rounded to int8, symmetric, to nearest, with a float32 scale for each output ("absmax").

    params = quantize(params, model, mesh)                what `LLM.from_params` and `Model.bind` take
    shapes = quantized_shapes(model, mesh)                the same, abstract: to compile steps ahead
    load_hf(directory, model, mesh, scheme="int8")        the same, each weight rounded as it is read

Rounded are the matrices of the layers and, where it is not the embedding too, that of the vocabulary's
logits. Norms, biases, embeddings and small heads (classes, spans, poolers) stay as they are: they are
little, and what is looked up is read by the row. Each `QTensor` is divided over the mesh as its weight.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.config.checks import choice
from llm_jax.ops.quantized import QTensor, in_order, lies_for_kernel, places
from llm_jax.sharding import is_axes, placed
from llm_jax.tree import flatten, unflatten

SCHEMES = ("int8", "w8a8")  # weights alone; activations too, as they come, each token's by itself
FLOATS = ("", "float32", "bfloat16", "float16")
SMALLEST = 1e-30  # of a scale times 127, so that it is a normal number where a row is nothing but zeros
HEAD = "lm_head/weight"
T = TypeVar("T")


class Described(Protocol):
    """What is asked of a model: a `models.Model`."""

    @property
    def shapes(self) -> dict[str, Any]: ...

    @property
    def axes(self) -> dict[str, Any]: ...

    @property
    def contract(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Weight:
    """One that is rounded. lead: (layers,) or (); the weight is [*lead, *out, inner]; axes: names."""

    lead: tuple[int, ...]
    out: tuple[int, ...]
    inner: int
    axes: tuple[str, str]
    transposed: bool
    round_x: bool

    def like(self, q: Any, scale: Any) -> QTensor:
        """A `QTensor` of this weight with these parts."""
        return QTensor(q, scale, self.out, self.axes, self.transposed, self.round_x)

    def in_order(self, inner: T, out: T) -> tuple[T, T]:
        """What belongs to the two axes of q, as they lie."""
        return in_order(inner, out, self.transposed)

    def abstract(self) -> QTensor:
        """Its shapes."""
        columns = int(np.prod(self.out))
        q = jax.ShapeDtypeStruct((*self.lead, *self.in_order(self.inner, columns)), jnp.int8)
        return self.like(q, jax.ShapeDtypeStruct((*self.lead, columns), jnp.float32))

    def shardings(self, mesh: Mesh) -> QTensor:
        """NamedSharding of its parts; see `places`."""
        return places(self.abstract(), mesh)


def read_weights(weights: str, dtype: str = "") -> tuple[str, str]:
    """(parameter dtype, scheme or "") that `--weights` names; dtype: of what it leaves open."""
    choice("weights", weights, (*FLOATS, *SCHEMES))
    return (dtype, weights) if weights in SCHEMES else (weights or dtype, "")


def rounded_weights(model: Described, mesh: Mesh, scheme: str) -> dict[str, Weight]:
    """{path: what becomes of it} of the weights that a scheme of `SCHEMES` rounds, for these devices."""
    choice("weights", scheme, SCHEMES)
    shapes = flatten(model.shapes)
    axes, contract = (flatten(tree, is_leaf=is_axes) for tree in (model.axes, model.contract))
    found = {}
    if mixed := next((path for path in shapes if "experts" in axes[path]), None):
        raise ValueError(
            f"weights={scheme!r}: the experts of a mixture ({mixed}) are not rounded; take 'bfloat16'"
        )
    for path, shape in shapes.items():
        stacked, names = axes[path][0] == "layers", axes[path]
        if len(contract[path]) != 1 or not (stacked or path == HEAD):
            continue
        assert names[-1:] == contract[path], f"{path} {names}: the axis that is summed over comes last"
        *lead_out, inner = shape.shape
        lead, out = tuple(lead_out[:stacked]), tuple(lead_out[stacked:])
        weight = Weight(lead, out, inner, (names[-1], names[stacked]), False, scheme == "w8a8")
        transposed = not lies_for_kernel(weight.abstract(), mesh)
        found[path] = dataclasses.replace(weight, transposed=transposed)
    return found


def round_rows(w: Any, xp: Any) -> tuple[Any, Any]:
    """(int8 [..., C], scale float32 [...]) of w [..., C]: the largest of a row becomes 127.

    xp: jax.numpy or numpy, whose results are the same.
    """
    scale = row_scales(w, xp)
    return round_by(w, scale, xp), scale


def row_scales(w: Any, xp: Any) -> Any:
    """The scales of `round_rows`."""
    return xp.maximum(xp.max(xp.abs(w.astype(xp.float32)), axis=-1), SMALLEST) * (1 / 127)


def round_by(w: Any, scale: Any, xp: Any) -> Any:
    """The numbers of `round_rows` for scales that are known."""
    return xp.rint(w.astype(xp.float32) * (1 / scale)[..., None]).astype(xp.int8)


def quantize(
    params: Mapping[str, Any], model: Described, mesh: Mesh, scheme: str = "int8"
) -> dict[str, Any]:
    """`params` of `model` with a `QTensor` in place of every matrix of `rounded_weights`.

    The others are the same arrays. Both kinds of weights are there until the caller gives up `params`;
    `load_hf` with a scheme needs less. ValueError for another scheme.
    """
    weights, flat = rounded_weights(model, mesh, scheme), flatten(params)

    def make(floats: dict[str, jax.Array]) -> dict[str, QTensor]:
        return {path: _quantized(floats[path], weight) for path, weight in weights.items()}

    places = {path: weight.shardings(mesh) for path, weight in weights.items()}
    with jax.set_mesh(mesh):
        made = jax.jit(make, out_shardings=places)({path: flat[path] for path in weights})
    return unflatten(flat | made)


def quantized_shapes(model: Described, mesh: Mesh, scheme: str = "int8") -> dict[str, Any]:
    """Shapes, dtypes and shardings of what `quantize` gives: nothing is allocated."""
    flat = flatten(placed(model.shapes, model.axes, mesh))
    place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)  # noqa: E731
    weights = rounded_weights(model, mesh, scheme)
    made = {p: jax.tree.map(place, w.abstract(), w.shardings(mesh)) for p, w in weights.items()}
    return unflatten(flat | made)


def _quantized(w: jax.Array, weight: Weight) -> QTensor:
    values, scale = round_rows(w.reshape(*weight.lead, -1, weight.inner), jnp)
    return weight.like(values if weight.transposed else values.swapaxes(-1, -2), scale)
