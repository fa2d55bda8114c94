"""Prompts of token ids in, tokens out as they are made: the host loop over the steps.

One batch of prompts, each of its own length: pad to a bucket, prefill, then decode several tokens per
dispatch until every row has met a stop id or used up its budget. Everything on the host is numpy; a
dispatch costs one call and one fetch.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.cache import init_cache
from llm_jax.infer.steps import (
    DecodeState,
    Ticks,
    make_decode,
    make_forward,
    make_pick,
    make_prefill,
    make_scored_prefill,
    make_start,
)
from llm_jax.infer.timeline import Timeline
from llm_jax.kernels.compiler_options import SERVE, compiler_options
from llm_jax.models import Model, Params
from llm_jax.ops.sampling import SamplingParams, pack
from llm_jax.sharding import data_shards, fetch, put_batch, put_whole
from llm_jax.tree import is_per_layer

MIN_BUCKET = 16  # smallest padded prompt
CACHE_STEP = 64  # cache sizes are multiples of this, so that few shapes are compiled


@dataclasses.dataclass
class Chunk:
    """What one dispatch brought. Row r continues prompt r // n, sample r % n.

    tokens, logprobs [M, R]; top_ids, top_logprobs [M, R, K] or None; tokens are -1 after a row's end.
    prompt: of the first chunk, where asked for: log probabilities of the prompts' tokens [P, T], and the
    ids and log probabilities of the likeliest [P, T, K]; place t is of token t + 1.
    """

    tokens: np.ndarray
    logprobs: np.ndarray | None
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None
    _finished: set[int]
    prompt: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def finish(self, row: int) -> None:
        """End a row from outside (a stop string was met)."""
        self._finished.add(row)


@dataclasses.dataclass
class Timing:
    """Seconds spent in each part of a generation, compilation kept apart."""

    compile_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0


def prompt_bucket(length: int) -> int:
    """Padded prompt length: the next of 16, 24, 32, 48, 64, 96, ... (at most a third is padding)."""
    power = max(MIN_BUCKET, 1 << (length - 1).bit_length())
    middle = power * 3 // 4
    return middle if power > MIN_BUCKET and length <= middle else power


def pad_prompts(prompts: Sequence[Sequence[int]], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens [B, T] and lengths [B], int32; T is a bucket, B the next multiple."""
    batch = -(-len(prompts) // multiple) * multiple
    tokens = np.zeros((batch, prompt_bucket(max(map(len, prompts)))), np.int32)
    lengths = np.ones(batch, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        lengths[i] = len(prompt)
    return tokens, lengths


class Compiled:
    """Jitted functions compiled ahead for the shapes they meet, so that compiling is timed apart."""

    def __init__(self):
        self._programs: dict[Any, Any] = {}

    def get(self, fn: Callable, timing: Timing, *args) -> Callable:
        """The program of `fn` for arguments like these; compiled on first use."""
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((x.shape, str(x.dtype), getattr(x, "sharding", None)) for x in leaves)
        key = (fn, structure, shapes)
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = fn.lower(*args).compile(_options(leaves))
            timing.compile_s += time.perf_counter() - start
        return self._programs[key]


def _options(leaves: Sequence[Any]) -> dict[str, int]:
    """What a program is compiled with for the devices that its arrays, or their shapes, are on."""
    shardings = (getattr(x, "sharding", None) for x in leaves)
    devices = next((s.device_set for s in shardings if s is not None), None)
    return {} if devices is None else compiler_options(SERVE, devices)


def check_lengths(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> None:
    """Refuse prompts that are empty, hold unknown ids, or do not fit the model's positions."""
    cfg = model.config
    for i, (prompt, new) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no tokens; give at least one (a bos token will do)")
        if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
            bad = next(t for t in prompt if not 0 <= t < cfg.vocab_size)
            raise ValueError(f"prompt {i} holds id {bad}: expected ids from 0 to {cfg.vocab_size - 1}")
        if len(prompt) + new > cfg.max_positions:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and max_new_tokens={new}, together more than "
                f"max_positions={cfg.max_positions} of this model; shorten one of them"
            )


def generate(
    model: Model,
    params: Params,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    *,
    stop_ids: Sequence[Sequence[int]],
    compiled: Compiled,
    timing: Timing,
    default_seed: int = 0,
    steps_per_dispatch: int = 8,
    timeline: Timeline | None = None,
) -> Iterator[Chunk]:
    """Generate for one batch of prompts; all requests share one `n`.

    prompts: token ids. stop_ids: ids that end each prompt's rows. Yields the first token of every row,
    then a chunk per dispatch. With a timeline each step is dispatched and waited for on its own.
    """
    check_lengths(model, prompts, [p.max_new_tokens for p in sampling])
    n = sampling[0].n
    rows = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(n)]
    timeline = timeline or Timeline(enabled=False)
    per_layer = is_per_layer(next(iter(jax.tree.leaves(params["layers"], is_leaf=is_per_layer))))
    finished: set[int] = set()
    with jax.set_mesh(mesh):
        tokens, lengths = pad_prompts(prompts, data_shards(mesh))
        state, features = _first_state(
            model, prompts, sampling, stop_ids, rows, len(lengths) * n, default_seed
        )
        longest = max(len(p) + s.max_new_tokens for p, s in zip(prompts, sampling, strict=True))
        size = -(-max(longest, tokens.shape[1]) // CACHE_STEP) * CACHE_STEP
        put = lambda x: put_batch(x, mesh)  # noqa: E731
        cache = init_cache(model.config, len(lengths), size, mesh, per_layer=per_layer)
        args = (params, cache, put(tokens), put(lengths))
        alternatives = max(
            (s.prompt_logprobs for s in sampling if s.prompt_logprobs is not None), default=None
        )
        scores = alternatives is not None
        prefill = make_scored_prefill(model, alternatives) if scores else make_prefill(model)
        prefill = compiled.get(prefill, timing, *args)

        start = time.perf_counter()
        with timeline.phase("prefill"):
            logits, cache, *scores = prefill(*args)
            if timeline.enabled:
                jax.block_until_ready(logits)
        timing.prefill_tokens += sum(map(len, prompts))
        timing.prefill_s += time.perf_counter() - start
        row_of = put_whole(np.repeat(np.arange(len(lengths), dtype=np.int32), n), mesh)
        args = (logits, cache, row_of, jax.tree.map(put, state))
        first = compiled.get(make_start(features, expand=n > 1), timing, *args)
        start = time.perf_counter()
        with timeline.phase("sample"):
            ticks, state, cache = first(*args)
            chunk, done = _fetch(ticks, len(rows), finished)
        timing.prefill_s += time.perf_counter() - start
        if scores:
            chunk.prompt = fetch(scores[0])
        yield chunk

        if timeline.enabled:
            run = _separate_steps(model, features, params, compiled, timing, timeline)
        else:
            run = _fused_steps(model, features, params, compiled, timing, mesh, steps_per_dispatch)
        left = max(s.max_new_tokens for s in sampling) - 1
        while left > 0 and not done.all():
            if finished:
                done = done.copy()
                done[list(finished)] = True
                if done[: len(rows)].all():
                    return
                state = dataclasses.replace(state, done=put(done))
            steps = min(left, steps_per_dispatch)
            ticks, state, cache = run(cache, state, steps)
            start = time.perf_counter()
            chunk, done = _fetch(ticks, len(rows), finished)
            timing.decode_s += time.perf_counter() - start
            timing.decode_tokens += int((chunk.tokens >= 0).sum())
            left -= len(chunk.tokens)
            yield chunk


def _fused_steps(model, features, params, compiled, timing, mesh, max_steps):
    """Several steps in one dispatch, sampling included."""
    decode, program = make_decode(model, features, max_steps), None

    def run(cache, state, steps):
        nonlocal program
        args = (params, cache, state, put_whole(np.int32(steps), mesh))
        if program is None:  # shapes and shardings stay the same from here on
            program = compiled.get(decode, timing, *args)
        start = time.perf_counter()
        result = program(*args)
        timing.decode_s += time.perf_counter() - start
        return result

    return run


def _separate_steps(model, features, params, compiled, timing, timeline):
    """One step at a time, its halves apart and waited for: what a timeline shows."""
    forward, pick = make_forward(model), make_pick(features)
    tick = 0

    def run(cache, state, steps):
        nonlocal tick
        tick += 1
        program = compiled.get(forward, timing, params, cache, state.tokens)
        start = time.perf_counter()
        with timeline.phase("decode", tick):
            logits, cache = jax.block_until_ready(program(params, cache, state.tokens))
        timing.decode_s += time.perf_counter() - start
        program = compiled.get(pick, timing, logits, state)
        start = time.perf_counter()
        with timeline.phase("sample", tick):
            ticks, state = jax.block_until_ready(program(logits, state))
        timing.decode_s += time.perf_counter() - start
        return ticks, state, cache

    return run


def _fetch(ticks: Ticks, rows: int, finished: set[int]) -> tuple[Chunk, np.ndarray]:
    """One transfer to the host: the tokens of the real rows, and which rows are done."""
    host = fetch(ticks)
    keep = lambda x: None if x is None else x[: int(host.count), :rows]  # noqa: E731
    parts = map(keep, (host.tokens, host.logprob, host.top_ids, host.top_logprobs))
    return Chunk(*parts, finished), host.done


def _first_state(model, prompts, sampling, stop_ids, rows, padded, default_seed):
    """DecodeState of all rows as numpy; rows beyond the real ones are done from the start."""
    fill = [rows[0]] * (padded - len(rows))
    prompt_of = [prompt for prompt, _ in [*rows, *fill]]
    packed, features = pack(
        [sampling[p] for p in prompt_of],
        [prompts[p] for p in prompt_of],
        vocab_size=model.config.vocab_size,
        sample_index=[sample for _, sample in [*rows, *fill]],
        stop_ids=[stop_ids[p] for p in prompt_of],
        default_seed=default_seed,
    )
    width = max(1, *map(len, stop_ids))
    stops = np.full((padded, width), -1, np.int32)
    for row, prompt in enumerate(prompt_of):
        stops[row, : len(stop_ids[prompt])] = list(stop_ids[prompt])
    budget = np.array([sampling[p].max_new_tokens for p in prompt_of], np.int32)
    done = np.arange(padded) >= len(rows)
    return DecodeState(np.zeros(padded, np.int32), done, budget, stops, packed), features
