"""The jitted steps of an engine: tokens of many sequences in one row of tokens, by pages.

Letters: D data shards, T tokens of a step, R rows, M pages of a row, S tokens that get logits, V vocab.

    logits, cache = forward(params, cache, slots.newest, packed)
    chosen, slots = choose(logits, slots, of)

A `StepShape` is all that a program is compiled for, so an engine has few. What the host says of a step
is one array, `packed` [D, X] int32, because each transfer has its price: `StepShape.empty()` gives it
to fill in by name, with rows that do nothing.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.cache.paged import PagedCache, StepRows
from llm_jax.config import ModelConfig
from llm_jax.infer.steps import score_tokens
from llm_jax.kernels.forms import by_rule
from llm_jax.kernels.paged_attention.reference import token_rows
from llm_jax.kernels.paged_attention.types import Rows
from llm_jax.models import Model
from llm_jax.models.adapter_bank import with_places
from llm_jax.ops.sampling import (
    EVERYTHING,
    MAX_LOGPROBS,
    SamplingFeatures,
    SamplingState,
    new_rows,
    process_logits,
    sample,
    token_logprobs,
    write_history,
)
from llm_jax.ops.speculation import speculative_accept
from llm_jax.ops.tap_context import Record, TapContext, TapInputs
from llm_jax.sharding import batch_sharding, data_shards, shard


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The sizes that a step is compiled for."""

    tokens: int  # T = rows where every row has one token, else a larger multiple of 16
    rows: int  # R
    samples: int  # S, so many for each row
    pages: int  # M
    pools: int
    scored: bool = False  # whether it says of each token how likely it was
    adapters: bool = False  # whether each row may have one
    hidden: bool = False  # whether what the logits come from is wanted, by a head that drafts

    @property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Shape of each part of `packed`, for one shard."""
        rows, table = (self.rows,), (self.rows, self.pages)
        return {
            "tokens": (self.tokens,),  # ids; -1 - i: what is at place i of `Slots.newest`
            "starts": rows,
            "counts": rows,
            "lengths": rows,
            "decodes": (),
            "rows": (),
            "at": (self.samples,),  # which of the tokens get logits
            **{f"table{i}": table for i in range(self.pools)},
            **({"targets": (self.tokens,)} if self.scored else {}),  # what came after each
            **({"adapters": rows} if self.adapters else {}),  # their places; -1 is none
        }

    def empty(self, shards: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(`packed` of a step without rows, its parts [D, ...] by name to write into)."""
        packed = np.zeros((shards, sum(map(math.prod, self.fields.values()))), np.int32)
        parts = self.parts(packed)
        parts["counts"][:] = 1
        return packed, parts

    def parts(self, packed: Any) -> dict[str, Any]:
        """The parts of `packed` by name, of a numpy array to write into or of a traced one."""
        parts, at = {}, 0
        for name, shape in self.fields.items():
            size = math.prod(shape)
            parts[name] = packed[:, at : at + size].reshape(-1, *shape)
            at += size
        return parts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Computed:
    """What a step's forward gives."""

    logits: jax.Array  # [D, S, V]
    cache: PagedCache
    hidden: jax.Array | None  # [D, S, E], what they come from; of a shape with `hidden`
    scores: jax.Array | None  # [D, T, C], what `token_logprobs` says of the targets of a `scored` shape
    recorded: dict[str, jax.Array] | None = None  # at the points of `record`


