"""The pages of running sequences as steps want them, kept from step to step."""

from collections.abc import Iterable

import numpy as np

from llm_jax.engine.request import Sequence


class PageTables:
    """By shard and slot, int32 [slots, pages] for each pool; what a sequence has no page for is 0.

    A step takes rows of it, which is much faster than making them of lists. Only those are written whose
    pages are not what they were when their slot was last asked for.
    """

    def __init__(self, shards: int, slots: int, pools: int, pages: int):
        self._tables = np.zeros((shards, pools, slots, pages), np.int32)
        self._held: list[list[list[list[int]]]] = [
            [[[] for _ in range(slots)] for _ in range(pools)] for _ in range(shards)
        ]

    def of(self, shard: int, pool: int, sequences: Iterable[Sequence], slots: np.ndarray) -> np.ndarray:
        """The rows of sequences of a shard, which have these slots: [n, pages]."""
        table, held = self._tables[shard, pool], self._held[shard][pool]
        for sequence in sequences:
            pages, slot = sequence.pages[pool], sequence.slot
            if pages != held[slot]:
                held[slot] = pages.copy()
                table[slot] = 0
                table[slot, : len(pages)] = pages
                np.maximum(table[slot], 0, out=table[slot])  # -1: slid out of the window
        return table[slots]
