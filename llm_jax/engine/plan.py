"""What a scheduler is told at its beginning, and what it says: plain data, without a decision in it."""

import dataclasses

from llm_jax.engine.pages import PoolSpec
from llm_jax.engine.request import Reason, Sequence

PREEMPTION = ("recompute", "offload")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Sizes and policy. ValueError names the field that cannot be."""

    max_rows: int  # running sequences at most
    token_budget: int  # new tokens of a step at most, chunks rounded up to `alignment`
    page_size: int  # tokens
    pools: tuple[PoolSpec, ...]
    max_length: int  # tokens of a sequence, prompt and generated
    max_queue: int = 1024  # waiting requests
    prefix_cache: bool = True
    alignment: int = 16  # rows of several tokens begin at multiples of this
    chunk_tokens: int = 0  # of a row in a step at most; 0 = the budget
    preemption: str = "recompute"  # or "offload": to host pages, while there are any
    host_pages: int = 0  # for each pool
    prefix_host_pages: int = 0  # likewise, for prefixes that would be forgotten; preempted ones go first
    aging_s: float = 10.0  # seconds in which a request gains one priority; inf: never
    watermark: float = 0.01  # share of each pool that admissions leave to the running sequences

    def __post_init__(self):
        for name in ("max_rows", "page_size", "max_queue", "alignment"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: a prompt and one new token are at least 2")
        least = self.max_rows - 1 + self.alignment
        if self.token_budget < least:
            raise ValueError(
                f"token_budget={self.token_budget}: expected max_rows - 1 + alignment = {least} or "
                "more, so that a prompt gets on while all other rows decode"
            )
        if self.chunk_tokens < 0 or self.chunk_tokens % self.alignment:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens}: expected 0 or a multiple of "
                f"alignment={self.alignment}"
            )
        if not self.pools:
            raise ValueError("pools=(): at least one pool of pages is needed")
        for spec in self.pools:
            if spec.pages < 2 or spec.window < 0:
                raise ValueError(f"pools has {spec}: expected at least 2 pages and a window from 0 on")
        self._check_policy()

    def _check_policy(self):
        if self.preemption not in PREEMPTION:
            raise ValueError(f"preemption={self.preemption!r}: expected one of {PREEMPTION}")
        if self.host_pages < 0 or (self.host_pages > 0) != (self.preemption == "offload"):
            raise ValueError(
                f"host_pages={self.host_pages} with preemption={self.preemption!r}: offload needs host "
                "pages, recompute has no use for them"
            )
        if self.prefix_host_pages < 0 or (self.prefix_host_pages and not self.prefix_cache):
            raise ValueError(
                f"prefix_host_pages={self.prefix_host_pages} with prefix_cache={self.prefix_cache}: "
                "expected 0, or more with prefix_cache=True"
            )
        if not self.aging_s > 0:
            raise ValueError(f"aging_s={self.aging_s}: must be more than 0 seconds (inf: no aging)")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark}: must be a share from 0 to below 1")

    @property
    def chunk_limit(self) -> int:
        """Tokens of a row in a step at most."""
        return min(self.chunk_tokens or self.token_budget, self.token_budget)


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """Tokens [start, start + count) of a sequence in one step."""

    sequence: Sequence
    start: int
    count: int  # the last `drafted` of them are the sequence's draft
    samples: bool  # whether a token comes after the last one: it is the sequence's last so far
    first: bool  # whether the sequence had no row in its slot yet: its sampling state must be set
    drafted: int = 0

    @property
    def made(self) -> int:
        """How many tokens its sequence made before the one that follows its last that is no draft."""
        return self.start + self.count - self.drafted - len(self.sequence.request.prompt)


@dataclasses.dataclass(slots=True, eq=False)
class StepPlan:
    """One step. Read it, and its sequences' pages and slots, before the scheduler is called again.

    Before the step, in this order: `offloads`, `copies`, `restores`, each all at once (a page may be the
    source of one entry and the target of a later one). Pages hold what the steps before left in them.
    """

    number: int
    decodes: list[Row] = dataclasses.field(default_factory=list)  # one token each
    chunks: list[Row] = dataclasses.field(default_factory=list)  # several tokens each
    copies: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)  # pool, source, target
    offloads: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)  # pool, device, host
    restores: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)  # pool, device, host
    released: list[Sequence] = dataclasses.field(default_factory=list)  # have lost their slots
    cost: int = 0  # tokens of the budget

    @property
    def rows(self) -> list[Row]:
        """The decodes, then the chunks: a row's index for `commit` is its place here."""
        return self.decodes + self.chunks

    @property
    def tokens(self) -> int:
        """New tokens, without padding."""
        return len(self.decodes) + sum(row.count for row in self.chunks)


@dataclasses.dataclass(slots=True)
class Event:
    """New tokens of a sequence, and why it ended if it did."""

    sequence: Sequence
    tokens: list[int]
    reason: Reason | None


@dataclasses.dataclass
class Statistics:
    """Counts since the start."""

    steps: int = 0
    rows: int = 0
    scheduled_tokens: int = 0
    padded_tokens: int = 0  # of the budget
    requests: int = 0
    refused: int = 0  # the queue was full
    finished: int = 0  # sequences, for any reason
    preemptions: int = 0
    offloads: int = 0  # of those, to host pages
    copied_pages: int = 0
    deferred: int = 0  # admissions put off as their prefix was being computed
    hit_tokens: int = 0  # from the prefix cache
    host_hit_tokens: int = 0  # of those, by pages that were on the host


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy it is. Pages by pool."""

    running: int
    waiting: int
    waiting_tokens: int  # to compute before the waiting ones can go on
    free_pages: tuple[int, ...]  # free or idle
    total_pages: tuple[int, ...]
    free_host_pages: tuple[int, ...]  # free or kept for prefixes
