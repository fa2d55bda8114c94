"""Compiled HLO, read from its text: what each operation computes, moves and sends, in scheduled order.

    module = read_module(program.text("hlo.txt"))
    for operation in operations(module): operation.flops, operation.hbm_bytes, operation.collective

An operation is a fusion, a product, a copy, a Pallas kernel, a collective: what the chip does in one
piece. Counted are multiply-adds times two of its products, the bytes that it reads from and writes to
HBM (a slice of a stacked weight counts as the slice, an update in place as the update, what the compiler
keeps in VMEM not at all), and what a collective sends. The text says all that (openxla.org/xla, "HLO
dumps"); `cost_analysis()` of JAX says less: it counts a loop's body once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0}
VMEM = 1  # the memory space as layouts say it, S(1)
FREE = (  # operations that do nothing at run time
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
    *("replica-id", "opt-barrier", "domain", "add-dependency"),
)
SLICES = ("dynamic-slice", "slice", "gather")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
INTEGERS = ("s8", "u8", "s4", "u4")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
# Of a fusion in another: the same array with other tiles.
IN_PLACE = "output_to_operand_aliasing={{}: (0, {})}"
HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
BODY = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
NAMES = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type. space: 0 = HBM, 1 = VMEM; others are scalars', semaphores' and the host's."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Without the padding of tiles."""
        digits = re.search(r"\d+", self.dtype)
        each = BYTES.get(self.dtype) or (int(digits[0]) / 8 if digits else 0)
        return each * math.prod(self.dims)

    @property
    def hbm(self) -> float:
        """Its bytes, if it lies in HBM."""
        return self.bytes if self.space == 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation. given: what its parentheses hold, rest: all that follows them."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result, a tuple's one after the other
    operands: tuple[str, ...]
    given: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """What stands behind `name=`, up to a comma or a space."""
        found = re.search(rf"\b{name}=([^\s,]+)", self.rest)
        return found[1] if found else None

    def called(self, name: str) -> str | None:
        """The computation behind `name=`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in scheduled order."""

    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices exchange. kind: one of `COLLECTIVES`.

    bytes: of the whole array on a device, gathered or not yet scattered. groups: devices (by their place
    in the program) that exchange with each other; pairs (from, to) of a permutation. rings: in how many
    at once the compiler goes round, 0 = not said.
    """

    kind: str
    bytes: float
    groups: tuple[tuple[int, ...], ...]
    rings: int = 0


@dataclasses.dataclass(frozen=True)
class Operation:
    """One thing that a device does, `times` in a row of its loops. kernel: a Pallas kernel.

    part: "" of an operation in one piece, else "start" or "done" of one that others run beside. of: the
    name of the operation whose end "done" waits for. flops: in products; integers: whether of 8 bits.
    vmem_bytes: of operands and results that the compiler keeps there. given, made: the operands and
    results of a kernel, for who knows what it does with them; it counts as reading and writing all.
    cycles: the compiler's own estimate, 0 = none.
    """

    name: str
    opcode: str
    flops: float = 0.0
    hbm_bytes: float = 0.0
    vmem_bytes: float = 0.0
    integers: bool = False
    kernel: str = ""
    collective: Collective | None = None
    part: str = ""
    of: str = ""
    cycles: int = 0
    given: tuple[Array, ...] = ()
    made: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Loop:
    """Operations that run `times` one after the other; times = 0: the program does not say how often."""

    name: str
    times: int
    body: tuple["Operation | Loop", ...]


def read_module(text: str) -> Module:
    """A module from what `compiled.as_text()` gives. Raises ValueError where there is no entry."""
    computations, entry = {}, ""
    name, root, found = "", "", {}
    for line in text.splitlines():
        if line.startswith("}"):
            computations[name] = Computation(name, found, root)
        elif head := HEAD.match(line):
            name, root, found = head[2], "", {}
            entry = name if head[1] else entry
        elif name and (body := BODY.match(line)):
            found[body[2]] = _instruction(body[2], line[body.end() :])
            root = body[2] if body[1] else root
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    """`TYPE opcode(operands), rest`."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    close = _closing("(" + rest) - 1
    given, operands = rest[: close - 1], tuple(NAMES.findall(rest[:close]))
    return Instruction(name, opcode, arrays(text[:end]), operands, given, rest[close:])


def _closing(text: str) -> int:
    """Where the parenthesis that opens `text` closes, and one further."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return at + 1
    return len(text)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type as HLO writes it, f32[8,128]{1,0:T(8,128)S(1)} or a tuple of such."""
    found = []
    for dtype, dims, layout in ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(n) for n in dims.split(",") if n)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def operations(module: Module) -> tuple[Operation | Loop, ...]:
    """What a device does, in order; loops as `Loop`."""
    return tuple(_Reader(module).of(module.entry))


