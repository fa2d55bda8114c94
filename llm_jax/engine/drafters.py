"""Models that draft on the device, for all sequences of a step at once.

    DraftModel    a small model with the same tokens. It reads what the large one reads, into pages of
                  its own under the same numbers: so shared prefixes, forks, windows and pages that
                  were moved are right without a thought, and a page costs more.
    DraftHead     a cell on the large model's own hidden states (models/draft_head.py). No pages.

Before a step `draft` writes tokens to `Slots.newest`, where its rows have room for them. The host never
sees them; it learns how many stayed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.cache.paged import PagedCache, init_paged, page_bytes, pool_windows
from llm_jax.config import EngineConfig
from llm_jax.engine.plan import StepPlan
from llm_jax.engine.programs import Buckets, Compiled, abstract
from llm_jax.infer.draft_steps import OF_MODEL, make_model_draft
from llm_jax.infer.llm import LLM
from llm_jax.infer.paged_steps import Slots, make_paged_forward
from llm_jax.ops.sampling import TIERS, SamplingFeatures
from llm_jax.tree import num_bytes

Plans = list[StepPlan | None]  # of each data shard


class DraftModel:
    """A small model beside the large one, on the same mesh.

    Raises ValueError for models that cannot go together, naming what differs.
    """

    def __init__(self, llm: LLM, target: LLM, config: EngineConfig, max_length: int):
        ours, theirs = llm.model.config, target.model.config
        if llm.mesh != target.mesh:
            raise ValueError(
                f"drafter: its mesh is {llm.mesh}; expected that of the model, {target.mesh}"
            )
        if pool_windows(ours) != pool_windows(theirs):
            raise ValueError(
                f"drafter: its layers' windows are {pool_windows(ours)}, the model's "
                f"{pool_windows(theirs)}: expected the same, as both use one table of pages"
            )
        if ours.max_positions < max_length:
            raise ValueError(
                f"drafter: max_positions={ours.max_positions} of it are fewer than max_length="
                f"{max_length}; set EngineConfig.max_length"
            )
        self.cost = num_bytes(llm.params) / num_bytes(target.params)
        self.windows = pool_windows(ours)
        self._llm, self._config = llm, config

    def page_bytes(self) -> tuple[int, ...]:
        """Bytes on one device of one page of each pool."""
        config = self._config
        mesh, dtype = self._llm.mesh, config.cache_dtype or None
        return page_bytes(self._llm.model.config, config.page_size, mesh, dtype)

    def init_cache(self, pages: tuple[int, ...]) -> PagedCache:
        """Its keys and values, in so many pages of each pool."""
        config = self._config
        dtype = config.cache_dtype or None
        return init_paged(self._llm.model.config, pages, config.page_size, self._llm.mesh, dtype)

    def prepare(self, buckets: Buckets, cache: PagedCache, slots: Slots) -> "_ModelPrograms":
        """Its programs, not compiled yet."""
        self.programs = _ModelPrograms(self._llm, buckets.of_drafter, cache, slots)
        return self.programs

    def draft(
        self, plans: Plans, slots: Slots, cache: PagedCache, pack: Callable
    ) -> tuple[Slots, PagedCache]:
        """Read a step's tokens and draft what its rows have room for. pack: see `Engine`."""
        buckets, mirrors = self.programs.buckets, [_without_drafts(plan) for plan in plans]
        rows = max(len(mirror.rows) for mirror in mirrors)
        alignment = buckets.alignment
        chunks = max(sum(_up(row.count, alignment) for row in mirror.chunks) for mirror in mirrors)
        shape = buckets.shape(rows, chunks)
        packed, parts = shape.empty(len(plans))
        of = np.zeros((len(plans), shape.rows, OF_MODEL + shape.pools * shape.pages), np.int32)
        of[..., 0] = self._config.max_rows
        tier = TIERS[0]
        for d, (plan, mirror) in enumerate(zip(plans, mirrors, strict=True)):
            made = np.zeros((len(plans), shape.rows, 3), np.int32)
            tiers = pack(mirror, d, parts, made)
            tier = max([tier, *tiers], key=TIERS.index)
            drafted = {row.sequence: row.drafted for row in plan.rows} if plan else {}
            for i, row in enumerate(mirror.decodes):
                if wanted := drafted[row.sequence]:
                    of[d, i, :OF_MODEL] = *made[d, i, :2], wanted, row.start + row.count
            for pool in range(shape.pools):
                first = OF_MODEL + pool * shape.pages
                of[d, :, first : first + shape.pages] = parts[f"table{pool}"][d]
        forward = self.programs.forward(shape)
        logits, cache, *_ = forward(self._llm.params, cache, slots.newest, packed)
        if not of[..., 2].any():
            return slots, cache
        return self.programs.draft(shape.rows, tier)(self._llm.params, cache, slots, logits, of)


def _without_drafts(plan: StepPlan | None) -> StepPlan:
    """The step as a small model reads it: of a row with a draft the token before that."""
    mirror = StepPlan(0)
    for row in plan.rows if plan else []:
        own = dataclasses.replace(row, count=row.count - row.drafted, drafted=0)
        (mirror.decodes if own.count == 1 else mirror.chunks).append(own)
    return mirror


def _up(tokens: int, alignment: int) -> int:
    return -(-tokens // alignment) * alignment


class _ModelPrograms(Compiled):
    """The forward of a small model, and the loop that drafts."""

    def __init__(self, llm: LLM, buckets: Buckets, cache: PagedCache, slots: Slots):
        super().__init__(llm, buckets)
        self._model = llm.model
        self._like = abstract((llm.params, cache, slots))

    def forward(self, shape: Any) -> Callable:
        """See `make_paged_forward`."""
        return self._get(("forward", shape))

    def draft(self, rows: int, features: SamplingFeatures) -> Callable:
        """See `make_model_draft`."""
        return self._get(("draft", rows, features))

    def _work(self) -> list[Any]:
        shapes = list(self.buckets.shapes(scored=False))
        rows = sorted({shape.rows for shape in shapes})
        return [("forward", shape) for shape in shapes] + [("draft", n, t) for n in rows for t in TIERS]

    def _build(self, key: Any) -> tuple[Any, tuple]:
        params, cache, slots = self._like
        if key[0] == "forward":
            args = (params, cache, slots.newest, self._packed(key[1]))
            return make_paged_forward(self._model, key[1]), args
        _, rows, features = key
        pools, pages = self.buckets.pools, self.buckets.pages
        logits = self._of_rows(rows, self._model.config.vocab_size, dtype=np.float32)
        of = self._of_rows(rows, OF_MODEL + pools * pages)
        return make_model_draft(self._model, pools, features), (params, cache, slots, logits, of)
