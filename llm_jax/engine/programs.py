"""The programs of an engine: a small closed set of shapes, compiled before the first request.

A step with nothing but single tokens is compiled for so many rows, a step with chunks of prompts for so
many rows and so many tokens of chunks. What is smaller is padded. So once the engine has begun nothing
is ever compiled again, which `misses` counts.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from llm_jax.cache.paged import copy_pages, put_pages, take_pages
from llm_jax.config import EngineConfig
from llm_jax.infer.generate import Timing
from llm_jax.infer.llm import LLM
from llm_jax.infer.paged_steps import (
    StepShape,
    make_paged_forward,
    make_paged_sample,
    make_paged_verify,
    make_write_history,
    make_write_masks,
    make_write_slots,
)
from llm_jax.ops.sampling import TIERS, SamplingFeatures, new_rows
from llm_jax.sharding import batch_sharding, data_shards

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # of rows with several tokens; see kernels/paged_attention
WRITTEN = 8  # slots written at once


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes there are programs for."""

    rows: tuple[int, ...]  # of steps with single tokens alone
    mixed: tuple[int, ...]  # of steps with chunks
    chunks: tuple[int, ...]  # tokens of the chunks of a step
    pages: int
    pools: int
    alignment: int  # of rows with several tokens
    drafts: int = 0  # K, tokens that a row may have drafted
    adapters: bool = False  # whether each row may have one

    @classmethod
    def of(cls, config: EngineConfig, pages: int, pools: int, alignment: int, drafts: int) -> "Buckets":
        """Powers of two for rows, of four for what chunks bring: at most so much is padding."""
        # XLA takes loops of one turn apart, and what it then fuses rounds otherwise.
        max_rows = max(config.max_rows, 2 if config.strict_numerics else 1)
        rows = tuple(1 << i for i in range((max_rows - 1).bit_length())) + (max_rows,)
        rows = tuple(n for n in rows if n > 1 or not config.strict_numerics)
        most = _up(config.token_budget, ALIGNMENT)
        chunks = {most}
        while min(chunks) > 2 * ALIGNMENT:
            chunks.add(_up(min(chunks) // 4, ALIGNMENT))
        mixed = {max_rows} | {n for n in (4, 16, 64) if n < max_rows}
        mixed = rows if drafts else tuple(sorted(mixed))
        sizes = (rows, mixed, tuple(sorted(chunks)), pages, pools, alignment, drafts)
        return cls(*sizes, config.adapters > 0)

    def room(self, rows: int) -> tuple[int, ...]:
        """Tokens of chunks for which there are programs of so many rows."""
        drafted = rows * _up(self.drafts + 1, self.alignment) if self.drafts else 0
        return tuple(sorted({n for n in self.chunks if n > drafted} | ({drafted} - {0})))

    def shape(self, rows: int, chunk_tokens: int, scored: bool = False) -> StepShape:
        """The least that has room for so many rows, and so many tokens of chunks, each rounded up."""
        if not chunk_tokens:
            count = next(n for n in self.rows if n >= rows)
            return StepShape(count, count, count, self.pages, self.pools, False, self.adapters)
        count = next(n for n in self.mixed if n >= rows)
        room = next(n for n in self.room(count) if n >= chunk_tokens)
        tokens = _up(count, self.alignment) + room
        samples, kind = count * (self.drafts + 1), (scored, self.adapters)
        return StepShape(_up(tokens, ALIGNMENT), count, samples, self.pages, self.pools, *kind)

    def shapes(self, scored: bool) -> Iterator[StepShape]:
        """All of them."""
        for rows in self.rows:
            yield self.shape(rows, 0)
        for rows in self.mixed:
            for chunk in self.room(rows):
                yield self.shape(rows, chunk)
                if scored:
                    yield self.shape(rows, chunk, scored)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Programs:
    """Compiled steps by shape. Like the functions of `paged_steps`, to be called with a mesh set."""

    def __init__(
        self,
        llm: LLM,
        config: EngineConfig,
        buckets: Buckets,
        cache: Any,
        slots: Any,
        params: Any = None,  # where they are not the LLM's: with an `AdapterBank` in them
    ):
        self.buckets, self.mesh, self.misses, self.compile_s = buckets, llm.mesh, 0, 0.0
        self._model, self._config = llm.model, config
        self._like = jax.tree.map(_abstract, (params or llm.params, cache, slots))
        self._programs = llm.compiled  # so that another engine of this LLM finds them
        self._compiled: dict[Any, Callable] = {}
        self._ahead = False

    def forward(self, shape: StepShape) -> Callable:
        """See `make_paged_forward`."""
        return self._get(("forward", shape))

    def choose(self, samples: int, features: SamplingFeatures) -> Callable:
        """See `make_paged_sample`."""
        return self._get(("choose", samples, features))

    def verify(self, rows: int, features: SamplingFeatures) -> Callable:
        """See `make_paged_verify`."""
        return self._get(("verify", rows, features))

    @property
    def write_slots(self) -> Callable:
        """See `make_write_slots`; of `WRITTEN` slots."""
        return self._get(("write_slots",))

    @property
    def write_masks(self) -> Callable:
        """See `make_write_masks`; of `WRITTEN` slots."""
        return self._get(("write_masks",))

    @property
    def write_history(self) -> Callable:
        """See `make_write_history`."""
        return self._get(("write_history",))

    def copy_pages(self, pool: int) -> Callable:
        """f(cache, sources [D, n], targets [D, n]) -> cache; of `WRITTEN` pages."""
        return self._get(("copy_pages", pool))

    def take_pages(self, pool: int) -> Callable:
        """f(cache, pages [D, n]) -> their content; of `WRITTEN` pages."""
        return self._get(("take_pages", pool))

    def put_pages(self, pool: int) -> Callable:
        """f(cache, pages [D, n], content) -> cache; of `WRITTEN` pages."""
        return self._get(("put_pages", pool))

    @property
    def longest(self) -> int:
        """Tokens that `write_history` takes."""
        return self.buckets.pages * self._page_size

    def trace(self, shape: StepShape) -> None:
        """Trace the forward alone: after it `kernels.forms.chosen` knows what operators it has."""
        params, cache, slots = self._like
        forward = make_paged_forward(self._model, shape, self._config.strict_numerics)
        with jax.set_mesh(self.mesh):
            jax.eval_shape(forward, params, cache, slots.last, self._packed(shape))

    def compile_all(self) -> None:
        """Compile everything, on all cores."""
        start = time.perf_counter()
        shapes = list(self.buckets.shapes(self._config.prompt_logprobs))
        work: list[Any] = [("forward", shape) for shape in shapes]
        if self.buckets.drafts:
            work += [("verify", n, tier) for n in self.buckets.mixed for tier in TIERS]
        single = [shape.samples for shape in shapes if shape.samples == shape.rows]
        work += [("choose", n, tier) for n in sorted(set(single)) for tier in TIERS]
        work += [("write_slots",), ("write_masks",), ("write_history",)]
        of_pages = (
            ("copy_pages", "take_pages", "put_pages") if self._config.host_pages else ("copy_pages",)
        )
        work += [(name, pool) for name in of_pages for pool in range(self.buckets.pools)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._compile, work))
        self.compile_s, self._ahead = time.perf_counter() - start, True
        logger.info("%d programs compiled in %.1f s", len(work), self.compile_s)

    def _get(self, key: Any) -> Callable:
        if key not in self._compiled:
            self.misses += self._ahead
            start = time.perf_counter()
            self._compile(key)
            self.compile_s += time.perf_counter() - start
        return self._compiled[key]

    def _compile(self, key: Any) -> None:
        params, cache, slots = self._like
        with jax.set_mesh(self.mesh):
            match key:
                case ("forward", shape):
                    packed = self._packed(shape)
                    fn = make_paged_forward(self._model, shape, self._config.strict_numerics)
                    args = (params, cache, slots.last, packed)
                case ("choose", samples, features):
                    shards = data_shards(self.mesh)
                    logits = self._array((shards, samples, self._vocab), np.float32)
                    args = (logits, slots, self._array((shards, 2, samples), np.int32))
                    fn = make_paged_sample(features, self._config.strict_numerics)
                case ("verify", rows, features):
                    places = self.buckets.drafts + 1
                    shards, words = data_shards(self.mesh), -(-self._vocab // 32)
                    logits = self._array((shards, rows * places, self._vocab), np.float32)
                    of = self._array((shards, rows, 2 + places), np.int32)
                    masks = self._array((shards, rows, places, words), np.uint32)
                    fn = make_paged_verify(features, self._config.strict_numerics)
                    args = (logits, slots, of, masks)
                case ("write_slots",):
                    rows = new_rows(WRITTEN, self._vocab, TIERS[-1], history=False)
                    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows)
                    fn, args = make_write_slots(), (slots, *self._numbers((WRITTEN,), 2), rows)
                case ("write_masks",):
                    masks = jax.ShapeDtypeStruct((WRITTEN, -(-self._vocab // 32)), np.uint32)
                    fn, args = make_write_masks(), (slots, *self._numbers((WRITTEN,), 2), masks)
                case ("copy_pages" | "take_pages" | "put_pages" as name, pool):
                    fn, args = self._on_pages(name, pool, cache)
                case _:
                    tokens = self._numbers((self.longest,), 1)
                    numbers = self._numbers((), 3)
                    fn, args = make_write_history(), (slots, *numbers[:2], *tokens, numbers[2])
            self._compiled[key] = self._programs.get(fn, Timing(), *args)

    def _on_pages(self, name: str, pool: int, cache: Any) -> tuple[Any, tuple]:
        """(the jitted function, arguments like those that it will have)."""
        numbers = self._array((data_shards(self.mesh), WRITTEN), np.int32)
        fn = _make_on_pages(name, pool)
        if name == "take_pages":
            return fn, (cache, numbers)
        if name == "copy_pages":
            return fn, (cache, numbers, numbers)
        content = jax.eval_shape(lambda *args: take_pages(args[0], pool, args[1]), cache, numbers)
        content = jax.tree.map(lambda x, y: x.update(sharding=y.sharding), content, cache.pools[pool])
        return fn, (cache, numbers, content)

    @property
    def _vocab(self) -> int:
        return self._model.config.vocab_size

    @functools.cached_property
    def _page_size(self) -> int:
        return self._like[1].page_size

    def _packed(self, shape: StepShape) -> jax.ShapeDtypeStruct:
        return self._array(shape.empty(data_shards(self.mesh))[0].shape, np.int32)

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh, shape))

    def _numbers(self, shape: tuple[int, ...], count: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(shape, np.int32)] * count


@functools.lru_cache(maxsize=16)
def _make_on_pages(name: str, pool: int) -> Callable:
    run = {"copy_pages": copy_pages, "take_pages": take_pages, "put_pages": put_pages}[name]
    fn = lambda cache, *args: run(cache, pool, *args)  # noqa: E731
    return jax.jit(fn, donate_argnums=() if name == "take_pages" else (0,))


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
