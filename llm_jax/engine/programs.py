"""The programs of an engine: a small closed set of shapes, compiled before the first request.

A step with nothing but single tokens is compiled for so many rows, a step with chunks of prompts for so
many rows and so many tokens of chunks. What is smaller is padded. So once the engine has begun nothing
is ever compiled again, which `misses` counts.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from llm_jax.cache.paged import PagedCache, copy_pages, put_pages, take_pages
from llm_jax.config import EngineConfig, ModelConfig
from llm_jax.engine.plan import StepPlan
from llm_jax.infer.generate import Timing
from llm_jax.infer.llm import LLM
from llm_jax.infer.paged_steps import (
    Slots,
    StepShape,
    make_paged_candidates,
    make_paged_forward,
    make_paged_sample,
    make_paged_verify,
    make_write_history,
    make_write_masks,
    make_write_slots,
)
from llm_jax.kernels.choice import kernel_refusal
from llm_jax.ops.sampling import EVERYTHING, GREEDY, MAX_STOPS, TIERS, SamplingFeatures, new_rows
from llm_jax.sharding import batch_sharding, data_shards

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # of rows with several tokens; see kernels/paged_attention
SOURCES = r".*/(?=(llm_jax|site-packages)/)"  # what is cut from names of files
WRITTEN = 8  # slots written at once
Caches = tuple[PagedCache, ...]  # the model's, and that of a model that drafts


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
    hidden: bool = False  # whether a head drafts from hidden states

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        pages: int,
        pools: int,
        alignment: int,
        drafts: int = 0,
        hidden: bool = False,
    ) -> "Buckets":
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
        return cls(*sizes, config.adapters > 0, hidden)

    @staticmethod
    def row_alignment(kind: str, *models: ModelConfig) -> int:
        """`alignment` of an engine of these models on a kind of device: that of kernels, if any."""
        kernels = [m.attention != "xla" and not kernel_refusal(kind, m.head_dim) for m in models]
        return ALIGNMENT if any(kernels) else 1

    @property
    def of_drafter(self) -> "Buckets":
        """For a small model that drafts: it reads single tokens where the large one reads drafts."""
        return dataclasses.replace(self, drafts=0, adapters=False, hidden=False)

    def chunk_tokens(self, plan: StepPlan | None) -> int:
        """What the chunks of a plan take, each rounded up."""
        return sum(_up(row.count, self.alignment) for row in plan.chunks) if plan else 0

    def room(self, rows: int) -> tuple[int, ...]:
        """Tokens of chunks for which there are programs of so many rows."""
        drafted = rows * _up(self.drafts + 1, self.alignment) if self.drafts else 0
        return tuple(sorted({n for n in self.chunks if n > drafted} | ({drafted} - {0})))

    def shape(self, rows: int, chunk_tokens: int, scored: bool = False) -> StepShape:
        """The least that has room for so many rows, and so many tokens of chunks, each rounded up."""
        if not chunk_tokens:
            count = next(n for n in self.rows if n >= rows)
            kind = (False, self.adapters, self.hidden)
            return StepShape(count, count, count, self.pages, self.pools, *kind)
        count = next(n for n in self.mixed if n >= rows)
        room = next(n for n in self.room(count) if n >= chunk_tokens)
        tokens = _up(count, self.alignment) + room
        samples, kind = count * (self.drafts + 1), (scored, self.adapters, self.hidden)
        return StepShape(_up(tokens, ALIGNMENT), count, samples, self.pages, self.pools, *kind)

    def largest(self, chunks: bool, scored: bool = False) -> StepShape:
        """The one with most room, with or without chunks."""
        return self.shape(self.rows[-1], self.room(self.mixed[-1])[-1] if chunks else 0, scored)

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


@contextlib.contextmanager
def _sources_by_package() -> Iterator[None]:
    """Programs name their sources from the package on: a kernel's are part of the key under which JAX's
    persistent cache has its program, which a machine with the package elsewhere could not find."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, before or SOURCES)
    try:
        yield
    finally:
        jax.config.update(name, before)