def each(program: tuple[Operation | Loop, ...], times: int = 1) -> Iterator[tuple[Operation, int]]:
    """(operation, how often it runs); loops of unknown length count once."""
    for item in program:
        if isinstance(item, Loop):
            yield from each(item.body, times * max(item.times, 1))
        else:
            yield item, times


class _Reader:
    """Turns computations into operations."""

    def __init__(self, module: Module):
        self.module = module
        self.begun: dict[str, str] = {}  # channels of exchanges that fusions begin: the name of that

    def of(self, name: str) -> Iterator[Operation | Loop]:
        computation = self.module.computations[name]
        for instruction in computation.instructions.values():
            yield from self.operation(instruction, computation)

    def operation(self, x: Instruction, where: Computation) -> Iterator[Operation | Loop]:
        if x.opcode in FREE:
            return
        if x.opcode == "while":
            body = x.called("body")
            assert body is not None, x
            yield Loop(x.name, self.trips(x), tuple(self.of(body)))
        elif x.opcode == "call":
            yield from self.of(x.called("to_apply") or "")
        elif x.opcode == "conditional":
            yield from self.longest(x)
        elif x.opcode in ("custom-call-update", "call-update"):
            began, *given = x.operands
            yield self.offloaded(x, where.instructions[began], given, where)
        elif x.opcode in ("custom-call-start", "call-start") and not x.operands:
            return  # its update hands it the operands
        elif x.opcode == "call-start":
            yield self.offloaded(x, x, x.operands, where)
        elif x.opcode.endswith("-done"):
            yield Operation(x.name, x.opcode, part="done", of=x.operands[0])
        else:
            yield self.costed(x, where)

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler says, or from 0 to the largest number its condition has
        in steps of what its body adds, which is more than 1 where the compiler has unrolled it."""
        said = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if said:
            return int(said[1])
        condition = self.module.computations.get(loop.called("condition") or "")
        if condition is None:
            return 0
        end = max((n for x in condition.instructions.values() if (n := _number(x))), default=0)
        return -(-end // self._step(condition, loop))

    def _step(self, condition: Computation, loop: Instruction) -> int:
        """What a turn adds to the counter that the condition compares; 1 where it is not seen."""
        counters = [x for x in condition.instructions.values() if x.opcode == "get-tuple-element"]
        body = self.module.computations[loop.called("body") or ""]
        root = body.instructions[body.root]
        if len(counters) != 1 or root.opcode != "tuple":
            return 1
        after = body.instructions[root.operands[int(counters[0].attribute("index") or 0)]]
        added = (_number(body.instructions[name]) for name in after.operands)
        return next((n for n in added if n), 1) if after.opcode == "add" else 1

    def longest(self, x: Instruction) -> Iterator[Operation | Loop]:
        """The branch that moves and computes most."""
        names = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
        branches = (
            NAMES.findall(names[1])
            if names
            else [b for b in (x.called("true_computation"), x.called("false_computation")) if b]
        )

        def weight(program: tuple[Operation | Loop, ...]) -> float:
            return sum(n * (op.hbm_bytes + op.flops / 100) for op, n in each(program))

        yield from max((tuple(self.of(b)) for b in branches), key=weight, default=())

    def costed(self, x: Instruction, where: Computation) -> Operation:
        start = x.opcode.endswith("-start")
        opcode = x.opcode.removesuffix("-start")
        cycles = re.search(r'"estimated_cycles":"(\d+)"', x.rest)
        common: dict[str, Any] = {
            "name": x.name,
            "opcode": opcode,
            "part": "start" if start else "",
            "cycles": int(cycles[1]) if cycles else 0,
        }
        if opcode == "async":  # another operation, begun
            inner = self.module.computations[x.called("calls") or ""]
            body = inner.instructions[inner.root]
            found = self.costed(dataclasses.replace(body, name=x.name), inner)
            return dataclasses.replace(found, **(common | {"opcode": found.opcode}))
        if opcode in COLLECTIVES:
            return Operation(**common, collective=_collective(x, opcode, self.operands(x, where)))
        if opcode in ("copy", "slice", "dynamic-slice") and start:
            # Its result is (target, source, semaphore), or the like: the target says how much.
            moved = min(a.bytes for a in x.arrays[:2] if a.bytes)
            between = {a.space for a in x.arrays[:2]}
            return Operation(**common, hbm_bytes=moved * (2 if between == {0} else 1))
        if opcode == "custom-call":
            return self.custom(x, where, common)
        if opcode == "fusion" and (fused := self.fused(x)) is not None:
            collective, channel = fused
            if x.name.startswith("async-collective-start"):
                self.begun[channel] = x.name
                return Operation(**common | {"part": "start"}, collective=collective)
            if x.name.startswith("async-collective-done"):
                return Operation(**common | {"part": "done"}, of=self.begun[channel])
            if channel not in self.begun:
                return Operation(**common, collective=collective)
            # Else it computes, and the exchange that has begun goes on beside.
        flops, integers = self.flops(x, where)
        inside = sum(a.bytes for a in (*self.operands(x, where), *x.arrays) if a.space == VMEM)
        moved = {"hbm_bytes": self.bytes(x, where), "vmem_bytes": inside}
        return Operation(**common, flops=flops, integers=integers, **moved)

    def fused(self, x: Instruction) -> tuple[Collective, str] | None:
        """(collective in a fusion, its channel); an all-reduce of which a part is kept scatters."""
        inner = self.module.computations[x.called("calls") or ""]
        for y in inner.instructions.values():
            if y.opcode in COLLECTIVES:
                found = _collective(y, y.opcode, self.operands(y, inner))
                channel = y.attribute("channel_id") or ""
                scatters = found.kind == "all-reduce" and x.arrays[0].bytes < found.bytes
                kind = "reduce-scatter" if scatters else found.kind
                return dataclasses.replace(found, kind=kind), channel
        return None

    def offloaded(
        self, x: Instruction, began: Instruction, given: Sequence[str], where: Computation
    ) -> Operation:
        """What the SparseCores are given to do beside (v5p, v6e, tpu7x): a collective, or a gather.

        began: names what they do; x: the instruction that hands them the operands `given`.
        """
        named = re.search(r"(?:called_computations=\{|to_apply=)%?([\w.\-]+)", began.rest)
        assert named is not None, began
        inner = self.module.computations[named[1]]
        for y in inner.instructions.values():
            if y.opcode in COLLECTIVES:
                found = self.costed(dataclasses.replace(y, name=x.name), inner)
                return dataclasses.replace(found, part="start")
        arrays = [a for name in given for a in where.instructions[name].arrays]
        moved = sum(a.hbm for a in (*arrays, *inner.instructions[inner.root].arrays))
        return Operation(x.name, x.opcode, hbm_bytes=moved, part="start")

    def custom(self, x: Instruction, where: Computation, common: dict) -> Operation:
        """A custom call: of the compiler's own, or a Pallas kernel."""
        given = self.operands(x, where)
        moved = sum(a.hbm for a in (*x.arrays, *given))
        if x.attribute("custom_call_target") != '"tpu_custom_call"':
            return Operation(**common, hbm_bytes=moved)
        kernel = {"kernel": x.name.partition(".")[0], "given": tuple(given), "made": x.arrays}
        return Operation(**common, hbm_bytes=moved, **kernel)

    def operands(self, x: Instruction, where: Computation) -> list[Array]:
        return [a for name in x.operands for a in where.instructions[name].arrays]

    def flops(self, x: Instruction, where: Computation) -> tuple[float, bool]:
        """(operations in products, whether they are of 8-bit integers)."""
        if x.opcode == "fusion":
            inner = self.module.computations[x.called("calls") or ""]
            found = [self.flops(y, inner) for y in inner.instructions.values()]
            most = max(found, default=(0.0, False))
            return sum(n for n, _ in found), most[1]
        if x.opcode not in ("dot", "convolution"):
            return 0.0, False
        left, right = self.operands(x, where)[:2]
        integers = left.dtype in INTEGERS and right.dtype in INTEGERS
        count = _dot if x.opcode == "dot" else _convolution
        return count(x, left, right), integers

    def bytes(self, x: Instruction, where: Computation) -> float:
        """What an operation reads from HBM and writes to it."""
        operands = self.operands(x, where)
        if x.opcode == "fusion":
            inner = self.module.computations[x.called("calls") or ""]
            read = sum(min(a.hbm, self.read(inner, i)) for i, a in enumerate(operands) if a.space == 0)
            return read + self.written(inner, x.arrays)
        if x.opcode in SLICES:
            return sum(2 * a.hbm for a in x.arrays)
        if x.opcode == "dynamic-update-slice":
            return 2 * operands[1].hbm
        return sum(a.hbm for a in (*operands, *x.arrays))

    @functools.cache  # noqa: B019 (a reader lives as long as one call)
    def _reads(self, name: str) -> dict[int, float]:
        """Bytes that a fused computation reads of each of its parameters."""
        inner = self.module.computations[name]
        users: dict[str, list[Instruction]] = {}
        for y in inner.instructions.values():
            for operand in y.operands:
                users.setdefault(operand, []).append(y)

        def read(x: Instruction) -> float:
            if x.name == inner.root:  # handed on as it is
                return math.inf
            total = 0.0
            for user in users.get(x.name, []):
                if user.opcode in SLICES and user.operands[0] == x.name:
                    total += user.arrays[0].bytes
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == x.name:
                    total += 0.0  # changed in place
                elif user.opcode == "bitcast" or IN_PLACE in user.rest:
                    total += read(user)
                elif user.opcode == "fusion":
                    of = self._reads(user.called("calls") or "")
                    total += sum(of[i] for i, o in enumerate(user.operands) if o == x.name)
                else:
                    return math.inf
            return total

        found = {}
        for x in inner.instructions.values():
            if x.opcode == "parameter":
                found[int(x.given)] = min(read(x), sum(a.bytes for a in x.arrays))
        return found

    def read(self, inner: Computation, parameter: int) -> float:
        return self._reads(inner.name).get(parameter, math.inf)

    def written(self, inner: Computation, results: tuple[Array, ...]) -> float:
        """Bytes that a fused computation writes to HBM: of an update in place, the update."""
        root = inner.instructions[inner.root]
        roots = [root] if root.opcode != "tuple" else [inner.instructions[n] for n in root.operands]
        total = 0.0
        for x, result in zip(roots, results, strict=False):
            while x.opcode in ("bitcast", "copy") and x.operands:
                x = inner.instructions[x.operands[0]]
            if x.opcode == "dynamic-update-slice":
                update = inner.instructions[x.operands[1]].arrays[0]
                total += min(update.bytes, result.bytes) if result.space == 0 else 0.0
            else:
                total += result.hbm
        return total


