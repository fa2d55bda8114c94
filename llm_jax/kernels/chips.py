"""What kernels must know of a TPU to choose their blocks by rule; see llm_jax/tpu/chips.py for the
sources.
"""

import dataclasses

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
