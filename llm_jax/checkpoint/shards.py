"""Arrays of which a process makes its own shards alone, from buffers on the host."""

import math
from collections import defaultdict
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Sharding

_ALIGNMENT = 64  # bytes; XLA:CPU uses a host buffer in place when it is aligned so

Fill = Callable[[np.ndarray, tuple[slice, ...]], None]  # of a shard's buffer, by its place in the array


def from_shards(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    fill: Fill,
) -> jax.Array:
    """An array of which only this process's shards are made, each from one host buffer.

    On CPU the buffer, aligned for XLA, becomes the shard itself; elsewhere it is freed when copied.
    """
    devices = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # it is for devices of other processes only
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        devices[bounds].append(device)
    arrays = []
    for bounds, replicas in devices.items():
        buffer = aligned(tuple(stop - start for start, stop in bounds), dtype)
        fill(buffer, tuple(slice(*b) for b in bounds))
        arrays += [jax.device_put(buffer, device, may_alias=True) for device in replicas]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, arrays))


def repeating(fill: Fill, own: tuple[int, ...], held: tuple[int, ...], unit: int = 1) -> Fill:
    """A `fill` of an array `held` by one of an array `own`, of which one axis at most is shorter: there
    every `unit` entries stand several times, side by side.
    """
    axis = next((i for i, (n, m) in enumerate(zip(own, held, strict=True)) if n != m), None)
    if axis is None:
        return fill
    times = held[axis] // own[axis]

    def run(shard: np.ndarray, index: tuple[slice, ...]) -> None:
        at = np.arange(index[axis].start, index[axis].stop)
        source = at // unit // times * unit + at % unit
        start, stop = int(source.min()), int(source.max()) + 1
        given = (*index[:axis], slice(start, stop), *index[axis + 1 :])
        if stop - start == len(at):  # nothing stands twice on this shard
            return fill(shard, given)
        part = np.empty((*shard.shape[:axis], stop - start, *shard.shape[axis + 1 :]), shard.dtype)
        fill(part, given)
        np.copyto(shard, np.take(part, source - start, axis=axis))

    return run


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
