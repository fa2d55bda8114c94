"""Arrays of which a process makes its own shards alone, from buffers on the host."""

import math
from collections import defaultdict
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Sharding

_ALIGNMENT = 64  # bytes; XLA:CPU uses a host buffer in place when it is aligned so


def from_shards(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    fill: Callable[[np.ndarray, tuple[slice, ...]], None],
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


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
