"""Logical axis names, the rules that map them to mesh axes, and the only file that says PartitionSpec.

Parameters and activations name their dimensions by meaning ("embed", "heads", "batch", ...). Two
tables say which mesh axis, if any, splits each name. A dimension that its mesh axis does not divide
is kept whole on every device of that axis, and that is logged once; only layers must fit their stages,
and a model that serves has its key heads repeated until they fit (`key_heads`).
"""

import dataclasses
import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractDevice, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from llm_jax.config import nearest

logger = logging.getLogger(__name__)

MESH_AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
# Split the batch. `expert` is one more of them to dense layers, `stage` to what is outside of layers.
DATA_AXES = ("stage", "data", "fsdp", "expert")

Rules = Mapping[str, str | tuple[str, ...] | None]

# Where the parameters live. "embed" over fsdp: each data-parallel group holds a part of every matrix.
PARAMS: Rules = {
    "layers": "stage",
    "embed": "fsdp",
    "embed_out": None,  # second width of a square matrix
    "vocab": "tensor",
    "heads": "tensor",
    "head_features": "tensor",  # heads and head_dim as one
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "routes": None,  # the experts, as columns of the router
    "positions": None,
    "types": None,
    "ngrams": "tensor",
    "lora": None,
    "classes": None,
}
# Where the activations and caches live: the batch over all data axes, its tokens over context, heads
# and mlp over tensor. Caches and what attends to them have every token ("slots") on each device.
COMPUTE: Rules = {
    "layers": None,
    "batch": DATA_AXES,
    "seq": "context",
    "slots": None,
    "embed": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
}

_reported: set[tuple] = set()


def parse_mesh(text: str) -> dict[str, int]:
    """{'data': 1, 'fsdp': 1, 'tensor': 8} from 'data:1,fsdp:1,tensor:8'; one size may be -1."""
    shape = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition(":")
        if name not in MESH_AXES:
            raise ValueError(f"--mesh={text}: no axis {name!r}{nearest(name, MESH_AXES)}")
        if name in shape:
            raise ValueError(f"--mesh={text}: axis {name!r} is given twice")
        if not size.lstrip("-").isdigit() or int(size) == 0 or int(size) < -1:
            raise ValueError(f"--mesh={text}: size {size!r} of {name!r}: expected 1, 2, ... or -1")
        shape[name] = int(size)
    return shape


