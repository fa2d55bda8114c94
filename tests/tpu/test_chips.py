"""The table of chips beside jax's own, which Pallas kernels consult."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.chips import RULES
from llm_jax.tpu.chips import CHIPS, chip_of

VERSIONS = {"v4": "TPU_V4", "v5e": "TPU_V5E", "v5p": "TPU_V5P", "v6e": "TPU_V6E", "tpu7x": "TPU_7X"}


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_those_of_jax(name):
    chip = CHIPS[name]
    version = getattr(pltpu.ChipVersion, VERSIONS[name])
    core = pltpu.get_tpu_info_for_chip(version, 1)  # of one core
    assert chip.peak_flops == pytest.approx(chip.cores * core.bf16_ops_per_second, rel=0.01)
    if core.int8_ops_per_second:
        assert chip.peak_int8 == pytest.approx(chip.cores * core.int8_ops_per_second, rel=0.01)
    assert chip.hbm_bandwidth == pytest.approx(chip.cores * core.mem_bw_bytes_per_second, rel=0.13)
    assert chip.vmem_bytes == core.vmem_capacity_bytes
    assert chip.mxus == core.num_mxus
    # A unit of 256 x 256 takes two rows a cycle.
    rows = 2 if core.mxu_column_size == 256 else 1
    assert chip.macs == rows * core.mxu_column_size**2


def test_clocks():
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.50, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.20}


def test_an_unknown_generation_is_named():
    with pytest.raises(ValueError, match="'v9'.*known: v4, v5e, v5p, v6e, tpu7x"):
        chip_of("v9:2x2")
    assert chip_of("v5e:2x4") is chip_of("v5e")


def test_kernels_know_the_same_chips():
    """Neither room imports the other, so that each can be lifted out; their figures must not part."""
    assert {rule.name for rule in RULES.values()} == set(CHIPS)
    assert all(rule.vmem_bytes == CHIPS[rule.name].vmem_bytes for rule in RULES.values())
