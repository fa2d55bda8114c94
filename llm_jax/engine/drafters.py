"""Models that draft on the device, for all sequences of a step at once.

    ModelDrafter    a small model with the same tokens. It reads what the large one reads, into pages of
                    its own under the same numbers: so shared prefixes, samples, windows and pages that
                    were moved are right without a thought, and a page costs more.
    HeadDrafter     a cell on the large model's own hidden states (models/draft_head.py). No pages.

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
from llm_jax.engine.programs import Buckets, Caches, ProgramSet, abstract
from llm_jax.infer.draft_steps import OF_MODEL, make_head_draft, make_model_draft
from llm_jax.infer.llm import LLM
from llm_jax.infer.paged_steps import Slots, make_paged_forward
from llm_jax.models import Params
from llm_jax.models.draft_head import DraftHeadModel
from llm_jax.ops.sampling import TIERS, SamplingFeatures
from llm_jax.tree import num_bytes

Plans = list[StepPlan | None]  # of each data shard


class ModelDrafter:
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
        self.cost = num_bytes(llm.params) / num_bytes(target.params)  # of a token, in the model's steps
        self.reads_hidden = False
        self._llm, self._config = llm, config

    def page_bytes(self) -> tuple[int, ...]:
        """Bytes on one device of one page of each pool."""
        config = self._config
        mesh, dtype = self._llm.mesh, config.cache_dtype or None
        return page_bytes(self._llm.model.config, config.page_size, mesh, dtype)

    def init_caches(self, pages: tuple[int, ...]) -> Caches:
        """Its keys and values, in so many pages of each pool."""
        config = self._config
        dtype = config.cache_dtype or None
        return (init_paged(self._llm.model.config, pages, config.page_size, self._llm.mesh, dtype),)

    def prepare(self, buckets: Buckets, caches: Caches, slots: Slots) -> None:
        """Say what its `programs` are for: none is compiled yet."""
        self.programs = _ModelPrograms(self._llm, buckets.of_drafter, caches[0], slots)

    def draft(
        self, plans: Plans, slots: Slots, caches: Caches, tier: SamplingFeatures, pack: Callable
    ) -> tuple[Slots, Caches]:
        """Read a step's tokens and draft what its rows have room for; the slots and caches after it.

        caches: those of `init_caches`. tier: what the rows need to be chosen. pack: `Runner._pack`.
        """
        (cache,), params = caches, self._llm.params
        buckets, mirrors = self.programs.buckets, [_without_drafts(plan) for plan in plans]
        rows = max(len(mirror.rows) for mirror in mirrors)
        shape = buckets.shape(rows, max(map(buckets.chunk_tokens, mirrors)))
        packed, parts = shape.empty(len(plans))
        of = np.zeros((len(plans), shape.rows, OF_MODEL + shape.pools * shape.pages), np.int32)
        of[..., 0] = self._config.max_rows
        for d, (plan, mirror) in enumerate(zip(plans, mirrors, strict=True)):
            pack(mirror, d, parts, np.zeros((len(plans), shape.rows, 3), np.int32))
            drafted = {row.sequence: row.drafted for row in plan.rows} if plan else {}
            for i, row in enumerate(mirror.decodes):
                if wanted := drafted[row.sequence]:
                    of[d, i, :OF_MODEL] = row.sequence.slot, row.made, wanted, row.start + row.count
        tables = [parts[f"table{pool}"] for pool in range(shape.pools)]
        of[..., OF_MODEL:] = np.concatenate(tables, axis=-1)
        read = self.programs.forward(shape)(params, cache, slots.newest, packed)
        cache = read.cache
        if of[..., 2].any():
            draft = self.programs.draft(shape.rows, tier)
            slots, cache = draft(params, cache, slots, read.logits, of)
        return slots, (cache,)


class HeadDrafter:
    """A draft head on the model's own hidden states.

    Raises ValueError for a head of another model.
    """

    def __init__(self, head: DraftHeadModel, params: Params, target: LLM, config: EngineConfig):
        ours, theirs = head.config, target.model.config
        for name in ("embed_dim", "vocab_size"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"drafter: {name}={getattr(ours, name)} of its model; expected "
                    f"{getattr(theirs, name)}, as this one has: train a head for it "
                    "(configs/draft_head.py)"
                )
        table = ours.vocab_size * ours.embed_dim * np.dtype(theirs.param_dtype).itemsize
        self.cost = (num_bytes(params) + table) / num_bytes(target.params)
        self.reads_hidden = True
        self._target, self._config, self._head, self._params = target, config, head, params

    def page_bytes(self) -> tuple[int, ...]:
        """None: it has no pages."""
        return (0,) * len(pool_windows(self._target.model.config))

    def init_caches(self, pages: tuple[int, ...]) -> Caches:
        """None."""
        return ()

    def prepare(self, buckets: Buckets, caches: Caches, slots: Slots) -> None:
        """Say what its `programs` are for: none is compiled yet."""
        self.programs = _HeadPrograms(self._target, buckets, self._head, self._params, slots)

    def draft(
        self, plans: Plans, slots: Slots, caches: Caches, tier: SamplingFeatures, pack: Callable
    ) -> tuple[Slots, Caches]:
        """Draft what the rows of a step have room for; see `ModelDrafter.draft`."""
        rows = [[row for row in plan.chunks if row.drafted] if plan else [] for plan in plans]
        if not any(rows):
            return slots, caches
        count = next(n for n in self.programs.buckets.mixed if n >= max(map(len, rows)))
        of = np.zeros((len(plans), count, 3), np.int32)
        of[..., 0] = self._config.max_rows
        for d, of_shard in enumerate(rows):
            for i, row in enumerate(of_shard):
                of[d, i] = row.sequence.slot, row.made, row.drafted
        return self.programs.draft(count, tier)(self._params, self._target.params, slots, of), caches


def _without_drafts(plan: StepPlan | None) -> StepPlan:
    """The step as a small model reads it: of a row with a draft the token before that."""
    mirror = StepPlan(0)
    for row in plan.rows if plan else []:
        own = dataclasses.replace(row, count=row.count - row.drafted, drafted=0)
        (mirror.decodes if own.count == 1 else mirror.chunks).append(own)
    return mirror


class _ModelPrograms(ProgramSet):
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


class _HeadPrograms(ProgramSet):
    """The loop that drafts by a head."""

    def __init__(self, llm: LLM, buckets: Buckets, head: DraftHeadModel, params: Params, slots: Slots):
        super().__init__(llm, buckets)
        self._model, self._head = llm.model, head
        self._like = abstract((params, llm.params, slots))

    def draft(self, rows: int, features: SamplingFeatures) -> Callable:
        """See `make_head_draft`."""
        return self._get(("draft", rows, features))

    def _work(self) -> list[Any]:
        return [("draft", n, tier) for n in self.buckets.mixed for tier in TIERS]

    def _build(self, key: Any) -> tuple[Any, tuple]:
        _, rows, features = key
        return make_head_draft(self._model, self._head, features), (*self._like, self._of_rows(rows, 3))
