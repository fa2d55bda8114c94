"""Executes the scalar half of a kernel's machine code: its loops, its skipped blocks, its DMAs.

The scalar unit of a TPU core decides how often each bundle is issued: registers s0..s31 and predicates
p0..p31, a memory (SMEM), branches, starts of DMAs and waits for them. None of it depends on vectors,
except in kernels that read a scalar from one. So executing it alone counts the bundles exactly, as long
as the integers that steer the kernel are given; whatever else it meets is counted in `blind`, never
guessed silently.

Time: a bundle is a cycle. A block of bundles cannot end before the matrix units are done with its
products; a taken branch costs `Chip.branch_cycles`; DMAs share one queue to HBM, bytes / bandwidth each,
and are complete `DMA_LATENCY` later. Waits stop the clock.
"""

import collections
import dataclasses
import re
import struct
import time
from collections.abc import Callable

import numpy as np

from llm_jax.tpu.assembly import Kernel, Operation, operations
from llm_jax.tpu.chips import Chip

DMA_LATENCY = 500e-9  # seconds; an assumption that no listing shows
LOCAL_BYTES, LOCAL_CYCLES = (
    512,
    50,
)  # a cycle, and to begin with, between memories of the core: assumptions
FAR_MEMORIES = ("hbm", "cmem")  # v4 has a second one, which is counted as if it were HBM
LONGEST_BLOCK = 4000  # bundles without a branch that are translated at once
# Where integers that steer the kernel lie. HBM and VMEM are addressed by 512 bytes or, for a DMA, by 32.
FAR, APART = 0x0800_0000, 0x0010_0000

SIGNED = "(({0}) + 0x80000000 & 0xffffffff) - 0x80000000"
UNSIGNED = "({0} & 0xffffffff)"
BINARY = {
    "sadd.s32": SIGNED.format("{a} + {b}"),
    "ssub.s32": SIGNED.format("{a} - {b}"),
    "smul.u32": SIGNED.format("{a} * {b}"),
    "smul.s32": SIGNED.format("{a} * {b}"),
    "smulhi.u32": SIGNED.format("({a} & 0xffffffff) * ({b} & 0xffffffff) >> 32"),
    "sand.u32": "{a} & {b}",
    "sor.u32": "{a} | {b}",
    "sxor.u32": "{a} ^ {b}",
    "sshll.u32": SIGNED.format("{a} << {b} if 0 <= {b} < 32 else 0"),
    "sshrl.u32": SIGNED.format("({a} & 0xffffffff) >> {b} if 0 <= {b} < 32 else 0"),
    "sshra.s32": "{a} >> min({b} & 0xff, 31)",
    "smin.s32": "min({a}, {b})",
    "smax.s32": "max({a}, {b})",
    "smin.u32": SIGNED.format("min({a} & 0xffffffff, {b} & 0xffffffff)"),
    "smax.u32": SIGNED.format("max({a} & 0xffffffff, {b} & 0xffffffff)"),
    "sc.u32": "({a} & 0xffffffff) + ({b} & 0xffffffff) > 0xffffffff",  # the carry
    "por": "bool({a} or {b})",
    "pand": "bool({a} and {b})",
    "pxor": "bool({a}) != bool({b})",
}
for _name, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    BINARY[f"s{_name}.s32"] = f"{{a}} {_sign} {{b}}"
    BINARY[f"s{_name}.u32"] = f"({{a}} & 0xffffffff) {_sign} ({{b}} & 0xffffffff)"
    BINARY[f"s{_name}.f32"] = f"to_float({{a}}) {_sign} to_float({{b}})"
for _name, _sign in {"sadd": "+", "ssub": "-", "smul": "*"}.items():
    BINARY[f"{_name}.f32"] = f"to_bits(to_float({{a}}) {_sign} to_float({{b}}))"
for _name in ("smin", "smax"):
    BINARY[f"{_name}.f32"] = f"to_bits({_name[1:]}(to_float({{a}}), to_float({{b}})))"
