"""Blocks of several pages on their way from HBM to VMEM, some ahead of the one that is computed with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Fetcher(NamedTuple):
    """pages: references [L, P, ...] in HBM; blocks: [buffers, pages, ...] of each in VMEM; done: their
    semaphores; lanes: which part of the pages' last axis a core reads, None = all.
    """

    layer: jax.Array
    page_of: Callable[[Any, Any], Any]  # (row, which of its pages) -> number of the page
    pages: tuple[Any, ...]
    blocks: tuple[Any, ...]
    done: Any
    lanes: Any = None

    @property
    def at_once(self) -> int:
        """Pages of a block."""
        return self.blocks[0].shape[1]

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.at_once * self.blocks[0].shape[3]

    def start(self, buffer, row, block, there) -> None:
        """Starts fetching the first `there` pages of a block of a row."""

        def one(i):
            page = self.page_of(row, block * self.at_once + i)
            for part, (source, target) in enumerate(zip(self.pages, self.blocks, strict=True)):
                source = source.at[self.layer, page]
                if not part and self.lanes is not None:
                    source = source.at[:, :, self.lanes]
                done = self.done.at[part, buffer]
                pltpu.make_async_copy(source, target.at[buffer, i], done).start()

        @pl.when(there == self.at_once)
        def _():
            for i in range(self.at_once):
                one(i)

        @pl.when(there < self.at_once)
        def _():
            lax.fori_loop(0, there, lambda i, _: one(i), None)

    def wait(self, buffer, there) -> None:
        """Until so many pages of a block are there."""

        @pl.when(there == self.at_once)
        def _():
            for part, block in enumerate(self.blocks):
                whole = block.at[buffer]
                pltpu.make_async_copy(whole, whole, self.done.at[part, buffer]).wait()

        @pl.when(there < self.at_once)
        def _():
            for part, block in enumerate(self.blocks):
                one = block.at[buffer, 0]
                copy = pltpu.make_async_copy(one, one, self.done.at[part, buffer])
                lax.fori_loop(0, there, lambda _, none, copy=copy: copy.wait(), None)
