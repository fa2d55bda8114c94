"""Which kernel computes a quantized matmul on a chip, and in which blocks: by the chip's figures."""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from llm_jax.kernels.chips import ChipRule
from llm_jax.kernels.quantized_matmul.tpu import LANES, PARTS, Decode, Stream, bits_of
from llm_jax.kernels.quantized_matmul.tpu_tiles import Tiles
from llm_jax.kernels.tuning import bucket, table_key, tuned

MOST_STREAMED = 256  # rows; with more the matrix units take longer than the weights do
CHUNK = 1024  # rows of weights: a DMA of the stream has a multiple of them
GROUP = 32  # rows of int8 in a tile of registers: groups of weights are multiples of it


@dataclasses.dataclass(frozen=True)
class Traits:
    """int8_units: whether matrix units multiply int8. words: whether int8 and int4
    are better unpacked from words of 32 bits than converted. e4m3b11: whether this is the 8-bit format
    that vectors are converted from. columns: the most of a tile.
    """

    int8_units: bool
    words: bool
    e4m3b11: bool
    columns: int


TRAITS = {
    "v4": Traits(False, True, False, 1024),
    "v5e": Traits(True, False, True, 1024),
    "v5p": Traits(True, False, True, 1024),
    "v6e": Traits(True, False, True, 2048),
    "tpu7x": Traits(False, False, False, 2048),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and dtypes of one product; group: rows of weights with one scale, K for one a column."""

    rows: int
    depth: int
    columns: int
    group: int
    x: jnp.dtype
    w: jnp.dtype
    quantize_x: bool

    @property
    def grouped(self) -> bool:
        """Whether a column has several scales."""
        return self.group < self.depth

    def units(self, traits: Traits) -> jnp.dtype:
        """What the matrix units are given where each block of weights is dequantized first."""
        if self.quantize_x:
            integers = traits.int8_units and not self.grouped
            return jnp.dtype(jnp.int8 if integers else jnp.bfloat16)
        return jnp.dtype(self.x)


def decoding(problem: Problem, rule: ChipRule, many: bool) -> Decode:
    """How weights are decoded: as the chip does it fastest. many: in the kernel for many rows."""
    traits = TRAITS[rule.name]
    if problem.w == jnp.float8_e4m3fn and traits.e4m3b11:
        return Decode.E4M3B11
    if many or not traits.words or problem.w not in (jnp.int8, jnp.int4):
        return Decode.CONVERT
    per_word = 32 // bits_of(problem.w)
    whole = problem.depth % (per_word * LANES) == 0  # whole registers of words
    fits = whole and (not problem.grouped or problem.group % (8 * per_word) == 0)
    return Decode.WORDS if fits else Decode.CONVERT


def plan(problem: Problem, rule: ChipRule) -> Stream | Tiles:
    """The kernel and its blocks: tuned ones, or by the rule."""
    found = tuned("quantized_matmul", rule.name, plan_key(problem), Stream, Tiles)
    return plan_rule(problem, rule) if found is None else found


def plan_key(problem: Problem) -> str:
    """Of the table of tuned blocks."""
    words = [problem.x, problem.w, *(["quantize_x"] if problem.quantize_x else [])]
    sizes = {"depth": problem.depth, "columns": problem.columns, "group": problem.group}
    return table_key(*words, rows=bucket(problem.rows), **sizes)


def plan_rule(problem: Problem, rule: ChipRule) -> Stream | Tiles:
    """A stream of weights for few rows, tiles for many or for odd sizes."""
    whole = problem.columns % LANES == 0 and problem.depth % LANES == 0
    if whole and problem.rows <= MOST_STREAMED:
        return stream_rule(problem, rule)
    return tile_rule(problem, rule)


def check_blocks(blocks: Stream | Tiles, problem: Problem) -> None:
    """Raises ValueError for blocks that cannot be laid over the arrays."""
    sizes, name = dataclasses.asdict(blocks), type(blocks).__name__
    k, n = problem.depth, problem.columns
    if min(sizes.values()) < 1:
        raise ValueError(f"blocks={blocks}: expected sizes of at least 1")
    if isinstance(blocks, Stream):
        if k % LANES or n % LANES or n % blocks.columns or blocks.columns % LANES:
            wanted = f"columns that divide N={n} and K={k} in multiples of {LANES}; take Tiles"
            raise ValueError(f"blocks={blocks}: {name} takes {wanted}")
        if blocks.depth % CHUNK or blocks.ahead < 2:
            raise ValueError(f"blocks={blocks}: depth must be a multiple of {CHUNK}, ahead 2 or more")
        return
    for field, length in (("depth", k), ("columns", n)):
        if sizes[field] % LANES and sizes[field] != length:
            raise ValueError(f"blocks={blocks}: expected {field} in multiples of {LANES}, or {length}")
    if blocks.rows % 32 and blocks.rows != problem.rows:
        raise ValueError(f"blocks={blocks}: expected rows in multiples of 32, or {problem.rows}")
    group = problem.group
    if problem.grouped and (k % blocks.depth or (blocks.depth % group and group % blocks.depth)):
        raise ValueError(f"blocks={blocks}: depth must hold whole groups of {group} and divide K={k}")


def stream_rule(problem: Problem, rule: ChipRule) -> Stream:
    """Columns that divide N: 512 to 1024, with 2 MiB of weights or more than 64 rows, if 5/8 of VMEM
    hold four steps of weights (or three, or two). DMAs of some 512 KiB.

    Fewer columns leave the matrix units waiting for weights; more make the last step longer.
    """
    bits, units = bits_of(problem.w), problem.columns // LANES
    wanted = (2 << 20) * 8 // bits // problem.depth if problem.rows <= 64 else 1024
    wanted = min(max(wanted, 512), 1024) // LANES
    room = rule.vmem_bytes * 5 // 8 - _operand_bytes(problem)
    for ahead in (4, 3, 2):
        most = min(wanted, room // (ahead * _column_bytes(problem) * LANES))
        if most >= wanted // 2 or ahead == 2:
            break
    columns = LANES * next(n for n in range(max(most, 1), 0, -1) if units % n == 0)
    depth = (512 << 10) * 8 // bits // columns
    return Stream(columns, max(depth // CHUNK * CHUNK, CHUNK), ahead)


def _column_bytes(problem: Problem) -> int:
    """Bytes of VMEM that a column takes in a step of the stream: weights (int4 takes a byte there too),
    scales, sums, results.
    """
    groups = problem.depth // problem.group
    sums = problem.rows * (PARTS if problem.x == jnp.float32 else 1)
    return problem.depth + 4 * (max(groups, 8) + 8 + 2 * problem.rows + sums)


def _operand_bytes(problem: Problem) -> int:
    """Bytes of VMEM that x takes in the stream, as it is and as the matrix units get it."""
    as_units = 2 * PARTS if problem.x == jnp.float32 else 2
    return _up(problem.rows, 32) * problem.depth * (problem.x.itemsize + as_units)


def tile_rule(problem: Problem, rule: ChipRule) -> Tiles:
    """The best columns and depth of those that fit 5/8 of VMEM, for 512 rows or, if none do, fewer.

    Wide columns spare reads of x, whose number they divide (all weights of a column of blocks are kept);
    deep blocks spare the sums a way through memory. 1024 columns where the matrix units are 128 wide,
    else 2048, are as many as compile soon.
    """
    passes = 4 if problem.units(TRAITS[rule.name]) == jnp.float32 else 1  # of the matrix units, about
    most = TRAITS[rule.name].columns // passes
    widths = {min(_up(problem.columns, LANES), n) for n in _halves(most)}
    depths = {_depth(problem, n) for n in _halves(4096 // passes)}
    rows = min(512, problem.rows)
    while True:
        sizes = [Tiles(rows, k, n) for k in depths for n in widths]
        fitting = [b for b in sizes if _tile_bytes(problem, b) <= rule.vmem_bytes * 5 // 8]
        if fitting or rows <= 32:
            break
        rows = _up(rows // 2, 32)
    best = min(fitting or sizes, key=lambda b: (1 / b.columns + 2 / b.depth, _tile_bytes(problem, b)))
    return dataclasses.replace(best, columns=min(best.columns, problem.columns))


def _halves(most: int) -> list[int]:
    """most, its half, and so on down to 128."""
    return [most >> n for n in range(most.bit_length()) if most >> n >= LANES]


def _depth(problem: Problem, most: int) -> int:
    """All of K where that is little, else an even part; of whole groups where there are any."""
    if problem.depth <= most:
        return problem.depth
    parts = [n for n in range(LANES, most + 1, LANES) if problem.depth % n == 0]
    if problem.grouped:
        parts = [n for n in parts if n % problem.group == 0 or problem.group % n == 0]
        return parts[-1] if parts else problem.depth
    if parts and parts[-1] * 2 >= most:
        return parts[-1]
    return _up(pl.cdiv(problem.depth, pl.cdiv(problem.depth, most)), LANES)


def _tile_bytes(problem: Problem, blocks: Tiles) -> int:
    """Bytes of VMEM that the kernel for many rows allocates: integers as bfloat16, int4 as bytes."""
    of_x = 1 if problem.quantize_x else problem.x.itemsize
    kept = _up(problem.depth, blocks.depth) * (2 if problem.quantize_x else problem.x.itemsize)
    inputs = 2 * blocks.depth * (blocks.rows * of_x + blocks.columns)
    of_y = blocks.rows * blocks.columns * (4 + 4 * problem.x.itemsize)
    return kept * blocks.columns + inputs + of_y


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
