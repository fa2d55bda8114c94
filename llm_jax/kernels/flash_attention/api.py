"""Attention of a whole sequence to itself, or of its end to all of it, by the fastest means there are.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.chips import ChipRule, GpuRule, chip_rule, device_kind, gpu_in_use
from llm_jax.kernels.choice import Choice, attention_refusal, kernel_name
from llm_jax.kernels.flash_attention import gpu
from llm_jax.kernels.flash_attention.gpu_backward import flash_backward as gpu_backward
from llm_jax.kernels.flash_attention.plan import fetched, plan_by_ids, plan_by_index
from llm_jax.kernels.flash_attention.reference import reference_attention
from llm_jax.kernels.flash_attention.tpu import (
    HIDDEN,
    LANES,
    SKIP,
    Blocks,
    flash_forward,
    heads_at_once,
    reach_of,
)
from llm_jax.kernels.flash_attention.tpu_backward import flash_backward
from llm_jax.kernels.tuning import bucket, table_key, tuned

SUBLANES = 8
IMPLEMENTATIONS = ("pallas", "xla")


def choose(q: jax.Array, k: jax.Array, kind: str | None = None) -> Choice:
    """What `flash_attention` takes for such arrays (or shapes) on a kind of device, or on ours."""
    kind = device_kind() if kind is None else kind
    if refusal := attention_refusal(q, kind):
        return Choice("xla", refusal)
    if q.shape[1] < LANES or k.shape[2] < LANES:
        sizes = f"{q.shape[1]} queries and {k.shape[2]} keys"
        return Choice("xla", f"{sizes}: below {LANES} the kernel would mostly compute padding", True)
    return Choice("pallas", kernel_name(kind), True)


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
    offset: int = 0,
    positions: tuple[jax.Array, jax.Array] | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    sinks: jax.Array | None = None,
    block_mask: jax.Array | np.ndarray | None = None,
    implementation: str | None = None,
    blocks: Blocks | None = None,
    interpret: bool | str = False,
) -> tuple[jax.Array, jax.Array]:
    """(attention [B, T, N, H] in the dtype of q, log of the sums of exponentials [B, N, T] float32).

    q [B, T, N, H], k and v [B, K, S, H]; query head n reads key head n // (N / K). Query t is at place t
    + offset of its keys, unless `positions` say otherwise: of queries [B, T] and keys [B, S] int32. A
    query sees keys of its own segment (`segments`, likewise [B, T] and [B, S] int32), not after it if
    `causal`, and less than `window` places from it if that is not 0. softcap: c tanh(s / c) of the
    scores, 0 = none. A query that sees nothing has attention 0 and a very negative logarithm.

    sinks [N] float32: a score of every query of a head that takes its share of the weights and gives
    nothing (Xiao et al. 2023; gpt-oss). block_mask bool [B or 1, T / block_q, S / block_k], with
    `blocks` that divide T and S: False hides whole blocks besides, which then cost nothing.

    implementation: "pallas" (TPU and GPU), "xla", or None for `choose`. blocks: of the TPU kernel; tuned
    ones or by a rule of the chip's memory if not given. interpret: run the TPU's kernel on a CPU, for
    tests, or with "gpu" the GPU's. Both results may be differentiated.

    Raises ValueError for arrays that do not fit each other and for an implementation that cannot run.
    """
    _check(q, k, v, positions, segments, implementation)
    _check_more(q, k, sinks, block_mask, blocks)
    if implementation is None:
        implementation = choose(q, k).implementation
    if implementation == "pallas" and not interpret and not choose(q, k).possible:
        raise ValueError(f"implementation='pallas': {choose(q, k).reason}; take 'xla' or None")
    if implementation == "xla":
        mask = _mask(q, k, causal, window, offset, positions, segments)
        if block_mask is not None and blocks is not None:
            sizes = (blocks.block_q, blocks.block_k)
            wide = functools.reduce(lambda x, n: jnp.repeat(x, sizes[n], n + 1), (0, 1), block_mask)
            mask = wide if mask is None else mask & wide
        out, log = reference_attention(q, k, v, mask, scale=scale, softcap=softcap)
    else:
        masks = (causal, window, offset, positions, segments, block_mask)
        if rule := gpu_in_use(interpret):
            out, log = _by_gpu(rule, q, k, v, scale, softcap, masks, blocks, bool(interpret))
        else:
            out, log = _by_tpu(q, k, v, scale, softcap, masks, blocks, bool(interpret))
    return (out, log) if sinks is None else _with_sinks(out, log, sinks)


def _with_sinks(out, log, sinks):
    """What remains of weights beside a score that has no value: exp(log) / (exp(log) + exp(sink))."""
    sinks = sinks[None, :, None]
    share = jax.nn.sigmoid(log - sinks).transpose(0, 2, 1)[..., None]
    return (out.astype(jnp.float32) * share).astype(out.dtype), jnp.logaddexp(log, sinks)


def _by_gpu(rule: GpuRule, q, k, v, scale, softcap, masks, blocks, interpret):
    """By the GPU's kernels, which take arrays as they are."""
    causal, window, offset, positions, segments, block_mask = masks
    tiles, reach = gpu.tile_rule(rule, q.shape[-1], q.dtype.itemsize), reach_of(causal, window)
    spec = gpu.Spec(tiles, scale, softcap, reach, offset, interpret)
    visits: list[gpu.Visits | None] = [None, None, None]
    if positions is not None or segments is not None or block_mask is not None:
        whole = Blocks(LANES, LANES, LANES, LANES)  # multiples of every tile
        ids = _ids(q.shape[0], q.shape[1], k.shape[2], offset, positions, segments, whole)
        visits = [
            gpu.visits_by_ids(*ids, causal, window, tile, block_mask, blocks, by_keys=n == 1)
            for n, tile in enumerate(tiles)
        ]
    results: Any = _attend_gpu(spec, q, k, v, visits)
    return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_gpu(spec: gpu.Spec, q, k, v, visits):
    """(output, log); visits of the forward kernel, of that for keys and of that for queries."""
    return gpu.flash_forward(q, k, v, visits[0], spec)


