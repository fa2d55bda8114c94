"""Few rows times many quantized weights: the time is that in which the weights arrive.

* Weights come by DMAs of our own, several steps ahead, in parts of some 512 KiB: memory is never idle,
  and the first part is multiplied soon after it has been asked for. Results leave the same way, because
  a result waits behind all reads that were begun before it.
* Weights are [K, N]: matrix units are loaded by rows of K. [N, K] is transposed on the way, which takes
  v6e and tpu7x longer than int4 takes to arrive.
* A product has 256 rows of weights. In larger ones the compiler converts more than its registers hold.
* Scales of groups multiply the products of each group, not the weights: there are fewer of them.
* float32 is three numbers of bfloat16 one after the other, which are rows of one product: exact, as the
  weights are in bfloat16.
"""

import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.quantized_matmul.reference import finish, quantize_rows

LANES = 128
ROWS = 16  # of bfloat16 in a register
TILE = 256  # rows of weights in one product: what the matrix units hold
PARTS = 3  # numbers of bfloat16 that add up to one of float32


class Decode(enum.Enum):
    """How weights become bfloat16.

    CONVERT: as the compiler does it. WORDS: integers unpacked from words of 32 bits. E4M3B11:
    float8_e4m3fn read as the format of that name, which v5e, v5p and v6e convert by themselves.
    """

    CONVERT = 0
    WORDS = 1
    E4M3B11 = 2


@dataclasses.dataclass(frozen=True)
class Stream:
    """columns: of a step; depth: rows of weights in one DMA; ahead: steps whose weights fit VMEM."""

    columns: int
    depth: int
    ahead: int