UNARY = {
    **dict.fromkeys(
        ("simm.u32", "simm.s32", "simm.f32", "smov.u32", "smov.s32", "smov.f32", "smov"), "{a}"
    ),
    "sclz.u32": "32 - ({a} & 0xffffffff).bit_length()",
    "scvt.s32.f32": "to_bits(float({a}))",
    "scvt.f32.s32": "int(to_float({a}))",
}
REGISTER = re.compile(r"([sp])(\d+)$")
SMEM = re.compile(r"\[smem:([^\]]+)\]")
FLAG = re.compile(r"\[sflag:([^\]]+)\](?:, (\S+))?")
JUMP = re.compile(r"\$[+-]?\d+(?:, \$(\d+))? \(=(0x[0-9a-f]+)\)")
DMA_TO = re.compile(r"\[(\w+):([^\]@]+)(?:@\w+)?\], \[sflag:([^\]]+)\]$")
DMA_FROM = re.compile(r"\[(\w+):([^\]@]+)(?:@\w+)?\](?:, \[sflag:[^\]]+\])?, length:(\S+?)(?:,|$)")


def to_bits(x: float) -> int:
    """The register that holds a float32."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


def to_float(bits: int) -> float:
    """The float32 that a register holds."""
    return struct.unpack("<f", struct.pack("<i", bits))[0]


@dataclasses.dataclass
class Traffic:
    """DMAs between two memories."""

    count: int = 0
    bytes: int = 0


@dataclasses.dataclass
class Run:
    """What happened. cycles: all; of them issued bundles, and cycles waited for a branch, the matrix
    units, DMAs.

    counts: [bundles] how often each was issued. jumps: (first, last bundle) of loops -> times they went
    back. dma: "hbm->vmem" -> traffic. mxu_cycles: how long the matrix units were busy. blind: what was
    met and could not be known -> how often. complete: whether the kernel ran to its end.
    """

    cycles: float
    issued: int
    branch_wait: int
    mxu_wait: int
    dma_wait: float
    mxu_cycles: int
    counts: np.ndarray
    jumps: dict[tuple[int, int], int]
    dma: dict[str, Traffic]
    blind: dict[str, int]
    complete: bool


@dataclasses.dataclass(frozen=True)
class _Block:
    """Bundles [first, first + size), the last of which a branch may leave."""

    run: Callable[["ScalarUnit"], int]  # -> the next bundle
    size: int
    busy: int  # cycles that its products occupy the matrix units


class ScalarUnit:
    """One core's scalar unit with a kernel loaded; `run` executes it once."""

    def __init__(self, kernel: Kernel, chip: Chip, integers: dict[int, np.ndarray]):
        """integers: operand -> the values that it holds; they are read as if the others were zero."""
        self.kernel, self.chip = kernel, chip
        self.s = [0] * 64
        self.p = [False] * 64
        self.smem: dict[int, int] = {}
        self.flags: dict[int, int] = collections.defaultdict(int)
        self.blind: dict[str, int] = collections.Counter()
        self.dma: dict[str, Traffic] = collections.defaultdict(Traffic)
        self._branch_wait = 0
        self._now = 0.0  # cycles
        self._hbm_free = 0.0
        self._dma_wait = 0.0
        self._pending: dict[int, collections.deque] = collections.defaultdict(collections.deque)
        self._queues: dict[str, collections.deque] = collections.defaultdict(collections.deque)
        self._images: list[tuple[int, np.ndarray]] = []  # (address in 512 bytes, words)
        self._blocks: dict[int, _Block] = {}
        for operand in kernel.operands:
            if operand.register is not None:
                self.s[operand.register] = self._place(operand.index, operand.space, integers)

    def run(self, limit_s: float = 60.0) -> Run:
        """Execute to the end, or for `limit_s` seconds of this machine's time."""
        first, size = self.kernel.first, len(self.kernel.bundles)
        entered: dict[int, int] = collections.Counter()
        jumps: dict[tuple[int, int], int] = collections.Counter()
        deadline, steps, at = time.monotonic() + limit_s, 0, 0
        while 0 <= at < size:
            block = self._blocks.get(at) or self._translate(at)
            entered[at] += 1
            following = block.run(self) - first
            if following < at + block.size:
                jumps[following, at + block.size - 1] += 1
            at, steps = following, steps + 1
            if steps % 4096 == 0 and time.monotonic() > deadline:
                self.blind[f"not executed to the end within {limit_s:.0f} s"] += 1
                break
        counts = np.zeros(size + 1, np.int64)
        for start, times in entered.items():
            counts[start] += times
            counts[min(start + self._blocks[start].size, size)] -= times
        counts = counts.cumsum()[:-1]
        blocks = [(self._blocks[start], times) for start, times in entered.items()]
        return Run(
            cycles=self._now,
            issued=int(counts.sum()),
            branch_wait=self._branch_wait,
            mxu_wait=sum(max(0, b.busy - b.size) * n for b, n in blocks),
            dma_wait=self._dma_wait,
            mxu_cycles=sum(b.busy * n for b, n in blocks),
            counts=counts,
            jumps=dict(jumps),
            dma=dict(self.dma),
            blind=dict(self.blind),
            complete=at == size,
        )

    # What translated code calls. `offset` is the bundle within its block.

    def load(self, address: int) -> int:
        """A word of SMEM; 0 where nothing wrote, as under a predicate that makes it meaningless."""
        word = self.smem.get(address)
        if word is None:
            if address >= FAR:
                self.blind["words of an operand in SMEM that are not given (taken as 0)"] += 1
            return 0
        return word

    def push_flag(self, queue: str, flag: int) -> None:
        self._queues[queue].append(self.flags[flag])

    def pop(self, queue: str) -> int:
        """What a semaphore, or a vector, handed to the scalar unit."""
        values = self._queues[queue]
        if not values:
            self.blind["scalars taken from vectors (taken as 0)"] += 1
            return 0
        return values.popleft()

    def wait(self, flag: int, count: int, offset: int) -> None:
        """Until the semaphore is at least `count`; DMAs that end there are let end."""
        now = until = self._now + offset
        pending = self._pending[flag]
        while self.flags[flag] < count and pending:
            done, length = pending.popleft()
            self.flags[flag] += length
            until = max(until, done)
        if self.flags[flag] < count:
            self.blind["waits for a semaphore that nothing here signals"] += 1
            self.flags[flag] = count
        self._dma_wait += until - now
        self._now += until - now

    def start_dma(self, to: str, source: str, at: int, origin: int, length: int, flag: int, offset: int):
        """Begin a transfer of `length` units, which adds them to the semaphore when it is complete."""
        length &= 0xFFFFFFFF
        size, now = length * self.chip.dma_unit, self._now + offset
        traffic = self.dma[f"{source}->{to}"]
        traffic.count += 1
        traffic.bytes += size
        remote = (to in FAR_MEMORIES) + (source in FAR_MEMORIES)
        if remote:
            per_cycle = (
                self.chip.hbm_bandwidth
                / self.chip.clock
                / (self.chip.cores if self.kernel.divided else 1)
            )
            self._hbm_free = max(now, self._hbm_free) + remote * size / per_cycle
            done = self._hbm_free + DMA_LATENCY * self.chip.clock
        else:
            done = now + size / LOCAL_BYTES + LOCAL_CYCLES
        self._pending[flag].append((done, length))
        if to == "smem" and source in ("vmem", *FAR_MEMORIES):
            self._copy_words(at, origin, size // 4)

    def tick(self, size: int, busy: int, taken: bool, filled: int) -> None:
        """The end of a block, perhaps by a branch that `filled` of its bundles follow."""
        self._now += max(size, busy)
        if taken:
            lost = self.chip.branch_cycles - filled
            self._now += lost
            self._branch_wait += lost

    def delay(self, cycles: int) -> None:
        self._now += cycles

    # How an operand's integers come into memory.

    def _place(self, index: int, space: str, integers: dict[int, np.ndarray]) -> int:
        """The operand's address, or its value where it is a number in a register."""
        values = integers.get(index)
        if space.startswith("<"):
            if values is None:
                self.blind["numbers that the kernel is given (taken as 0)"] += 1
            return 0 if values is None else int(values.reshape(-1)[0])
        if values is None and not space.startswith("smem"):
            return 0
        address = FAR + APART * len(self._images)
        words = np.zeros(0, np.int64) if values is None else _words(values)
        self._images.append((address, words))
        if space.startswith("smem"):
            self.smem.update((address + i, int(word)) for i, word in enumerate(words.tolist()))
        return address

    def _copy_words(self, at: int, origin: int, count: int) -> None:
        origin &= 0xFFFFFFFF
        for address, words in self._images:
            for scale in (128, 8):  # words in a unit of address
                start = (origin - address * (128 // scale)) * scale
                if 0 <= start < APART * 128 and (scale == 128) == (origin < FAR << 1):
                    part = words[start : start + count].tolist()
                    self.smem.update((at + i, int(word)) for i, word in enumerate(part))
                    return
        self.blind["copies to SMEM of an operand whose values are not given (taken as 0)"] += 1
        self.smem.update((at + i, 0) for i in range(count))

    # Translation of bundles to Python.

    def _translate(self, at: int) -> _Block:
        """The block that begins at bundle `at` of the kernel, as Python that was made for it."""
        lines, size, jump, left = [], 0, None, LONGEST_BLOCK
        bundles = self.kernel.bundles
        while at + size < len(bundles) and left >= 0:
            found = list(operations(bundles[at + size]))
            branch = next((op for op in found if op.name.startswith("sbr.")), None)
            if branch is not None and jump is None:
                jump = self._jump(branch)
                lines.append(f"taken = {_condition(branch) or 'True'}")
                left = jump[1]
            lines += self._bundle(found, size)
            size += 1
            left -= 1
        busy = self._busy(bundles[at : at + size])
        after = self.kernel.first + at + size
        if jump is None:
            lines += [f"u.tick({size}, {busy}, False, 0)", f"return {after}"]
        else:
            lines += [
                f"u.tick({size}, {busy}, taken, {jump[1]})",
                f"return {jump[0]} if taken else {after}",
            ]
        scope = {"to_bits": to_bits, "to_float": to_float}
        exec("def run(u):\n s, p = u.s, u.p\n " + "\n ".join(lines), scope)
        block = self._blocks[at] = _Block(scope["run"], size, busy)
        return block

    def _jump(self, branch: Operation) -> tuple[int, int]:
        """(target, bundles that are issued after the branch)."""
        found = JUMP.match(branch.args)
        if branch.name != "sbr.rel" or found is None:
            raise ValueError(f"{self.kernel.name}: a branch that is not read here: {branch}")
        filled = self.chip.branch_cycles if found[1] is None else int(found[1])
        return int(found[2], 16), filled

    def _busy(self, bundles: list[str]) -> int:
        """Cycles that the products in these bundles occupy the matrix units, evenly spread."""
        packed, plain = self.chip.product_cycles
        total = 0
        for bundle in bundles:
            for kind in re.findall(r"= vmatmul(?:\.packed)?(?:\.dwg)?\.8x128\.(\w+)", bundle):
                total += plain if kind == "f32" else packed
        return -(-total // self.chip.mxus)

    def _bundle(self, found: list[Operation], offset: int) -> list[str]:
        """Python for one bundle. All of its operations read before any writes a register."""
        reads, writes = [], []
        for i, op in enumerate(found):
            condition = _condition(op)
            register = REGISTER.match(op.to)
            if register:
                value, target = self._value(op), f"{register[1]}[{register[2]}]"
                if condition:
                    reads += [f"c{i} = {condition}", f"if c{i}: x{i} = {value}"]
                    writes.append(f"if c{i}: {target} = x{i}")
                else:
                    reads.append(f"x{i} = {value}")
                    writes.append(f"{target} = x{i}")
            elif effect := self._effect(op, offset):
                reads.append(f"if {condition}: {effect}" if condition else effect)
        return reads + writes

    def _value(self, op: Operation) -> str:
        """The expression for what is written to a register."""
        args = [x.strip() for x in op.args.split(",")] if op.args else []
        if op.name == "sld" and (found := SMEM.match(op.args)):
            return f"u.load({_address(found[1])})"
        if op.name in BINARY and len(args) == 2:
            return BINARY[op.name].format(a=_read(args[0]), b=_read(args[1]))
        if op.name in UNARY and args:
            return UNARY[op.name].format(a=_read(args[0]))
        if op.name == "spop":
            return f"u.pop({op.args!r})"
        self.blind[f"operation {op.name} (taken as 0)"] += 1
        return "0"

    def _effect(self, op: Operation, offset: int) -> str | None:
        """The statement for an operation on memory, semaphores or DMAs; None where it is a vector's."""
        if op.name.startswith("sst") and (found := SMEM.match(op.to)):
            return f"u.smem[{_address(found[1])}] = {_read(op.args.split(',')[0])}"
        if op.name == "vwait.ge" and (found := FLAG.match(op.args)):
            return f"u.wait({_address(found[1])}, {_read(found[2])}, {offset})"
        if op.name == "vdelay":
            return f"u.delay({_read(op.args)})"
        if op.name.startswith("vsync") and "remote" not in op.name:
            if found := FLAG.match(op.to):
                sign = "+=" if op.name.startswith("vsyncadd") else "="
                return f"u.flags[{_address(found[1])}] {sign} {_read(op.args.split(',')[0])}"
            if op.name == "vsyncmov" and (found := FLAG.match(op.args)):
                return f"u.push_flag({op.to!r}, {_address(found[1])})"
        if op.name.startswith("dma.") and "trace" not in op.name:
            to, source = DMA_TO.match(op.to), DMA_FROM.match(op.args)
            if to is None or source is None:
                self.blind[f"a DMA of another form: {op.name}"] += 1
                return None
            spaces = (x.replace("self_", "") for x in (to[1], source[1]))
            numbers = (_address(to[2]), _address(source[2]), _read(source[3]), _address(to[3]))
            return f"u.start_dma({', '.join(map(repr, spaces))}, {', '.join(numbers)}, {offset})"
        return None


def _condition(op: Operation) -> str:
    """The predicate under which an operation happens; "" = always."""
    return "" if op.guard is None else f"{'not ' if op.guard[1] else ''}p[{op.guard[0]}]"


def _read(argument: str) -> str:
    """The expression for $5, $0x5, s3, p3 or !p3."""
    argument = argument.strip()
    if argument.startswith("$"):
        text = argument[1:]
        try:
            value = int(text, 0)
        except ValueError:
            return str(to_bits(float(text)))
        return str((value + 0x80000000 & 0xFFFFFFFF) - 0x80000000)
    if found := re.match(r"(!?)p(\d+)$", argument):
        return f"(not p[{found[2]}])" if found[1] else f"p[{found[2]}]"
    if found := re.match(r"s(\d+)$", argument):
        return f"s[{found[1]}]"
    raise ValueError(f"an operand that is not read here: {argument!r}")


def _address(text: str) -> str:
    """The expression for s3+$5."""
    return " + ".join(_read(part) for part in text.split("+"))


def _words(values: np.ndarray) -> np.ndarray:
    """Integers as the 32-bit words of a kernel's operand: rows padded to 128 words, narrow numbers
    packed.

    Rows of 8-bit and 16-bit numbers share words: four or two of them, the first in the lowest bits.
    """
    packed = 4 // values.dtype.itemsize if values.dtype.itemsize < 4 else 1
    if values.ndim < 2:
        return values.astype(np.int64).reshape(-1)
    rows, columns = -values.shape[-2] % (8 if packed > 1 else 1), -values.shape[-1] % 128
    values = np.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, rows), (0, columns)])
    if packed == 1:
        return values.astype(np.int64).reshape(-1)
    bits = 32 // packed
    parts = (values.astype(np.int64) & ((1 << bits) - 1)).reshape(
        *values.shape[:-2], values.shape[-2] // packed, packed, values.shape[-1]
    )
    return np.sum([parts[..., i, :] << (bits * i) for i in range(packed)], axis=0).reshape(-1)