def mesh_sizes(shape: Mapping[str, int] | str, count: int) -> dict[str, int]:
    """The size of each of `MESH_AXES`; one may be -1 and takes what is left of `count` devices.

    Raises ValueError for axes that there are not, and a -1 that cannot be.
    """
    sizes = {**dict.fromkeys(MESH_AXES, 1), **(parse_mesh(shape) if isinstance(shape, str) else shape)}
    if unknown := set(sizes) - set(MESH_AXES):
        raise ValueError(f"mesh axes {sorted(unknown)} are unknown; expected {MESH_AXES}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {sizes}: only one axis may be -1, got {free}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if count % fixed:
            raise ValueError(f"mesh {sizes}: {count} devices are not a multiple of {fixed}")
        sizes[free[0]] = count // fixed
    return sizes


def make_mesh(shape: Mapping[str, int] | str = "", devices: Sequence | None = None) -> Mesh:
    """Mesh with the axes of `MESH_AXES` over the first devices that the shape needs.

    Sizes not named are 1; one may be -1 and takes the devices that are left. Raises ValueError
    when the sizes do not fit the devices there are, or leave some of several processes without any.
    """
    real = devices is None  # and not those of a topology to compile for
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(shape, len(devices))
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ValueError(
            f"mesh {sizes} needs {needed} devices, there are {len(devices)}; on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    idle = {d.process_index for d in devices} - {d.process_index for d in devices[:needed]}
    if real and idle:
        raise ValueError(
            f"mesh {sizes} takes {needed} of {len(devices)} devices and none of processes "
            f"{sorted(idle)}: expected all devices, as --mesh=data:-1 does"
        )
    shape_of, devices, auto = tuple(sizes.values()), devices[:needed], (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape_of, tuple(sizes), axis_types=auto, devices=devices)
    except NotImplementedError:  # an axis must lie along a part of a slice's, as 8 does on 4 x 4 chips
        places = create_device_mesh(shape_of, devices, allow_split_physical_axes=True)
        return Mesh(places, tuple(sizes), axis_types=auto)


def spec(axes: Sequence[str | None], rules: Rules, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes and this shape on `mesh`."""
    return PartitionSpec(*(_mesh_axis(a, rules, n, mesh) for a, n in zip(axes, shape, strict=True)))


def shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Rules = PARAMS) -> Any:
    """Tree of NamedSharding for a tree of logical axes (tuples) and the matching tree of shapes."""
    return jax.tree.map(
        lambda a, s: NamedSharding(mesh, spec(a, rules, s.shape, mesh)),
        axes,
        shapes,
        is_leaf=is_axes,
    )


def placed(abstract: Any, axes: Any, mesh: Mesh, rules: Rules = PARAMS) -> Any:
    """A tree of shapes with the shardings of its logical axes, for compiling ahead and for `zeros`."""
    place = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, abstract, shardings(axes, abstract, mesh, rules))


def zeros(abstract: Any) -> Any:
    """Arrays of zeros like what `placed` gives, born on their shards."""
    make = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract)  # noqa: E731
    return jax.jit(make, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))()


def is_axes(leaf: Any) -> bool:
    """Whether `leaf` is the tuple of logical axes of one array, for `is_leaf=`."""
    return isinstance(leaf, tuple) and all(a is None or isinstance(a, str) for a in leaf)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Rows over the data axes, everything else whole: how a batch [B, ...] enters a step."""
    axes = ("batch",) + (None,) * (len(shape) - 1)
    return NamedSharding(mesh, spec(axes, COMPUTE, shape, mesh))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation by logical axis names; the identity where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, COMPUTE, x.shape, mesh))


def on_shards(fn: Callable, in_axes: Sequence[tuple], out_like: Sequence[int]) -> Callable:
    """`fn` run on each device's own part of its arguments (shard_map); as it is where no mesh is set.

    Inside of `on_stages` the arguments are those of a stage, of which each of its devices has a part.

    in_axes: logical axes of each argument. out_like: for each result, the argument it is split like.
    """

    def run(*args):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return fn(*args)
        specs = [spec(axes, COMPUTE, x.shape, mesh) for axes, x in zip(in_axes, args, strict=True)]
        outs = tuple(specs[i] for i in out_like)
        rest = set(mesh.axis_names) - set(mesh.manual_axes)
        how = {"in_specs": tuple(specs), "out_specs": outs, "axis_names": rest}
        return jax.shard_map(fn, **how, check_vma=False)(*args)

    return run


def key_heads(heads: int, kv_heads: int, mesh: Any) -> int:
    """How many key heads stand side by side where each of `kv_heads` is repeated in place, so that every
    shard of "tensor" has those that its part of `heads` query heads reads: the fewest that it divides.

    kv_heads where "tensor" does not divide the query heads, as these are then kept whole too.
    """
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    return kv_heads if heads % tensor else math.lcm(kv_heads, tensor)


def splits(axis: str, name: str, size: int) -> bool:
    """Whether `axis` of the mesh that is set splits an activation's dimension of this name and size."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[axis] == 1:
        return False
    target = _mesh_axis(name, COMPUTE, size, mesh)
    return axis in ((target,) if isinstance(target, str) else target or ())


def stages() -> int:
    """In how many stages the mesh that is set has the layers; 1 = in one, or this is inside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or "stage" in mesh.manual_axes else mesh.shape["stage"]


def on_stages(fn: Callable, split: Sequence[bool]) -> Callable:
    """`fn` run by each stage: with its part of the arguments (trees) that are `split` by their first
    axis, and all of the others. Its results are parts as well, joined by their first axis.

    Only `stage` is taken from the mesh: inside, the other axes split arrays as they do outside.
    """
    specs = tuple(PartitionSpec("stage") if part else PartitionSpec() for part in split)
    how = {"in_specs": specs, "out_specs": PartitionSpec("stage"), "axis_names": {"stage"}}
    return jax.shard_map(fn, **how, check_vma=False)


def sequence_shards(tokens: int) -> int:
    """In how many parts the mesh that is set splits sequences of so many tokens; 1 = not at all."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["context"]
    return 1 if tokens % parts else parts


def balanced(x: jax.Array) -> jax.Array:
    """x [B, T, ...] in an order in which every device of "context" has as much causal attention to do:
    the first and the last of 2 C pieces, the second and the last but one, and so on.

    What follows must go by positions and not by places. As it is where sequences are not split.
    """
    parts = sequence_shards(x.shape[1])
    if parts == 1 or x.shape[1] % (2 * parts):
        return x
    pieces = x.reshape(x.shape[0], 2 * parts, -1, *x.shape[2:])
    order = [piece for i in range(parts) for piece in (i, 2 * parts - 1 - i)]
    return pieces[:, jnp.asarray(order)].reshape(x.shape)


def data_shards(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


@functools.lru_cache(maxsize=64)
def host_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): of a batch cut into n equal parts, this process's devices hold the i-th.

    Processes that share an axis of the mesh other than data and fsdp hold the same part. ValueError
    where the data shards cannot be dealt out like that.
    """
    shards, held = data_shards(mesh), defaultdict(set)
    for device, (rows,) in batch_sharding(mesh, (shards,)).devices_indices_map((shards,)).items():
        held[device.process_index].add(rows.indices(shards)[0])
    size = len(held[jax.process_index()])
    parts = {tuple(range(first, first + size)) for first in range(0, shards, size)}
    if any(tuple(sorted(rows)) not in parts for rows in held.values()):
        raise ValueError(
            f"mesh {dict(mesh.shape)} deals {shards} data shards to {len(held)} processes unequally: "
            "expected data * fsdp to be a multiple or a divisor of the number of processes"
        )
    return min(held[jax.process_index()]) // size, shards // size


def put(x: Any, target: Sharding) -> jax.Array:
    """A host array on `target`. All processes give the same one, and each keeps its shards of it."""
    if target.is_fully_addressable:
        return jax.device_put(x, target)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, target, lambda index: x[index])