def stream(
    layer: jax.Array,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    blocks: Stream,
    cores: int,
    activation: str | None,
    int8: bool,
    int8_units: bool,
    decode: Decode,
    vmem_limit: int,
    interpret: bool = False,
) -> jax.Array:
    """activation(x w + bias) + residual [M, N] in the dtype of x [M, K]; scale [groups, N].

    w [layers, K, N], of which layer [1] int32 is taken.

    The weights of the next steps are on their way while those of this one are multiplied.
    """
    (rows, depth), columns = x.shape, w.shape[2]
    if decode == Decode.WORDS:  # a word holds rows that follow each other; x is put into their order
        x = x.reshape(rows, -1, 32 // bits_of(w.dtype)).swapaxes(1, 2).reshape(rows, depth)
    groups, bn = scale.shape[0], blocks.columns
    steps = -(-columns // bn // cores)
    if int8:
        operand = pltpu.VMEM((rows, depth), jnp.int8 if int8_units else jnp.bfloat16)
    elif x.dtype == jnp.float32:
        operand = pltpu.VMEM((PARTS * _up(rows, ROWS), depth), jnp.bfloat16)
    else:
        operand = None
    tiled = {"scale": (groups, jnp.float32)}
    if bias is not None:
        tiled["bias"] = (1, bias.dtype)
    if residual is not None:
        tiled["residual"] = (rows, residual.dtype)
    chunks = -(-depth // blocks.depth)
    scratch = {
        "x": pltpu.VMEM(x.shape, x.dtype),
        "w": pltpu.VMEM((blocks.ahead, depth, bn), w.dtype),
        "arrived": pltpu.SemaphoreType.DMA((blocks.ahead, chunks + len(tiled))),
        "x_arrived": pltpu.SemaphoreType.DMA,
        "out": pltpu.VMEM((blocks.ahead + 1, rows, bn), x.dtype),
        "left": pltpu.SemaphoreType.DMA((blocks.ahead + 1,)),
        **{name: pltpu.VMEM((blocks.ahead, n, bn), dtype) for name, (n, dtype) in tiled.items()},
    }
    if operand is not None:
        scratch["operand"] = operand
    if int8:
        scratch["row_scale"] = pltpu.VMEM((rows, LANES), jnp.float32)
    arrays = [x, w, scale, *(a for a in (bias, residual) if a is not None)]
    if not interpret:  # else XLA may copy all weights to VMEM before the kernel begins
        arrays[1] = pltpu.with_memory_space_constraint(w, pltpu.HBM)
    last = columns // bn - 1
    kernel = functools.partial(
        _stream_kernel,
        names=tuple(scratch),
        tiled=tuple(tiled),
        blocks=blocks,
        steps=steps,
        last=last,
        activation=activation,
        int8=int8,
        decode=decode,
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, steps),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * len(arrays),
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(layer, *arrays)


def _stream_kernel(
    layer_ref, x_hbm, w_hbm, *rest, names, tiled, blocks, steps, last, activation, int8, decode
):
    given, out_hbm, scratch = rest[: len(tiled)], rest[len(tiled)], rest[len(tiled) + 1 :]
    refs: dict[str, Any] = dict(zip(names, scratch, strict=True))
    step, first = pl.program_id(1), pl.program_id(0) * steps
    depth, layer = w_hbm.shape[1], layer_ref[0]
    spans = [(k, min(blocks.depth, depth - k)) for k in range(0, depth, blocks.depth)]

    def columns(step):
        at = jnp.minimum(first + step, last) * blocks.columns
        return pl.ds(pl.multiple_of(at, blocks.columns), blocks.columns)

    def leaving(step):
        slot = step % (blocks.ahead + 1)
        target = out_hbm.at[:, columns(step)]
        return pltpu.make_async_copy(refs["out"].at[slot], target, refs["left"].at[slot])

    def copies(step):
        """The DMAs of a step: what belongs to columns, then the weights."""
        slot, here = step % blocks.ahead, columns(step)
        pairs = [(hbm.at[:, here], refs[name].at[slot]) for name, hbm in zip(tiled, given, strict=True)]
        pairs += [
            (w_hbm.at[layer, pl.ds(k, size), here], refs["w"].at[slot, pl.ds(k, size)])
            for k, size in spans
        ]
        return [
            pltpu.make_async_copy(source, target, refs["arrived"].at[slot, n])
            for n, (source, target) in enumerate(pairs)
        ]

    whole_x = pltpu.make_async_copy(x_hbm, refs["x"], refs["x_arrived"])

    @pl.when(step == 0)
    def _():
        whole_x.start()

        # In a loop, lest the compiler begin others before x, which is needed first.
        @pl.loop(0, min(blocks.ahead - 1, steps))
        def _(ahead):
            for copy in copies(ahead):
                copy.start()

        whole_x.wait()
        _prepare(refs, int8)

    @pl.when(step + blocks.ahead - 1 < steps)
    def _():
        for copy in copies(step + blocks.ahead - 1):
            copy.start()

    slot, pending = step % blocks.ahead, copies(step)
    for copy in pending[: len(tiled)]:
        copy.wait()
    operand = refs.get("operand", refs["x"])
    total: Any = None
    for (k, size), copy in zip(spans, pending[len(tiled) :], strict=True):
        copy.wait()
        for columns_of_x, weights, scales in _parts(refs, slot, k, size, operand.dtype, decode):
            product = _dot(operand[:, columns_of_x], weights)
            product = product if scales is None else product.astype(jnp.float32) * scales
            total = product if total is None else total + product
    total = _folded(total.astype(jnp.float32), out_hbm.shape[0])
    if int8:
        total = total * refs["row_scale"][:, :1]
    if refs["scale"].shape[1] == 1:
        total = total * (refs["scale"][slot] * factor(decode))
    bias = refs["bias"][slot] if "bias" in refs else None
    residual = refs["residual"][slot] if "residual" in refs else None

    @pl.when(step > blocks.ahead)
    def _():
        leaving(step - blocks.ahead - 1).wait()

    result = finish(total, bias, residual, activation)
    refs["out"][step % (blocks.ahead + 1)] = result.astype(x_hbm.dtype)
    leaving(step).start()

    @pl.when(step == steps - 1)
    def _():
        for n in range(max(steps - blocks.ahead - 1, 0), steps):
            leaving(n).wait()


def _parts(refs, slot, k, size, dtype, decode):
    """(columns of x, weights in `dtype`, scale of the product or None) within rows k to k + size.

    With words a word is shorter than a group, so the weights are scaled, in float32, not the product.
    """
    groups, depth = refs["scale"].shape[1], refs["w"].shape[1]
    words = decode == Decode.WORDS
    group, per_word = depth // groups, 32 // bits_of(refs["w"].dtype) if words else 1
    while size:
        tile = min(size, TILE * per_word)
        if groups > 1 and (not words or tile % group):
            tile = min(tile, group - k % group)
        weights, scales = refs["w"][slot, pl.ds(k, tile)], None
        if groups > 1:
            scales = refs["scale"][slot, pl.ds(k // group, max(tile // group, 1))] * factor(decode)
        for n, part in enumerate(_unpacked(weights, per_word) if words else [plain(weights, decode)]):
            if scales is not None and words:
                part = times(part, scales)
            at = pl.ds((n * depth + k) // per_word, tile // per_word)
            yield at, part.astype(dtype), None if words else scales
        k, size = k + tile, size - tile


def _unpacked(weights: jax.Array, per_word: int) -> list[jax.Array]:
    """The integers [K, N] in words of `per_word` rows, float32 [K / per_word, N] each."""
    words, bits = pltpu.bitcast(weights, jnp.int32), 32 // per_word
    ends = range(32 - bits, -1, -bits)  # how far from the top each of them ends
    return [((words << end) >> (32 - bits)).astype(jnp.float32) for end in ends]


def plain(weights: jax.Array, decode: Decode) -> jax.Array:
    """The weights over `factor(decode)`, in a dtype that the chip converts."""
    if decode != Decode.E4M3B11:
        return weights
    bits = pltpu.bitcast(weights, jnp.int8)
    bits = jnp.where(bits == -128, jnp.zeros_like(bits), bits)  # -0, which is not-a-number there
    return pltpu.bitcast(bits, jnp.float8_e4m3b11fnuz)


def factor(decode: Decode) -> float:
    """What `plain` leaves to the scales: exponents of e4m3b11 begin 4 lower."""
    return 16.0 if decode == Decode.E4M3B11 else 1.0


def times(weights: jax.Array, scales: jax.Array) -> jax.Array:
    """weights [K, N] times scales [groups, N], each for K / groups rows."""
    (depth, columns), groups = weights.shape, scales.shape[0]
    return (weights.reshape(groups, -1, columns) * scales[:, None]).reshape(depth, columns)


def bits_of(dtype) -> int:
    """Of one weight."""
    return 4 if dtype == jnp.int4 else 8


def _prepare(refs, int8: bool):
    """x as the matrix units take it."""
    x = refs["x"][...]
    if int8:
        rows, scale = quantize_rows(x)
        refs["operand"][...] = rows.astype(refs["operand"].dtype)
        refs["row_scale"][...] = jnp.broadcast_to(scale, refs["row_scale"].shape)
    elif x.dtype == jnp.float32:
        block = _up(x.shape[0], ROWS)
        for n in range(PARTS):
            part = x.astype(jnp.bfloat16)
            refs["operand"][pl.ds(n * block, x.shape[0])] = part
            x = x - part.astype(jnp.float32)


def _folded(total: jax.Array, rows: int) -> jax.Array:
    """The sum over the parts of x, [rows, columns]."""
    if total.shape[0] == rows:
        return total
    block = total.shape[0] // PARTS
    high, *lower = (total[n * block : n * block + rows] for n in range(PARTS))
    return high + sum(lower[1:], lower[0])


def _dot(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """rows [R, K] of int8 or bfloat16 times weights [K, N]: int32 or float32 [R, N]."""
    exact = jnp.int32 if rows.dtype == jnp.int8 else jnp.float32
    return jnp.dot(rows, weights.astype(rows.dtype), preferred_element_type=exact)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
