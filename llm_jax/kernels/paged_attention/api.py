"""Attention of new tokens, of some rows one and of others many, to keys and values in pages.

Letters: T tokens, R rows, N query heads, K key/value heads, H head dim, L layers, P pages of Z tokens,
M pages of a row.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.chips import ChipRule, chip_rule, device_kind, gpu_in_use, gpu_rule
from llm_jax.kernels.choice import Choice, attention_refusal, kernel_name
from llm_jax.kernels.forms import FORMS, note, pick
from llm_jax.kernels.paged_attention import gpu
from llm_jax.kernels.paged_attention.reference import reference_paged_attention
from llm_jax.kernels.paged_attention.scales import LANES, spread_scales
from llm_jax.kernels.paged_attention.tpu_chunk import ChunkSizes, chunk_attention
from llm_jax.kernels.paged_attention.tpu_decode import DecodeSizes, InOrder, decode_attention
from llm_jax.kernels.paged_attention.tpu_write import write_pages
from llm_jax.kernels.paged_attention.types import (
    CHUNK_ALIGNMENT,
    EIGHT_BITS,
    Pages,
    Rows,
    abstract_pages,
)
from llm_jax.kernels.tuning import bucket, table_key, tuned

IMPLEMENTATIONS = FORMS["paged_attention"]
MIB = 1 << 20
NO_WINDOW = 1 << 30
TABLE_BYTES = 512 << 10  # of the memory that a core's scalar unit has


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the two kernels, see there; by a rule of the chip's memory if not given."""

    decode: DecodeSizes
    chunk: ChunkSizes


@dataclasses.dataclass(frozen=True)
class PagedProblem:
    """Paged attention as tables of forms have it; rows, tokens of a row and new tokens of all rows are
    powers of two. new = rows: each has a single one.
    """

    operator = "paged_attention"
    dtype: str
    of_pages: str
    heads: int
    kv_heads: int
    dim: int
    page: int
    rows: int
    tokens: int
    new: int

    @property
    def key(self) -> str:
        names = ("heads", "kv_heads", "dim", "page", "rows", "tokens", "new")
        return table_key(self.dtype, self.of_pages, **{name: getattr(self, name) for name in names})

    @classmethod
    def of(cls, q: jax.Array, pages: Pages, rows: Rows) -> "PagedProblem":
        """Of arrays or shapes."""
        (new, heads, dim), (page, lanes), (count, most) = (
            q.shape,
            pages.tokens.shape[3:],
            rows.table.shape,
        )
        sizes = (heads, lanes // dim, dim, page, bucket(count), bucket(page * most), bucket(new))
        return cls(str(q.dtype), str(pages.tokens.dtype), *sizes)


def choose(q: jax.Array, pages: Pages, rows: Rows, kind: str | None = None) -> Choice:
    """What `paged_attention` takes for such arrays (or shapes) on a kind of device, or on ours, where
    what was measured decides (`forms`).
    """
    if kind is not None:
        return by_rule(q, pages, rows, kind)
    rule = by_rule(q, pages, rows, device_kind())
    possible = IMPLEMENTATIONS if rule.possible else IMPLEMENTATIONS[1:]
    return pick(PagedProblem.of(q, pages, rows), rule, possible)


def by_rule(q: jax.Array, pages: Pages, rows: Rows, kind: str) -> Choice:
    """The kernel wherever it can run on this kind of device."""
    if refusal := attention_refusal(q, kind):
        return Choice("xla", refusal)
    if rule := gpu_rule(kind):
        refusal = gpu.refusal(rule, pages)
        return Choice("xla", refusal) if refusal else Choice("pallas", kernel_name(kind), True)
    table = math.prod(rows.table.shape) * 4
    if table > TABLE_BYTES:
        shape = "x".join(map(str, rows.table.shape))
        found = f"a table of {shape} pages takes {table >> 10} KiB of scalar memory"
        return Choice("xla", f"{found}, {TABLE_BYTES >> 10} are there: take larger pages or fewer rows")
    return Choice("pallas", kernel_name(kind), True)


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    rows: Rows,
    layer: jax.Array | int,
    *,
    scale: float,
    window: jax.Array | int = 0,
    softcap: float = 0.0,
    implementation: str | None = None,
    sizes: Sizes | None = None,
    interpret: bool | str = False,
) -> tuple[jax.Array, Pages]:
    """(attention [T, N, H] in the dtype of q, the pages with the new tokens, in place if donated).

    q [T, N, H], k and v [T, K, H] of the new tokens of all rows, which `rows` describes; query head n
    reads key head n // (N / K). A token sees its row's tokens up to itself, and if `window` is not 0
    only those less than so many places before it. softcap: c tanh(s / c) of the scores, 0 = none.
    Attention of padding is 0. layer: which of the pages' layers. layer, window: numbers or [] int32.
    Where T = R every row has one new token, and only that is compiled. Pages may have room for more
    heads than K, see `types.heads_held`.

    Tokens are quantized to 8-bit pages here, each head's largest number to the largest that there is.

    implementation: "pallas" (TPU and GPU), "xla", "xla_together" (see `reference`), or None for
    `choose`. sizes: of the TPU's kernels. interpret: run the TPU's kernels on a CPU, for tests, or with
    "gpu" the GPU's. It cannot be differentiated by way of "pallas": training attends within the batch.

    Raises ValueError for arrays that do not fit each other and for an implementation that cannot run.
    """
    _check(q, k, v, pages, rows, implementation)
    if implementation is None:
        implementation = choose(q, pages, rows).implementation
    else:
        if implementation == "pallas" and not interpret:
            rule = by_rule(q, pages, rows, device_kind())
            if not rule.possible:
                raise ValueError(f"implementation='pallas': {rule.reason}; take 'xla' or None")
        note(PagedProblem.of(q, pages, rows), Choice(implementation, "named by the caller"))
    layer, window = jnp.asarray(layer, jnp.int32), jnp.asarray(window, jnp.int32)
    window = jnp.where(window == 0, NO_WINDOW, window)
    heads, (q, k, v) = q.shape[1], _with_room(q, k, v, pages)
    new, new_scales = _new(k, v, pages)
    given, how = (q, new, new_scales, pages, rows, layer), {"scale": scale, "softcap": softcap}
    if implementation == "pallas":
        out, pages = _by_kernel(*given, window, sizes, interpret, **how)
    else:
        how |= {"window": window, "together": implementation == "xla_together"}
        out, pages = reference_paged_attention(*given, **how)
    return _of_heads(out, heads), pages


