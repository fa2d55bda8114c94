"""Compiled HLO is read as XLA means it: against XLA's own count, arithmetic, and published figures."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.tpu.chips import CHIPS
from llm_jax.tpu.hlo import Collective, Loop, Operation, arrays, each, operations, read_module
from llm_jax.tpu.links import LINKS, SHARE, Slice
from llm_jax.tpu.timing import Assumptions, KernelCost, time_program

ZERO = Assumptions(hbm=1.0, operation_s=0.0)


def program(text: str):
    return operations(read_module(text))


def compiled(fn, *shapes, dtype=jnp.float32) -> str:
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(fn).lower(*args).compile().as_text()


def entry(*lines: str) -> str:
    return "\n".join(["HloModule m", "", "ENTRY %main (x: f32[8]) -> f32[8] {", *lines, "}"])


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (jnp.matmul, [(64, 32), (32, 48)]),
        (functools.partial(jnp.einsum, "bij,bjk->bik"), [(3, 8, 16), (3, 16, 24)]),
        (lambda x, w: jnp.tanh(x @ w) @ w.T, [(16, 32), (32, 64)]),
        (
            functools.partial(jax.lax.conv, window_strides=(1, 1), padding="SAME"),
            [(2, 3, 9, 9), (5, 3, 3, 3)],
        ),
        (
            functools.partial(jax.lax.conv, window_strides=(2, 2), padding="VALID"),
            [(2, 3, 9, 9), (5, 3, 3, 3)],
        ),
    ],
)
def test_products_are_counted_as_by_xla(fn, shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    whole = jax.jit(fn).lower(*args)
    counted = jax.jit(lambda *x: jax.lax.optimization_barrier(fn(*x))).lower(*args).compile()
    found = sum(n * op.flops for op, n in each(program(counted.as_text())))
    # XLA counts a few other operations too, never less.
    assert found <= whole.compile().cost_analysis()["flops"] <= 1.05 * found + 4096


def test_a_loop_counts_as_often_as_it_runs():
    def stack(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = program(compiled(stack, (8, 64), (5, 64, 64)))
    loops = [item for item in found if isinstance(item, Loop)]
    assert [loop.times for loop in loops] == [5]
    assert sum(n * op.flops for op, n in each(found)) == 5 * 2 * 8 * 64 * 64


# As libtpu writes a product that gathers piece by piece: two pieces a turn.
UNROLLED = """HloModule m

%cond (p: (f32[8], u32[])) -> pred[] {
  %p = (f32[8]{0}, u32[]) parameter(0)
  %end = u32[] constant(4)
  %i = u32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (q: (f32[8], u32[])) -> (f32[8], u32[]) {
  %q = (f32[8]{0}, u32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%q), index=0
  %j = u32[] get-tuple-element(%q), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%j, %two)
  %y = f32[8]{0} multiply(%x, %x)
  ROOT %t = (f32[8]{0}, u32[]) tuple(%y, %next)
}

ENTRY %main (z: (f32[8], u32[])) -> (f32[8], u32[]) {
  %z = (f32[8]{0}, u32[]) parameter(0)
  ROOT %w = (f32[8]{0}, u32[]) while(%z), condition=%cond, body=%body
}
"""


def test_a_loop_that_the_compiler_has_unrolled():
    (loop,) = program(UNROLLED)
    assert loop.times == 2
    (once,) = program(UNROLLED.replace("constant(2)", "constant(1)"))
    assert once.times == 4


def test_a_product_with_padding_counts_what_is_computed():
    # A batch of 4 products, as a TPU's compiler writes it: of each window one place meets a number.
    found = program(
        entry(
            "  %x = bf16[32,4096,1]{1,0,2} parameter(0)",
            "  %w = bf16[4,128,4096]{2,1,0} parameter(1)",
            "  ROOT %y = bf16[32,4,128]{2,0,1} convolution(%x, %w), "
            "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
        )
    )
    assert found[0].flops == 2 * 32 * 4 * 128 * 4096


SLICED = """HloModule m

%take (p.0: bf16[32,64,128], p.1: s32[]) -> bf16[64,128] {
  %p.0 = bf16[32,64,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %s = bf16[1,64,128]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %b = bf16[64,128]{1,0:S(1)} bitcast(%s)
}

%put (q.0: f32[100,128], q.1: f32[1,128], q.2: s32[]) -> f32[100,128] {
  %q.0 = f32[100,128]{1,0} parameter(0)
  %q.1 = f32[1,128]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %u = f32[100,128]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %none)
}