@functools.lru_cache(maxsize=256)
def make_paged_forward(
    model: Model, shape: StepShape, strict: bool = False, record: Record | None = None
) -> Callable:
    """f(params, cache, newest [D, slots, P], packed [D, X] int32) -> `Computed`.

    cache: a `PagedCache`, donated. newest: see `Slots`; the host may not know them yet.
    strict: one token after the other, each by the same code, so that no bit of a result depends on what
    else is in the step or on how a text was cut into steps. Of a shape with `adapters` params hold an
    `AdapterBank`. record: then f takes `TapInputs` too; not with `strict`.
    """

    @functools.partial(jax.jit, donate_argnames="cache")
    def forward(params, cache, newest, packed, given=None):
        with by_rule() if strict else contextlib.nullcontext():  # one code for all shapes
            return step(params, cache, newest, packed, given)

    def step(params, cache, newest, packed, given):
        net, parts = model.bind(params), shape.parts(packed)
        tokens = parts["tokens"]
        known = newest.reshape(len(newest), -1)
        known = jnp.take_along_axis(known, jnp.maximum(-1 - tokens, 0), axis=1)
        tokens = jnp.where(tokens >= 0, tokens, known)
        tables = tuple(parts[f"table{i}"] for i in range(shape.pools))
        rows = StepRows(tables, *(parts[name] for name in _OF_ROWS))
        run = _one_by_one if strict else _together
        if record is not None:
            run = functools.partial(_tapped, model.config, record, given)
        adapters = _of_tokens(parts["adapters"], rows, tokens.shape[1]) if shape.adapters else None
        bind = functools.partial(_bind, model, params, strict)
        hidden, cache, *recorded = run(bind, cache, tokens, rows, adapters)
        chosen = jnp.take_along_axis(hidden, parts["at"][..., None], axis=1)
        unembed = functools.partial(_unembed, net, strict)
        results = unembed(chosen), cache.constrained(), chosen if shape.hidden else None
        if not shape.scored:
            return Computed(*results, None, *recorded)
        targets = parts["targets"]
        say = _score_alone if strict else score_tokens
        scores = _chosen_bits(targets, *say(unembed, hidden, targets, MAX_LOGPROBS))
        return Computed(*results, scores, *recorded)

    return forward


_OF_ROWS = ("starts", "counts", "lengths", "decodes", "rows")


def _bind(model: Model, params, strict: bool, adapters: jax.Array | None):
    """The modules for tokens whose adapters have these places."""
    return model.bind(params if adapters is None else with_places(params, adapters, alone=strict))


def _of_tokens(per_row: jax.Array, rows: StepRows, count: int) -> jax.Array:
    """[D, T] of [D, R]; -1 in padding."""
    row = _places(rows, count)[0]
    return jnp.where(row < 0, -1, jnp.take_along_axis(per_row, jnp.maximum(row, 0), axis=1))


def _together(bind: Callable, cache: PagedCache, tokens: jax.Array, rows: StepRows, adapters):
    """(hidden [D, T, E], cache) of all tokens at once. adapters [D, T]: their places, or None."""
    positions = _places(rows, tokens.shape[1])[1]
    hidden, context = bind(adapters)(tokens, jnp.maximum(positions, 0), cache.context(rows))
    return hidden, context.cache


def _tapped(config, record: Record, given: TapInputs, bind, cache, tokens, rows, adapters):
    """What `_together` gives, and what was recorded."""
    positions = _places(rows, tokens.shape[1])[1]
    keys = rows.tables[0].shape[-1] * cache.page_size
    context = TapContext.begin(cache.context(rows), config, record, given, keys)
    hidden, context = bind(adapters)(tokens, jnp.maximum(positions, 0), context)
    return hidden, context.inner.cache, context.results()


def _one_by_one(bind: Callable, cache: PagedCache, tokens: jax.Array, rows: StepRows, adapters):
    """The same, a token of each shard at a time."""
    of_token, positions = _places(rows, tokens.shape[1])
    at = jnp.maximum(of_token, 0)
    tables = tuple(jax.vmap(lambda table, row: table[row])(table, at) for table in rows.tables)

    def one(cache, given):
        token, position, adapter, *tables = given
        net = bind(None if adapter is None else adapter[:, None])
        there = (position >= 0).astype(jnp.int32)  # none in padding: nothing is written
        flat = jnp.zeros_like(position)[:, None]
        lengths = jnp.maximum(position + 1, 1)[:, None]
        row = StepRows(tuple(t[:, None] for t in tables), flat, flat + 1, lengths, there, there)
        hidden, context = net(token[:, None], jnp.maximum(position, 0)[:, None], cache.context(row))
        return context.cache, hidden[:, 0]

    turned = jax.tree.map(lambda x: x.swapaxes(0, 1), (tokens, positions, adapters, *tables))
    cache, hidden = jax.lax.scan(one, cache, turned)
    return hidden.swapaxes(0, 1), cache


