"""The scalar unit executes machine code as its listing means it: programs counted by hand."""

import numpy as np
import pytest

from llm_jax.tpu.assembly import Kernel, Operand, operations, read_slots
from llm_jax.tpu.chips import CHIPS
from llm_jax.tpu.scalar_unit import DMA_LATENCY, FAR, ScalarUnit


def kernel(*bundles: str, operands=(), divided=False) -> Kernel:
    """A kernel at bundle 0x100 of its program."""
    slots = (("SALU",), (2,), [[0]] * len(bundles))
    return Kernel("test.1", 0x100, list(bundles), tuple(operands), slots, 0, 0, 0, divided)


def run(*bundles, chip="v5e", integers=None, **options):
    unit = ScalarUnit(kernel(*bundles, **options), CHIPS[chip], integers or {})
    return unit, unit.run()


LOOP = (  # one bundle, then ten times seven
    "s1 = simm.u32 $0",
    "s1 = sadd.s32 $1, s1",
    "p0 = slt.s32 s1, $10",
    "(pc) = sbr.rel @p0 $-2 (=0x101); p0 = slt.s32 s1, $3",
    "",
    "",
    "",
    "s2 = sadd.s32 $1, s2",
)


def test_a_loop_is_counted_with_the_bundles_that_follow_its_branch():
    unit, result = run(*LOOP)
    assert result.complete
    assert unit.s[1:3] == [10, 10]  # what follows the branch happens, whether it is taken or not
    assert result.issued == result.cycles == 1 + 10 * 7
    assert result.jumps == {(1, 7): 9}
    np.testing.assert_array_equal(result.counts, [1] + [10] * 7)


def test_only_one_bundle_follows_a_branch_on_v4():
    unit, result = run(*LOOP[:4], "s3 = sadd.s32 $1, s3", "s2 = sadd.s32 $1, s2", chip="v4")
    assert unit.s[1:4] == [10, 1, 10]
    assert result.issued == result.cycles == 1 + 10 * 4 + 1


def test_operations_of_a_bundle_read_before_any_writes():
    unit, _ = run("s1 = simm.u32 $3; s2 = simm.u32 $4", "s1 = smov.u32 s2; s2 = smov.u32 s1")
    assert unit.s[1:3] == [4, 3]


def test_predicates_guard_and_negate():
    unit, _ = run(
        "p0 = seq.s32 s0, $0",
        "s1 = simm.u32 @p0 $1; s2 = simm.u32 @!p0 $1",
        "p1 = por !p0, !p0; p2 = pand p0, p0",
        "s3 = simm.u32 @!p1 $7; [smem:$0x5] = sst @p1 s1; [smem:$0x6] = sst @p2 s1",
    )
    assert unit.s[1:4] == [1, 0, 7]
    assert unit.smem == {6: 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("sadd.s32 $2147483647, $1", -(2**31)),
        ("ssub.s32 $-2147483648, $1", 2**31 - 1),
        ("smul.u32 $-1369812055, $1234567", (-1369812055 * 1234567 + 2**31) % 2**32 - 2**31),
        ("smulhi.u32 $-1, $-1", -2),
        ("sshll.u32 $1, $31", -(2**31)),
        ("sshrl.u32 $-1, $28", 15),
        ("sshra.s32 $-16, $2", -4),
        ("smin.u32 $-1, $5", 5),
        ("smin.s32 $-1, $5", -1),
        ("sclz.u32 $1", 31),
        ("sadd.f32 $1.5, $2.25", np.float32(3.75).view(np.int32)),
        ("scvt.s32.f32 $3", np.float32(3).view(np.int32)),
        ("simm.f32 $-0.5", np.float32(-0.5).view(np.int32)),
    ],
)
def test_arithmetic_is_that_of_32_bits(text, value):
    unit, result = run(f"s1 = {text}")
    assert unit.s[1] == value
    assert not result.blind


def test_comparisons_know_signs():
    unit, _ = run(
        "p0 = slt.s32 $-1, $0; p1 = slt.u32 $-1, $0; p2 = sgt.f32 $2.0, $-3.0; p3 = sc.u32 $-1, $1"
    )
    assert unit.p[:4] == [True, False, True, True]


def test_a_branch_names_its_bundles_on_tpu7x_and_a_shorter_one_costs_the_rest():
    bundles = (
        "(pc) = sbr.rel $+3, $1 (=0x103)",
        "s1 = simm.u32 $1",
        "s1 = simm.u32 $9",
        "s2 = simm.u32 $1",
    )
    unit, result = run(*bundles, chip="tpu7x")
    assert unit.s[1:3] == [1, 1]
    np.testing.assert_array_equal(result.counts, [1, 1, 0, 1])
    assert result.branch_wait == 5  # of six cycles one was filled
    assert result.cycles == 3 + 5


def test_waiting_for_a_dma_takes_its_bytes_and_its_latency():
    chip = CHIPS["v5e"]
    start = "[vmem:s0], [sflag:$7] = dma.simple [hbm:s1], length:$0x8000"
    wait = "_ = vwait.ge [sflag:$7], $32768"
    _, result = run(start, wait, "[sflag:$7] = vsyncadd.s32 $-32768", wait)
    assert result.dma["hbm->vmem"].count == 1
    assert result.dma["hbm->vmem"].bytes == 2**20
    seconds = 2**20 / chip.hbm_bandwidth + DMA_LATENCY
    assert result.cycles == pytest.approx(seconds * chip.clock + 3, abs=1)
    assert result.blind == {"waits for a semaphore that nothing here signals": 1}  # the second wait


