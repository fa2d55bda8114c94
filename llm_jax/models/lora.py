"""LoRA: small trainable matrices beside frozen weights (Hu et al. 2021, arXiv:2106.09685).

    lora = LoraModel(model, LoraConfig(rank=8, alpha=16.0, targets=("attn/w[qv]$",)))
    adapters = lora.init(params, mesh, key)    what trains, a nested dict beside the frozen params
    net = lora.bind(adapters, params)          inside a jit; the products never form W + scale b a
    params = lora.merge(adapters, params)      ordinary parameters again
    change = lora.change(adapters)             the adapters alone: {path: LowRank without its base}

A weight W [O, C] becomes W + (alpha / rank) b a, with a [R, C] drawn and b [O, R] zero, so that training
starts from the model as it was. Stacked weights have one a and one b for each layer. Parameters named
by `whole` (a new head) are trained as they are.
"""

import functools
import math
import re
from collections.abc import Collection, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.config import LoraConfig
from llm_jax.models.describe import Model, Params
from llm_jax.models.moe import MOE
from llm_jax.models.transformer import Transformer
from llm_jax.ops.linear import LowRank, is_low_rank
from llm_jax.sharding import is_axes, shardings
from llm_jax.tree import flatten, is_per_layer, unflatten


class LoraModel:
    """The trainable part of `model` under LoRA, described as a `Model` describes the whole.

    targets, whole: paths of the parameters that have adapters, and that are trained themselves.
    shapes, axes, contract: as `Model` has them, of {target: {"a", "b"}} and of the whole ones.
    ValueError for a pattern that matches nothing, or a target that is not the weight of a product.
    """

    def __init__(self, model: Model, lora: LoraConfig):
        self.model, self.rank, self.alpha = model, lora.rank, lora.alpha
        shapes, axes, contract = flatten(model.shapes), _flat(model.axes), _flat(model.contract)
        self.whole = matching(lora.whole, shapes, "lora.whole")
        weights = {path: names for path, names in contract.items() if names}
        self.targets = matching(lora.targets, weights, "lora.targets")
        if experts := [path for path in self.targets if path.startswith(MOE)]:
            raise ValueError(
                f"lora.targets={lora.targets!r} name {experts}: a mixture of experts has no adapters; "
                "expected such as ('layers/attn/',)"
            )
        if both := set(self.whole) & set(self.targets):
            raise ValueError(
                f"lora.targets and lora.whole both name {sorted(both)}; expected one of them"
            )
        parts: dict[str, tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]] = {
            path: (shapes[path].shape, axes[path], contract[path]) for path in self.whole
        }
        for path in self.targets:
            shape, names, summed = shapes[path].shape, axes[path], contract[path]
            lead = names.count("layers")  # 0 or 1 axes
            split = len(names) - len(summed)
            parts[f"{path}/a"] = (
                (*shape[:lead], lora.rank, *shape[split:]),
                (*names[:lead], "lora", *names[split:]),
                summed,
            )
            parts[f"{path}/b"] = ((*shape[:split], lora.rank), (*names[:split], "lora"), ("lora",))
        as_shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        self.shapes: Params = unflatten({path: as_shape(part[0]) for path, part in parts.items()})
        self.axes: Params = unflatten({path: part[1] for path, part in parts.items()})
        self.contract: Params = unflatten({path: part[2] for path, part in parts.items()})

    def shardings(self, mesh: Mesh) -> Params:
        """NamedSharding of every trainable array on `mesh`."""
        return shardings(self.axes, self.shapes, mesh)

    def init(self, params: Params, mesh: Mesh, key: jax.Array) -> Params:
        """Trainable arrays (float32) on their shards: a ~ N(0, 1 / C), b = 0, the whole ones copied."""
        shapes, contract, axes = flatten(self.shapes), _flat(self.contract), _flat(self.axes)

        def make(key, whole):
            made = {path: value.astype(jnp.float32) for path, value in whole.items()}
            for number, (path, shape) in enumerate(shapes.items()):
                if path.endswith("/b") and path not in made:
                    made[path] = jnp.zeros(shape.shape, shape.dtype)
                elif path not in made:
                    sizes = dict(zip(axes[path], shape.shape, strict=True))
                    std = math.prod(sizes[name] for name in contract[path]) ** -0.5
                    fold = jax.random.fold_in(key, number)
                    made[path] = std * jax.random.normal(fold, shape.shape, shape.dtype)
            return unflatten({path: made[path] for path in shapes})

        flat = flatten(params)
        whole = {path: flat[path] for path in self.whole}
        return jax.jit(make, out_shardings=self.shardings(mesh))(key, whole)

    def attach(self, adapters: Params, params: Params) -> Params:
        """`params` with a `LowRank` in place of every target: what `Model.bind` takes."""
        flat, small = (flatten(tree, is_leaf=is_per_layer) for tree in (params, adapters))
        as_like = functools.partial(jax.tree.map, lambda x, like: x.astype(like.dtype))
        attached = {path: as_like(small[path], flat[path]) for path in self.whole}
        scale = self.alpha / self.rank
        for path in self.targets:
            attached[path] = LowRank(flat[path], small[f"{path}/a"], small[f"{path}/b"], scale)
        return unflatten(flat | attached)

    def change(self, adapters: Params) -> dict[str, LowRank]:
        """{path: LowRank without its base} of every target. ValueError where parameters train whole."""
        if self.whole:
            raise ValueError(
                f"lora.whole has {list(self.whole)}: they are no low-rank change; merge the adapter"
            )
        small = flatten(adapters, is_leaf=is_per_layer)
        parts = ((path, small[f"{path}/a"], small[f"{path}/b"]) for path in self.targets)
        return {path: LowRank(None, a, b, self.alpha / self.rank) for path, a, b in parts}

    def bind(self, adapters: Params, params: Params) -> Transformer:
        """The modules with these parameters and adapters in them; call it inside a jit."""
        return self.model.bind(self.attach(adapters, params))

    def merge(self, adapters: Params, params: Params) -> Params:
        """Ordinary parameters, dtypes and shards as before: targets plus their changes, in float32."""

        def add(adapters, params):
            flat = flatten(self.attach(adapters, params), is_leaf=is_low_rank)
            merged = {path: _sum(flat[path], stacked=path in stacked) for path in self.targets}
            return unflatten(flat | merged)

        stacked = {path for path, names in _flat(self.model.axes).items() if "layers" in names}
        shards = jax.tree.map(lambda p: p.sharding, params)
        return jax.jit(add, out_shardings=shards)(adapters, params)


def _sum(w: LowRank, *, stacked: bool) -> jax.Array:
    """base + scale b a as one array; `stacked`: all three lead with layers."""
    lead, rank = w.base.shape[:stacked], w.b.shape[-1]
    a, b = w.a.reshape(*lead, rank, -1), w.b.reshape(*lead, -1, rank)
    change = (w.scale * (b @ a)).reshape(w.base.shape)
    return (w.base.astype(jnp.float32) + change).astype(w.base.dtype)


def _flat(axes: Params) -> dict[str, tuple[str, ...]]:
    return flatten(axes, is_leaf=is_axes)


def matching(patterns: Iterable[str], paths: Collection[str], field: str) -> tuple[str, ...]:
    """The paths in which one of the regular expressions is found; every pattern must find some."""
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"{field}={pattern!r} matches none of {', '.join(paths)}")
    return tuple(path for path in paths if any(re.search(p, path) for p in patterns))