def _places(rows: StepRows, count: int) -> tuple[jax.Array, jax.Array]:
    """(row, position) of each token [D, T]; -1 in padding."""
    given = (rows.tables[0], *(getattr(rows, name) for name in _OF_ROWS))
    return jax.vmap(lambda *x: token_rows(Rows(*x), count))(*given)


def _unembed(net, strict: bool, hidden: jax.Array) -> jax.Array:
    """Logits [D, S, V] of hidden [D, S, E]."""
    if not strict:
        return shard(net.unembed(hidden), "batch", None, None)
    return jax.lax.map(lambda x: net.unembed(x[:, None])[:, 0], hidden.swapaxes(0, 1)).swapaxes(0, 1)


ALONE_AT_ONCE = 64  # tokens whose logits are held while they are scored alone


def _score_alone(unembed: Callable, hidden: jax.Array, targets: jax.Array, alternatives: int):
    """`score_tokens` a token at a time, by the code that a chosen token's log probability is from.

    In two loops, one of logits and one of what they say: in one, XLA makes other code of the two.
    """

    def say(piece):
        score = lambda logits, token: token_logprobs(logits[None], token[None], alternatives)  # noqa: E731
        return jax.vmap(score)(*piece)

    def some(piece):
        hidden, targets = piece  # [n, D, E], [n, D]
        return jax.lax.map(say, (unembed(hidden.swapaxes(0, 1)).swapaxes(0, 1), targets))

    count = targets.shape[1]
    size = min(count, ALONE_AT_ONCE)
    padding = -count % size
    pieces = [
        jnp.pad(x.swapaxes(0, 1), ((0, padding), *((0, 0),) * (x.ndim - 1))) for x in (hidden, targets)
    ]
    found = jax.lax.map(some, tuple(x.reshape(-1, size, *x.shape[1:]) for x in pieces))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count, :, 0].swapaxes(0, 1), found)


def _chosen_bits(tokens, logprob=None, top_ids=None, top_logprobs=None) -> jax.Array:
    """[..., C] int32: see `read_chosen`."""
    parts = [tokens[..., None]]
    if logprob is not None:
        parts += [_bits(logprob)[..., None], top_ids, _bits(top_logprobs)]
    return jnp.concatenate(parts, axis=-1)


def _bits(x: jax.Array) -> jax.Array:
    """float32 as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What the device knows of each running sequence besides its pages; a slot is one's place."""

    newest: jax.Array  # [D, slots, P] int32: its newest token, and what the device drafts after it
    sampling: SamplingState  # [D, slots, ...]; `step` is not used, a step brings its own
    hidden: jax.Array | None = None  # [D, slots, E], what the newest token was chosen from; for heads


def init_slots(
    slots: int, config: ModelConfig, mesh: Mesh, drafts: int = 0, hidden: bool = False
) -> Slots:
    """Slots that hold no sequence, on the devices. Everything that sampling can need has its place.

    drafts: tokens that the device may draft for a sequence, P - 1. hidden: whether a head drafts them.
    """
    shards = data_shards(mesh)
    rows = new_rows(slots, config.vocab_size, EVERYTHING)
    rows = jax.tree.map(lambda x: np.broadcast_to(x[None], (shards, *x.shape)), rows)
    states = np.zeros((shards, slots, config.embed_dim), config.compute_dtype) if hidden else None
    empty = Slots(np.zeros((shards, slots, 1 + drafts), np.int32), rows, states)
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.shape)), empty)


@functools.lru_cache(maxsize=256)
def make_paged_sample(features: SamplingFeatures, strict: bool = False) -> Callable:
    """f(logits [D, S, V], slots, of [D, 2, S] int32, hidden [D, S, E] or None) -> (chosen [D, S, C]
    int32, slots).

    of: the slot that each token is for, one past the last is none, and how many its sequence made
    before. chosen: a token and, with log probabilities, the bits of its float32 one, the ids of the K
    likeliest, and the bits of theirs: see `read_chosen`. slots: donated. strict: a row at a time.
    """

    run = _row_by_row if strict else sample

    @functools.partial(jax.jit, donate_argnames="slots")
    def choose(logits, slots, of, hidden=None):
        def rows(logits, slots, at, steps):
            state = dataclasses.replace(rows_of(slots, at), step=steps)
            return run(logits, state, features)

        at = of[:, 0]
        sampled, after = jax.vmap(rows)(logits, slots, at, of[:, 1])
        slots = jax.vmap(functools.partial(_kept, features))(slots, at, sampled.tokens, after, hidden)
        found = (sampled.logprob, sampled.top_ids, sampled.top_logprobs)
        return _chosen_bits(sampled.tokens, *(x for x in found if x is not None)), pinned(slots)

    return choose