def test_two_dmas_share_the_way_to_hbm():
    start = "[vmem:s0], [sflag:{}] = dma.simple [hbm:s1], length:$0x8000"
    waits = ("_ = vwait.ge [sflag:$7], $32768", "_ = vwait.ge [sflag:$8], $32768")
    _, one = run(start.format("$7"), waits[0])
    _, two = run(start.format("$7"), start.format("$8"), *waits)
    per_dma = 2**20 / CHIPS["v5e"].hbm_bandwidth * CHIPS["v5e"].clock
    assert two.cycles - one.cycles == pytest.approx(per_dma, abs=3)


def test_a_shared_grid_has_half_of_the_bandwidth():
    bundles = (
        "[vmem:s0], [sflag:$7] = dma.simple [hbm:s1], length:$0x80000",
        "_ = vwait.ge [sflag:$7], $524288",
    )
    _, alone = run(*bundles, chip="v5p")
    _, shared = run(*bundles, chip="v5p", divided=True)
    latency = DMA_LATENCY * CHIPS["v5p"].clock
    assert shared.cycles - latency == pytest.approx(2 * (alone.cycles - latency), rel=1e-3)


@pytest.mark.parametrize("name", ["8x128.bf16", "packed.8x128.f16", "packed.dwg.8x128.f16"])
def test_products_hold_the_matrix_units(name):
    _, result = run(*[f"(mrf0) = vmatmul.{name} v1"] * 8)
    assert result.mxu_cycles == 8 * 16 / 4  # four units share them
    assert result.cycles == 32
    assert result.mxu_wait == 24


@pytest.mark.parametrize("space", ["smem", "hbm", "vmem", "<no memory space>"])
def test_given_integers_reach_the_kernel(space):
    operand = Operand(0, "input", space, "s32[3]", register=5)
    values = {0: np.array([11, 22, 33], np.int32)}
    if space == "smem":
        bundles = ("s1 = sld [smem:s5+$2]",)
    elif space == "<no memory space>":
        bundles = ("s1 = sadd.s32 $22, s5",)
    else:
        copy = f"[smem:$0x40], [sflag:$7] = dma.simple [{space}:s4], length:$1"
        bundles = ("s4 = sshll.u32 s5, $4", copy, "s1 = sld [smem:$0x42]")
    unit, result = run(*bundles, operands=[operand], integers=values)
    assert unit.s[1] == 33
    assert not result.blind
    unit, result = run(*bundles, operands=[operand])
    assert unit.s[1] == (22 if space.startswith("<") else 0)
    assert sum(result.blind.values()) >= 1, "what is not known is told"


def test_narrow_integers_share_words():
    operand = Operand(0, "input", "smem", "s8[8,2]", register=0)
    values = np.arange(16, dtype=np.int8).reshape(8, 2)
    unit, _ = run(
        "s1 = sld [smem:s0+$1]; s2 = sld [smem:s0+$128]", operands=[operand], integers={0: values}
    )
    assert unit.s[1] == 1 + (3 << 8) + (5 << 16) + (7 << 24)
    assert unit.s[2] == 8 + (10 << 8) + (12 << 16) + (14 << 24)
    assert unit.s[0] == FAR


def test_semaphores_are_read_in_order():
    unit, result = run(
        "[sflag:$3] = vsyncadd.s32 $5",
        "(sfrf) = vsyncmov [sflag:$3]",
        "s1 = spop (sfrf); s2 = spop (v2sf)",
    )
    assert unit.s[1:3] == [5, 0]
    assert result.blind == {"scalars taken from vectors (taken as 0)": 1}


def test_an_unknown_operation_is_told():
    _, result = run("s1 = sfrobnicate.s32 s2, s3")
    assert result.blind == {"operation sfrobnicate.s32 (taken as 0)": 1}


def test_a_kernel_without_end_is_stopped():
    unit = ScalarUnit(kernel("(pc) = sbr.rel $+0 (=0x100)", *[""] * 4), CHIPS["v5e"], {})
    result = unit.run(limit_s=0.05)
    assert not result.complete
    assert any("not executed to the end" in what for what in result.blind)


def test_operations_of_a_line():
    found = list(
        operations("p9 = por !p8, !p5; [smem:s12] = sst @!p3 s13; _ = sfence; v1 = vld.8x128 [vmem:s2]")
    )
    assert [op.name for op in found] == ["por", "sst", "sfence", "vld.8x128"]
    assert found[1].guard == (3, True)
    assert found[0].args == "!p8, !p5"


def test_tables_of_slots():
    text = "== CAPACTIY:\nMXU, VALU, VLOAD:FILL\n    4    2     3\n== UTILIZATION:\n1 0 2\n0 2 0\n"
    assert read_slots(text) == (("MXU", "VALU", "VLOAD:FILL"), (4, 2, 3), [[1, 0, 2], [0, 2, 0]])