def put_batch(x: Any, mesh: Mesh) -> jax.Array:
    """`put` of a batch [B, ...]: rows over the data axes, everything else whole."""
    return put(x, batch_sharding(mesh, x.shape))


def put_whole(x: Any, mesh: Mesh) -> jax.Array:
    """`put` of what every device needs whole."""
    return put(x, replicated(mesh))


def fetch(tree: Any) -> Any:
    """`jax.device_get`, also of arrays of which other processes hold parts; all of them must call it."""

    def whole(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def _mesh_axis(name: str | None, rules: Rules, size: int, mesh: Any) -> str | tuple | None:
    """The mesh axis (or axes) that splits a dimension of this size, or None."""
    if name is None:
        return None
    if name not in rules:
        raise ValueError(f"logical axis {name!r} has no sharding rule{nearest(name, rules)}")
    target = rules[name]
    if isinstance(target, tuple):
        target = tuple(axis for axis in target if axis not in mesh.manual_axes)
    if target is None:
        return None
    parts = math.prod(mesh.shape[a] for a in ((target,) if isinstance(target, str) else target))
    if parts == 1:
        return None
    if size % parts:
        if target == "stage":
            raise ValueError(
                f"num_layers={size}: expected a multiple of the stages of --mesh, stage:{parts}"
            )
        if size > 1 and (name, size, parts) not in _reported:
            _reported.add((name, size, parts))
            logger.warning(
                "%s=%d is not divisible by %s=%d: kept whole on each device", name, size, target, parts
            )
        return None
    return target


def abstract_device(kind: str, cores: int | None, platform: str) -> AbstractDevice:
    """A device that is not there, for an `AbstractMesh`; jax before 0.10 asks for no platform."""
    given = {"device_kind": kind, "num_cores": cores, "platform": platform}
    asked = {field.name for field in dataclasses.fields(AbstractDevice)}
    return AbstractDevice(**{name: value for name, value in given.items() if name in asked})
