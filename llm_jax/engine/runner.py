"""The device's side of an engine: its arrays, its programs, and one step of them.

The plans of the schedulers are packed into one array, which goes up with one call to the forward of the
model; another chooses a token for each row. Nothing is waited for: a `Flight` holds what will come.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from llm_jax.cache.paged import free_bytes, init_paged, page_bytes, pool_windows
from llm_jax.config import EngineConfig
from llm_jax.engine.adapters import Adapters
from llm_jax.engine.drafters import HeadDrafter, ModelDrafter
from llm_jax.engine.drafts import ON_DEVICE
from llm_jax.engine.live import Live, LiveRequests
from llm_jax.engine.page_mover import PageMover
from llm_jax.engine.page_tables import PageTables
from llm_jax.engine.plan import Row, StepPlan
from llm_jax.engine.programs import WRITTEN, Buckets, Programs
from llm_jax.engine.taps import StepTaps, is_tapped, step_taps
from llm_jax.infer.llm import LLM
from llm_jax.infer.paged_steps import StepShape, init_slots, make_paged_forward
from llm_jax.ops.sampling import (
    EVERYTHING,
    GREEDY,
    TIERS,
    SamplingFeatures,
    new_rows,
    pack_row,
)
from llm_jax.sharding import data_shards

Plans = list[StepPlan | None]  # of each data shard


@dataclasses.dataclass
class Flight:
    """A step that runs: its plans, by shard, and the tokens it will have chosen."""

    plans: Plans
    starts: np.ndarray  # [D, R], where its rows' tokens are
    chosen: Any  # [D, S, C] or [D, R, P, C]
    candidates: Any  # [D, R, 3, C], of rows that are beams, or None
    scores: Any  # [D, T, C] or None
    taps: StepTaps | None

    def wait(self) -> None:
        """Have its results on the host, as numpy arrays. It may be interrupted and called again."""
        results = jax.device_get((self.chosen, self.candidates, self.scores))
        self.chosen, self.candidates, self.scores = results


class Runner:
    """Caches, slots, adapters, a drafter if there is one, and the programs that change them.

    live: of all requests that plans name.
    """

    def __init__(
        self, llm: LLM, config: EngineConfig, drafter: Any, max_length: int, live: LiveRequests
    ):
        self.config, self.max_length = config, max_length
        self._llm, self._live = llm, live
        model, self._mesh = llm.model, llm.mesh
        self.shards = data_shards(self._mesh)
        kind = self._mesh.devices.flat[0].device_kind
        configs = [model.config, *([drafter.model.config] if isinstance(drafter, LLM) else [])]
        self.alignment = Buckets.row_alignment(kind, *configs)
        self.windows = pool_windows(model.config)
        self.adapters = Adapters(llm, config)  # before pages take the rest of the memory
        self.drafter = self._drafter_of(drafter)
        self.drafts = config.draft_tokens if config.speculation != "off" else 0
        self.pages = config.pages or self._pages_that_fit()
        if len(self.pages) != len(self.windows):
            raise ValueError(
                f"pages={self.pages}: expected one number for each pool of windows {self.windows}"
            )

    def allocate(self) -> None:
        """Take the memory of the pages, and compile all programs if the config says so."""
        config, model = self.config, self._llm.model
        hidden = self.drafter is not None and self.drafter.reads_hidden
        with jax.set_mesh(self._mesh):
            dtype = config.cache_dtype or None
            self.caches = (init_paged(model.config, self.pages, config.page_size, self._mesh, dtype),)
            on_device = self.drafts if self.drafter else 0
            self.slots = init_slots(config.max_rows, model.config, self._mesh, on_device, hidden)
            if self.drafter:
                self.caches += self.drafter.init_caches(self.pages)
        per_row = -(-self.max_length // config.page_size)
        sizes = (per_row, len(self.windows), self.alignment, self.drafts, hidden)
        buckets = Buckets.of(config, *sizes)
        self._tables = PageTables(self.shards, config.max_rows, len(self.windows), per_row)
        states = (self.caches, self.slots, self.adapters.params)
        self.programs = Programs(self._llm, config, buckets, *states)
        self._mover = PageMover(self.programs)
        compiled = [self.programs]
        if self.drafter:
            self.drafter.prepare(buckets, self.caches[1:], self.slots)
            compiled.append(self.drafter.programs)
        if config.compile_ahead:
            for programs in compiled:
                programs.compile_all()

    @property
    def misses(self) -> int:
        """See `Engine.misses`."""
        return self.programs.misses + (self.drafter.programs.misses if self.drafter else 0)

    def run(self, plans: Plans) -> Flight:
        """Start a step; what it gives is not there yet."""
        self.caches = self._mover.move(plans, self.caches)
        self.adapters.write()
        rows, live = [plan.rows if plan else [] for plan in plans], self._live
        searches, every = live.some("search"), [row for of_shard in rows for row in of_shard]
        self._upload(
            [
                (d, row)
                for d, of_shard in enumerate(rows)
                for row in of_shard
                if row.first or (searches and self._is_new(row))
            ]
        )
        buckets = self.programs.buckets
        scored = live.some("prompt_logprobs") and any(live.of(row).is_scored(row) for row in every)
        most = (max(map(len, rows)), max(*map(buckets.chunk_tokens, plans), int(scored)))
        tapped = live.some("taps") and any(is_tapped(row, live.of(row).taps) for row in every)
        shape = buckets.largest(most[1] > 0, scored) if tapped else buckets.shape(*most, scored)
        packed, parts = shape.empty(self.shards)
        places = shape.samples // shape.rows
        of = np.zeros((self.shards, shape.rows, 2 + places), np.int32)
        of[:, :, 0] = self.config.max_rows
        tiers = {TIERS[0]}
        for d, plan in enumerate(plans):
            if plan is not None:
                tiers |= self._pack(plan, d, parts, of)
        tier = max(tiers, key=TIERS.index)
        if self.drafter:
            given = (plans, self.slots, self.caches[1:], tier, self._pack)
            self.slots, caches = self.drafter.draft(*given)
            self.caches = (self.caches[0], *caches)
        taps = None
        if tapped:
            of_row = lambda row: live.of(row).taps  # noqa: E731
            taps = step_taps(self._llm.model.config, rows, parts["starts"], shape.tokens, of_row)
        forward, given = self._forward(shape, taps)
        cache, *others = self.caches
        found = forward(self.adapters.params, cache, self.slots.newest, packed, *given)
        self.caches = (found.cache, *others)
        if taps is not None:
            taps.results = found.recorded
        candidates = self._candidates(rows, shape, found.logits)
        chosen = self._choose(rows, tier, found.logits, found.hidden, of)
        for array in jax.tree.leaves((chosen, found.scores, candidates, found.recorded)):
            array.copy_to_host_async()
        return Flight(plans, parts["starts"], chosen, candidates, found.scores, taps)

    def _is_new(self, row: Row) -> bool:
        """Whether a row's slot must be told how it samples; of beams with penalties, what they hold."""
        live = self._live.of(row)
        return row.first or (live.search is not None and live.params.penalized)

    def _candidates(
        self, rows: list[list[Row]], shape: StepShape, logits: jax.Array
    ) -> jax.Array | None:
        """How the step's beams may go on, [D, R, 3, C]; None where it has no beam."""
        if not self._live.some("search"):
            return None
        of, tier = np.zeros((self.shards, 2, shape.rows), np.int32), None
        of[:, 0] = self.config.max_rows
        for d, of_shard in enumerate(rows):
            for i, row in enumerate(of_shard):
                live = self._live.of(row)
                if live.search is not None and row.samples:
                    of[d, :, i] = row.sequence.slot, row.made
                    tier = max(tier or GREEDY, live.tier, key=TIERS.index)
        return None if tier is None else self.programs.candidates(shape, tier)(logits, self.slots, of)

    def _forward(self, shape: StepShape, taps: StepTaps | None) -> tuple[Callable, tuple]:
        """(the forward of a step, what it takes more), compiled now if it has taps that are new."""
        if taps is None:
            return self.programs.forward(shape), ()
        return make_paged_forward(self._llm.model, shape, record=taps.record), (taps.given,)

    def _choose(
        self, rows: list[list[Row]], tier: SamplingFeatures, logits, hidden, of: np.ndarray
    ) -> jax.Array:
        """The step's tokens, [D, S, C], or [D, R, P, C] where it may hold drafts."""
        given = () if hidden is None else (hidden,)
        places = of.shape[2] - 2
        if places > 1:
            words = -(-self._llm.model.config.vocab_size // 32)
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
            chosen, self.slots = verify(logits, self.slots, of, masks, *given)
            return chosen
        forms = [each for each in self._masked(rows) if each[2].grammars]
        for first in range(0, len(forms), WRITTEN):
            masks = np.zeros((WRITTEN, -(-self._llm.model.config.vocab_size // 32)), np.uint32)
            shards, at = np.zeros(WRITTEN, np.int32), np.full(WRITTEN, self.config.max_rows, np.int32)
            for n, (d, _, live, row) in enumerate(forms[first : first + WRITTEN]):
                live.grammars[row.sequence.sample].fill(masks[n])
                masks[n] &= live.mask
                shards[n], at[n] = d, row.sequence.slot
            self.slots = self.programs.write_masks(self.slots, shards, at, masks)
        choose = self.programs.choose(of.shape[1], tier)
        chosen, self.slots = choose(logits, self.slots, of[:, :, :2].swapaxes(1, 2).copy(), *given)
        return chosen

    def _masked(self, rows: list[list[Row]]) -> Iterator[tuple[int, int, Live, Row]]:
        """(shard, row's index, request, row) of the rows that sample among some tokens only."""
        if not self._live.some("mask"):
            return
        for d, of_shard in enumerate(rows):
            for i, row in enumerate(of_shard):
                live = self._live.of(row) if row.samples else None
                if live is not None and live.mask is not None:
                    yield d, i, live, row

    def _pack(
        self, plan: StepPlan, d: int, parts: dict[str, np.ndarray], of: np.ndarray
    ) -> set[SamplingFeatures]:
        """Write a shard's rows into the arrays of a step; returns the tiers that they need."""
        slots = np.array([row.sequence.slot for row in plan.rows], np.int32)
        for pool in range(len(self.windows)):
            sequences = (row.sequence for row in plan.rows)
            parts[f"table{pool}"][d, : len(slots)] = self._tables.of(d, pool, sequences, slots)
        if "adapters" in parts:
            names = [row.sequence.request.adapter for row in plan.rows]
            parts["adapters"][d, : len(names)] = [self.adapters.place(name) for name in names]
        if "targets" in parts:
            self._pack_targets(plan, d, parts["targets"])
        parts["decodes"][d], parts["rows"][d] = len(plan.decodes), len(plan.rows)
        tiers = self._pack_decodes(plan.decodes, d, parts, of)
        return tiers | self._pack_chunks(plan.chunks, len(plan.decodes), d, parts, of)

    def _pack_decodes(
        self, rows: list[Row], d: int, parts: dict[str, np.ndarray], of: np.ndarray
    ) -> set[SamplingFeatures]:
        """Rows of one token, all at once: most rows are such."""
        if not rows:
            return set()
        width, tokens, numbers, tiers = self.slots.newest.shape[-1], [], [], set()
        for row in rows:
            sequence, start = row.sequence, row.start
            known = sequence.tokens
            tokens.append(known[start] if start < len(known) else -1 - sequence.slot * width)
            slot, made = self.config.max_rows, 0
            if row.samples and not sequence.request.search:
                slot, made = sequence.slot, start + 1 - len(sequence.request.prompt)
                tiers.add(self._live.of(row).tier)
            numbers.append((start + 1, slot, made))
        count, places = len(rows), of.shape[2] - 2
        order, table = np.arange(count), np.array(numbers, np.int32)
        parts["tokens"][d, :count] = tokens
        parts["starts"][d, :count], parts["counts"][d, :count] = order, 1
        parts["lengths"][d, :count] = table[:, 0]
        parts["at"][d, : count * places] = np.repeat(order, places)
        of[d, :count, :2] = table[:, 1:]
        return tiers

    def _pack_chunks(
        self, rows: list[Row], before: int, d: int, parts: dict[str, np.ndarray], of: np.ndarray
    ) -> set[SamplingFeatures]:
        """Rows of several tokens, which come after `before` rows of one: each begins aligned."""
        at, tiers, places = before, set(), of.shape[2] - 2
        for i, row in enumerate(rows, before):
            sequence, drafted = row.sequence, row.drafted
            at = -(-at // self.alignment) * self.alignment
            end = at + row.count
            known = sequence.tokens[row.start : row.start + row.count] + sequence.draft[:drafted]
            first = -1 - sequence.slot * self.slots.newest.shape[-1]
            parts["tokens"][d, at:end] = first
            parts["tokens"][d, at : at + len(known)] = known
            if drafted and known[-1] == ON_DEVICE:
                parts["tokens"][d, end - drafted : end] = first - 1 - np.arange(drafted)
            parts["starts"][d, i], parts["counts"][d, i] = at, row.count
            parts["lengths"][d, i] = row.start + row.count
            place = np.minimum(np.arange(places), drafted) + end - 1 - drafted
            parts["at"][d, i * places : (i + 1) * places] = place
            if row.samples and not sequence.request.search:
                of[d, i, :2] = sequence.slot, row.made
                if drafted:
                    of[d, i, 2], of[d, i, 3 : 3 + drafted] = drafted, known[-drafted:]
                tiers.add(self._live.of(row).tier)
            at = end
        return tiers

    def _pack_targets(self, plan: StepPlan, d: int, targets: np.ndarray) -> None:
        """What comes after each token of the prompts, whose log probabilities may be wanted."""
        at = 0
        for i, row in enumerate(plan.rows):
            if i >= len(plan.decodes):
                at = -(-at // self.alignment) * self.alignment
            after = row.sequence.request.prompt[row.start + 1 : row.start + row.count + 1]
            targets[d, at : at + len(after)] = after
            at += row.count

    def _upload(self, fresh: list[tuple[int, Row]]) -> None:
        """Tell the device how new sequences sample."""
        vocab = self._llm.model.config.vocab_size
        for first in range(0, len(fresh), WRITTEN):
            part = fresh[first : first + WRITTEN]
            table = new_rows(WRITTEN, vocab, EVERYTHING, history=False)
            shards, at = np.zeros(WRITTEN, np.int32), np.full(WRITTEN, self.config.max_rows, np.int32)
            for i, (d, row) in enumerate(part):
                live = self._live.of(row)
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
            self.slots = self.programs.write_slots(self.slots, shards, at, table)
        for d, row in fresh:
            sequence = row.sequence
            if self._live.of(row).params.penalized:
                tokens = np.full(self.programs.longest, vocab, np.int32)
                tokens[: len(sequence.tokens)] = sequence.tokens
                numbers = (np.int32(d), np.int32(sequence.slot))
                prompt = np.int32(len(sequence.request.prompt))
                self.slots = self.programs.write_history(self.slots, *numbers, tokens, prompt)

    def _drafter_of(self, drafter: Any) -> ModelDrafter | HeadDrafter | None:
        """What drafts on the device. ValueError where it is not what the config says."""
        kinds = {"draft_model": LLM, "draft_head": tuple}
        wanted = kinds.get(self.config.speculation, type(None))
        if not isinstance(drafter, wanted):
            raise ValueError(
                f"speculation={self.config.speculation!r} with drafter={type(drafter).__name__}: "
                "'draft_model' takes an LLM, 'draft_head' what load_draft_head gives, as "
                "Engine(..., drafter=...); nothing else takes one"
            )
        if isinstance(drafter, LLM):
            return ModelDrafter(drafter, self._llm, self.config, self.max_length)
        return None if drafter is None else HeadDrafter(*drafter, self._llm, self.config)

    def _pages_that_fit(self) -> tuple[int, ...]:
        """Pages of each pool: what all rows can use, twice with a prefix cache, or less where memory is
        short.
        """
        config, size = self.config, self.config.page_size
        useful = []
        for window in self.windows:
            tokens = min(self.max_length, window + config.token_budget) if window else self.max_length
            useful.append(config.max_rows * (-(-tokens // size) + 1) * (2 if config.prefix_cache else 1))
        each = page_bytes(self._llm.model.config, size, self._mesh, config.cache_dtype or None)
        if self.drafter:
            each = tuple(map(sum, zip(each, self.drafter.page_bytes(), strict=True)))
        free = min(free_bytes(device) for device in self._mesh.local_devices)
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
