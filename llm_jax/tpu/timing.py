"""How long a compiled program should take: a model of time, not a measurement.

Every operation takes as long as its products at the peak of the matrix units, its bytes at the bandwidth
of HBM or of VMEM, or its exchange over the links, whichever is longest (the roofline of Williams et al.
2009), and a little for itself. Operations follow each other as scheduled; copies and exchanges that the
compiler begins ahead run beside them, HBM serving one after the other. What a Pallas kernel costs, the
caller says, who knows what it does with its operands.

What it takes from nowhere but measurement, and so assumes, is in `Assumptions`, the same for every
program; docs/plan.md holds them against published figures.
"""

import dataclasses
from collections.abc import Callable

from llm_jax.tpu.chips import Chip
from llm_jax.tpu.hlo import Loop, Operation
from llm_jax.tpu.links import Slice

GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# Share of the peak that the compiler's own products reach: its estimate for [4096, 4096] times the same.
PRODUCTS = dict(zip(GENERATIONS, (0.95, 0.97, 0.95, 0.87, 0.81), strict=True))
VMEM = 20.0  # its bandwidth, times that of HBM (scaling-book, "How to think about TPUs": about 22)


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """hbm: share of HBM's bandwidth that operations reach. operation_s: what each takes for itself."""

    hbm: float = 0.9
    operation_s: float = 0.2e-6


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """What a kernel computes and moves, and the shares of peak and bandwidth that it reaches."""

    flops: float
    hbm_bytes: float
    peak_share: float = 1.0
    hbm_share: float = 1.0


CostOf = Callable[[Operation], KernelCost | None]  # None: not known


@dataclasses.dataclass
class Timeline:
    """What a program takes on each device.

    seconds: from beginning to end. by_limit: of that, what waits for "compute", "memory", "interconnect"
    or the start of operations, "overhead". busy: seconds that matrix units, HBM and links work. flops,
    hbm_bytes: in all. operations: (seconds, times, name) of each, longest first. unknown: kernels whose
    cost nobody says; they count as reading and writing their operands.
    """

    seconds: float = 0.0
    by_limit: dict[str, float] = dataclasses.field(default_factory=dict)
    busy: dict[str, float] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    hbm_bytes: float = 0.0
    operations: list[tuple[float, int, str]] = dataclasses.field(default_factory=list)
    unknown: set[str] = dataclasses.field(default_factory=set)

    @property
    def limit(self) -> str:
        """What most of the time goes to."""
        return max(self.by_limit, key=lambda name: self.by_limit[name], default="overhead")


def time_program(
    program: tuple[Operation | Loop, ...],
    chip: Chip,
    place: Slice,
    kernel_cost: CostOf,
    assumptions: Assumptions = Assumptions(),  # noqa: B008 (frozen)
) -> Timeline:
    """The timeline of what `hlo.operations` gives. A loop of unknown length runs once."""
    clock = _Clock(chip, place, kernel_cost, assumptions)
    clock.run(program, 1)
    clock.line.seconds = clock.now
    each = ((seconds, times, name) for name, (seconds, times) in clock.own.items())
    clock.line.operations = sorted(each, reverse=True)
    return clock.line