@functools.lru_cache(maxsize=256)
def make_paged_verify(features: SamplingFeatures, strict: bool = False) -> Callable:
    """f(logits [D, R P, V], slots, of [D, R, 3 + K] int32, masks [D, R, P, W] uint32, hidden [D, R P, E]
    or None) -> (chosen [D, R, P, C], slots): which tokens of a draft stay, and one more; then -1.

    of: a row's slot, how many tokens its sequence made before, how many are drafted, and those; -1 where
    the device drafted them itself. masks: which tokens may be at each place. P = K + 1. strict: a row at
    a time.
    """

    run = _row_by_row if strict else sample

    @functools.partial(jax.jit, donate_argnames="slots")
    def verify(logits, slots, of, masks, hidden=None):
        def rows(logits, slots, of, masks):
            logits = logits.reshape(of.shape[0], -1, logits.shape[-1])
            state = dataclasses.replace(rows_of(slots, of[:, 0]), step=of[:, 1])
            given = {"masks": masks if features.mask else None, "choose": run}
            drafts = of[:, 3:]
            if slots.newest.shape[-1] > 1:
                own = jnp.take(slots.newest[:, 1:], of[:, 0], axis=0, mode="clip")
                drafts = jnp.where(drafts < 0, own, drafts)
            return speculative_accept(drafts, of[:, 2], logits, state, features, **given)[1:]

        sampled, after = jax.vmap(rows)(logits, slots, of, masks)
        kept = jnp.sum(sampled.tokens >= 0, axis=-1, keepdims=True) - 1
        newest = jnp.take_along_axis(sampled.tokens, kept, axis=-1)[..., 0]
        if hidden is not None:
            hidden = hidden.reshape(*of.shape[:2], -1, hidden.shape[-1])
            hidden = jnp.take_along_axis(hidden, kept[..., None], axis=2)[:, :, 0]
        slots = jax.vmap(functools.partial(_kept, features))(slots, of[..., 0], newest, after, hidden)
        found = (sampled.logprob, sampled.top_ids, sampled.top_logprobs)
        return _chosen_bits(sampled.tokens, *(x for x in found if x is not None)), pinned(slots)

    return verify


@functools.lru_cache(maxsize=64)
def make_paged_candidates(features: SamplingFeatures, count: int, strict: bool = False) -> Callable:
    """f(logits [D, R P, V], slots, of [D, 2, R] int32) -> candidates [D, R, 3, C] int32, the C = `count`
    likeliest next tokens of each row, likeliest first, for beam search: see `read_candidates`.

    of: as of `make_paged_sample`. Of a row's P places the first counts. strict: a row at a time.
    """

    def likeliest(logits, state):
        own = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        processed, tokens = jax.lax.top_k(process_logits(own, state, features), count)
        bits = [_bits(x) for x in (processed, jnp.take_along_axis(own, tokens, axis=-1))]
        return jnp.stack([tokens, *bits], axis=1)  # [R, 3, C]

    @jax.jit
    def candidates(logits, slots, of):
        def rows(logits, slots, of):
            first = logits.reshape(of.shape[1], -1, logits.shape[-1])[:, 0]
            state = dataclasses.replace(rows_of(slots, of[0]), step=of[1])
            return _one_row_each(likeliest, first, state) if strict else likeliest(first, state)

        return jax.vmap(rows)(logits, slots, of)

    return candidates