def _attend_gpu_forward(spec, q, k, v, visits):
    out, log = gpu.flash_forward(q, k, v, visits[0], spec)
    return (out, log), (q, k, v, out, log, visits)


def _attend_gpu_backward(spec, saved, grads):
    q, k, v, out, log, visits = saved
    out_grad, log_grad = grads
    products = out_grad.astype(jnp.float32) * out.astype(jnp.float32)
    # The logarithm's own gradient reaches the scores by the weights, as delta does.
    delta = products.sum(axis=-1).transpose(0, 2, 1) - log_grad
    log = jnp.where(log > HIDDEN / 2, log, -HIDDEN)  # weights of 0 for a query that sees nothing
    gradients = gpu_backward((q, k, v, out_grad, log, delta), visits[1], visits[2], spec)
    return *gradients, jax.tree.map(lambda _: None, visits)


_attend_gpu.defvjp(_attend_gpu_forward, _attend_gpu_backward)


def _by_tpu(q, k, v, scale, softcap, masks, blocks, interpret):
    causal, window, offset, positions, segments, block_mask = masks
    (batch, queries, heads, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    rule, groups = chip_rule(interpret), heads_at_once(heads // kv_heads)
    plain = positions is None and segments is None
    if blocks is None and plain and causal and not window and not softcap and queries == keys:
        key = blocks_key(q.dtype, groups, dim, queries)
        blocks = tuned("flash_attention", rule.name, key, Blocks)
    if blocks is None:
        blocks = block_rule(rule, groups, dim, q.dtype.itemsize)
    blocks = blocks.fitted(queries, keys)
    # Of one sequence beside itself, everything is known by index; else by positions and segments.
    aligned = blocks.block_q % blocks.block_k == 0 and offset % blocks.block_k == 0
    covered = keys == _up(keys, blocks.block_k) or (causal and offset + queries <= keys)
    q, k, v = _pad(q, 1, blocks.block_q), _pad(k, 2, blocks.block_k), _pad(v, 2, blocks.block_k)
    ids: tuple[jax.Array, ...] = ()
    if plain and covered and (aligned or not (causal or window)):
        kinds, used = plan_by_index(q.shape[1], k.shape[2], offset, reach_of(causal, window), blocks)
    else:
        ids = _ids(batch, queries, keys, offset, positions, segments, blocks)
        kinds, used = plan_by_ids(*ids, causal, window, blocks)
    if block_mask is not None:
        kinds, used = jnp.where(block_mask, kinds, SKIP), used | {SKIP}
    spec = _Spec(
        heads, blocks, used, scale, causal, window, softcap, rule.vmem_bytes * 3 // 4, interpret
    )
    # As the projections of queries leave them, where a key head's queries fill whole registers.
    flat = groups * dim % LANES == 0
    if flat:
        q = q.reshape(batch, -1, heads * dim)
    else:
        q = q.reshape(batch, -1, heads // groups, groups, dim).transpose(0, 2, 3, 1, 4)
    results: Any = _attend(spec, rule.sums_by_matrix_units, q, k, v, jnp.asarray(kinds), ids)
    out, log = results
    if not flat:
        out = out.transpose(0, 3, 1, 2, 4)
    out = out.reshape(batch, -1, heads, dim)
    return out[:, :queries], log.reshape(batch, heads, -1)[:, :, :queries]


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What both directions are told besides arrays; see `tpu.flash_forward`."""

    heads: int
    blocks: Blocks
    used: frozenset[int]
    scale: float
    causal: bool
    window: int
    softcap: float
    vmem_limit: int
    interpret: bool

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec: _Spec, ones: bool, q, k, v, kinds, ids):
    """(output, log) of padded arrays as the kernels take them."""
    rows = v.transpose(0, 1, 3, 2)
    return flash_forward(q, k, rows, kinds, fetched(kinds), ids, ones=ones, **spec.options)


def _attend_forward(spec, ones, q, k, v, kinds, ids):
    rows = v.transpose(0, 1, 3, 2)
    out, log = flash_forward(q, k, rows, kinds, fetched(kinds), ids, ones=ones, **spec.options)
    return (out, log), (q, k, v, out, log, kinds, ids)


def _attend_backward(spec, ones, saved, grads):
    q, k, v, out, log, kinds, ids = saved
    out_grad, log_grad = grads
    products = (out_grad.astype(jnp.float32) * out.astype(jnp.float32)).reshape(*q.shape[:-1], -1)
    if q.ndim == 3:
        products = products.reshape(*q.shape[:2], *log.shape[1:3], -1).transpose(0, 2, 3, 1, 4)
    # The logarithm's own gradient reaches the scores by the weights, as delta does.
    delta = products.sum(axis=-1) - log_grad
    log = jnp.where(log > HIDDEN / 2, log, -HIDDEN)  # weights of 0 for a query that sees nothing
    gradients = flash_backward(
        q,
        k,
        v,
        out_grad,
        log,
        delta,
        kinds,
        fetched(kinds),
        fetched(kinds.transpose(0, 2, 1)),
        ids,
        **spec.options,
    )
    return *gradients, None, tuple(None for _ in ids)


_attend.defvjp(_attend_forward, _attend_backward)


def blocks_key(dtype: jax.typing.DTypeLike, groups: int, dim: int, tokens: int) -> str:
    """Of the table of tuned blocks, for causal attention of a sequence to itself without a soft cap."""
    return table_key(dtype, groups=groups, dim=dim, tokens=bucket(tokens))


def block_rule(rule: ChipRule, groups: int, dim: int, itemsize: int) -> Blocks:
    """Blocks for a chip's VMEM: 1024 queries and keys in tiles of 512 keys, fewer queries where they are
    many.

    Wide tiles keep the matrix units busy; what grows with block_q are the query and result blocks, the
    running sums and the scores of two tiles. Where few rows hide the loading of weights, tiles at the
    edges of masks are smaller, which computes less that is hidden.
    """
    edge = min(512, 2 * rule.pass_rows)
    blocks = Blocks(1024, 1024, 512, edge)
    while blocks.block_q > LANES and _vmem(blocks, groups, dim, itemsize) > rule.vmem_bytes * 5 // 8:
        half = blocks.block_q // 2
        blocks = Blocks(half, min(half, blocks.block_k), min(half, 512), min(half, edge))
    return blocks


def _vmem(blocks: Blocks, groups: int, dim: int, itemsize: int) -> int:
    """Bytes of VMEM that the kernel allocates, spills not counted."""
    lanes = _up(dim, LANES)
    q_and_out = 5 * groups * blocks.block_q * lanes * itemsize
    k_and_v = 2 * blocks.block_k * (lanes + _up(dim, 16) + 16) * itemsize
    sums = groups * (dim + 16 + 2 * SUBLANES) * blocks.block_q * 4
    return q_and_out + k_and_v + sums + 2 * blocks.tile_k * blocks.block_q * 4


def _mask(q, k, causal, window, offset, positions, segments) -> jax.Array | None:
    """bool [B or 1, T, S], True = visible; None where every key is."""
    queries, keys = q.shape[1], k.shape[2]
    if positions is None:
        positions = (jnp.arange(queries)[None] + offset, jnp.arange(keys)[None])
    distance = positions[0][:, :, None] - positions[1][:, None, :]
    mask = None
    if causal:
        mask = distance >= 0
    if window:
        near = jnp.abs(distance) < window
        mask = near if mask is None else mask & near
    if segments is not None:
        same = segments[0][:, :, None] == segments[1][:, None, :]
        mask = same if mask is None else mask & same
    return mask


def _ids(batch, queries, keys, offset, positions, segments, blocks) -> tuple[jax.Array, jax.Array]:
    """Positions and segments of queries [B, 2, T] and keys [B, S, 2], of padding in segments of their
    own.
    """
    if positions is None:
        rows = (np.arange(queries) + offset, np.arange(keys))
        positions = tuple(jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, len(x))) for x in rows)
    if segments is None:
        segments = tuple(jnp.zeros((batch, n), jnp.int32) for n in (queries, keys))

    def padded(position, segment, multiple, fill):
        wide = ((0, 0), (0, -position.shape[1] % multiple))
        # The last position again, so that a block's range of positions stays what it is.
        return [jnp.pad(position, wide, mode="edge"), jnp.pad(segment, wide, constant_values=fill)]

    low = jnp.iinfo(jnp.int32).min
    of_queries = padded(positions[0], segments[0], blocks.block_q, low)
    of_keys = padded(positions[1], segments[1], blocks.block_k, low + 1)
    return jnp.stack(of_queries, axis=1), jnp.stack(of_keys, axis=2)


def _check(q, k, v, positions, segments, implementation) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS} or None")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        shapes = f"{q.shape}, {k.shape} and {v.shape}"
        raise ValueError(f"q, k, v of {shapes}: expected [B, T, N, H], [B, K, S, H] twice")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[1]:
        raise ValueError(f"q {q.shape} does not fit k {k.shape}: batch, head_dim, or heads % kv_heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}: expected one dtype")
    for name, pair in {"positions": positions, "segments": segments}.items():
        if pair is not None:
            wanted = ((q.shape[0], q.shape[1]), (k.shape[0], k.shape[2]))
            found = tuple(x.shape for x in pair)
            if found != wanted:
                raise ValueError(f"{name} of {found}: expected {wanted}")


def _check_more(q, k, sinks, block_mask, blocks) -> None:
    """sinks and block_mask."""
    if sinks is not None and (sinks.shape != (q.shape[2],) or sinks.dtype != jnp.float32):
        raise ValueError(f"sinks {sinks.shape} of {sinks.dtype}: expected float32 [{q.shape[2]}]")
    if block_mask is None:
        return
    if blocks is None:
        raise ValueError("block_mask without blocks=: say of which sizes the blocks are")
    wanted = (q.shape[1] // blocks.block_q, k.shape[2] // blocks.block_k)
    divided = q.shape[1] % blocks.block_q == 0 and k.shape[2] % blocks.block_k == 0
    if not divided or blocks.fitted(q.shape[1], k.shape[2]) != blocks:
        sizes = f"{q.shape[1]} queries and {k.shape[2]} keys"
        raise ValueError(f"blocks={blocks}: with block_mask they must divide {sizes}, tiles them")
    shape = block_mask.shape
    if len(shape) != 3 or shape[0] not in (1, q.shape[0]) or shape[1:] != wanted:
        raise ValueError(f"block_mask {shape}: expected [{q.shape[0]} or 1, {wanted[0]}, {wanted[1]}]")
    if block_mask.dtype != bool:
        raise ValueError(f"block_mask of {block_mask.dtype}: expected bool, True = not hidden")


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """x with zeros behind this axis up to a multiple."""
    wide = [(0, 0)] * x.ndim
    wide[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, wide) if wide[axis][1] else x
