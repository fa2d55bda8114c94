"""What a compiled program costs on a TPU, by the count of its final machine code.

    report = profile_program(compile_for("my_kernels.py:my_case", "v6e:1x1"))
    report.kernels[0].estimate_us, report.kernels[0].limit

Nothing here is a measurement: it is the compiler's code, executed by a model of the scalar unit and of
one queue to HBM. `BLIND` says what the model cannot see.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.tpu.assembly import Kernel, read_kernels
from llm_jax.tpu.chips import Chip
from llm_jax.tpu.compile import Program
from llm_jax.tpu.scalar_unit import Run, ScalarUnit

BLIND = """What this count cannot see:
* Interlocks. A bundle is one cycle: waits for results of the matrix, transpose and transcendental
  units, conflicts of VMEM banks and fetches of instructions are left out. The compiler schedules for
  known latencies, so little is hidden in straight code.
* HBM, and the CMEM of v4 with it, is one queue at the public bandwidth; a DMA is complete 500 ns after
  its last byte (an assumption). Short or strided rows, refresh and other users of it cost nothing here.
* Clocks are peak operations / width, not read from a chip; that of tpu7x is inferred.
* A device of v4 and v5p is two cores. A kernel whose grid they share is counted on the first, with half
  of the bandwidth; the DMAs that are listed are the first core's.
* Scalars taken from vectors, numbers that were not given, semaphores that another core signals, remote
  DMAs: taken as 0 or as ready, and listed with each kernel.
* XLA's own operations are not executed: their time is XLA's estimate, which assumes a part of the
  bandwidth and leaves out what it brings to VMEM ahead."""
XLA_UNKNOWN = 1 << 60  # cycles; what XLA writes where it has no estimate
Shares = Callable[[int, int], dict[str, float]]  # (first, last bundle) -> the share of each slot in use


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles [first, last] of a kernel, which ran `iterations` times.

    issued: cycles of all iterations, inner loops included. slots: the share of each kind that is in use.
    """

    first: int
    last: int
    iterations: int
    issued: int
    slots: dict[str, float]
    depth: int


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One kernel: times in microseconds, memory in bytes, shares in [0, 1].

    issued_cycles: bundles that are issued. compute_us: those, branches, and what the matrix units need
    beyond. hbm_us: its HBM traffic at full bandwidth. estimate_us: both, overlapped as its waits allow.
    share_of_hbm: of the bandwidth, by the bytes that the case needs, or else by those that it moves.
    share_of_peak_flops: None where the case does not say how many it needs. in_vmem: operands that XLA
    holds in VMEM already, whose traffic is not the kernel's.
    """

    kernel: str
    bundles: int
    issued_cycles: int
    branch_cycles: int
    mxu_wait_cycles: int
    dma_wait_cycles: int
    compute_us: float
    hbm_us: float
    estimate_us: float
    share_of_peak_flops: float | None
    share_of_hbm: float
    mxu_share: float
    limit: str
    slots: dict[str, float]
    loops: tuple[Loop, ...]
    dma: dict[str, dict[str, int]]
    hbm_bytes: int
    vmem_bytes: int
    smem_bytes: int
    spills: int
    in_vmem: tuple[str, ...]
    blind: dict[str, int]
    complete: bool


@dataclasses.dataclass(frozen=True)
class XlaOperation:
    """An operation of XLA's own and its estimate, for all the times it runs."""

    name: str
    kind: str
    times: int
    estimate_us: float


@dataclasses.dataclass(frozen=True)
class Report:
    """A program on one device. flops, needed_bytes: what its result needs, as the case says."""

    topology: str
    target: str
    arguments: dict[str, Any]
    flops: float
    needed_bytes: float
    kernels: tuple[KernelReport, ...]
    operations: tuple[XlaOperation, ...]
    temp_bytes: int
    argument_bytes: int
    compile_s: float

    @property
    def kernel_us(self) -> float:
        """All kernels, one after the other."""
        return sum(k.estimate_us for k in self.kernels)

    @property
    def xla_us(self) -> float:
        """All of XLA's operations by its own estimate."""
        return sum(x.estimate_us for x in self.operations)

    def record(self) -> dict[str, Any]:
        """As JSON holds it; the fields of a program with one kernel stand at the top as well."""
        one = dataclasses.asdict(self.kernels[0]) if len(self.kernels) == 1 else {}
        return one | dataclasses.asdict(self) | {"estimate_us": self.kernel_us, "xla_us": self.xla_us}


def profile_program(program: Program, *, limit_s: float = 60.0) -> Report:
    """Execute each kernel's scalar code for at most `limit_s` seconds, and count.

    Raises ValueError where this libtpu does not print its machine code.
    """
    kernels = read_kernels(program, program.kernels) if program.kernels else []
    needs = (program.flops, program.hbm_bytes) if len(kernels) == 1 else (0.0, 0.0)
    reports = []
    for kernel, integers in zip(kernels, _integers(program, kernels), strict=True):
        run = ScalarUnit(kernel, program.chip, integers).run(limit_s)
        reports.append(_report(kernel, run, program.chip, *needs))
    names = {kernel.name for kernel in kernels}
    operations = xla_operations(program.text("hlo.txt"), program.chip)
    return Report(
        topology=program.topology,
        target=program.target,
        arguments=program.arguments,
        flops=program.flops,
        needed_bytes=program.hbm_bytes,
        kernels=tuple(reports),
        operations=tuple(x for x in operations if x.name not in names),
        temp_bytes=program.memory["temp_size_in_bytes"],
        argument_bytes=program.memory["argument_size_in_bytes"],
        compile_s=program.compile_s,
    )