def _number(x: Instruction) -> int:
    """The value of a constant that is a natural number; 0 for anything else."""
    return int(x.given) if x.opcode == "constant" and x.given.isdigit() else 0


def _dot(x: Instruction, left: Array, right: Array) -> float:
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.rest)
    summed = math.prod(left.dims[int(d)] for d in dims[1].split(",") if d) if dims else 1
    return 2.0 * math.prod(x.arrays[0].dims) * summed


def _convolution(x: Instruction, left: Array, right: Array) -> float:
    """Products are convolutions in a TPU's programs, often with padding that is not computed."""
    labels = x.attribute("dim_labels")
    assert labels is not None, x
    of_left, _, more = labels.partition("_")
    of_right, _, of_out = more.partition("->")
    out = x.arrays[0]
    window = re.search(r"window=\{([^}]*)\}", x.rest)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1.0
    for label in (c for c in of_right if c.isdigit()):
        d = int(label)
        size = right.dims[of_right.index(label)]
        inside, after = left.dims[of_left.index(label)], out.dims[of_out.index(label)]
        pairs *= _valid(size, inside, after, *(_setting(settings, n, d) for n in WINDOW))
    batch = out.dims[of_out.index("b")]
    return 2.0 * batch * right.dims[of_right.index("o")] * right.dims[of_right.index("i")] * pairs


WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")


def _setting(settings: dict[str, str], name: str, dimension: int) -> int:
    """A window's setting of one dimension; of padding, what comes before."""
    default = 0 if name == "pad" else 1
    if name not in settings:
        return default
    return int(settings[name].split("x")[dimension].split("_")[0])


def _valid(size: int, inside: int, after: int, stride: int, pad: int, left: int, right: int) -> int:
    """(place of the result, place of the window) pairs that meet a number, not padding or a hole."""
    if size == 1:
        at = np.arange(after)[:, None] * stride - pad
    else:
        at = np.arange(after)[:, None] * stride + np.arange(size)[None, :] * right - pad
    there = (at >= 0) & (at <= (inside - 1) * left) & (at % left == 0)
    return int(there.sum())


def _collective(x: Instruction, kind: str, operands: list[Array]) -> Collective:
    sent = sum(a.bytes for a in operands)
    got = sum(a.bytes for a in x.arrays) - (sent if x.opcode.endswith("-start") else 0.0)
    whole = {"all-gather": got, "reduce-scatter": sent}.get(kind, sent)
    groups = _pairs(x.rest) if kind == "collective-permute" else _groups(x.rest)
    rings = re.search(r"\bcolors:(\d+)", x.rest)
    return Collective(kind, whole, groups, int(rings[1]) if rings else 0)


