"""What kernels must know of a TPU or GPU to choose their blocks by rule.

Sources: of TPUs, see llm_jax/tpu/chips.py; of GPUs, NVIDIA's data sheets and its table of technical
specifications per compute capability (CUDA C++ programming guide).
"""

import dataclasses
import re
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class ChipRule:
    """One generation. sums_by_matrix_units: whether they have more to spare than the vector units.

    cores: of a device, which share a kernel's grid. pass_rows: that must pass a weight matrix in the
    matrix units to hide the loading of the next one.
    """

    name: str
    vmem_bytes: int  # of a core
    sums_by_matrix_units: bool
    cores: int = 1
    pass_rows: int = 256


MIB = 1 << 20
RULES = {  # the device's kind: its rule
    "TPU v4": ChipRule("v4", 16 * MIB, True, 2, 256),
    "TPU v5 lite": ChipRule("v5e", 128 * MIB, False, 1, 128),
    "TPU v5e": ChipRule("v5e", 128 * MIB, False, 1, 128),
    "TPU v5": ChipRule("v5p", 64 * MIB, False, 2, 128),
    "TPU v5p": ChipRule("v5p", 64 * MIB, False, 2, 128),
    "TPU v6 lite": ChipRule("v6e", 128 * MIB, True, 1, 256),
    "TPU v6e": ChipRule("v6e", 128 * MIB, True, 1, 256),
    "TPU7x": ChipRule("tpu7x", 64 * MIB, True, 1, 256),
}


@dataclasses.dataclass(frozen=True)
class GpuRule:
    """One NVIDIA GPU. capability: 9.0 is 90; shared_bytes: that a block may have."""

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int


KIB = 1 << 10
OLDEST_CAPABILITY = 80  # the first with bfloat16 and asynchronous copies into shared memory
GPUS = {  # a word of the device's kind: its rule
    rule.name: rule
    for rule in (
        GpuRule("V100", 70, 80, 96 * KIB),
        GpuRule("T4", 75, 40, 64 * KIB),
        GpuRule("A100", 80, 108, 163 * KIB),
        GpuRule("A30", 80, 56, 163 * KIB),
        GpuRule("A10", 86, 72, 99 * KIB),
        GpuRule("A10G", 86, 80, 99 * KIB),
        GpuRule("A40", 86, 84, 99 * KIB),
        GpuRule("A6000", 86, 84, 99 * KIB),
        GpuRule("3090", 86, 82, 99 * KIB),
        GpuRule("4090", 89, 128, 99 * KIB),
        GpuRule("L4", 89, 58, 99 * KIB),
        GpuRule("L40", 89, 142, 99 * KIB),
        GpuRule("L40S", 89, 142, 99 * KIB),
        GpuRule("H100", 90, 132, 227 * KIB),
        GpuRule("H200", 90, 132, 227 * KIB),
        GpuRule("H20", 90, 78, 227 * KIB),
        GpuRule("GH200", 90, 132, 227 * KIB),
        GpuRule("B200", 100, 148, 227 * KIB),
        GpuRule("GB200", 100, 148, 227 * KIB),
    )
}


def gpu_rule(kind: str) -> GpuRule | None:
    """Of a device's kind, such as "NVIDIA H100 80GB HBM3"; None for what is no GPU that is known."""
    if not kind.startswith(("NVIDIA ", "Tesla ")):
        return None
    return next((GPUS[word] for word in re.split(r"[\s-]", kind) if word in GPUS), None)


def kind_of(mesh: Any) -> str:
    """Of a mesh's devices; "" for one that is abstract and does not say."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return "" if mesh.abstract_device is None else mesh.abstract_device.device_kind
    return mesh.devices.flat[0].device_kind


def device_kind() -> str:
    """Of the devices that are computed on: those of the mesh that is set, else the first one there."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def chip_rule(interpret: bool = False) -> ChipRule:
    """The rule of the TPU that is computed on; interpret: of the newest, for tests on a CPU.

    Raises ValueError for a TPU that is not known.
    """
    if interpret:
        return RULES["TPU7x"]
    kind = device_kind()
    if kind not in RULES:
        raise ValueError(
            f"device kind {kind!r}: expected one of {tuple(RULES)}; add it to kernels/chips.py"
        )
    return RULES[kind]


def gpu_in_use(interpret: bool | str = False) -> GpuRule | None:
    """The rule of the GPU that is computed on, if it is one; interpret: "gpu" pretends to an H100, and
    True to a TPU.
    """
    if interpret:
        return GPUS["H100"] if interpret == "gpu" else None
    return gpu_rule(device_kind())
