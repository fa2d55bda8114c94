"""From a step's logits to its next tokens: per-row penalties, bias, filters and a seeded draw.

The story in order: a request carries `SamplingParams` (host); `pack` turns the requests of a batch
into `SamplingState` (arrays, one row each) and `SamplingFeatures` (static: what the compiled step
must contain); `sample` is called once per decode step, inside jit, with the features static, and
returns the tokens and the next state. Every row has its own parameters and its own random stream.

Where rows come and go, the host keeps a table of them: `new_rows` makes it, `pack_row` fills one row,
`take_rows` picks those of a step, with what its tier of features needs (`tier_of`). Histories stay on
the device, where `write_history` begins a row's.

Letters: B rows, V vocabulary, W words of 32 bits that hold V, M biased ids, E forbidden ids,
K log-probability alternatives.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.ops.sampling_params import MAX_STOPS, SamplingParams

# Widths of a table for rows yet unknown: a row that needs more is refused.
MAX_BIASES = 300  # as many as the OpenAI interface takes
MAX_LOGPROBS = 20  # alternatives in the widest tier; also OpenAI's limit

_ALL_TOKENS = np.uint32(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class SamplingFeatures:
    """What a batch's compiled step must contain: static under jit, so the rest costs nothing.

    Attributes:
        sampling: some row has a temperature; otherwise the step is an argmax without random bits.
        filters: some sampled row has top-k, top-p, min-p or typical-p.
        penalties: some row has a penalty, so the state holds [B, V] counts.
        bias: some row has a logit bias.
        min_tokens: some row forbids its stop ids at first.
        mask: some row has banned or allowed ids, or a form to follow.
        logprobs: None for none, else the largest number of alternatives asked for.
    """

    sampling: bool
    filters: bool
    penalties: bool
    bias: bool
    min_tokens: bool
    mask: bool
    logprobs: int | None

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> "SamplingFeatures":
        """What these requests use, and no more."""
        params = list(params)
        return cls(
            sampling=any(not p.greedy for p in params),
            filters=any(p.filtered for p in params),
            penalties=any(p.penalized for p in params),
            bias=any(p.logit_bias for p in params),
            min_tokens=any(p.min_new_tokens > 0 for p in params),
            mask=any(p.masked for p in params),
            logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
        )

    def covers(self, other: "SamplingFeatures") -> bool:
        """Whether a step with these features serves rows that use the others."""
        pairs = zip(_values(self), _values(other), strict=True)
        return all(mine >= theirs for mine, theirs in pairs)


def _values(features: SamplingFeatures) -> tuple[int, ...]:
    """Each feature as a number that grows with it."""
    return tuple(-1 if value is None else int(value) for value in dataclasses.astuple(features))


# The programs of an engine, cheapest first. A row's tokens do not depend on which of them runs, nor do
# its log probabilities: of the alternatives each row takes its first k.
GREEDY = SamplingFeatures(False, False, False, False, False, False, None)
SAMPLED = dataclasses.replace(GREEDY, sampling=True)
EVERYTHING = SamplingFeatures(True, True, True, True, True, True, MAX_LOGPROBS)
TIERS = (GREEDY, SAMPLED, EVERYTHING)


def tier_of(params: Iterable[SamplingParams]) -> SamplingFeatures:
    """The cheapest of `TIERS` for these requests; ValueError when even EVERYTHING is too little."""
    needed = SamplingFeatures.of(params)
    for tier in TIERS:
        if tier.covers(needed):
            return tier
    raise ValueError(f"SamplingParams.logprobs is {needed.logprobs}: expected at most {MAX_LOGPROBS}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """The parameters and the history of each row. Fields of an absent feature are None."""

    temperature: jax.Array  # [B] float32; 0 marks a greedy row
    top_k: jax.Array  # [B] int32; 0 is off
    top_p: jax.Array  # [B] float32
    min_p: jax.Array  # [B] float32
    typical_p: jax.Array  # [B] float32
    repetition_penalty: jax.Array  # [B] float32
    presence_penalty: jax.Array  # [B] float32
    frequency_penalty: jax.Array  # [B] float32
    min_new_tokens: jax.Array  # [B] int32
    key_data: jax.Array  # [B, 2] uint32, threefry key of the row's stream; never changes
    step: jax.Array  # [B] int32, tokens sampled so far: the row's place in its stream
    counts: jax.Array | None  # [B, V] int32, how often each token was generated (penalties)
    in_prompt: jax.Array | None  # [B, V] bool, which tokens the prompt holds (penalties)
    bias_ids: jax.Array | None  # [B, M] int32, padded with V, which scatters drop (bias)
    bias_values: jax.Array | None  # [B, M] float32 (bias)
    forbidden_ids: jax.Array | None  # [B, E] int32, padded with V (min_tokens)
    mask: jax.Array | None  # [B, W] uint32, bit t % 32 of word t // 32 allows token t (mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """One step's choice. Log probabilities are of the model's own distribution: log-softmax of the
    raw logits in float32, before any penalty, bias, temperature or filter."""

    tokens: jax.Array  # [B] int32
    logprob: jax.Array | None  # [B] float32, of the chosen token; None without the feature
    top_ids: jax.Array | None  # [B, K] int32, likeliest first; K may be 0, and is at most V
    top_logprobs: jax.Array | None  # [B, K] float32


# The fields of SamplingParams that are a [B] array of SamplingState.
_PER_ROW = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "typical_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "min_new_tokens": np.int32,
}


def pack(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    sample_index: Sequence[int],
    stop_ids: Sequence[Sequence[int]],
    default_seed: int,
) -> tuple[SamplingState, SamplingFeatures]:
    """Lays the requests of a batch out as arrays, one row each.

    The leaves are numpy arrays: pass them to jit, or place them with `jax.device_put` first where
    the step expects a sharding. A row's random stream depends only on (seed, sample index) when its
    request has a seed, and on (`default_seed`, row number) when not, so `default_seed` should
    differ from batch to batch.

    Args:
        params: the request of each row; B = len(params).
        prompts: the prompt's token ids of each row, without padding.
        vocab_size: V, the last axis of the logits.
        sample_index: which of its request's n samples each row is.
        stop_ids: ids that end each row; forbidden until the row's min_new_tokens.
        default_seed: for the requests without a seed.

    Raises:
        ValueError: lengths differ, or an id or a logprobs count lies outside the vocabulary.
    """
    batch = len(params)
    rows = {"prompts": prompts, "sample_index": sample_index, "stop_ids": stop_ids}
    for name, values in rows.items():
        if len(values) != batch:
            raise ValueError(f"{name} has {len(values)} rows: expected {batch}, one per request")
    features = SamplingFeatures.of(params)
    stops = [ids for p, ids in zip(params, stop_ids, strict=True) if p.min_new_tokens]
    table = new_rows(
        batch,
        vocab_size,
        features,
        bias_width=_width([p.logit_bias for p in params]),
        stop_width=_width(stops),
    )
    for row in range(batch):
        pack_row(
            table,
            row,
            params[row],
            prompts[row],
            vocab_size=vocab_size,
            sample_index=sample_index[row],
            stop_ids=stop_ids[row],
            default_seed=default_seed,
            stream=row,
        )
    return table, features


def _width(rows: Iterable[Collection]) -> int:
    """Room for the longest row: a power of two, so that few shapes compile."""
    longest = max((len(row) for row in rows), default=0)
    return 1 << max(longest - 1, 0).bit_length()


def new_rows(
    rows: int,
    vocab_size: int,
    features: SamplingFeatures,
    *,
    bias_width: int = MAX_BIASES,
    stop_width: int = MAX_STOPS,
    history: bool = True,
) -> SamplingState:
    """Rows that hold no request yet, as numpy arrays that `pack_row` writes into.

    Those not yet written are greedy, allow every token and cost nothing. history=False leaves out the
    [B, V] arrays of the penalties, for a caller that keeps them on the device.
    """
    history = history and features.penalties
    ids = lambda width: np.full((rows, width), vocab_size, np.int32)  # noqa: E731
    return SamplingState(
        **{name: np.zeros(rows, dtype) for name, dtype in _PER_ROW.items()}
        | {name: np.ones(rows, np.float32) for name in ("top_p", "typical_p", "repetition_penalty")},
        key_data=np.zeros((rows, 2), np.uint32),
        step=np.zeros(rows, np.int32),
        counts=np.zeros((rows, vocab_size), np.int32) if history else None,
        in_prompt=np.zeros((rows, vocab_size), bool) if history else None,
        bias_ids=ids(bias_width) if features.bias else None,
        bias_values=np.zeros((rows, bias_width), np.float32) if features.bias else None,
        forbidden_ids=ids(stop_width) if features.min_tokens else None,
        mask=np.full((rows, -(-vocab_size // 32)), _ALL_TOKENS) if features.mask else None,
    )


def pack_row(
    table: SamplingState,
    row: int,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    *,
    vocab_size: int,
    sample_index: int,
    stop_ids: Sequence[int],
    default_seed: int,
    stream: int,
) -> None:
    """Writes a request into a row of a table of `new_rows`, over whatever the row held.

    Args:
        prompt: its token ids; read only where the table holds the history.
        sample_index: which of the request's n samples the row is.
        stop_ids: ids that end the row; forbidden until min_new_tokens.
        default_seed, stream: name the random stream of a request without a seed; no two requests of
            one default_seed should have the same.

    Raises:
        ValueError: an id or a logprobs count lies outside the vocabulary, or does not fit the table.
    """
    _check_row(params, vocab_size, stop_ids, default_seed)
    for name in _PER_ROW:
        getattr(table, name)[row] = getattr(params, name)
    if params.greedy:
        table.temperature[row] = 0
    table.key_data[row] = _row_key(params.seed, sample_index, default_seed, stream)
    table.step[row] = 0
    if table.counts is not None and table.in_prompt is not None:
        table.counts[row] = 0
        table.in_prompt[row] = False
        table.in_prompt[row, _checked_ids("prompts", prompt, vocab_size)] = True
    if table.bias_ids is not None and table.bias_values is not None:
        ids, values = zip(*params.logit_bias, strict=True) if params.logit_bias else ((), ())
        _fill_ids(table.bias_ids[row], "logit_bias", ids, vocab_size)
        table.bias_values[row] = 0
        table.bias_values[row, : len(values)] = values
    if table.forbidden_ids is not None:
        forbidden = stop_ids if params.min_new_tokens else ()
        _fill_ids(table.forbidden_ids[row], "stop_ids", forbidden, vocab_size)
    if table.mask is not None:
        table.mask[row] = pack_mask(params, vocab_size)


def _check_row(
    params: SamplingParams, vocab_size: int, stop_ids: Sequence[int], default_seed: int
) -> None:
    if default_seed < 0:
        raise ValueError(f"default_seed is {default_seed}: expected an integer of at least 0")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None and count > vocab_size:
            raise ValueError(
                f"SamplingParams.{name} is {count}: expected at most the vocabulary's "
                f"{vocab_size}; ask for fewer alternatives"
            )
    if params.min_new_tokens and params.allowed_ids is not None:
        if not set(params.allowed_ids) - set(params.banned_ids) - set(stop_ids):
            raise ValueError(
                f"SamplingParams.allowed_ids is {params.allowed_ids}: expected an id that does not end "
                f"the text, for min_new_tokens={params.min_new_tokens} allows no other at first"
            )


def pack_mask(params: SamplingParams, vocab_size: int) -> np.ndarray:
    """[W] uint32: which tokens allowed_ids and banned_ids leave, as `SamplingState.mask` has it."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, bool)
    if params.allowed_ids is None:
        allowed[:vocab_size] = True
    else:
        allowed[_checked_ids("allowed_ids", params.allowed_ids, vocab_size)] = True
    allowed[_checked_ids("banned_ids", params.banned_ids, vocab_size)] = False
    if not allowed.any():
        raise ValueError("SamplingParams.banned_ids holds all that may be emitted; leave an id")
    return np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)