def _by_kernel(
    q, new, new_scales, pages, rows: Rows, layer, window, sizes, interpret, *, scale, softcap
):
    """`paged_attention` of as many heads as pages have room for."""
    if of_gpu := gpu_in_use(interpret):
        how = {"scale": scale, "softcap": softcap, "interpret": bool(interpret)}
        return gpu.paged(of_gpu, q, new, new_scales, pages, rows, layer, window, **how)
    rule = chip_rule(bool(interpret))
    sizes = sizes or _sizes(rule, q, pages, rows.starts.shape[0], rows.table.shape[1])
    how = _options(rule, scale, softcap, bool(interpret))
    held = _arrays(pages)
    given = (new,) if new_scales is None else (new, new_scales)
    count = rows.starts.shape[0]
    single = jnp.arange(count) < rows.decodes
    end = jnp.where(single, rows.lengths, 0)
    places = (rows.table, jnp.maximum(end - window, 0), end, end - 1)
    new = [x[:count] for x in given]
    how_many = {"rows": rows.decodes, "sizes": sizes.decode}
    out, held = _decode(q[:count], new, held, layer, places, **how_many, **how)
    out = jnp.where(single[:, None, None], out, 0)
    if q.shape[0] > count:
        out, held = _chunks(q, out, given, held, rows, layer, window, sizes=sizes.chunk, **how)
    return out, Pages(*held, *[None] * (2 - len(held)))


