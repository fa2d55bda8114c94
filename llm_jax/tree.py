"""Trees of arrays: paths as strings, byte counts, and stacked layers taken apart."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLayer:
    """Stands where an array stacked over layers stood: one array per layer, layer 0 first.

    XLA:CPU and XLA:GPU copy the slice of a stacked weight before every product, which triples the
    memory traffic of a decode step; separate arrays are read in place.
    """

    parts: tuple[Any, ...]

    def __getitem__(self, layer: int) -> Any:
        return self.parts[layer]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfLayer:
    """Stands where the array of one layer stood: those of all layers [L, ...], and which one it is [];
    None that all are meant.

    A kernel reads that one in place, where a slice would be copied before it begins.
    """

    stack: Any
    layer: Any = None


def is_per_layer(leaf: Any) -> bool:
    """Whether `leaf` is a `PerLayer`, for `is_leaf=`."""
    return isinstance(leaf, PerLayer)


def is_parameter(leaf: Any) -> bool:
    """Whether `leaf` is a parameter, whatever stands for its array, and not a dict of some."""
    return not isinstance(leaf, dict)


def path_string(path: tuple) -> str:
    """'layers/attn/wq' for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any, is_leaf: Callable | None = None) -> dict[str, Any]:
    """{'layers/attn/wq': leaf, ...} in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {path_string(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` came from."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays (or ShapeDtypeStructs) in the tree, counted once whatever the sharding."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def num_elements(tree: Any) -> int:
    """Number of elements of all arrays in the tree."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def mask(tree: Any, patterns: Mapping[str, Any]) -> Any:
    """Value of the one regex in `patterns` that fully matches each leaf's path, as a tree.

    Raises ValueError when a leaf matches no pattern or several, or when a pattern matches nothing.
    """
    used = set()

    def choose(path, _):
        name = path_string(path)
        hits = [p for p in patterns if re.fullmatch(p, name)]
        if len(hits) != 1:
            raise ValueError(f"{name}: matched by {hits or 'no pattern'}; expected exactly one")
        used.add(hits[0])
        return patterns[hits[0]]

    result = jax.tree_util.tree_map_with_path(choose, tree)
    if unused := set(patterns) - used:
        raise ValueError(f"patterns that match no leaf: {sorted(unused)}")
    return result


def layers_apart(params: dict[str, Any]) -> dict[str, Any]:
    """`params` with `PerLayer` in place of the arrays [L, ...] under "layers"; for use inside a jit.

    A gradient through it is stacked again: the transpose of a split is one concatenation.
    """

    if "layers" not in params:
        return params
    return params | {"layers": jax.tree.map(lambda x: PerLayer(_layers(x)), params["layers"])}


def unstack(stacked: Any, *, release: bool = False) -> Any:
    """Each array [L, ...] as `PerLayer`, for read-only use. What is `PerLayer` already stays as it is.

    On one CPU device they are views: they share the buffers of `stacked` when a layer's bytes keep XLA's
    alignment (64 bytes), else that array is copied. Elsewhere all are copies with the same shardings;
    release: each array is deleted once it is copied, so that there is never much memory for both.
    """

    def apart(x: Any) -> PerLayer:
        if is_per_layer(x):
            return x
        (first, *others) = x.devices()
        if not others and first.platform == "cpu":
            return PerLayer(tuple(_views(x)))
        parts = PerLayer(_copies(x))
        if release:
            x.delete()
        return parts

    return jax.tree.map(apart, stacked, is_leaf=is_per_layer)


def _copies(x: jax.Array) -> tuple[jax.Array, ...]:
    sharding = x.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.jit(_layers, out_shardings=sharding)(x)


def _layers(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(part[0] for part in jax.lax.split(x, (1,) * x.shape[0]))


def _views(x: jax.Array) -> list[jax.Array]:
    (device,) = x.devices()
    host = np.asarray(x)  # zero-copy on CPU
    return [jax.device_put(host[i], device, may_alias=True) for i in range(host.shape[0])]
