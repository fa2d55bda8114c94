"""What a step does on a device, by formulas: operations like those that `tpu.hlo` reads of a program.

The clock of compiled programs goes over them (`tpu.timing`, with `tpu.links` and `plan.kernels`).
Letters: R rows (tokens) of a step on a device, D embed, F mlp, K experts of a token, X expert shards,
M microbatches, S stages; [in, out] a matrix as `tensor` and `expert` split it.

    every matrix   2 R in out operations; it is read once, and R (in + out) numbers
    attention      the kernels, at the workload's lengths
    tensor         two all-reduces of [R, D] a layer; in training two more, and one of what is made again
    expert         an all-gather and a reduce-scatter of [R X, D]; of R X K rows 8 D + 3 F are moved
    fsdp           every matrix is gathered twice, its gradient scattered once
    data           the gradients that are left are added up
    context        keys and values go round; in training three times
    stage          M + S - 1 turns through a stage's layers, with M of them at work: models/pipeline.py
    training       products three times; with remat=full once more, but for a layer's last one (`down`);
                   parameters, moments and gradients are read and written

Nothing overlaps and nothing is fused. What compiled programs of several models have in common is
counted: how many small operations a layer has, how often it moves activations that do not fit VMEM.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from llm_jax.models import describe
from llm_jax.models.moe import EXPERTS
from llm_jax.plan.kernels import Traffic, at_share
from llm_jax.plan.quote import traffic_of
from llm_jax.plan.steps import (
    abstract_mesh,
    device_bytes,
    mesh_on,
    serving_arrays,
    training_arrays,
)
from llm_jax.plan.workload import Workload, device_kind, devices
from llm_jax.sharding import data_shards, is_axes, mesh_sizes, placed
from llm_jax.tpu.chips import chip_of
from llm_jax.tpu.hlo import Collective, Loop, Operation
from llm_jax.tpu.timing import KernelCost
from llm_jax.tree import flatten, is_parameter

# As compiled programs have them: operations of a layer, and how often it moves a token's D numbers.
OPERATIONS = {"decode": 48, "prefill": 64, "train": 360}
ROUTED = 40  # more operations of a layer with experts
TOUCHED = {"serve": 8, "train": 96}
LANES = 128  # of a tile: parts of a weight that are narrower are gathered and added up by all-reduce
BF16 = 2  # bytes

Operations = tuple[Operation | Loop, ...]


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """One of a layer or outside of them, on a device. experts: that it is of so many here; 0 = dense."""

    path: str
    depth: int
    columns: int
    bytes: float
    experts: int
    narrow: bool

    @property
    def size(self) -> int:
        return self.depth * self.columns * max(self.experts, 1)


def _repeat(body: Operations, times: int) -> Loop:
    return Loop("", times, body)


class Sketch:
    """A step on one device: "prefill", "decode", "choose" or "train". costs: of its kernels, by path."""

    def __init__(self, name: str, work: Workload, topology: str, mesh: str):
        self.name, self.work, self.topology, self.mesh = name, work, topology, mesh
        self.config, self.training = work.config, name == "train"
        self.sizes = mesh_sizes(mesh, devices(topology))
        self.costs: dict[str, KernelCost] = {}
        self.sequences = work.rows(data_shards(mesh_on(topology, mesh)))
        self.rows = self.sequences
        if name == "train":
            self.rows = self.sequences * work.context // self.sizes["context"]
        elif name == "prefill":
            self.rows = min(work.prefill_tokens, self.sequences * work.context)

    def program(self) -> Operations:
        """What it does, one after the other."""
        match self.name:
            case "choose":
                logits = 4 * self.sequences * self.config.vocab_size
                return (Operation("choose", "fusion", hbm_bytes=logits),)
            case "train":
                return tuple(self.train())
            case _:
                return tuple(self.serve())

    def serve(self) -> Iterator[Operation | Loop]:
        """A forward pass; logits of one token of each sequence."""
        yield from self.exchange("all-reduce", self.wide_bytes, "tensor")
        yield _repeat(tuple(self.layer()), self.layers)
        for matrix in self.matrices(inside=False):
            yield self.product(matrix, self.sequences)
        yield from self.exchange("all-gather", BF16 * self.sequences * self.config.vocab_size, "tensor")

    def train(self) -> Iterator[Operation | Loop]:
        """Forward, backward with what it computes again, gradients that are added up, the update."""
        stages = self.sizes["stage"]
        micro, one = stages > 1 and self.work.microbatches or stages, copy.copy(self)
        one.rows, turns = self.rows * stages // micro, micro + stages - 1
        handed = tuple(one.exchange("collective-permute", one.wide_bytes, "stage"))
        yield _repeat((_repeat(tuple(one.layer()), self.layers), *handed), turns)
        for matrix in self.matrices(inside=False):
            yield from self.gathered(matrix)
            yield _repeat((self.product(matrix, self.rows),), 3)
            yield from self.added(matrix)
        backward = (*one.again(), *one.backward())
        yield _repeat((_repeat(backward, self.layers), *handed), turns)
        yield _repeat(tuple(x for m in self.matrices(inside=True) for x in self.added(m)), self.layers)
        _, _, state = training_arrays(self.work, mesh_on(self.topology, self.mesh))
        yield Operation("update", "fusion", hbm_bytes=2 * device_bytes(state) + self.gradients())

    def layer(self) -> Iterator[Operation | Loop]:
        """Of a forward pass."""
        for matrix in self.matrices(inside=True):
            yield from self.gathered(matrix)
            yield self.product(matrix, self.rows)
        yield from self.attention()
        yield from self.sums(2)
        yield self.touched(TOUCHED["train"] / 4 if self.training else TOUCHED["serve"])
        yield from self.started(4 if self.training else 1)

    def again(self) -> Iterator[Operation | Loop]:
        """Of a layer, what the backward pass computes again: nobody needs its last product."""
        if self.work.remat == "none":
            return
        for matrix in self.matrices(inside=True):
            if self.work.remat == "full" and not matrix.path.endswith("/down"):
                yield self.product(matrix, self.rows)
        yield from self.attention()
        yield from self.sums(self.work.remat == "full")
        yield self.touched(TOUCHED["train"] / 4)
        yield from self.started(4)

    def backward(self) -> Iterator[Operation | Loop]:
        """Of a layer, without what is computed again."""
        for matrix in self.matrices(inside=True):
            yield from self.gathered(matrix)
            yield _repeat((self.product(matrix, self.rows),), 2)
        flops = 5 * self.score_flops(self.work.context) / 4  # of the one kernel for all gradients
        yield self.kernel("attention, backward", "flash_attention_keys", flops, 4 * self.attended_bytes)
        yield from self.round("context", 2 * self.key_bytes)  # with their gradients
        yield from self.sums(2)
        yield self.touched(TOUCHED["train"] / 2)
        yield from self.started(2)

    def sums(self, count: int) -> Iterator[Operation]:
        """What a layer exchanges of its activations: so many sums, of attention and mlp."""
        config = self.config
        for _ in range(count):
            yield from self.exchange("all-reduce", self.wide_bytes, "tensor")
        if config.num_experts:
            parts = self.sizes["expert"]
            moved = 8 * config.embed_dim + 3 * self.local("mlp")
            routed = BF16 * self.rows * parts * config.experts_per_token * moved
            yield Operation("routed rows", "fusion", hbm_bytes=routed)
            for kind in ("all-gather", "reduce-scatter"):
                yield from self.exchange(kind, self.wide_bytes * parts, "expert")

    def touched(self, times: float) -> Operation:
        """Activations that go through HBM, as they do not fit VMEM beside all else."""
        fits = self.wide_bytes <= chip_of(self.topology).vmem_bytes / 5
        return Operation("activations", "fusion", hbm_bytes=0.0 if fits else times * self.wide_bytes)

    def started(self, share: float) -> Iterator[Loop]:
        """Small operations, by what they take to start."""
        count = (OPERATIONS[self.name] + ROUTED * bool(self.config.num_experts)) / share
        yield _repeat((Operation("small operations", "fusion"),), round(count))

    def attention(self) -> Iterator[Operation]:
        """Of a layer, forward; where it serves, the new keys and values are written first."""
        context = self.work.context
        if not self.training:
            yield self.kernel("attention, new keys", "paged_write", 0.0, 2 * self.key_bytes)
        if self.name == "decode":
            moved = self.rows * self.traffic.seen(context) * self.token_bytes
            kept = "" if self.work.cache in ("bf16", "f32") else ", 8 bits"
            yield self.kernel("attention", f"paged_decode{kept}", self.score_flops(context), moved)
        elif self.name == "prefill":
            seen = self.traffic.seen(self.traffic.prefill)
            moved = self.attended_bytes + self.rows / 512 * seen * self.token_bytes
            yield self.kernel("attention", "paged_chunk", self.score_flops(context / 2), moved)
        else:
            flops = self.score_flops(context) / 2
            yield self.kernel("attention", "flash_attention", flops, 2 * self.attended_bytes)
            yield from self.round("context", self.key_bytes)

    def product(self, matrix: _Matrix, rows: int) -> Operation:
        """Of the rows of a device with a matrix; of experts, with those that the rows choose."""
        config, wide = self.config, matrix.depth + matrix.columns
        if matrix.experts:
            mine = rows * config.experts_per_token
            read = self.traffic.used(matrix.experts, mine * self.sizes["expert"]) / matrix.experts
            moved = read * matrix.bytes + BF16 * mine * wide
            flops = 2.0 * mine * matrix.depth * matrix.columns
            return self.kernel(matrix.path, "grouped_matmul", flops, moved)
        flops, moved = 2.0 * rows * matrix.depth * matrix.columns, matrix.bytes + BF16 * rows * wide
        if self.work.scheme and not self.training:
            rows_too = ", 8-bit rows" if self.work.scheme == "w8a8" else ""
            return self.kernel(matrix.path, f"quantized_matmul{rows_too}", flops, moved)
        return Operation(matrix.path, "fusion", flops=flops, hbm_bytes=moved)

    def kernel(self, path: str, name: str, flops: float, moved: float) -> Operation:
        self.costs[path] = at_share(name, chip_of(self.topology).name, flops, moved)
        return Operation(path, "custom-call", kernel=path)

    def gathered(self, matrix: _Matrix) -> Iterator[Operation]:
        """A matrix that `fsdp` splits, whole."""
        if self.training:
            kind = "all-reduce" if matrix.narrow else "all-gather"
            yield from self.exchange(kind, BF16 * matrix.size, "fsdp")

    def added(self, matrix: _Matrix) -> Iterator[Operation]:
        """Its gradient over all devices that have other rows."""
        kind = "all-reduce" if matrix.narrow else "reduce-scatter"
        yield from self.exchange(kind, BF16 * matrix.size, "fsdp")
        others = ["data", "context"]
        others += [] if matrix.experts else ["expert"]
        others += [] if matrix.path.startswith("layers/") else ["stage"]
        yield from self.exchange("all-reduce", BF16 * matrix.size / self.sizes["fsdp"], *others)

    def exchange(self, kind: str, size: float, *axes: str) -> Iterator[Operation]:
        """Between the devices that differ by these axes only; nothing where there are no others."""
        if math.prod(self.sizes[axis] for axis in axes) > 1:
            groups = self.pairs(*axes) if kind == "collective-permute" else self.groups(axes)
            of = ", ".join(axis for axis in axes if self.sizes[axis] > 1)
            yield Operation(f"{kind} over {of}", kind, collective=Collective(kind, size, groups))

    def round(self, axis: str, size: float) -> Iterator[Operation]:
        """To the next, as often as there are others."""
        for _ in range(self.sizes[axis] - 1):
            yield from self.exchange("collective-permute", size, axis)

    def groups(self, axes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        names, sizes = list(self.sizes), tuple(self.sizes.values())
        places = np.arange(math.prod(sizes)).reshape(sizes)
        last = [names.index(axis) for axis in axes]
        rest = [i for i in range(len(names)) if i not in last]
        count = math.prod(sizes[i] for i in last)
        return tuple(map(tuple, places.transpose(*rest, *last).reshape(-1, count).tolist()))

    def pairs(self, axis: str) -> tuple[tuple[int, ...], ...]:
        return tuple(p for g in self.groups((axis,)) for p in zip(g, (*g[1:], g[0]), strict=True))

    @functools.cached_property
    def traffic(self) -> Traffic:
        return traffic_of(self.work, self.name)

    @property
    def layers(self) -> int:
        return self.config.num_layers // self.sizes["stage"]

    @property
    def wide_bytes(self) -> float:
        """Of the activations [R, D]."""
        return BF16 * self.rows * self.config.embed_dim

    @property
    def key_bytes(self) -> float:
        """Of the keys and values of the rows."""
        return 2.0 * BF16 * self.rows * self.local("kv_heads") * self.config.head_dim

    @property
    def attended_bytes(self) -> float:
        """Of queries and what attention makes of them."""
        return 2.0 * BF16 * self.rows * self.local("heads") * self.config.head_dim

    def score_flops(self, tokens: float) -> float:
        """Of all queries with as many keys, and of what is made of their values."""
        heads = self.local("heads") * self.config.head_dim
        return 4.0 * self.rows * heads * self.traffic.seen(tokens)

    def local(self, name: str) -> int:
        """Heads, or columns of the feed-forward layers, on a device."""
        config, parts = self.config, self.sizes["tensor"]
        size = {"heads": config.num_heads, "kv_heads": config.num_kv_heads, "mlp": config.mlp_dim}[name]
        return size if size % parts else size // parts

    @functools.cached_property
    def token_bytes(self) -> float:
        """Keys and values of a token in one layer of the cache."""
        on = mesh_on(self.topology, self.mesh)
        tokens = self.sequences * self.work.pages * self.work.page_size
        return device_bytes(serving_arrays(self.work, on)[2]) / tokens / self.config.num_layers

    def matrices(self, inside: bool) -> list[_Matrix]:
        """Those of a layer, or those outside of layers."""
        return [m for m in self.every if m.path.startswith("layers/") == inside]

    @functools.cached_property
    def every(self) -> list[_Matrix]:
        """All that are multiplied by, without the `fsdp` that splits how they are kept."""
        whole = {name: n for name, n in self.sizes.items() if name != "fsdp"}
        on = abstract_mesh(whole, math.prod(whole.values()), device_kind(self.topology))
        if self.training:
            model = describe(dataclasses.replace(self.config, param_dtype="bfloat16"))
            params = placed(model.shapes, model.axes, on)
        else:
            model, params, _ = serving_arrays(self.work, on)
        kept, axes = flatten(params, is_leaf=is_parameter), flatten(model.axes, is_leaf=is_axes)
        shapes = flatten(placed(model.shapes, model.axes, on))
        sums = flatten(model.contract, is_leaf=is_axes)
        if self.config.tie_embeddings:
            sums |= {"embed/tokens": ("embed",)}
        found = []
        for path, over in sums.items():
            if not over:  # looked up, or added
                continue
            local = shapes[path].sharding.shard_shape(shapes[path].shape)
            sizes = dict(zip(axes[path], local, strict=True))
            layers, experts = sizes.pop("layers", 1), sizes.pop("experts", 0)
            depth = math.prod(sizes[axis] for axis in over)
            found.append(
                _Matrix(
                    path,
                    depth,
                    math.prod(sizes.values()) // depth,
                    device_bytes(kept[path]) / layers,
                    experts if path in EXPERTS else 0,
                    0 < sizes.get("embed", 0) // self.sizes["fsdp"] < LANES,
                )
            )
        return found

    def gradients(self) -> float:
        """Bytes of what the update reads: float32, split as the weights are."""
        on = mesh_on(self.topology, self.mesh)
        return device_bytes(training_arrays(self.work, on)[2].params)

    def temporaries(self) -> float:
        """Bytes that a step has besides what it is given."""
        config, vmem = self.config, chip_of(self.topology).vmem_bytes
        wide, mlp = config.embed_dim, self.local("mlp")
        if not self.training:
            routed = self.rows * self.sizes["expert"] * config.experts_per_token * (wide + mlp)
            made = 2 * BF16 * routed if config.num_experts else 3 * BF16 * self.rows * (wide + mlp)
            return max(made - vmem, 0.0)
        kept = {
            "full": wide,
            "dots": wide + sum(m.columns for m in self.matrices(inside=True)),
            "none": 4 * wide + sum(m.columns + m.depth for m in self.matrices(inside=True)),
        }["dots" if self.work.remat.startswith("dots") else self.work.remat]
        layer = BF16 * self.rows * (20 * wide + 6 * mlp)
        outside = sum(m.size for m in self.matrices(inside=False))
        return BF16 * self.rows * kept * self.layers + layer + 8 * outside + self.gradients() / 2