def _integers(program: Program, kernels: list[Kernel]) -> list[dict[int, np.ndarray]]:
    """The known integers of each kernel: of the first traced kernel left whose operands fit."""
    left, found = list(program.integers), []
    for kernel in kernels:
        shapes = {o.index: o.shape for o in kernel.operands}
        fits = [all(_same(shapes.get(i), x) for i, x in known.items()) for _, known in left]
        found.append(left.pop(fits.index(True))[1] if True in fits else {})
    return found


def _same(shape: str | None, values: np.ndarray) -> bool:
    """Whether "s32[32,128]" has room for these values, of whatever axes."""
    if shape is None:
        return False
    sizes = re.findall(r"\d+", shape.partition("[")[2])
    return int(np.prod([int(n) for n in sizes])) == values.size


def _report(kernel: Kernel, run: Run, chip: Chip, flops: float, needed: float) -> KernelReport:
    kinds, capacity, used = kernel.slots
    table = np.array(used, np.int64).reshape(len(used), len(kinds))

    def shares(first: int, last: int) -> dict[str, float]:
        counts = run.counts[first : last + 1]
        total = (table[first : last + 1] * counts[:, None]).sum(axis=0)
        issued = max(int(counts.sum()), 1)
        return {k: float(n) / issued / c for k, n, c in zip(kinds, total, capacity, strict=True)}

    cores = chip.cores if kernel.divided else 1
    moved = cores * sum(t.bytes for way, t in run.dma.items() if "hbm" in way or "cmem" in way)
    microseconds = 1e6 / chip.clock
    compute = (run.issued + run.branch_wait + run.mxu_wait) * microseconds
    estimate, hbm = run.cycles * microseconds, moved / chip.hbm_bandwidth * 1e6
    slots, loops = shares(0, len(used) - 1), _loops(run, shares)
    return KernelReport(
        kernel=kernel.name,
        bundles=len(kernel.bundles),
        issued_cycles=run.issued,
        branch_cycles=run.branch_wait,
        mxu_wait_cycles=run.mxu_wait,
        dma_wait_cycles=round(run.dma_wait),
        compute_us=compute,
        hbm_us=hbm,
        estimate_us=estimate,
        share_of_peak_flops=flops / (estimate * 1e-6 * chip.peak_flops) if flops and estimate else None,
        share_of_hbm=(needed or moved) / (max(estimate, 1e-9) * 1e-6 * chip.hbm_bandwidth),
        mxu_share=run.mxu_cycles / max(run.cycles, 1.0),
        limit=_limit(compute, hbm, estimate, run, loops[0].slots if loops else slots),
        slots=slots,
        loops=tuple(loops),
        dma={way: {"count": t.count, "bytes": t.bytes} for way, t in run.dma.items()},
        hbm_bytes=moved,
        vmem_bytes=kernel.vmem,
        smem_bytes=kernel.smem,
        spills=kernel.spills,
        in_vmem=tuple(f"{o.index}: {o.shape}" for o in kernel.operands if o.space.startswith("vmem")),
        blind=run.blind,
        complete=run.complete,
    )


def _limit(compute: float, hbm: float, estimate: float, run: Run, slots: dict[str, float]) -> str:
    """What the time goes to."""
    if hbm >= 0.9 * estimate:
        return "HBM bandwidth"
    if run.mxu_cycles >= 0.9 * run.cycles:
        return "matrix units"
    busiest = max(slots, key=lambda kind: slots[kind])
    if compute >= 0.5 * estimate:
        share = f"{compute / estimate:.0%} of the time"
        slot = f"the hot loop's busiest slot is {busiest} ({slots[busiest]:.0%})"
        return f"issue of bundles ({share}); {slot}"
    return "latency of DMAs: neither HBM nor the core is busy; take larger blocks or more buffers"


def _loops(run: Run, shares: Shares) -> list[Loop]:
    """Loops by their cycles, most first."""
    spans: dict[int, tuple[int, int]] = {}  # first -> (last, times it went back)
    for (first, last), times in run.jumps.items():
        before = spans.get(first, (last, 0))
        spans[first] = (max(before[0], last), before[1] + times)
    loops = [
        Loop(
            first=first,
            last=last,
            iterations=max(back + 1, int(run.counts[first])),
            issued=int(run.counts[first : last + 1].sum()),
            slots=shares(first, last),
            depth=sum(a < first and last <= b for a, (b, _) in spans.items()),
        )
        for first, (last, back) in spans.items()
    ]
    return sorted(loops, key=lambda loop: -loop.issued)


def xla_operations(hlo: str, chip: Chip) -> list[XlaOperation]:
    """Operations with an `estimated_cycles` in compiled HLO, those in loops times the loops' counts."""
    computation, found, calls = "", [], []
    bounds: dict[str, list[int]] = {}
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            computation = head[1]
        if number := re.search(r" = s32\[\]\S* constant\((\d+)\)", line):
            bounds.setdefault(computation, []).append(int(number[1]))
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = .*?\s([a-z][\w\-]+)\(", line)
            if name and int(cycles[1]) < XLA_UNKNOWN:
                found.append((computation, name[1], name[2], int(cycles[1])))
        if " while(" in line and (body := re.search(r"body=%?([\w.\-]+)", line)):
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            condition = re.search(r"condition=%?([\w.\-]+)", line)
            calls.append((computation, body[1], count and int(count[1]), condition and condition[1]))
    times: dict[str, int] = {}
    for _ in range(4):  # loops within loops
        for caller, body, count, condition in calls:
            # Where no count is written, the condition compares with it.
            n = count if count is not None else max(bounds.get(condition or "", [1]))
            times[body] = times.get(caller, 1) * n
    return [
        XlaOperation(name, kind, n, cycles * n / chip.clock * 1e6)
        for where, name, kind, cycles in found
        for n in (times.get(where, 1),)
    ]