class _Clock:
    """Runs operations one after the other. Times are seconds from the beginning."""

    def __init__(self, chip: Chip, place: Slice, kernel_cost: CostOf, assumptions: Assumptions):
        self.chip, self.place, self.assumed = chip, place, assumptions
        self.kernel_cost = kernel_cost
        self.line = Timeline()
        self.now = 0.0
        self.memory = 0.0  # when HBM has done what it was asked for
        self.links = 0.0
        self.own: dict[str, tuple[float, int]] = {}  # of each operation: seconds, how often
        self.ends: dict[str, tuple[float, str]] = {}  # of what runs beside: when, and what it takes

    def run(self, program: tuple[Operation | Loop, ...], times: int) -> None:
        """times: how often all of it runs, in loops around it; the clock goes once."""
        for item in program:
            if isinstance(item, Loop):
                self.loop(item, times)
            elif item.part == "done":
                end, limit = self.ends.pop(item.of, (0.0, "memory"))
                self.advance(item, end, limit, times)
            elif item.part == "start":
                self.begin(item, times)
            else:
                self.operation(item, times)

    def loop(self, loop: Loop, times: int) -> None:
        """Its first turn, then one more for all that follow: what is begun in one ends in the next."""
        count = max(loop.times, 1)
        self.run(loop.body, times)
        if count > 1:
            before, limits = self.now, dict(self.line.by_limit)
            self.run(loop.body, times * (count - 1))
            more = (self.now - before) * (count - 2)
            for name, seconds in self.line.by_limit.items():
                self.line.by_limit[name] += (seconds - limits.get(name, 0.0)) * (count - 2)
            self.now += more
            self.memory, self.links = self.memory + more, self.links + more
            self.ends = {name: (end + more, limit) for name, (end, limit) in self.ends.items()}

    def begin(self, x: Operation, times: int) -> None:
        """What others run beside."""
        if x.collective is not None:
            seconds = self.place.seconds(x.collective)
            self.links = max(self.links, self.now) + seconds
            self.ends[x.name] = (self.links, "interconnect")
            self.work("links", seconds * times)
        else:
            self.ends[x.name] = (self.read(x.hbm_bytes, self.assumed.hbm, times), "memory")
        self.advance(x, self.now, "overhead", times)

    def operation(self, x: Operation, times: int) -> None:
        if x.collective is not None:
            seconds = self.place.seconds(x.collective)
            self.links = max(self.links, self.now) + seconds
            self.work("links", seconds * times)
            return self.advance(x, self.links, "interconnect", times)
        if x.kernel:
            return self.kernel(x, times)
        peak = self.chip.peak_int8 if x.integers else self.chip.peak_flops
        products = self.multiply(x.flops, peak * PRODUCTS[self.chip.name], times)
        compute = self.now + max(products, x.vmem_bytes / (VMEM * self.chip.hbm_bandwidth))
        memory = self.read(x.hbm_bytes, self.assumed.hbm, times) if x.hbm_bytes else self.now
        return self.advance(x, *max((compute, "compute"), (memory, "memory")), times)

    def kernel(self, x: Operation, times: int) -> None:
        cost = self.kernel_cost(x)
        if cost is None:
            self.line.unknown.add(x.kernel)
            cost = KernelCost(0.0, x.hbm_bytes, hbm_share=self.assumed.hbm)
        products = self.multiply(cost.flops, self.chip.peak_flops * cost.peak_share, times)
        memory = self.read(cost.hbm_bytes, cost.hbm_share, times)
        self.advance(x, *max((self.now + products, "compute"), (memory, "memory")), times)

    def multiply(self, flops: float, a_second: float, times: int) -> float:
        """Seconds that the matrix units take."""
        self.line.flops += flops * times
        self.work("matrix units", flops / a_second * times)
        return flops / a_second

    def read(self, moved: float, share: float, times: int) -> float:
        """When HBM has moved so many bytes."""
        self.line.hbm_bytes += moved * times
        seconds = moved / (self.chip.hbm_bandwidth * share)
        self.memory = max(self.memory, self.now) + seconds
        self.work("HBM", seconds * times)
        return self.memory

    def advance(self, x: Operation, end: float, limit: str, times: int) -> None:
        """To the end of an operation, and what it takes for itself."""
        waited, own = max(end - self.now, 0.0), self.assumed.operation_s
        for name, seconds in ((limit, waited), ("overhead", own)):
            self.line.by_limit[name] = self.line.by_limit.get(name, 0.0) + seconds
        self.now += waited + own
        before, count = self.own.get(x.kernel or x.name, (0.0, 0))
        self.own[x.kernel or x.name] = (before + (waited + own) * times, count + times)

    def work(self, what: str, seconds: float) -> None:
        self.line.busy[what] = self.line.busy.get(what, 0.0) + seconds
