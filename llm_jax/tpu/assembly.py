"""The final machine code of a TPU program as libtpu prints it, read into bundles of operations.

A line of the listing is one bundle, which one core issues in one cycle; its operations act at the same
time:

    0:0x17  : {s16 = sadd.s32 $1, s12; [smem:s12] = sst s13; v25 = vpop.8x128 (mrf1)}
    0:0x2d  : {(pc) = sbr.rel @p0 $+68, $3 (=0x71)}          jumps after three more bundles

The format is libtpu's own and undocumented; what stands here was read from its listings (0.0.52).
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

BUNDLE = re.compile(r"^(\d+):(0x[0-9a-f]+)\s*:\s*\{(.*)\}\s*(?:/\*.*)?$", re.MULTILINE)
OPERATION = re.compile(
    r"^(?P<to>.+?) = (?P<name>[a-z][\w.]*)(?: @(?P<unless>!)?p(?P<guard>\d+))?(?: (?P<args>.*))?$"
)
RANGE = re.compile(
    r"operation: %(\S+) = .*?emitted bundle range: "
    r"\[TensorCoreSequencer:(\d+):(0x[0-9a-f]+), TensorCoreSequencer:(\d+):(0x[0-9a-f]+)\)",
    re.DOTALL,
)
OPERAND = re.compile(
    r"%s\d+(?:_s(?P<register>\d+))? = inlined_call_operand\.(?P<space><no memory space>|[a-z_.]+) "
    r"\[shape: (?P<shape>\S+?),? index: (?P<index>\d+), kind: (?P<kind>\w+)"
)
ALLOCATION = re.compile(r"#allocation\d+ \[shape = '[^']*', space=(\w+), size = (0x[0-9a-f]+)")
SPILL = re.compile(r"#allocation(\d+)_spill")


class Operation(NamedTuple):
    """`to = name @guard args`; guard: (predicate register, whether it must be false), None = always."""

    to: str
    name: str
    guard: tuple[int, bool] | None
    args: str


class Operand(NamedTuple):
    """An operand of a kernel: where it lies ("hbm", "vmem", "smem", or "<no memory space>" for a
    number).
    """

    index: int
    kind: str  # "input" or "output"
    space: str
    shape: str  # "bf16[4096,128]"
    register: int | None  # which scalar register holds its address when the kernel begins


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The code of one kernel: bundles [first, first + count) of the program.

    slots: (name of each kind of slot, how many a bundle has of it, how many each bundle uses
    [count][kinds]). vmem, smem: bytes that it allocates. spills: places in VMEM and SMEM for values that
    found no register. divided: whether two cores of a device share the grid.
    """

    name: str
    first: int
    bundles: list[str]
    operands: tuple[Operand, ...]
    slots: tuple[tuple[str, ...], tuple[int, ...], list[list[int]]]
    vmem: int
    smem: int
    spills: int
    divided: bool


class Texts(Protocol):
    """What is read of a program: its texts by name, as `compile.Program` has them."""

    def text(self, name: str) -> str: ...


def read_kernels(program: Texts, names: tuple[str, ...]) -> list[Kernel]:
    """The Pallas kernels of a compiled program. Raises ValueError where libtpu did not print them."""
    listing: dict[str, dict[int, str]] = {}
    for overlay, address, body in BUNDLE.findall(program.text("assembly.txt")):
        listing.setdefault(overlay, {})[int(address, 16)] = body
    ranges = {name: rest for name, *rest in _ranges(program.text("ranges.txt"))}
    return [_kernel(program, name, listing, ranges) for name in names]


def operations(bundle: str) -> Iterator[Operation]:
    """The operations of a bundle."""
    for part in bundle.split("; "):
        found = OPERATION.match(part.strip())
        if found:
            guard = None if found["guard"] is None else (int(found["guard"]), bool(found["unless"]))
            yield Operation(found["to"], found["name"], guard, found["args"] or "")


def _ranges(text: str) -> Iterator[tuple[str, str, int, str, int]]:
    """(HLO name, overlay, first bundle, overlay, end) of everything that has code."""
    for block in text.split("HLO:")[1:]:
        if found := RANGE.search(block):
            name, overlay, first, last_overlay, end = found.groups()
            yield name, overlay, int(first, 16), last_overlay, int(end, 16)


def _kernel(program: Texts, name: str, listing: dict[str, dict[int, str]], ranges: dict) -> Kernel:
    if name not in ranges:
        raise ValueError(f"kernel {name}: libtpu's listing does not say where its code is")
    overlay, start, last_overlay, end = ranges[name]
    if overlay != last_overlay:
        raise ValueError(f"kernel {name}: its code spans two overlays, which is not read here")
    bundles = program.text(f"{name}.bundles.txt")
    kinds, capacity, used = read_slots(program.text(f"{name}.slots.txt"))
    code = listing[overlay]
    first = _first_bundle(name, bundles, code, start, end, len(used))
    allocated = {"vmem": 0, "smem": 0}
    for space, size in ALLOCATION.findall(program.text(f"{name}.allocations.txt")):
        if space in allocated:
            allocated[space] += int(size, 16)
    operands = {
        int(m["index"]): Operand(
            int(m["index"]),
            m["kind"],
            m["space"],
            m["shape"],
            int(m["register"]) if m["register"] else None,
        )
        for m in OPERAND.finditer(bundles)
    }
    return Kernel(
        name=name,
        first=first,
        bundles=[code.get(first + i, "") for i in range(len(used))],
        operands=tuple(operands[i] for i in sorted(operands)),
        slots=(kinds, capacity, used),
        vmem=allocated["vmem"],
        smem=allocated["smem"],
        spills=len(set(SPILL.findall(bundles))),
        divided="megacore core id" in bundles,
    )


def _first_bundle(
    name: str, bundles: str, code: dict[int, str], start: int, end: int, count: int
) -> int:
    """Where the kernel's own listing begins in the program: where its branches fall on the program's.

    The range that libtpu names has a few bundles more, for tracing and for a second core's sake.
    """
    lines = re.findall(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:(.*)$", bundles, re.MULTILINE)
    branches = [i for i, line in enumerate(lines) if " sbr." in line]
    likely = end - count

    def hits(first: int) -> int:
        return sum("sbr." in code.get(first + i, "") for i in branches)

    best = max(range(start, likely + 7), key=lambda first: (hits(first), -abs(first - likely)))
    if hits(best) < len(branches):
        raise ValueError(
            f"kernel {name}: {hits(best)} of its {len(branches)} branches found in the program"
        )
    return best


def read_slots(text: str) -> tuple[tuple[str, ...], tuple[int, ...], list[list[int]]]:
    """(kinds of slots, how many a bundle has of each, how many each bundle uses) of libtpu's table."""
    head, _, body = text.partition("UTILIZATION")
    lines = head.strip().splitlines()
    kinds = next(line for line in lines if "VALU" in line)
    capacity = next(line for line in lines if line.split() and all(x.isdigit() for x in line.split()))
    rows = [[int(x) for x in line.split()] for line in body.splitlines()[1:] if line.strip()]
    names = tuple(x.strip() for x in kinds.split(","))
    return names, tuple(int(x) for x in capacity.split()), rows