def _pairs(text: str) -> tuple[tuple[int, ...], ...]:
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{?(\d+),(\d+)", found[1])) if found else ()


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Groups of devices, of the four ways to write them; () = all of them."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*)\{([^}]*)\}", text):
        return _mesh_groups(mesh[1], mesh[2])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = _numbers(iota[1]), _numbers(iota[2])
        ids = np.arange(math.prod(source)).reshape(source)
        if iota[3]:
            ids = ids.transpose(_numbers(iota[3]))
        return _rows(ids.reshape(shape))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    return ()


def _mesh_groups(axes: str, over: str) -> tuple[tuple[int, ...], ...]:
    """Of mesh['a'=2,'b'=4] {'b'}: rows of b. 'b':(2)2 is a part of b, of size 2 after 2 others."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = [f"{name}" for name in sizes]
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    inner = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        if not size:
            inner.append(name)
            continue
        at, before, size = order.index(name), int(before), int(size)
        parts = [(f"{name}<", before), (f"{name}=", size), (f"{name}>", sizes[name] // before // size)]
        ids = ids.reshape(*ids.shape[:at], *(n for _, n in parts), *ids.shape[at + 1 :])
        order[at : at + 1] = [p for p, _ in parts]
        inner.append(f"{name}=")
    outer = [i for i, name in enumerate(order) if name not in inner]
    last = [order.index(name) for name in inner]
    size = math.prod(ids.shape[i] for i in last)
    return _rows(ids.transpose(*outer, *last).reshape(-1, size))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in row) for row in ids)
