"""Several LoRA adapters beside the weights of a model at once; every token has its own, or none.

    bank = AdapterBank(model, places=4, rank=16, mesh=mesh)
    held = bank.init(params)                   arrays for the adapters, a dict beside the params
    write = bank.make_write(held)
    held = write(held, place, bank.padded(bank.pack(change, name)))
    net = model.bind(with_places(bank.attach(held, params), places))       inside a jit

A place is a range of the rows of one wide LoRA: its a and b have the rank of all places together. So a
step has the same ordinary products whatever it holds, where Punica (Chen et al. 2023, arXiv:2310.18547)
gathers weights by token; their cost grows with places times rank, meant to be a few hundreds.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.config import LoraConfig
from llm_jax.models.describe import Model, Params
from llm_jax.models.key_heads import own
from llm_jax.models.lora import LoraModel, matching
from llm_jax.models.moe import MOE
from llm_jax.ops.linear import LowRank, LowRankBank, is_bank
from llm_jax.sharding import is_axes, replicated
from llm_jax.tree import PerLayer, flatten, is_parameter, is_per_layer, unflatten

HostChange = dict[str, tuple[np.ndarray, np.ndarray]]  # path: a [L, r, C], b [L, O, r] times the scale


class AdapterBank:
    """Room for `places` changes, each of rank up to `rank`, of the weights of every layer.

    model: as it is served; changes have each key head once. targets: patterns of the paths that have
    room, () for all weights of the layers but those of experts. Arrays are in the parameter dtype, split
    over `mesh` as the weights are. ValueError for patterns that cannot be.
    """

    def __init__(self, model: Model, places: int, rank: int, mesh: Mesh, targets: tuple[str, ...] = ()):
        contract = flatten(model.contract, is_leaf=is_axes)
        weights = [path for path, names in contract.items() if names and path.startswith("layers/")]
        weights = [path for path in weights if not path.startswith(MOE)]
        found = matching(targets or (".",), weights, "EngineConfig.adapter_targets")
        wide = LoraConfig(places * rank, targets=tuple(f"^{path}$" for path in found))
        lora = LoraModel(model, wide)
        self.targets, self.places, self.rank, self.mesh = lora.targets, places, rank, mesh
        self.dtype = jnp.dtype(model.config.param_dtype)
        self._shapes, self._shardings = flatten(lora.shapes), flatten(lora.shardings(mesh))
        self._given = flatten(LoraModel(own(model), wide).shapes)  # what changes look like

    def init(self, params: Params) -> dict[str, LowRankBank]:
        """Empty places (zeros), layer by layer where the weights are so."""
        apart = any(map(is_per_layer, jax.tree.leaves(params["layers"], is_leaf=is_per_layer)))

        def zeros(name: str) -> Any:
            shape = self._shapes[name].shape
            if not apart:
                return jnp.zeros(shape, self.dtype, device=self._shardings[name])
            like = {"shape": shape[1:], "dtype": self.dtype, "device": replicated(self.mesh)}
            return PerLayer(tuple(jnp.zeros(**like) for _ in range(shape[0])))

        return {
            path: LowRankBank(None, zeros(f"{path}/a"), zeros(f"{path}/b"), None, self.rank)
            for path in self.targets
        }

    def attach(self, held: Mapping[str, LowRankBank], params: Params) -> Params:
        """`params` with the banks in place of their weights, as `with_places` takes them."""
        flat = flatten(params, is_leaf=is_parameter)
        banks = {path: dataclasses.replace(bank, base=flat[path]) for path, bank in held.items()}
        return unflatten(flat | banks)

    def make_write(self, held: Mapping[str, LowRankBank]) -> Callable:
        """f(held, place [], `padded` change) -> held with the change there; compiled. held: donated."""

        def put(x: Any, new: jax.Array, axis: int, at: jax.Array) -> Any:
            if is_per_layer(x):
                return PerLayer(tuple(put(part, new[i], axis, at) for i, part in enumerate(x.parts)))
            return jax.lax.dynamic_update_slice_in_dim(x, new, at, axis)

        def write(held, place, change):
            at = place * self.rank
            return {
                path: dataclasses.replace(
                    bank, a=put(bank.a, change[path][0], -2, at), b=put(bank.b, change[path][1], -1, at)
                )
                for path, bank in held.items()
            }

        shardings = jax.tree.map(lambda x: x.sharding, held)
        fn = jax.jit(write, donate_argnums=0, out_shardings=shardings)
        return fn.lower(held, np.int32(0), self.padded({})).compile()

    def pack(self, change: Mapping[str, LowRank], name: str) -> HostChange:
        """A change as the host keeps it; ValueError, with the name, where no place can hold it."""
        if lacking := sorted(set(change) - set(self.targets)):
            raise ValueError(
                f"adapter {name!r} changes {', '.join(lacking)}; this engine has room for changes of "
                f"{', '.join(self.targets)}: set EngineConfig.adapter_targets for other weights of the "
                "layers, or serve the adapter merged"
            )
        return {path: self._pack(path, one, name) for path, one in change.items()}

    def _pack(self, path: str, change: LowRank, name: str) -> tuple[np.ndarray, np.ndarray]:
        a, b = (_on_host(x) for x in (change.a, change.b))
        shapes = [self._given[f"{path}/{part}"].shape for part in "ab"]
        rank = b.shape[-1]
        if rank > self.rank:
            raise ValueError(
                f"adapter {name!r} has rank {rank} at {path}, this engine room for rank {self.rank}: "
                f"set EngineConfig.adapter_rank={rank}, or serve the adapter merged"
            )
        wanted = ((*shapes[0][:-2], rank, shapes[0][-1]), (*shapes[1][:-1], rank))
        if (a.shape, b.shape) != wanted:
            raise ValueError(
                f"adapter {name!r} has a {a.shape} and b {b.shape} at {path}, expected {wanted[0]} and "
                f"{wanted[1]}; it belongs to another model"
            )
        b = b.astype(np.float32) * np.float32(change.scale)
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        if not all(np.isfinite(x.astype(np.float32)).all() for x in (a, b)):
            raise ValueError(
                f"adapter {name!r} has values at {path} that are not finite in {self.dtype}: they would "
                "spoil other requests; train it again, or convert it anew"
            )
        return a, b

    def padded(self, change: HostChange) -> HostChange:
        """The change with zeros for what it lacks: of full rank, of every target."""
        full = {}
        for path in self.targets:
            of_a, of_b = (self._shapes[f"{path}/{part}"].shape for part in "ab")
            a = np.zeros((*of_a[:-2], self.rank, of_a[-1]), self.dtype)
            b = np.zeros((*of_b[:-1], self.rank), self.dtype)
            if path in change:
                of_change = change[path][1]
                rank, times = of_change.shape[-1], of_b[1] // of_change.shape[1]
                a[..., :rank, :], b[..., :rank] = change[path][0], np.repeat(of_change, times, axis=1)
            full[path] = a, b
        return full


def with_places(params: Params, places: jax.Array, *, alone: bool = False) -> Params:
    """`params` whose `LowRankBank`s know the place of every token, [..., T] int32; -1 is none.

    alone: see `LowRankBank`.
    """

    def knowing(leaf: Any) -> Any:
        if not is_bank(leaf):
            return leaf
        if is_per_layer(leaf.a):
            apart = PerLayer((places,) * len(leaf.a.parts))
            return dataclasses.replace(leaf, places=apart, alone=alone)
        stacked = jnp.broadcast_to(places, (leaf.a.shape[0], *places.shape))
        return dataclasses.replace(leaf, places=stacked, alone=alone)

    return jax.tree.map(knowing, params, is_leaf=is_bank)


def _on_host(x: Any) -> np.ndarray:
    """A stacked array, or the layers of one."""
    return np.stack([np.asarray(part) for part in x.parts]) if is_per_layer(x) else np.asarray(x)