def take_rows(table: SamplingState, rows: Any, features: SamplingFeatures) -> SamplingState:
    """Copies of rows (any numpy index) of a table, in the fields that a step with these features reads.

    Copies, because on a CPU jax may read an array that it was given after the table has changed.
    """
    optional = {
        "counts": features.penalties,
        "in_prompt": features.penalties,
        "bias_ids": features.bias,
        "bias_values": features.bias,
        "forbidden_ids": features.min_tokens,
        "mask": features.mask,
    }
    changes = {name: None for name, present in optional.items() if not present}
    return jax.tree.map(lambda x: np.array(x[rows]), dataclasses.replace(table, **changes))


def write_history(
    counts: jax.Array, in_prompt: jax.Array, rows: jax.Array, tokens: jax.Array, prompt_length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`SamplingState`'s counts and in_prompt, [B, V], with the histories of R rows begun anew.

    rows: [R] int32, each once; B or more is dropped. tokens: [R, T] int32, a prompt and what was
    generated after it, padded with V. prompt_length: [R] int32.
    """
    vocab = counts.shape[1]
    is_prompt = jnp.arange(tokens.shape[1])[None] < prompt_length[:, None]

    def histogram(ids: jax.Array) -> jax.Array:
        return jnp.zeros(vocab, counts.dtype).at[ids].add(1, mode="drop")

    present = jax.vmap(histogram)(jnp.where(is_prompt, tokens, vocab)) > 0
    generated = jax.vmap(histogram)(jnp.where(is_prompt, vocab, tokens))
    counts = counts.at[rows].set(generated, mode="drop")
    return counts, in_prompt.at[rows].set(present, mode="drop")


def _row_key(seed: int | None, sample_index: int, default_seed: int, stream: int) -> np.ndarray:
    """Threefry key data [2] uint32. numpy's SeedSequence mixes on the host, where folding keys with
    jax.random would cost several device calls per row; its output is stable by contract."""
    if seed is None:
        mixed = np.random.SeedSequence(default_seed, spawn_key=(1, stream))
    else:
        mixed = np.random.SeedSequence(seed, spawn_key=(0, sample_index))
    return mixed.generate_state(2, np.uint32)


def _checked_ids(name: str, ids: Iterable[int], vocab_size: int) -> np.ndarray:
    array = np.array(list(ids), np.int64)
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"{name} holds id {outside[0]}: expected ids from 0 to {vocab_size - 1}, the "
            "vocabulary's; was it made with another tokenizer?"
        )
    return array


def _fill_ids(padded: np.ndarray, name: str, ids: Collection[int], vocab_size: int) -> None:
    """Writes ids into a row of int32, the rest of it V."""
    if len(ids) > len(padded):
        raise ValueError(f"{name} has {len(ids)} ids: expected at most {len(padded)}")
    padded[:] = vocab_size
    padded[: len(ids)] = _checked_ids(name, ids, vocab_size)


def sample(
    logits: jax.Array, state: SamplingState, features: SamplingFeatures
) -> tuple[Sampled, SamplingState]:
    """Chooses each row's next token and advances its state.

    Order: repetition penalty, presence and frequency penalties, logit bias, forbidden stop ids, mask
    (`process_logits`); temperature; top-k, top-p, min-p, typical-p (`filter_logits`); draw. The
    filters come in transformers' order, each seeing what those before it kept. A row's token depends
    on its logits, its parameters and its stream only, not on the other rows nor on the features that
    they switch on. Tied maxima go to the lowest id, as does a row of only -inf.

    The draw is Gumbel-max: argmax of logits plus noise is a sample of their softmax. The noise has
    a float32's 2^-23 resolution, so tokens below about 1e-7 of the likeliest are never drawn.

    Cost on a [B, V] array: one pass when all rows are greedy; B * V random words to draw; up to 96
    more passes to filter (no sort); K-largest selection for alternatives.

    Args:
        logits: [B, V], any float dtype; computed with in float32.
        state: of the B rows, from `pack` or the step before.
        features: static under jit; must cover what the rows use, as `pack` returns it.
    """
    logits = logits.astype(jnp.float32)
    processed = process_logits(logits, state, features)
    tokens = jnp.argmax(processed, axis=-1).astype(jnp.int32)  # [B]
    if features.sampling:
        noise = gumbel(state.key_data, state.step, logits.shape[-1])
        drawn = jnp.argmax(draw_logits(processed, state, features) + noise, axis=-1)
        tokens = jnp.where(state.temperature == 0, tokens, drawn.astype(jnp.int32))
    return _with_logprobs(tokens, logits, features), _advance(state, tokens, features)


def process_logits(logits: jax.Array, state: SamplingState, features: SamplingFeatures) -> jax.Array:
    """Penalties, bias, forbidden ids and mask: float32 [B, V] -> [B, V].

    What holds for greedy decoding too. Transformers adds its bias before the repetition penalty;
    here, as in the OpenAI interface, the bias is the caller's last word.
    """
    if features.penalties:
        logits = _penalize(logits, state)
    if features.bias:
        assert state.bias_ids is not None and state.bias_values is not None, "state lacks biases"
        logits = _at_ids(logits, state.bias_ids, state.bias_values)
    if features.min_tokens:
        assert state.forbidden_ids is not None, "state lacks forbidden ids"
        ban = jnp.where(state.step < state.min_new_tokens, -jnp.inf, 0.0)[:, None]
        bans = jnp.broadcast_to(ban, state.forbidden_ids.shape).astype(jnp.float32)
        logits = _at_ids(logits, state.forbidden_ids, bans)
    if features.mask:
        assert state.mask is not None, "state lacks a mask"
        logits = mask_logits(logits, state.mask)
    return logits


def mask_logits(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits [B, V] with the tokens whose bit in `mask` [B, W] uint32 is 0 at -inf."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]  # [B, W, 32]
    allowed = bits.reshape(len(mask), -1)[:, : logits.shape[-1]] & 1
    return jnp.where(allowed == 1, logits, -jnp.inf)


def draw_logits(processed: jax.Array, state: SamplingState, features: SamplingFeatures) -> jax.Array:
    """What sampled rows draw from the softmax of: `process_logits`'s result, scaled and filtered."""
    temperature = jnp.where(state.temperature == 0, 1, state.temperature)
    scaled = processed / temperature[:, None]
    if not features.filters:
        return scaled
    return filter_logits(scaled, state.top_k, state.top_p, state.min_p, state.typical_p)


def _penalize(logits: jax.Array, state: SamplingState) -> jax.Array:
    """Repetition over prompt and generated tokens; presence and frequency over generated ones."""
    assert state.counts is not None and state.in_prompt is not None, "state lacks penalties"
    generated = state.counts > 0  # [B, V]
    repetition = state.repetition_penalty[:, None]
    weakened = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(state.in_prompt | generated, weakened, logits)
    presence = state.presence_penalty[:, None] * generated.astype(jnp.float32)
    frequency = state.frequency_penalty[:, None] * state.counts.astype(jnp.float32)
    return logits - presence - frequency


def _at_ids(logits: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    """Adds values [B, M] to logits [B, V] at ids [B, M]; ids of V or more are dropped.

    vmap keeps the rows a batch axis of the scatter, so a sharded batch needs no communication.
    """
    return jax.vmap(lambda row, at, value: row.at[at].add(value, mode="drop"))(logits, ids, values)


def filter_logits(
    scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, typical_p: jax.Array
) -> jax.Array:
    """Top-k, then top-p (arXiv:1904.09751), min-p (arXiv:2407.01082) and locally typical sampling
    (arXiv:2202.00666) of what was kept before.

    Each filter is a threshold on a value, so tokens tied at the cut are all kept. The likeliest token
    always is, but for typical sampling, where it may be too likely. Thresholds are found by bisection:
    on XLA's CPU backend a sort of [B, V] takes 16 times as long at [1, 32000] and 5 times at
    [32, 151936]. Each pass of the bisection sums over V, so logits sharded over V are better gathered
    first.

    Args:
        scaled: [B, V] float32 logits after temperature.
        top_k: [B] int32, 0 is off.  top_p: [B] float32, 1 is off.  min_p: [B] float32, 0 is off.
        typical_p: [B] float32, 1 is off.

    Returns:
        [B, V] with the tokens left out at -inf.
    """
    top_k, top_p, min_p, typical_p = (x[:, None] for x in (top_k, top_p, min_p, typical_p))  # [B, 1]
    order = _ordered_bits(scaled)
    k = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
    threshold = _bisect(order, jnp.ones_like(scaled), k)

    largest = jnp.max(scaled, axis=-1, keepdims=True)
    mass = jnp.where(order >= threshold, jnp.exp(scaled - largest), 0)
    threshold = jnp.maximum(threshold, _holding(order, mass, top_p))

    keep = (order >= threshold) & (scaled >= largest + jnp.log(min_p))
    scaled = jnp.where(keep, scaled, -jnp.inf)

    logprobs = jax.nn.log_softmax(scaled, axis=-1)
    mass = jnp.exp(logprobs)
    entropy = -jnp.sum(jnp.where(mass > 0, mass * logprobs, 0), axis=-1, keepdims=True)
    order = _ordered_bits(-jnp.abs(logprobs + entropy))  # surprisals nearest to the entropy are highest
    return jnp.where(order >= _holding(order, mass, typical_p), scaled, -jnp.inf)


def _holding(order: jax.Array, mass: jax.Array, share: jax.Array) -> jax.Array:
    """The threshold [B, 1] on `order` that keeps this share [B, 1] of the mass; 1 keeps all."""
    # A target above zero, or the empty set would do for a share of 0.
    target = jnp.maximum(share * jnp.sum(mass, axis=-1, keepdims=True), jnp.finfo(mass.dtype).tiny)
    return _bisect(order, mass, jnp.where(share < 1, target, jnp.inf))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 that sorts the same way (IEEE 754: flip all bits of negatives, else the
    sign), with both zeros equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _bisect(order: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """The largest threshold [B, 1] uint32 with sum(weight where order >= threshold) >= target.

    Fixed bit by bit from the highest, so 32 passes give it exactly. 0, which keeps everything, when
    the target [B, 1] is out of reach; no pass at all when every row's is infinite (filter off).
    """

    def fix_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        trial = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(order >= trial, weight, 0), axis=-1, keepdims=True)
        return jnp.where(reached >= target, trial, threshold)

    passes = jnp.where(jnp.any(jnp.isfinite(target)), 32, 0)
    return jax.lax.fori_loop(0, passes, fix_bit, jnp.zeros(target.shape, jnp.uint32))


def gumbel(key_data: jax.Array, step: jax.Array, vocab_size: int) -> jax.Array:
    """Noise [B, V]: row b's depends on its key and its step only."""

    def row_noise(row_key_data: jax.Array, row_step: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(row_key_data, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, row_step), (vocab_size,), jnp.float32)

    return jax.vmap(row_noise)(key_data, step)


def _with_logprobs(tokens: jax.Array, logits: jax.Array, features: SamplingFeatures) -> Sampled:
    """The chosen tokens [B] with what the features want to know of the raw logits [B, V]."""
    if features.logprobs is None:
        return Sampled(tokens, None, None, None)
    return Sampled(tokens, *token_logprobs(logits, tokens, features.logprobs))


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, alternatives: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log probabilities [...] of tokens [...] under logits [..., V], and those of the K likeliest:
    their ids and values [..., K], K = min(alternatives, V)."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    top_logprobs, top_ids = jax.lax.top_k(logprobs, min(alternatives, logits.shape[-1]))
    return chosen, top_ids, top_logprobs


def _advance(state: SamplingState, tokens: jax.Array, features: SamplingFeatures) -> SamplingState:
    counts = state.counts
    if features.penalties:
        assert counts is not None, "state lacks penalties"
        # One-hot, not a scatter: elementwise, so it needs no communication under any sharding.
        vocab = jax.lax.broadcasted_iota(jnp.int32, counts.shape, 1)
        counts = counts + (vocab == tokens[:, None]).astype(jnp.int32)
    return dataclasses.replace(state, step=state.step + 1, counts=counts)
