"""Many requests at once: each step computes what the scheduler chose, for all of them together.

    engine = Engine(LLM("path/to/model"), EngineConfig(max_rows=64))
    outputs = engine.generate(["我喜欢编程。", "Once upon a time"], SamplingParams(max_new_tokens=64))

A step, in order: the scheduler plans rows of tokens and says which pages are theirs
(engine/scheduler.py); the plan is packed into one array and sent with one call to the forward of the
model, and another chooses a token for each row, on the device (infer/paged_steps.py); while these run
the next step is planned, whose rows take their newest token from the device; then the chosen tokens are
fetched, become text (infer/replies.py), and are committed. Nothing is compiled after the beginning
(engine/programs.py).
"""

import asyncio
import collections
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.cache.paged import free_bytes, init_paged, page_bytes, pool_windows
from llm_jax.config import EngineConfig
from llm_jax.engine.adapters import Adapters
from llm_jax.engine.drafts import PromptLookup
from llm_jax.engine.pages import SCRATCH, PoolSpec
from llm_jax.engine.plan import Event, Row, SchedulerConfig, StepPlan
from llm_jax.engine.programs import ALIGNMENT, WRITTEN, Buckets, Programs
from llm_jax.engine.request import Reason, Request
from llm_jax.engine.request import Sequence as Running
from llm_jax.engine.scheduler import QueueFull, Scheduler
from llm_jax.engine.structured import Grammar, GrammarState
from llm_jax.engine.trace import TraceWriter
from llm_jax.infer.generate import check_lengths
from llm_jax.infer.llm import LLM
from llm_jax.infer.paged_steps import init_slots, read_chosen
from llm_jax.infer.replies import Output, Reply, best_of
from llm_jax.kernels.choice import kernel_refusal
from llm_jax.kernels.forms import explain
from llm_jax.ops.linear import LowRank
from llm_jax.ops.sampling import (
    EVERYTHING,
    TIERS,
    SamplingFeatures,
    new_rows,
    pack_mask,
    pack_row,
    tier_of,
)
from llm_jax.ops.sampling_params import SamplingParams
from llm_jax.sharding import data_shards

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a step added to one continuation of a request."""

    id: str  # of the request
    sample: int
    text: str  # may be empty: half a character, or what may become a stop string
    token_ids: tuple[int, ...]
    finish_reason: str | None  # set where it is the continuation's last
    output: Output  # the continuation, which grows


@dataclasses.dataclass
class _Live:
    """What the engine knows of a request besides the scheduler."""

    params: SamplingParams
    tier: SamplingFeatures
    stop_ids: tuple[int, ...]
    stream: int  # names the random stream of a request without a seed
    shard: int
    replies: list[Reply]
    on_text: Callable[[Delta], None] | None
    left: int  # continuations that have not ended
    mask: np.ndarray | None  # [W] uint32, the tokens that may ever come
    grammars: list[GrammarState]  # of each continuation, if they are to have a form
    lookups: list[PromptLookup]  # likewise, if drafts are made


@dataclasses.dataclass
class _Flight:
    """A step that runs: its plans, by shard, and the tokens it will have chosen."""

    plans: list[StepPlan | None]
    starts: np.ndarray  # [D, R], where its rows' tokens are
    chosen: jax.Array  # [D, R, P, C]
    scores: jax.Array | None  # [D, T, C]


class Engine:
    """Serves requests with one model on one mesh.

    `generate` for lists of prompts, `stream` in asyncio; `add`, `step` and `cancel` for a loop of one's
    own. All but the arrays are guarded by a lock: requests may come from other threads than steps.
    """

    def __init__(
        self, llm: LLM, config: EngineConfig | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self.llm, self.config = llm, config or EngineConfig()
        model, mesh = llm.model, llm.mesh
        self.max_length = self.config.max_length or model.config.max_positions
        if self.max_length > model.config.max_positions:
            raise ValueError(
                f"max_length={self.max_length}: expected at most max_positions="
                f"{model.config.max_positions} of this model"
            )
        self._clock, self._shards = clock, data_shards(mesh)
        kind, by = mesh.devices.flat[0].device_kind, model.config.attention
        kernel = by != "xla" and not kernel_refusal(kind, model.config.head_dim)
        self._alignment = ALIGNMENT if kernel else 1
        windows = pool_windows(model.config)
        self.adapters = Adapters(llm, self.config)  # before pages take the rest of the memory
        pages = self.config.pages or self._pages_that_fit(windows)
        if len(pages) != len(windows):
            raise ValueError(f"pages={pages}: expected one number for each pool of windows {windows}")
        settings = SchedulerConfig(
            max_rows=self.config.max_rows,
            token_budget=self.config.token_budget,
            page_size=self.config.page_size,
            pools=tuple(PoolSpec(n, w) for n, w in zip(pages, windows, strict=True)),
            max_length=self.max_length,
            max_queue=self.config.max_queue,
            prefix_cache=self.config.prefix_cache,
            alignment=self._alignment,
            preemption=self.config.preemption,
            host_pages=self.config.host_pages,
            aging_s=self.config.aging_s,
        )
        self.schedulers = [self._scheduler(settings, d) for d in range(self._shards)]
        with jax.set_mesh(mesh):
            dtype = self.config.cache_dtype or None
            self._cache = init_paged(model.config, pages, self.config.page_size, mesh, dtype)
            self._slots = init_slots(self.config.max_rows, model.config.vocab_size, mesh)
        per_row = -(-self.max_length // self.config.page_size)
        self._drafts = self.config.draft_tokens if self.config.speculation != "off" else 0
        buckets = Buckets.of(self.config, per_row, len(windows), self._alignment, self._drafts)
        states = (self._cache, self._slots, self.adapters.params)
        self.programs = Programs(llm, self.config, buckets, *states)
        self._host: dict[tuple[int, int, int], list[np.ndarray]] = {}  # by shard, pool, host page
        if self.config.compile_ahead:
            self.programs.compile_all()
        self._live: dict[str, _Live] = {}
        self._flights: collections.deque[_Flight] = collections.deque()
        self._numbers, self._lock = itertools.count(), threading.RLock()
        self._driver: asyncio.Task | None = None
        self.busy_s = self.scheduling_s = 0.0  # seconds in steps, and of these in the schedulers

    # Requests.

    def add(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        adapter: str | None = None,
        on_text: Callable[[Delta], None] | None = None,
    ) -> str:
        """Queue a request; returns its id.

        prompt: as `LLM.generate` takes them. priority: higher is sooner. deadline_s: seconds from now.
        adapter: the name of one that `load_adapter` was given; None is the model as it is.
        on_text: called with every `Delta`; if it raises, the request ends with the reason "error".
        Raises ValueError for what can never be served, naming the field, and QueueFull.
        """
        params = self.llm.default_sampling() if params is None else params
        ids = self.llm.encode(prompt)
        check_lengths(self.llm.model, [ids], [params.max_new_tokens])
        stop_ids = self.llm.stops(params)
        self._check(params, stop_ids)
        grammar = None
        if params.structured is not None:
            if self.llm.tokenizer is None:
                raise ValueError("SamplingParams.structured needs a tokenizer, and this LLM has none")
            grammar = Grammar.compile(params.structured, self.llm.tokenizer, stop_ids or None)
        replies = self.llm.replies(prompt, ids, params)
        with self._lock:
            self.adapters.check(adapter)
            number = next(self._numbers)
            name = str(number) if id is None else id
            scheduler = min(self.schedulers, key=lambda s: (s.load().waiting_tokens, s.load().running))
            now = self._clock()
            request = Request(
                name,
                tuple(ids),
                params.max_new_tokens,
                params.n,
                priority,
                None if deadline_s is None else now + deadline_s,
                adapter,
                params=params,
                reuse_prefix=params.prompt_logprobs is None,
            )
            if name in self._live:
                raise ValueError(f"id={name!r} is in use; give every request its own")
            scheduler.add(request)
            self._live[name] = _Live(
                params,
                tier_of([params]),
                stop_ids,
                number,
                self.schedulers.index(scheduler),
                replies,
                on_text,
                params.n,
                pack_mask(params, self.llm.model.config.vocab_size) if params.masked else None,
                [grammar.start() for _ in replies if grammar],
                [PromptLookup(self._drafts) for _ in replies if self._drafts],
            )
        return name

    def cancel(self, id: str) -> bool:
        """End a request now, wherever it is; False where there is none of that id."""
        with self._lock:
            live = self._live.get(id)
            return live is not None and self.schedulers[live.shard].cancel(id)

    def load_adapter(self, name: str, source: str | Path | Mapping[str, LowRank]) -> None:
        """Let requests name an adapter: a directory that PEFT saved, or what `LoraModel.change` gives.

        Nothing is compiled, and requests go on. ValueError naming it where it cannot be served.
        """
        change = self.adapters.pack(name, source)
        with self._lock:
            self.adapters.load(name, change)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. ValueError where there is none of that name, or requests of it are left."""
        with self._lock:
            self.adapters.check(name)
            known = [x for s in self.schedulers for x in (*s.running, *s.waiting)]
            if left := {x.request.id for x in known if x.request.adapter == name}:
                raise ValueError(
                    f"adapter {name!r} is used by requests {sorted(left)}: cancel them or wait for them"
                )
            self.adapters.unload(name)
            for scheduler in self.schedulers:
                scheduler.prefix.forget(name)

    def explain(self) -> list[str]:
        """Lines of text: the form of every operator at the shapes traced in this process so far, why it
        was chosen, and what its alternatives took where that was measured (see `kernels.forms`).
        """
        return explain()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, nor to report."""
        return not (self._live or self._flights)

    # Steps.

    def step(self) -> list[Delta]:
        """Run one step, and take in what an earlier one chose; returns what became of requests.

        With `overlap` a step is left running while the next is planned, so what a call returns may be of
        the step before.
        """
        with self._lock, jax.set_mesh(self.llm.mesh):
            start = time.perf_counter()
            began = self._dispatch()
            ahead = 1 if began and self._may_run_ahead else 0
            deltas = self._reported(event for s in self.schedulers for event in s.poll())
            while len(self._flights) > ahead:
                deltas += self._land(self._flights.popleft())
            self.busy_s += time.perf_counter() - start
            return deltas

    def generate(
        self,
        prompts: Sequence[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        on_text: Callable[[Delta], None] | None = None,
    ) -> list[Output]:
        """Continuations of all prompts, in order; n for each. See `LLM.generate`.

        adapter: of all of them, or of each; see `add`.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is a single string: expected a list of prompts")
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"sampling has {len(each)} entries for {len(prompts)} prompts")
        adapters = [adapter] * len(prompts) if isinstance(adapter, str | None) else list(adapter)
        if len(adapters) != len(prompts):
            raise ValueError(f"adapter has {len(adapters)} entries for {len(prompts)} prompts")
        each = [self.llm.default_sampling() if params is None else params for params in each]
        outputs: dict[str, list[Output]] = {}
        work = collections.deque(zip(prompts, each, adapters, strict=True))
        try:
            while work or any(name in self._live for name in outputs):
                try:
                    while work:
                        prompt, params, its = work[0]
                        if on_text is None:
                            params = params.candidates()
                        name = self.add(prompt, params, adapter=its, on_text=on_text)
                        outputs[name] = [reply.output for reply in self._live[name].replies]
                        work.popleft()
                except QueueFull:
                    pass  # a step makes room
                self.step()
        finally:
            for name in outputs:
                self.cancel(name)
            # What was cancelled is reported, and a step that was begun ahead lands.
            while any(name in self._live for name in outputs) or not (self._live or self.idle):
                self.step()
        drawn = zip(outputs.values(), each, strict=True)
        return [output for found, params in drawn for output in best_of(found, params)]

    async def stream(
        self, prompt: Any, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Delta]:
        """The continuations of one prompt as they come, beside any number of others. See `add`.

        Leaving the loop early cancels the request.
        """
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        put = lambda delta: loop.call_soon_threadsafe(queue.put_nowait, delta)  # noqa: E731
        params = self.llm.default_sampling() if params is None else params
        name = await asyncio.to_thread(self.add, prompt, params, on_text=put, **options)
        left = params.n
        try:
            while left:
                pull, driver = asyncio.ensure_future(queue.get()), self._driven(loop)
                await asyncio.wait({pull, driver}, return_when=asyncio.FIRST_COMPLETED)
                if not pull.done():
                    pull.cancel()
                    driver.result()  # raises what a step raised
                    continue
                delta = pull.result()
                left -= delta.finish_reason is not None
                yield delta
        finally:
            self.cancel(name)

    def _driven(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task:
        """The task that runs steps for all streams of an event loop, while there is something to do."""
        if self._driver is None or self._driver.done() or self._driver.get_loop() is not loop:
            self._driver = loop.create_task(self._drive())
        return self._driver

    async def _drive(self) -> None:
        while not self.idle:
            await asyncio.to_thread(self.step)

    @property
    def _may_run_ahead(self) -> bool:
        """Whether a step can be planned without the tokens of the one before."""
        forms = any(live.grammars for live in self._live.values())
        return self.config.overlap and not self._drafts and not forms

    # The device's side.

    def _dispatch(self) -> bool:
        """Plan a step and start it; False where there is nothing to do before one lands."""
        self._propose()
        self.adapters.places.begin(x for scheduler in self.schedulers for x in scheduler.running)
        start = time.perf_counter()
        plans = [scheduler.plan() for scheduler in self.schedulers]
        self.scheduling_s += time.perf_counter() - start
        if not any(plans):
            return False
        self._move_pages(plans)
        self.adapters.write()
        rows = [plan.rows if plan else [] for plan in plans]
        self._upload([(d, row) for d, of_shard in enumerate(rows) for row in of_shard if row.first])
        costs = [sum(self._up(row.count) for row in plan.chunks) if plan else 0 for plan in plans]
        scored = any(self._is_scored(row) for of_shard in rows for row in of_shard)
        most = (max(map(len, rows)), max(*costs, int(scored)))
        shape = self.programs.buckets.shape(*most, scored)
        packed, parts = shape.empty(self._shards)
        places = shape.samples // shape.rows
        of = np.zeros((self._shards, shape.rows, 2 + places), np.int32)
        of[:, :, 0] = self.config.max_rows
        tier = TIERS[0]
        for d, plan in enumerate(plans):
            if plan is not None:
                tiers = self._pack(plan, d, parts, of)
                tier = max([tier, *tiers], key=TIERS.index)
        forward = self.programs.forward(shape)
        results = forward(self.adapters.params, self._cache, self._slots.last, packed)
        logits, self._cache, *scores = results
        chosen = self._choose(rows, tier, logits, of)
        for array in (chosen, *scores):
            array.copy_to_host_async()
        self._flights.append(_Flight(plans, parts["starts"], chosen, scores[0] if scores else None))
        return True

    def _choose(
        self, rows: list[list[Row]], tier: SamplingFeatures, logits, of: np.ndarray
    ) -> jax.Array:
        """The step's tokens, [D, S, C], or [D, R, P, C] where it may hold drafts."""
        places = of.shape[2] - 2
        if places > 1:
            words = -(-self.llm.model.config.vocab_size // 32)
            masks = np.full((*of.shape[:2], places, words), 0xFFFFFFFF, np.uint32)
            for d, i, live, row in self._masked(rows):
                if live.mask is not None:
                    masks[d, i] = live.mask
                if live.grammars:
                    allowed = np.zeros_like(masks[d, i])
                    draft = of[d, i, 3 : 3 + row.drafted].tolist()
                    live.grammars[row.sequence.sample].fill_draft(allowed, draft)
                    masks[d, i] &= allowed
            verify = self.programs.verify(of.shape[1], tier)
            chosen, self._slots = verify(logits, self._slots, of, masks)
            return chosen
        forms = [each for each in self._masked(rows) if each[2].grammars]
        for first in range(0, len(forms), WRITTEN):
            masks = np.zeros((WRITTEN, -(-self.llm.model.config.vocab_size // 32)), np.uint32)
            shards, at = np.zeros(WRITTEN, np.int32), np.full(WRITTEN, self.config.max_rows, np.int32)
            for n, (d, _, live, row) in enumerate(forms[first : first + WRITTEN]):
                live.grammars[row.sequence.sample].fill(masks[n])
                masks[n] &= live.mask
                shards[n], at[n] = d, row.sequence.slot
            self._slots = self.programs.write_masks(self._slots, shards, at, masks)
        choose = self.programs.choose(of.shape[1], tier)
        chosen, self._slots = choose(logits, self._slots, of[:, :, :2].swapaxes(1, 2).copy())
        return chosen

    def _masked(self, rows: list[list[Row]]) -> Iterator[tuple[int, int, _Live, Row]]:
        """(shard, row's index, request, row) of the rows that sample among some tokens only."""
        for d, of_shard in enumerate(rows):
            for i, row in enumerate(of_shard):
                live = self._live[row.sequence.request.id] if row.samples else None
                if live is not None and live.mask is not None:
                    yield d, i, live, row

    def _propose(self) -> None:
        """Give running sequences drafts of what may come next."""
        if not self._drafts:
            return
        for sequence in itertools.chain(*(scheduler.running for scheduler in self.schedulers)):
            live = self._live[sequence.request.id]
            left = sequence.request.max_new_tokens - len(sequence.generated) - 1
            ready = sequence.pending == 0 and sequence.computed == sequence.length - 1 and left > 0
            if ready:
                lookup = live.lookups[sequence.sample]
                draft = lookup.propose(sequence.tokens, min(left, self._drafts))
                if draft and live.grammars:
                    words = -(-self.llm.model.config.vocab_size // 32)
                    scratch = np.zeros((len(draft) + 1, words), np.uint32)
                    draft = draft[: live.grammars[sequence.sample].fill_draft(scratch, draft)]
                sequence.draft = draft

    def _is_scored(self, row: Row) -> bool:
        """Whether log probabilities of the row's tokens are wanted."""
        request = row.sequence.request
        wanted = self._live[request.id].params.prompt_logprobs is not None
        return wanted and row.sequence.sample == 0 and row.start < len(request.prompt) - 1

    def _up(self, tokens: int) -> int:
        return -(-tokens // self._alignment) * self._alignment

    def _pack(self, plan: StepPlan, d: int, parts: dict[str, np.ndarray], of: np.ndarray) -> list:
        """Write a shard's rows into the arrays of a step; returns the tiers that they need."""
        at, tiers, places = 0, [], of.shape[2] - 2
        for i, row in enumerate(plan.rows):
            sequence, prompt = row.sequence, row.sequence.request.prompt
            if i >= len(plan.decodes):
                at = self._up(at)
            end, drafted = at + row.count, row.drafted
            known = sequence.tokens[row.start : row.start + row.count] + sequence.draft[:drafted]
            parts["tokens"][d, at:end] = -1 - sequence.slot
            parts["tokens"][d, at : at + len(known)] = known
            parts["starts"][d, i], parts["counts"][d, i] = at, row.count
            parts["lengths"][d, i] = row.start + row.count
            place = np.minimum(np.arange(places), drafted) + end - 1 - drafted
            parts["at"][d, i * places : (i + 1) * places] = place
            for pool, pages in enumerate(sequence.pages):
                parts[f"table{pool}"][d, i, : len(pages)] = pages
            if "adapters" in parts:
                parts["adapters"][d, i] = self.adapters.place(sequence.request.adapter)
            if "targets" in parts:
                after = prompt[row.start + 1 : row.start + row.count + 1]
                parts["targets"][d, at : at + len(after)] = after
            if row.samples:
                made = row.start + row.count - drafted - len(prompt)
                of[d, i, :2] = sequence.slot, made
                if drafted:
                    of[d, i, 2], of[d, i, 3 : 3 + drafted] = drafted, known[-drafted:]
                tiers.append(self._live[sequence.request.id].tier)
            at = end
        for name in parts:
            if name.startswith("table"):
                np.maximum(parts[name][d], 0, out=parts[name][d])  # -1: slid out of the window
        parts["decodes"][d], parts["rows"][d] = len(plan.decodes), len(plan.rows)
        return tiers

    def _move_pages(self, plans: list[StepPlan | None]) -> None:
        """Copies between pages, to the host and back, as the plans want them before their rows."""
        for pool in range(len(self._cache.pools)):
            of_pool = lambda name, pool=pool: [  # noqa: E731
                [pair for p, *pair in getattr(plan, name) if p == pool] if plan else [] for plan in plans
            ]
            for pairs in _batches(of_pool("offloads")):
                content = self.programs.take_pages(pool)(self._cache, pairs[..., 0])
                self._keep(pool, pairs[..., 1], jax.tree.map(np.asarray, content))
            for pairs in _batches(of_pool("copies"), SCRATCH):
                copy = self.programs.copy_pages(pool)
                self._cache = copy(self._cache, pairs[..., 0].copy(), pairs[..., 1].copy())
            for pairs in _batches(of_pool("restores")):
                content = self._kept(pool, pairs[..., 1])
                self._cache = self.programs.put_pages(pool)(self._cache, pairs[..., 0].copy(), content)

    def _keep(self, pool: int, hosts: np.ndarray, content: Any) -> None:
        """Pages of a pool, [L, D n, ...], in host memory as `hosts` [D, n]; -1 is none."""
        for i, (d, n) in enumerate(np.ndindex(hosts.shape)):
            arrays = [x[:, i].copy() for x in jax.tree.leaves(content)]
            if hosts[d, n] >= 0:
                self._host[d, pool, int(hosts[d, n])] = arrays

    def _kept(self, pool: int, hosts: np.ndarray) -> Any:
        """What `_keep` was given."""
        places = [(d, pool, int(hosts[d, n])) for d, n in np.ndindex(hosts.shape)]
        none = next(self._host[place] for place in places if place in self._host)
        pages = [self._host.get(place, none) for place in places]
        arrays = [np.stack(parts, axis=1) for parts in zip(*pages, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(self._cache.pools[pool]), arrays)

    def _upload(self, fresh: list[tuple[int, Row]]) -> None:
        """Tell the device how new sequences sample."""
        vocab = self.llm.model.config.vocab_size
        for first in range(0, len(fresh), WRITTEN):
            part = fresh[first : first + WRITTEN]
            table = new_rows(WRITTEN, vocab, EVERYTHING, history=False)
            shards, at = np.zeros(WRITTEN, np.int32), np.full(WRITTEN, self.config.max_rows, np.int32)
            for i, (d, row) in enumerate(part):
                live = self._live[row.sequence.request.id]
                shards[i], at[i] = d, row.sequence.slot
                pack_row(
                    table,
                    i,
                    live.params,
                    vocab_size=vocab,
                    sample_index=row.sequence.sample,
                    stop_ids=live.stop_ids,
                    default_seed=self.config.seed,
                    stream=live.stream * self.config.max_rows + row.sequence.sample,
                )
            self._slots = self.programs.write_slots(self._slots, shards, at, table)
        for d, row in fresh:
            sequence = row.sequence
            if self._live[sequence.request.id].params.penalized:
                tokens = np.full(self.programs.longest, vocab, np.int32)
                tokens[: len(sequence.tokens)] = sequence.tokens
                numbers = (np.int32(d), np.int32(sequence.slot))
                prompt = np.int32(len(sequence.request.prompt))
                self._slots = self.programs.write_history(self._slots, *numbers, tokens, prompt)

    def _land(self, flight: _Flight) -> list[Delta]:
        """Wait for a step's tokens and take them in."""
        chosen = np.asarray(flight.chosen)
        if chosen.ndim == 3:
            chosen = chosen[:, :, None]
        scores = None if flight.scores is None else read_chosen(np.asarray(flight.scores))
        found = read_chosen(chosen)
        deltas: list[Delta] = []
        for d, plan in enumerate(flight.plans):
            if plan is None:
                continue
            tokens, stopped, texts = {}, set(), {}
            for i, row in enumerate(plan.rows):
                if row.sequence.finished is not None:
                    continue
                if scores is not None and self._is_scored(row):
                    at = flight.starts[d, i]
                    self._score(row, [x[d, at : at + row.count] for x in scores])
                if row.samples:
                    tokens[i], texts[row.sequence], ended = self._reply(row, [x[d, i] for x in found])
                    stopped |= {i} if ended else set()
            start = time.perf_counter()
            events = self.schedulers[d].commit(plan, tokens, stopped)
            self.scheduling_s += time.perf_counter() - start
            deltas += self._reported(events, texts)
        return deltas

    def _reply(self, row: Row, found: list[np.ndarray]) -> tuple[list[int], str, bool]:
        """(new tokens, their text, whether it ends there) of a row's [P, ...] choices."""
        sequence, sample = row.sequence, row.sequence.sample
        live = self._live[sequence.request.id]
        reply, text, tokens = live.replies[sample], "", []
        for place, token in enumerate(found[0].tolist()):
            if token < 0 or reply.stopped:
                break
            tokens.append(token)
            text += reply.take(token, [x[place] for x in found[1:]] or None)
            if live.grammars:
                live.grammars[sample].accept(token)
        if row.drafted:
            live.lookups[sample].learn(row.drafted, int((found[0] >= 0).sum()) - 1)
        return tokens, text, reply.stopped

    def _score(self, row: Row, scores: list[np.ndarray]) -> None:
        """Note the log probabilities of the prompt's tokens after each of a row's."""
        live, prompt = self._live[row.sequence.request.id], row.sequence.request.prompt
        count = min(row.count, len(prompt) - 1 - row.start)
        for reply in live.replies:  # of a prompt that is computed again a part is known
            known = len(reply.output.prompt_logprobs or ()) - 1 - row.start
            reply.take_prompt(*(x[known:count] for x in scores[1:]))

    def _reported(self, events, texts: dict[Running, str] | None = None) -> list[Delta]:
        """The events as callers see them; requests that have ended are forgotten."""
        deltas = []
        for event in events:
            delta = self._delta(event, (texts or {}).get(event.sequence, ""))
            deltas.append(delta)
        return deltas

    def _delta(self, event: Event, text: str) -> Delta:
        name, sample = event.sequence.request.id, event.sequence.sample
        live = self._live[name]
        reply = live.replies[sample]
        if event.reason is not None:
            text += "" if event.reason in (Reason.STOP, Reason.LENGTH) else reply.end()
            reply.output.finish_reason = str(event.reason)
            live.left -= 1
        reason = None if event.reason is None else str(event.reason)
        delta = Delta(name, sample, text, tuple(event.tokens), reason, reply.output)
        if not live.left:
            del self._live[name]
        if live.on_text is not None:
            try:
                live.on_text(delta)
            except Exception:  # the caller's own: it must not touch other requests
                logger.exception("request %s: its callback raised, it ends here", name)
                live.on_text = None
                self.schedulers[live.shard].cancel(name, Reason.ERROR)
        return delta

    # Checks and sizes.

    def _scheduler(self, settings: SchedulerConfig, shard: int) -> Scheduler:
        if self.config.trace:
            path = Path(f"{self.config.trace}.{shard}" if shard else self.config.trace)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w", encoding="utf-8", buffering=1)  # whole lines, whatever happens
            return TraceWriter(settings, self._clock, file)
        may_begin = self.adapters.places.may_begin if self.config.adapters else None
        return Scheduler(settings, self._clock, may_begin)

    def _check(self, params: SamplingParams, stop_ids: tuple[int, ...]) -> None:
        """Refuse by name what the steps cannot do."""
        if params.best_of is not None:
            raise ValueError(
                f"SamplingParams.best_of is {params.best_of}: what is chosen at the end cannot come in "
                "pieces; use None, or `generate` without on_text"
            )
        vocab = self.llm.model.config.vocab_size
        if params.prompt_logprobs is not None and not self.config.prompt_logprobs:
            raise ValueError(
                f"SamplingParams.prompt_logprobs is {params.prompt_logprobs}: this engine was not made "
                "for it; set EngineConfig.prompt_logprobs"
            )
        tier_of([params])
        table = new_rows(1, vocab, EVERYTHING, history=False)
        pack_row(
            table,
            0,
            params,
            vocab_size=vocab,
            sample_index=0,
            stop_ids=stop_ids,
            default_seed=0,
            stream=0,
        )

    def _pages_that_fit(self, windows: tuple[int, ...]) -> tuple[int, ...]:
        """Pages of each pool: what all rows can use, twice with a prefix cache, or less where memory is
        short.
        """
        config, size = self.config, self.config.page_size
        useful = []
        for window in windows:
            tokens = min(self.max_length, window + config.token_budget) if window else self.max_length
            useful.append(config.max_rows * (-(-tokens // size) + 1) * (2 if config.prefix_cache else 1))
        mesh = self.llm.mesh
        each = page_bytes(self.llm.model.config, size, mesh, config.cache_dtype or None)
        free = min(free_bytes(device) for device in mesh.local_devices)
        wanted = sum(n * b for n, b in zip(useful, each, strict=True))
        fits = min(1.0, free * config.memory_share / wanted)
        pages = tuple(int(n * fits) for n in useful)
        if min(pages) < -(-self.max_length // size) + 2 and fits < 1:
            raise ValueError(
                f"{free / 2**30:.1f} GiB of memory are free, {wanted / 2**30:.1f} GiB serve max_rows="
                f"{config.max_rows} of max_length={self.max_length}: lower one, or take an 8-bit "
                "cache_dtype"
            )
        return pages


def _batches(pairs: list[list], fill: int = -1) -> Iterator[np.ndarray]:
    """Pairs of pages of each shard as [D, n, 2] arrays of one size, the rest (0, fill)."""
    for first in range(0, max(map(len, pairs)), WRITTEN):
        batch = np.full((len(pairs), WRITTEN, 2), (SCRATCH, fill), np.int32)
        for d, of_shard in enumerate(pairs):
            part = of_shard[first : first + WRITTEN]
            batch[d, : len(part)] = np.array(part, np.int32).reshape(-1, 2)
        yield batch
