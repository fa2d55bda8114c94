"""Training rows out of token stores: mapped, never loaded, in an order that is never held.

    loader = StoreLoader([Source("books", open_store("books"), weight=3.0),
                          Source("web", open_store("web"), weight=1.0)], 1024, batch_size=64, seed=0)
    loader(step)                 # {"tokens", "targets", "segment_ids", "positions"}, each [B / hosts, T]

A row is a window of T consecutive tokens of one shard, so documents follow each other without padding
(the last row of a shard alone has some) and a long one goes on in the next window. Each document, or
part of one, is a segment whose positions count from 0: attention never joins two. A token's target is
the next token of its document, also where the window ends in between; a document's last has none. So an
epoch has each token once, and each but the first of a document once as a target.

What a batch holds is arithmetic on its number: nothing is drawn, kept or read ahead, whatever the size
of the stores. Rows of several sources are interleaved as their weights say; each source has an endless
stream of its own, epoch after epoch in a new order, of which the batches take the next rows.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.data.loader import host_part
from llm_jax.data.packing import NO_TARGET, Batch, row_batches
from llm_jax.data.permutation import permuted
from llm_jax.data.token_store import TRAIN, TokenStore

PERIOD = 1 << 16  # rows after which sources take turns as before; weights are multiples of its inverse
_ORDER = 2  # keeps this random stream apart from the others of a seed


class SplitRows:
    """The rows of one split of a store, in order: `read` gets some of them.

    length: tokens of a row, T.
    """

    def __init__(self, store: TokenStore, split: str, length: int):
        if length < 2:
            raise ValueError(f"length={length}: expected a row of 2 tokens or more")
        self.length, self._store = length, store
        self._shards = store.splits[split].shards
        self._tokens = [np.asarray(store.tokens(shard)) for shard in self._shards]  # views of the maps
        self._offsets = [np.asarray(store.offsets(shard)) for shard in self._shards]
        rows = [-(-shard.tokens // length) for shard in self._shards]
        self._first = np.cumsum([0, *rows])  # row of each shard

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, indices: np.ndarray) -> Batch:
        """Rows [n] as {"tokens", "targets", "segment_ids", "positions"}, each [n, T] int32.

        ValueError, with file and place, for an id that the vocabulary does not have.
        """
        shape = len(indices), self.length
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
        batch["targets"] = np.full(shape, NO_TARGET, np.int32)
        for row, index in enumerate(indices.tolist()):
            self._fill({name: values[row] for name, values in batch.items()}, index)
        return batch

    def _fill(self, row: Batch, index: int) -> None:
        """Row `index` into zeros [T], and targets that are none."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        tokens, offsets = self._tokens[number], self._offsets[number]
        start = (index - int(self._first[number])) * self.length
        ids = tokens[start : start + self.length + 1]  # and the target of the last
        self._store.check_ids(self._shards[number], ids, start)
        size = min(len(ids), self.length)
        first, last = np.searchsorted(offsets, (start, start + size), side="right")
        ends = offsets[first:last] - start  # of documents, one after their last token
        row["tokens"][:size] = ids[:size]
        row["targets"][: len(ids) - 1] = ids[1:]
        row["targets"][ends - 1] = NO_TARGET
        begins, places = np.zeros(size, np.int32), np.arange(size, dtype=np.int32)
        begins[0] = 1
        begins[ends[ends < size]] = 1
        row["segment_ids"][:size] = np.cumsum(begins)
        row["positions"][:size] = places - np.maximum.accumulate(places * begins)


class SplitBatches(Sequence[Batch]):
    """All rows of a split once, in batches that are read when they are asked for.

    What the last one lacks is padding that carries no loss.
    """

    def __init__(self, rows: SplitRows, batch_size: int):
        self._rows, self._batch_size = rows, batch_size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        start = number * self._batch_size
        indices = np.arange(start, min(start + self._batch_size, len(self._rows)))
        return row_batches(self._rows.read(indices), self._batch_size)[0]


@dataclasses.dataclass(frozen=True)
class Source:
    """A store to take training rows from."""

    name: str  # in messages
    store: TokenStore
    weight: float  # its rows' share of all, relative to the other sources'


class StoreLoader:
    """Batches of rows of one or several stores: `loader(step)` -> {name: [B / hosts, T]}.

    row_tokens: T. batch_size: rows of the global batch; host `host_index` of `host_count` gets its
    equal part. Raises ValueError for a weight too small to ever be drawn.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        row_tokens: int,
        batch_size: int,
        seed: int,
        *,
        host_index: int = 0,
        host_count: int = 1,
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: expected {least} or more")
        self._rows = [SplitRows(source.store, TRAIN, row_tokens) for source in sources]
        self._turns, self._ranks, self._shares = _interleaved(sources)
        self._sources, self._batch_size, self._seed = sources, batch_size, seed
        self._part = host_part(batch_size, host_index, host_count)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which the only source comes once. ValueError when there are several."""
        if len(self._rows) > 1:
            names = [source.name for source in self._sources]
            raise ValueError(f"epochs of {names}: expected steps, as the epochs of each end at its own")
        return len(self._rows[0]) / self._batch_size

    @property
    def fingerprint(self) -> dict[str, int]:
        """What the batches are a function of: a run is resumed only where it is the same."""
        about = {"batch_size": self._batch_size, "seed": self._seed, "row_tokens": self._rows[0].length}
        for source, share in zip(self._sources, self._shares.tolist(), strict=True):
            about[f"crc32 of {source.name}"] = source.store.crc32
            about[f"rows of {source.name} in {PERIOD}"] = share
        return about

    def __call__(self, step: int) -> Batch:
        if step < 0:
            raise ValueError(f"step={step}: expected 0 or more")
        places = step * self._batch_size + np.arange(self._batch_size)[self._part]
        periods, places = np.divmod(places, PERIOD)
        turns = self._turns[places]
        ranks = periods * self._shares[turns] + self._ranks[places]
        batch: Batch = {}
        for source, rows in enumerate(self._rows):
            mine = np.flatnonzero(turns == source)
            for name, values in rows.read(self._order(source, ranks[mine])).items():
                batch.setdefault(name, np.empty((len(turns), rows.length), np.int32))[mine] = values
        return batch

    def _order(self, source: int, ranks: np.ndarray) -> np.ndarray:
        """Rows [n] of a source that stand at these places [n] of its stream."""
        size = len(self._rows[source])
        epochs, places = np.divmod(ranks, size)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            places[mine] = permuted(places[mine], size, (self._seed, _ORDER, source, epoch))
        return places


def _interleaved(sources: Sequence[Source]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How sources take turns in a period: (source [PERIOD], which of its rows [PERIOD], rows [n]).

    The rows of each are spread evenly, so every stretch of the stream has all weights nearly.
    """
    weights = np.array([source.weight for source in sources], np.float64)
    exact = weights / weights.sum() * PERIOD
    rows = np.floor(exact).astype(np.int64)
    rows[np.argsort(rows - exact, kind="stable")[: PERIOD - rows.sum()]] += 1  # the largest remainders
    if not rows.all():
        name = sources[int(np.argmin(rows))].name
        least = weights.sum() / PERIOD
        raise ValueError(f"weight of {name}={weights[rows.argmin()]}: expected {least:.3g} or more")
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in rows])
    order = np.argsort(times, kind="stable")
    turns = np.repeat(np.arange(len(rows)), rows)[order]
    return turns, np.concatenate([np.arange(count) for count in rows])[order], rows