class ProgramSet:
    """Programs by key, compiled ahead or as they are needed. To be called with the mesh set."""

    def __init__(self, llm: LLM, buckets: Buckets):
        self.buckets, self.mesh, self.misses, self.compile_s = buckets, llm.mesh, 0, 0.0
        self._programs = llm.compiled  # so that another engine of this LLM finds them
        self._compiled: dict[Any, Callable] = {}
        self._ahead = False

    @property
    def count(self) -> int:
        """How many programs there are."""
        return len(self._work())

    def compile_all(self) -> None:
        """Compile everything, on all cores."""
        start, work = time.perf_counter(), self._work()
        with _sources_by_package(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._compile, work))
        self.compile_s, self._ahead = time.perf_counter() - start, True
        logger.info("%d programs compiled in %.1f s", len(work), self.compile_s)

    def _work(self) -> list[Any]:
        """Keys of all programs."""
        raise NotImplementedError

    def _build(self, key: Any) -> tuple[Any, tuple]:
        """(the jitted function of a key, arguments like those that it will have)."""
        raise NotImplementedError

    def _get(self, key: Any) -> Callable:
        if key not in self._compiled:
            self.misses += self._ahead
            start = time.perf_counter()
            self._compile(key)
            self.compile_s += time.perf_counter() - start
        return self._compiled[key]

    def _compile(self, key: Any) -> None:
        with jax.set_mesh(self.mesh):
            fn, args = self._build(key)
            self._compiled[key] = self._programs.get(fn, Timing(), *args)

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh, shape))

    def _of_rows(self, *sizes: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        """An array of so many for each data shard."""
        return self._array((data_shards(self.mesh), *sizes), dtype)

    def _packed(self, shape: StepShape) -> jax.ShapeDtypeStruct:
        return self._array(shape.empty(data_shards(self.mesh))[0].shape, np.int32)


class Programs(ProgramSet):
    """The steps of the model, and what writes to slots and pages. See the functions of `paged_steps`."""

    def __init__(
        self,
        llm: LLM,
        config: EngineConfig,
        buckets: Buckets,
        caches: Caches,
        slots: Slots,
        params: Any = None,  # where they are not the LLM's: with an `AdapterBank` in them
    ):
        super().__init__(llm, buckets)
        self._model, self._config = llm.model, config
        self._like = abstract((params or llm.params, caches, slots))

    def forward(self, shape: StepShape) -> Callable:
        """See `make_paged_forward`."""
        return self._get(("forward", shape))

    def choose(self, samples: int, features: SamplingFeatures) -> Callable:
        """See `make_paged_sample`."""
        return self._get(("choose", samples, features))

    def verify(self, rows: int, features: SamplingFeatures) -> Callable:
        """See `make_paged_verify`."""
        return self._get(("verify", rows, features))

    def candidates(self, shape: StepShape, features: SamplingFeatures) -> Callable:
        """See `make_paged_candidates`; features: GREEDY or EVERYTHING."""
        return self._get(("candidates", shape.samples, shape.rows, features))

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
        """f(caches, sources [D, n], targets [D, n]) -> caches; of `WRITTEN` pages."""
        return self._get(("copy_pages", pool))

    def take_pages(self, pool: int) -> Callable:
        """f(caches, pages [D, n]) -> their content; of `WRITTEN` pages."""
        return self._get(("take_pages", pool))

    def put_pages(self, pool: int) -> Callable:
        """f(caches, pages [D, n], content) -> caches; of `WRITTEN` pages."""
        return self._get(("put_pages", pool))

    @property
    def longest(self) -> int:
        """Tokens that `write_history` takes."""
        return self.buckets.pages * self._like[1][0].page_size

    def trace(self, shape: StepShape) -> None:
        """Trace the forward alone: after it `kernels.forms.chosen` knows what operators it has."""
        forward, args = self._build(("forward", shape))
        with jax.set_mesh(self.mesh):
            jax.eval_shape(forward, *args)

    def _work(self) -> list[Any]:
        shapes = list(self.buckets.shapes(self._config.prompt_logprobs))
        work: list[Any] = [("forward", shape) for shape in shapes]
        if self.buckets.drafts:
            work += [("verify", n, tier) for n in self.buckets.mixed for tier in TIERS]
        single = [shape.samples for shape in shapes if shape.samples == shape.rows]
        work += [("choose", n, tier) for n in sorted(set(single)) for tier in TIERS]
        if self._config.max_beams:
            sizes = sorted({(shape.samples, shape.rows) for shape in shapes})
            work += [("candidates", *size, tier) for size in sizes for tier in (GREEDY, EVERYTHING)]
        work += [("write_slots",), ("write_masks",), ("write_history",)]
        to_host = self._config.host_pages or self._config.prefix_host_pages
        of_pages = ("copy_pages", "take_pages", "put_pages") if to_host else ("copy_pages",)
        return work + [(name, pool) for name in of_pages for pool in range(self.buckets.pools)]

    def _build(self, key: Any) -> tuple[Any, tuple]:
        params, caches, slots = self._like
        strict, vocab = self._config.strict_numerics, self._model.config.vocab_size
        words = -(-vocab // 32)
        match key:
            case ("forward", shape):
                fn = make_paged_forward(self._model, shape, strict)
                return fn, (params, caches[0], slots.newest, self._packed(shape))
            case ("choose", samples, features):
                logits, of = self._of_rows(samples, vocab, dtype=np.float32), self._of_rows(2, samples)
                return make_paged_sample(features, strict), (logits, slots, of, *self._hidden(samples))
            case ("candidates", samples, rows, features):
                logits = self._of_rows(samples, vocab, dtype=np.float32)
                # A beam's extensions by K others and by all stop ids: K go on whatever ends.
                count = min(vocab, self._config.max_beams + MAX_STOPS)
                args = (logits, slots, self._of_rows(2, rows))
                return make_paged_candidates(features, count, strict), args
            case ("verify", rows, features):
                places = self.buckets.drafts + 1
                logits = self._of_rows(rows * places, vocab, dtype=np.float32)
                masks = self._of_rows(rows, places, words, dtype=np.uint32)
                args = (logits, slots, self._of_rows(rows, 2 + places), masks)
                return make_paged_verify(features, strict), (*args, *self._hidden(rows * places))
            case ("write_slots",):
                rows = abstract_numpy(new_rows(WRITTEN, vocab, TIERS[-1], history=False))
                return make_write_slots(), (slots, *_numbers((WRITTEN,), 2), rows)
            case ("write_masks",):
                masks = jax.ShapeDtypeStruct((WRITTEN, words), np.uint32)
                return make_write_masks(), (slots, *_numbers((WRITTEN,), 2), masks)
            case ("copy_pages" | "take_pages" | "put_pages" as name, pool):
                return self._on_pages(name, pool, caches)
            case _:
                numbers = _numbers((), 3)
                tokens = _numbers((self.longest,), 1)
                return make_write_history(), (slots, *numbers[:2], *tokens, numbers[2])

    def _hidden(self, samples: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Hidden states, where a head drafts from them."""
        states = self._like[2].hidden
        if states is None:
            return ()
        return (self._of_rows(samples, states.shape[-1], dtype=states.dtype),)

    def _on_pages(self, name: str, pool: int, caches: Caches) -> tuple[Any, tuple]:
        pages = self._of_rows(WRITTEN)
        fn = _make_on_pages(name, pool)
        if name == "take_pages":
            return fn, (caches, pages)
        if name == "copy_pages":
            return fn, (caches, pages, pages)
        content = jax.eval_shape(_make_on_pages("take_pages", pool), caches, pages)
        pools = tuple(cache.pools[pool] for cache in caches)
        return fn, (
            caches,
            pages,
            jax.tree.map(lambda x, y: x.update(sharding=y.sharding), content, pools),
        )


def _numbers(shape: tuple[int, ...], count: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, np.int32)] * count


@functools.lru_cache(maxsize=16)
def _make_on_pages(name: str, pool: int) -> Callable:
    """What `copy_pages` and so on do with one cache, for a tuple of caches."""

    def copy(caches, sources, targets):
        return tuple(copy_pages(cache, pool, sources, targets) for cache in caches)

    def take(caches, pages):
        return tuple(take_pages(cache, pool, pages) for cache in caches)

    def put(caches, pages, contents):
        each = zip(caches, contents, strict=True)
        return tuple(put_pages(cache, pool, pages, content) for cache, content in each)

    run = {"copy_pages": copy, "take_pages": take, "put_pages": put}[name]
    return jax.jit(run, donate_argnums=() if name == "take_pages" else (0,))


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def abstract_numpy(tree: Any) -> Any:
    """Shapes and dtypes of arrays of the host."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