ENTRY %main (w: bf16[32,64,128], i: s32[], c: f32[100,128], n: f32[1,128]) -> f32[100,128] {
  %w = bf16[32,64,128]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %c = f32[100,128]{1,0} parameter(2)
  %n = f32[1,128]{1,0} parameter(3)
  %one = bf16[64,128]{1,0:S(1)} fusion(%w, %i), kind=kLoop, calls=%take
  ROOT %all = f32[100,128]{1,0} fusion(%c, %n, %i), kind=kLoop, calls=%put
}
"""


def test_a_slice_counts_as_the_slice_and_an_update_as_the_update():
    one, put = program(SLICED)
    assert one.hbm_bytes == 64 * 128 * 2  # read; what it makes stays in VMEM
    assert one.vmem_bytes == 64 * 128 * 2
    assert put.hbm_bytes == 2 * 128 * 4


# As the compiler of a tpu7x writes a product with one of 16 stacked matrices, read by other tiles.
RETILED = """HloModule m

%copy_fusion (p.0: bf16[16,64,128]) -> bf16[16,64,128] {
  %p.0 = bf16[16,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %copy = bf16[16,64,128]{2,1,0:T(8,128)(2,1)} copy(%p.0)
}

%sliced (q.0: bf16[16,64,128], q.1: s32[]) -> bf16[64,128] {
  %q.0 = bf16[16,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %tiled = bf16[16,64,128]{2,1,0:T(8,128)(2,1)} fusion(%q.0), kind=kLoop, ALIASED, calls=%copy_fusion
  %q.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,64,128]{2,1,0} dynamic-slice(%tiled, %q.1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %flat = bf16[64,128]{1,0} bitcast(%one)
}

%product (r.0: bf16[4,128], r.1: bf16[16,64,128], r.2: s32[]) -> bf16[4,64] {
  %r.0 = bf16[4,128]{1,0} parameter(0)
  %r.1 = bf16[16,64,128]{2,1,0:T(16,128)(2,1)} parameter(1)
  %r.2 = s32[] parameter(2)
  %matrix = bf16[64,128]{1,0} fusion(%r.1, %r.2), kind=kLoop, calls=%sliced
  ROOT %out = bf16[4,64]{1,0} convolution(%r.0, %matrix), dim_labels=bf_oi->bf
}

ENTRY %main (x: bf16[4,128], w: bf16[16,64,128], i: s32[]) -> bf16[4,64] {
  %x = bf16[4,128]{1,0:T(4,128)(2,1)S(1)} parameter(0)
  %w = bf16[16,64,128]{2,1,0:T(16,128)(2,1)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = bf16[4,64]{1,0:T(4,128)(2,1)S(1)} fusion(%x, %w, %i), kind=kOutput, calls=%product
}
"""


# As the compiler of a v5e writes an all-gather that it begins in a fusion, goes on with while a product
# is computed, and ends in a third one.
BESIDE = """HloModule m

%begin (p: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {
  %p = bf16[64,128]{1,0} parameter(0)
  %all-gather.1 = bf16[256,128]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %c = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) custom-call(%p, %all-gather.1)
}

%go_on (q.0: bf16[8,128], q.1: bf16[64,128]) -> bf16[8,64] {
  %q.0 = bf16[8,128]{1,0} parameter(0)
  %q.1 = bf16[64,128]{1,0} parameter(1)
  %all-gather.2 = bf16[256,128]{1,0} all-gather(%q.1), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %out = bf16[8,64]{1,0} convolution(%q.0, %q.1), dim_labels=bf_oi->bf
}

%end (r: bf16[64,128]) -> bf16[256,128] {
  %r = bf16[64,128]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[256,128]{1,0} all-gather(%r), channel_id=7, replica_groups={{0,1,2,3}}
}

ENTRY %main (x: bf16[8,128], w: bf16[64,128]) -> bf16[256,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %w = bf16[64,128]{1,0} parameter(1)
  %async-collective-start.1 = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) fusion(%w), calls=%begin
  %fusion.5 = bf16[8,64]{1,0} fusion(%x, %w), kind=kOutput, calls=%go_on
  ROOT %async-collective-done.1 = bf16[256,128]{1,0} fusion(%w), kind=kCustom, calls=%end
}
"""


def test_an_exchange_in_fusions_goes_on_beside_what_they_compute():
    begin, product, end = program(BESIDE)
    assert (begin.part, begin.collective.kind, begin.collective.bytes) == ("start", "all-gather", 65536)
    assert (product.part, product.collective, product.flops) == ("", None, 2 * 8 * 64 * 128)
    assert (end.part, end.of, end.collective) == ("done", begin.name, None)


def test_other_tiles_in_place_are_not_read():
    (product,) = program(RETILED.replace("ALIASED", "output_to_operand_aliasing={{}: (0, {})}"))
    assert product.hbm_bytes == 64 * 128 * 2 + 4  # the slice, and which one
    assert product.flops == 2 * 4 * 64 * 128


def test_types():
    found = arrays("(f32[2,3]{1,0:T(8,128)S(1)}, s4[16]{0}, pred[], /*index=3*/f8e4m3fn[5]{0})")
    assert [a.bytes for a in found] == [24, 8, 1, 5]
    assert [a.space for a in found] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(2)4}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("{}", ()),
    ],
)
def test_groups_of_devices_in_every_way_to_write_them(written, groups):
    (found,) = program(
        entry(
            "  %x = f32[8]{0} parameter(0)",
            f"  ROOT %y = f32[8]{{0}} all-reduce(%x), replica_groups={written}, to_apply=%add",
        )
    )
    assert found.collective == Collective("all-reduce", 32, groups)


def test_collectives_of_a_sharded_program():
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, ("a", "b"))
    place = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))  # noqa: E731

    def two(x, w):
        return jax.lax.with_sharding_constraint(x @ w, place("a", None))

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=place("a", "b"))
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place("b", None))
    found = program(jax.jit(two).lower(x, w).compile().as_text())
    (only,) = [op.collective for op, _ in each(found) if op.collective]
    assert (only.kind, only.bytes) == ("all-reduce", 8 * 32 * 4)
    assert sorted(only.groups) == [(0, 1, 2, 3), (4, 5, 6, 7)]


# As the compiler of a tpu7x writes what its SparseCores do beside: begun empty, given operands, awaited.
OFFLOADED = """HloModule m

%gather_cores (p: bf16[528,512]) -> bf16[2112,512] {
  %p = bf16[528,512]{1,0} parameter(0)
  ROOT %g = bf16[2112,512]{1,0} all-gather(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}, execution_thread="sparsecore"

%take_rows (r: f32[4224], i: s32[1024]) -> f32[1024] {
  %r = f32[4224]{0} parameter(0)
  %i = s32[1024]{0} parameter(1)
  ROOT %t = f32[1024]{0} gather(%r, %i)
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[528,512], r: f32[4224], i: s32[1024]) -> bf16[2112,512] {
  %x = bf16[528,512]{1,0} parameter(0)
  %r = f32[4224]{0} parameter(1)
  %i = s32[1024]{0} parameter(2)
  %a = ((), (), (s32[8192]{0})) custom-call-start(), called_computations={%gather_cores}
  %b = ((), (), (s32[8192]{0})) custom-call-start(), called_computations={%take_rows}
  %u = ((bf16[528,512]{1,0}), bf16[2112,512]{1,0}, (s32[8192]{0})) custom-call-update(%a, %x)
  %v = ((f32[4224]{0}, s32[1024]{0}), f32[1024]{0}, (s32[8192]{0})) custom-call-update(%b, %r, %i)
  %w = f32[1024]{0} custom-call-done(%v)
  ROOT %y = bf16[2112,512]{1,0} custom-call-done(%u)
}
"""


NEWER = re.sub(  # since libtpu 0.0.50
    r"called_computations=\{(%\w+)\}",
    r'async_execution_thread="sparsecore", to_apply=\1',
    OFFLOADED.replace("custom-call", "call"),
)
DIRECT = re.sub(r"call-start\(\), (.*take_rows)", r"call-start(%r, %i), \1", NEWER)
DIRECT = re.sub("  %v = .*\n", "", DIRECT).replace("call-done(%v)", "call-done(%b)")  # given at once


@pytest.mark.parametrize("text", [OFFLOADED, NEWER, DIRECT])
def test_what_sparse_cores_do_beside(text):
    first, second, taken, gathered = program(text)
    gather, take = sorted((first, second), key=lambda x: x.collective is None)
    of_groups = ((0, 2, 4, 6), (1, 3, 5, 7))
    assert gather.collective == Collective("all-gather", 2112 * 512 * 2, of_groups)
    assert take.hbm_bytes == 4 * (4224 + 1024 + 1024)
    assert [x.part for x in (gather, take, taken, gathered)] == ["start", "start", "done", "done"]
    assert (taken.of, gathered.of) == (take.name, gather.name)
    line = time_program(
        (first, second, taken, gathered), CHIPS["tpu7x"], box("tpu7x:2x2x1"), lambda _: None, ZERO
    )
    assert line.limit == "interconnect"


# As libtpu writes a reduce-scatter that it has an emitter for.
SCATTERED = """HloModule m

%all-reduce-scatter (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0} parameter(0)
  %r = bf16[64,128]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %s = bf16[16,128]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={16,128}
}

ENTRY %main (x: bf16[64,128]) -> bf16[16,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  ROOT %y = bf16[16,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_collective_in_a_fusion():
    (found,) = program(SCATTERED)
    assert found.collective == Collective("reduce-scatter", 64 * 128 * 2, ((0, 1, 2, 3),))


def box(topology: str) -> Slice:
    shape = tuple(int(n) for n in topology.partition(":")[2].split("x"))
    places = [tuple(int(i) for i in at) for at in np.ndindex(*shape)]
    devices = LINKS[topology.partition(":")[0]].devices
    return Slice(topology, tuple((*at, core) for at in places for core in range(devices)))


def test_a_v5e_pod_all_reduces_as_fast_as_published():
    # "All-reduce bandwidth per Pod 51.2 TB/s": what all chips send (cloud.google.com/tpu/docs/v5e).
    pod, size = box("v5e:16x16"), 1e9
    seconds = pod.seconds(Collective("all-reduce", size, ()))
    moved = 2 * size * 255 / 256 * 256
    assert moved / seconds / SHARE == pytest.approx(51.2e12, rel=0.02)
    # "Bisection bandwidth per Pod 1.6 TB/s": half of all bytes of an all-to-all cross the middle.
    seconds = pod.seconds(Collective("all-to-all", size, ()))
    one_way = size * 256 / 4
    assert one_way / seconds / SHARE == pytest.approx(1.6e12, rel=0.02)


def test_open_axes_closed_axes_and_parts_of_a_slice():
    size = 1e9
    gather = lambda place, *groups: place.seconds(Collective("all-gather", size, groups))  # noqa: E731
    link = LINKS["v5e"].bandwidth * SHARE
    line = box("v5e:1x8")
    assert gather(line) == pytest.approx(size * 7 / 8 / link, rel=0.01)
    square = box("v5e:4x4")
    assert gather(square) == pytest.approx(size * 15 / 16 / (2 * link), rel=0.01)
    row = tuple(i for i, at in enumerate(square.coords) if at[0] == 0)
    assert gather(square, row) == pytest.approx(size * 3 / 4 / link, rel=0.01)
    ring = box("v5p:4x4x4")
    column = tuple(i for i, at in enumerate(ring.coords) if at[:2] == (0, 0))
    assert gather(ring, column) == pytest.approx(size * 3 / 4 / (2 * 100e9 * SHARE), rel=0.01)
    chip = box("tpu7x:2x2x1")
    assert gather(chip, (0, 1)) < gather(chip, (0, 2)) / 6


def matmul(n: int, name: str = "p", **more) -> Operation:
    return Operation(name, "fusion", flops=2.0 * n**3, **more)


def test_time_is_that_of_the_slowest_part():
    chip, place = CHIPS["v5e"], box("v5e:1x1")
    run = lambda *ops: time_program(ops, chip, place, lambda _: None, ZERO)  # noqa: E731
    peak = 0.97 * chip.peak_flops
    line = run(matmul(4096))
    assert (line.seconds, line.limit) == (pytest.approx(2 * 4096**3 / peak), "compute")
    line = run(Operation("w", "fusion", flops=1.0, hbm_bytes=819e6))
    assert (line.seconds, line.limit) == (pytest.approx(1e-3), "memory")
    assert line.by_limit == {"memory": pytest.approx(1e-3), "overhead": 0.0}


def test_a_copy_begun_ahead_runs_beside_products():
    chip, place = CHIPS["v5e"], box("v5e:1x1")
    start = Operation("c", "copy", hbm_bytes=819e6, part="start")
    done = Operation("d", "copy-done", part="done", of="c")
    product = matmul(4096)
    alone = time_program((product,), chip, place, lambda _: None, ZERO).seconds
    run = lambda *ops: time_program(ops, chip, place, lambda _: None, ZERO).seconds  # noqa: E731
    assert run(start, product, done) == pytest.approx(max(alone, 1e-3))
    assert run(product, start, done) == pytest.approx(alone + 1e-3)
    # In a loop, too, what is begun in one turn may end in the next.
    loop = Loop("l", 10, (done, start, product))
    assert run(start, loop, done) == pytest.approx(10 * max(alone, 1e-3), rel=0.11)


def test_a_kernel_costs_what_is_said_of_it():
    chip, place = CHIPS["v6e"], box("v6e:1x1")
    kernel = Operation("k.1", "custom-call", hbm_bytes=1e9, kernel="k")
    cost = KernelCost(1e9, 1.64e9, peak_share=0.5, hbm_share=0.5)
    line = time_program((kernel,), chip, place, lambda _: cost, ZERO)
    assert line.seconds == pytest.approx(2e-3)
    line = time_program((kernel,), chip, place, lambda _: None, ZERO)
    assert line.unknown == {"k"}


def test_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_module("HloModule m\n")