def contiguous_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    layer: jax.Array | int,
    lengths: jax.Array,
    *,
    scale: float,
    window: jax.Array | int = 0,
    ring: bool = False,
    softcap: float = 0.0,
    interpret: bool | str = False,
) -> tuple[jax.Array, Pages]:
    """`paged_attention` of one new token a row, by the kernel, to rows whose pages are in order.

    q [R, N, H], k and v [R, K, H]; pages of L layers with R M pages, row r's from r M on; lengths [R]
    int32, of rows without the new token, less than M Z. ring: pages hold a row's last M Z tokens, the
    new one in place of the oldest, and lengths are any. The rest as there.
    """
    layer, window = jnp.asarray(layer, jnp.int32), jnp.asarray(window, jnp.int32)
    window = jnp.where(window == 0, NO_WINDOW, window)
    heads, (q, k, v) = q.shape[1], _with_room(q, k, v, pages)
    new, new_scales = _new(k, v, pages)
    if of_gpu := gpu_in_use(interpret):
        how = {"scale": scale, "softcap": softcap, "interpret": bool(interpret)}
        given = (new_scales, pages, lengths, layer, window, ring)
        out, pages = gpu.contiguous(of_gpu, q, new, *given, **how)
        return _of_heads(out, heads), pages
    count, rule = q.shape[0], chip_rule(bool(interpret))
    given = [new] if new_scales is None else [new, new_scales]
    order = InOrder(pages.tokens.shape[1] // count, ring)
    out, held = _decode(
        q,
        given,
        _arrays(pages),
        layer,
        (lengths,),
        rows=count,
        window=window,
        order=order,
        sizes=_sizes(rule, q, pages, count, order.pages).decode,
        **_options(rule, scale, softcap, bool(interpret)),
    )
    return _of_heads(out, heads), Pages(*held, *[None] * (2 - len(held)))


def _with_room(q, k, v, pages: Pages) -> tuple[jax.Array, jax.Array, jax.Array]:
    """With as many key heads as pages have room for, of which those that are more are zeros."""
    kv_heads, dim = k.shape[1:]
    more = pages.tokens.shape[4] // dim - kv_heads
    wide = lambda x, count: jnp.pad(x, ((0, 0), (0, count), (0, 0))) if count else x  # noqa: E731
    return wide(q, more * q.shape[1] // kv_heads), wide(k, more), wide(v, more)


def _of_heads(out: jax.Array, heads: int) -> jax.Array:
    return out if out.shape[1] == heads else out[:, :heads]


def _new(k, v, pages: Pages) -> tuple[jax.Array, jax.Array | None]:
    """New tokens as pages hold them, [T, 2, K H], and their scales [T, 2, K]."""
    new, scales = quantize_tokens(jnp.stack([k, v], axis=1), pages.tokens.dtype)
    return new.reshape(k.shape[0], 2, -1), scales


def _arrays(pages: Pages) -> tuple[jax.Array, ...]:
    return (pages.tokens,) if pages.scales is None else (pages.tokens, pages.scales)


def _options(rule: ChipRule, scale, softcap, interpret) -> dict[str, Any]:
    limit = rule.vmem_bytes * 3 // 4
    return {
        "scale": scale,
        "softcap": softcap,
        "cores": rule.cores,
        "vmem_limit": limit,
        "interpret": interpret,
    }


def _decode(q, new, held, layer, places, **how):
    """(attention [R, N, H] of rows with one new token, pages)."""
    page, lanes = held[0].shape[3:]
    count, heads, dim = q.shape
    kv_heads = lanes // dim
    # Query heads in the order (g, k), so that the scales of key heads repeat.
    q = q.reshape(count, kv_heads, -1, dim).swapaxes(1, 2).reshape(count, heads, dim)
    new = (new[0], *(spread_scales(x, page) for x in new[1:]))
    out, *held = decode_attention(q, new, held, layer, places, **how)
    return out.reshape(count, -1, kv_heads, dim).swapaxes(1, 2).reshape(count, heads, dim), tuple(held)


def _chunks(q, out, new, held, rows: Rows, layer, window, *, cores, sizes, scale, softcap, **how):
    """(attention [T, N, H] of all rows, `out` that of those with one token; pages with the chunks)."""
    count, heads, dim = q.shape
    page, lanes = held[0].shape[3:]
    kv_heads = lanes // dim
    of_rows = (rows.table, rows.starts, rows.counts, rows.lengths, rows.decodes, rows.rows)
    tokens = [new[0][:, 0], new[0][:, 1], *(_lane_padded(x.reshape(count, -1)) for x in new[1:])]
    short = page + CHUNK_ALIGNMENT - count
    if short > 0:
        tokens = [jnp.pad(x, ((0, short), (0, 0))) for x in tokens]
    held = write_pages(tuple(tokens), held, layer, *of_rows, kv_heads=kv_heads, cores=cores, **how)
    cores = _sharing(cores, lanes, dim)
    out = jnp.pad(out.reshape(out.shape[0], -1), ((0, count - out.shape[0]), (0, 0)))
    out = chunk_attention(
        q.reshape(count, -1),
        out,
        held,
        layer,
        *of_rows,
        window,
        heads=heads,
        scale=scale,
        softcap=softcap,
        sizes=sizes,
        cores=cores,
        **how,
    )
    return out.reshape(q.shape), tuple(held)


def _sharing(cores: int, lanes: int, dim: int) -> int:
    """How many cores divide the key heads of a chunk: all, or one."""
    return cores if lanes % (cores * LANES) == 0 and lanes // dim % cores == 0 else 1


def _lane_padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))