def read_candidates(candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, log probabilities after penalties, bias and masks, the model's own), [..., C] each."""
    floats = candidates.view(np.float32)
    return candidates[..., 0, :], floats[..., 1, :], floats[..., 2, :]


def _row_by_row(logits: jax.Array, state: SamplingState, features: SamplingFeatures):
    """`sample` of each row of [S, V] on its own, by the same code."""
    return _one_row_each(lambda *row: sample(*row, features), logits, state)


def _one_row_each(run: Callable, logits: jax.Array, state: SamplingState):
    """What `run` makes of each row of [S, V] on its own."""
    one = lambda x: run(*jax.tree.map(lambda y: y[None], x))  # noqa: E731
    return jax.tree.map(lambda x: x[:, 0], jax.lax.map(one, (logits, state)))


def rows_of(slots: Slots, at: jax.Array) -> SamplingState:
    """What one shard's slots `at` [S] say."""
    return jax.tree.map(lambda x: jnp.take(x, at, axis=0, mode="clip"), slots.sampling)


def _kept(features: SamplingFeatures, slots: Slots, at, tokens, after: SamplingState, hidden) -> Slots:
    """One shard's slots after new tokens [S]; a slot past the last is none. hidden: before these."""
    kept = slots.sampling
    if features.penalties:
        assert kept.counts is not None and after.counts is not None
        kept = dataclasses.replace(kept, counts=kept.counts.at[at].set(after.counts, mode="drop"))
    newest, known = slots.newest.at[at, 0].set(tokens, mode="drop"), slots.hidden
    if known is not None:
        known = known.at[at].set(hidden, mode="drop")
    return Slots(newest, kept, known)


def read_chosen(chosen: np.ndarray) -> tuple[np.ndarray, ...]:
    """(tokens [...], logprob [...], top ids [..., K], top logprobs [..., K]) of [..., C]; the
    first alone where C = 1.
    """
    if chosen.shape[-1] == 1:
        return (chosen[..., 0],)
    half = (chosen.shape[-1] - 2) // 2
    floats = chosen.view(np.float32)
    return chosen[..., 0], floats[..., 1], chosen[..., 2 : 2 + half], floats[..., 2 + half :]


@functools.lru_cache(maxsize=8)
def make_write_slots() -> Callable:
    """f(slots, shards [n], at [n], rows) -> slots with the requests of `rows`, a `SamplingState` of n
    rows without histories, at slots `at` of `shards`; a slot past the last is dropped. slots: donated.
    """

    @functools.partial(jax.jit, donate_argnames="slots")
    def write(slots, shards, at, rows):
        kept = dataclasses.replace(slots.sampling, counts=None, in_prompt=None)
        new = jax.tree.map(lambda old, x: old.at[shards, at].set(x, mode="drop"), kept, rows)
        history = {name: getattr(slots.sampling, name) for name in ("counts", "in_prompt")}
        new = dataclasses.replace(new, **history)
        return pinned(dataclasses.replace(slots, sampling=new))

    return write


@functools.lru_cache(maxsize=8)
def make_write_history() -> Callable:
    """f(slots, shard [], at [], tokens [T], prompt_length []) -> slots in which one knows its tokens,
    those of the prompt and those after it, padded with V; for penalties. slots: donated.
    """

    @functools.partial(jax.jit, donate_argnames="slots")
    def write(slots, shard_, at, tokens, prompt_length):
        kept = slots.sampling
        of_shard = (kept.counts[shard_], kept.in_prompt[shard_])
        counts, present = write_history(*of_shard, at[None], tokens[None], prompt_length[None])
        kept = dataclasses.replace(
            kept,
            counts=kept.counts.at[shard_].set(counts),
            in_prompt=kept.in_prompt.at[shard_].set(present),
        )
        return pinned(dataclasses.replace(slots, sampling=kept))

    return write


@functools.lru_cache(maxsize=8)
def make_write_masks() -> Callable:
    """f(slots, shards [n], at [n], masks [n, W] uint32) -> slots that allow other tokens; donated."""

    @functools.partial(jax.jit, donate_argnames="slots")
    def write(slots, shards, at, masks):
        mask = slots.sampling.mask.at[shards, at].set(masks, mode="drop")
        masked = dataclasses.replace(slots.sampling, mask=mask)
        return pinned(dataclasses.replace(slots, sampling=masked))

    return write


def pinned(slots: Slots) -> Slots:
    """On the shards where they were."""
    return jax.tree.map(lambda x: shard(x, "batch", *(None,) * (x.ndim - 1)), slots)
