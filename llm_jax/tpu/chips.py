"""The public figures of every TPU generation, in one table, per JAX device.

A JAX device is a chip; of tpu7x it is a core, half a chip. v4 and v5p have two cores a chip, which work
as one device (megacore).

Sources: cloud.google.com/tpu/docs, the pages v4, v5e, v5p, v6e and tpu7x (peak operations, HBM, links);
Jouppi et al. 2023 (arXiv:2304.01433) for v4. No page states the clock: it is peak / (2 x multiply-adds a
cycle), and the final code agrees where it can be seen: on v5e a product of 16 rows is issued every 16
cycles on each of four units of 128 x 128, on v6e every 8 on each of two of 256 x 256. For tpu7x this is
an inference: the compiler's own estimates for a large product and for a copy fit units of v6e's size at
2.2 GHz.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation; figures of one JAX device unless said otherwise.

    mxus: matrix units a core, and macs: bfloat16 multiply-adds a cycle of each. product_cycles: how long
    a product of one 8 x 128 register of (packed 16-bit or 8-bit, 32-bit) numbers occupies its unit.
    branch_cycles: from a branch that is taken to its target. As many bundles follow the branch and are
    issued nevertheless, unless the branch names a smaller number (on tpu7x). dma_unit: bytes in which
    the code counts the length of a DMA, as its tiles show.
    """

    name: str
    cores: int
    mxus: int
    macs: int
    product_cycles: tuple[int, int]
    peak_flops: float  # bfloat16, a second
    peak_int8: float  # operations a second; that of bfloat16 where 8 bits bring nothing
    hbm_bytes: int
    hbm_bandwidth: float  # bytes a second
    vmem_bytes: int  # of one core
    branch_cycles: int
    dma_unit: int

    @property
    def clock(self) -> float:
        """Cycles a second of a core."""
        return self.peak_flops / (2 * self.cores * self.mxus * self.macs)

    @property
    def megacore(self) -> bool:
        """Whether one device is two cores, between which the hardware divides a kernel's grid."""
        return self.cores > 1


GB, GIB, MIB = 10**9, 1 << 30, 1 << 20
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 2, 4, 128 * 128, (16, 8), 275e12, 275e12, 32 * GIB, 1228 * GB, 16 * MIB, 1, 512),
        Chip("v5e", 1, 4, 128 * 128, (16, 8), 197e12, 394e12, 16 * GIB, 819 * GB, 128 * MIB, 4, 32),
        Chip("v5p", 2, 4, 128 * 128, (16, 8), 459e12, 918e12, 95 * GIB, 2765 * GB, 64 * MIB, 4, 32),
        Chip("v6e", 1, 2, 2 * 256**2, (8, 4), 918e12, 1836e12, 32 * GIB, 1640 * GB, 128 * MIB, 4, 32),
        Chip(
            "tpu7x", 1, 2, 2 * 256**2, (8, 4), 1153.5e12, 2307e12, 96 * GIB, 3690 * GB, 64 * MIB, 6, 32
        ),
    )
}


def chip_of(topology: str) -> Chip:
    """The chip of "v5e:2x2" or "v5e". Raises ValueError for an unknown generation."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"topology={topology!r}: {name!r} is no TPU generation; known: {', '.join(CHIPS)}"
        )
    return CHIPS[name]