def quantize_tokens(x: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """x [T, 2, K, H] -> (numbers of `dtype` in that of x, scales [T, 2, K] float32, None for floats).

    A head's largest number becomes the largest that `dtype` has.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in EIGHT_BITS:
        return x, None
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=-1)
    scales = jnp.where(largest > 0, largest, 1.0) / EIGHT_BITS[dtype]
    numbers = wide / scales[..., None]
    if dtype == jnp.int8:
        numbers = jnp.round(numbers)
    return numbers.astype(dtype).astype(x.dtype), scales


def _sizes(rule: ChipRule, q: jax.Array, pages: Pages, rows: int, pages_of_row: int) -> Sizes:
    """Tuned ones, of rows with one new token, or by the rule."""
    sizes = size_rule(rule, q, pages, pages_of_row)
    key = decode_key(q, pages, rows, pages_of_row)
    found = tuned("paged_attention", rule.name, key, DecodeSizes)
    return sizes if found is None else dataclasses.replace(sizes, decode=found)


def decode_key(q: jax.Array, pages: Pages, rows: int, pages_of_row: int) -> str:
    """Of the table of tuned sizes, for rows with one new token."""
    (_, heads, dim), (page, lanes) = q.shape, pages.tokens.shape[3:]
    tokens = bucket(page * pages_of_row)
    sizes = {"heads": heads, "kv_heads": lanes // dim, "dim": dim, "page": page}
    return table_key(q.dtype, pages.tokens.dtype, **sizes, rows=bucket(rows), tokens=tokens)


def size_rule(rule: ChipRule, q: jax.Array, pages: Pages, pages_of_row: int) -> Sizes:
    """Blocks of 4 MiB of pages, which take longer to fetch than a DMA takes to begin, or of what there
    is room for thrice; tiles of 512 queries or what there is room for.
    """
    _, _, _, page, lanes = pages.tokens.shape
    count, heads, dim = q.shape
    token = 2 * lanes * pages.tokens.dtype.itemsize
    longest = max(LANES, page * pages_of_row)
    widened = 2 * lanes * q.dtype.itemsize if pages.scales is not None else 0
    most = min(4 * MIB // token, rule.vmem_bytes // 5 // (token + widened))
    at_once = _pages(min(max(most, LANES), 4096, longest), page)
    at_once_of_chunk = _pages(min(512, longest), page)
    block_q = min(512, max(LANES, 1 << (count - 1).bit_length()))
    share = _sharing(rule.cores, lanes, dim)
    needed = lambda rows: _chunk_vmem(rows, at_once_of_chunk * page, q, token) // share  # noqa: E731
    while block_q > LANES and needed(block_q) > rule.vmem_bytes * 2 // 3:
        block_q //= 2
    return Sizes(DecodeSizes(at_once, 3), ChunkSizes(block_q, at_once_of_chunk, 3))


def _pages(tokens: int, page: int) -> int:
    """Pages of a block of at most so many tokens: a power of two of 128 tokens."""
    return max(1, (1 << tokens.bit_length() - 1) // page)


def _chunk_vmem(block_q: int, keys: int, q, token: int) -> int:
    """Bytes of VMEM that `chunk_attention` allocates, spills not counted."""
    _, heads, dim = q.shape
    queries = block_q * heads * (3 * dim + -(-dim // LANES) * LANES) * q.dtype.itemsize
    sums = block_q * heads * (dim + 16 + 8) * 4
    return queries + sums + 2 * keys * block_q * 4 + 3 * keys * token


def _check(q, k, v, pages: Pages, rows: Rows, implementation) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS} or None")
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape:
        shapes = f"{q.shape}, {k.shape} and {v.shape}"
        raise ValueError(f"q, k, v of {shapes}: expected [T, N, H], [T, K, H] twice")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {q.shape} does not fit k {k.shape}: tokens, head_dim, or heads % kv_heads")
    (kv_heads, dim), lanes = k.shape[1:], pages.tokens.shape[-1]
    if pages.tokens.ndim != 5 or lanes % dim or lanes < kv_heads * dim:
        raise ValueError(
            f"pages of {pages.tokens.shape}: expected [L, P, 2, Z, {kv_heads * dim}] for k {k.shape}, "
            "or room for more heads"
        )
    of_pages = (*pages.tokens.shape[:2], pages.page_size, lanes // dim)
    wanted = abstract_pages(*of_pages, dim, pages.tokens.dtype)
    found = [None if x is None else x.shape for x in (pages.scales, wanted.scales)]
    if found[0] != found[1]:
        raise ValueError(f"scales of {found[0]} beside {pages.tokens.dtype} pages: expected {found[1]}")
    if rows.table.ndim != 2 or any(x.shape != rows.starts.shape for x in (rows.counts, rows.lengths)):
        shapes = [x.shape for x in (rows.table, rows.starts, rows.counts, rows.lengths)]
        raise ValueError(
            f"rows' table, starts, counts, lengths of {shapes}: expected [R, M] and [R] thrice"
        )
    count, size = q.shape[0], rows.table.shape[0]
    if size != rows.starts.shape[0] or count < size or (count > size and count % CHUNK_ALIGNMENT):
        raise ValueError(
            f"{count} tokens for {size} rows: expected as many tokens as rows, or a larger multiple of "
            f"{CHUNK_ALIGNMENT}"
        )
