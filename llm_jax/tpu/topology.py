"""Named TPU slices that are not there: devices to compile for."""

import math
from typing import Any

import jax
from jax.experimental import topologies

from llm_jax.tpu.chips import chip_of


def topology_devices(topology: str) -> list[Any]:
    """The devices of "v5e:2x4", "v5p:2x2x1", ...: what `jax.jit(f).lower(...).compile()` can target.

    Needs libtpu, and no TPU. "v5e:1x1", "v6e:1x1", "v5p:1x1x1", "v4:1x1x1" and "tpu7x:1x1x1" are one
    chip (of tpu7x two devices). v4 is compiled for as one device a chip. Call it in a process of its
    own, since libtpu locks the machine's TPU, where there is one (`compile.compile_for` does).

    Raises ValueError for a name that no generation has, with libtpu's reason for a shape it refuses.
    """
    chip, shape = chip_of(topology), topology.partition(":")[2]
    try:
        sizes = [int(n) for n in shape.split("x")]
    except ValueError as error:
        raise ValueError(f"topology={topology!r}: expected a shape such as {chip.name}:2x2") from error
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    if math.prod(sizes) == 1:  # a host has four chips unless one says otherwise
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology={topology!r}: libtpu refuses it: {error}") from error
    return list(found.devices)
