"""Batches as a pure function of (seed, step, host), so that a resumed run replays nothing.

Records form one endless stream: epoch 0 in its shuffled order, then epoch 1 in its own, and so on.
Batch `step` takes the stream's records from step * B to (step + 1) * B - 1, so each record comes
exactly once per epoch and none is dropped: where B does not divide the number of records, a batch
holds the end of one epoch and the beginning of the next.

The way of a batch: `loader(step)` numpy rows of this host -> `to_device` global sharded arrays;
`prefetch` does both ahead of the step that runs. Processes whose devices hold the same rows
(`sharding.host_share`) are one host here.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax import sharding
from llm_jax.data.ngrams import pad_ngrams
from llm_jax.data.packing import Batch, pad_batch
from llm_jax.data.tasks import Example

T = TypeVar("T")
Transform = Callable[[Example, np.random.Generator], Example]

WINDOW = 16  # batches whose records are sorted by length together
_ORDER, _TRANSFORM = 0, 1  # keep the random streams of one seed apart


class BatchOrder:
    """Which records make up each global batch.

    With `lengths` [n] (tokens per record), each epoch is shuffled, cut into windows of 16 batches, and
    in each window the records are sorted by length and the batches shuffled: batches of records of
    similar length need little padding, and the order stays random from batch to batch.
    """

    def __init__(self, num_records: int, batch_size: int, seed: int, lengths: np.ndarray | None = None):
        for name, value, least in (
            ("num_records", num_records, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: expected {least} or more")
        self.num_records, self.batch_size, self.seed = num_records, batch_size, seed
        self.lengths = lengths
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    @property
    def fingerprint(self) -> dict[str, int]:
        """What the order is a function of: a run is resumed only where it is the same."""
        return {"records": self.num_records, "batch_size": self.batch_size, "seed": self.seed}

    def indices(self, step: int) -> np.ndarray:
        """Record indices [B] of global batch `step`."""
        if step < 0:
            raise ValueError(f"step={step}: expected 0 or more")
        epochs, places = np.divmod(step * self.batch_size + np.arange(self.batch_size), self.num_records)
        return np.concatenate([self.epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def _epoch(self, epoch: int) -> np.ndarray:
        """The permutation [n] of the records that epoch `epoch` follows."""
        rng = np.random.default_rng((self.seed, _ORDER, epoch))
        order = rng.permutation(self.num_records)
        if self.lengths is not None:
            # The first records complete the batch that the previous epoch began.
            head = min(-epoch * self.num_records % self.batch_size, self.num_records)
            whole = (self.num_records - head) // self.batch_size * self.batch_size
            batches = order[head : head + whole].reshape(-1, self.batch_size)
            for start in range(0, len(batches), WINDOW):
                batches[start : start + WINDOW] = self._by_length(batches[start : start + WINDOW], rng)
        return order

    def _by_length(self, batches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        records = batches.reshape(-1)
        assert self.lengths is not None  # without lengths the order is not sorted by them
        records = records[np.argsort(self.lengths[records], kind="stable")]
        return rng.permutation(records.reshape(batches.shape))


class PackedLoader:
    """Batches of packed rows (`packing.pack`): `loader(step)` -> {name: [B / hosts, T]}.

    batch_size: rows of the global batch; host `host_index` of `host_count` gets its equal part.
    """

    def __init__(
        self, rows: Batch, batch_size: int, seed: int, *, host_index: int = 0, host_count: int = 1
    ):
        self.rows = rows
        self.order = BatchOrder(len(rows["tokens"]), batch_size, seed)
        self.part = host_part(batch_size, host_index, host_count)

    @property
    def steps_per_epoch(self) -> float:
        return self.order.num_records / self.order.batch_size

    @property
    def fingerprint(self) -> dict[str, int]:
        return self.order.fingerprint

    def __call__(self, step: int) -> Batch:
        indices = self.order.indices(step)[self.part]
        return {name: values[indices] for name, values in self.rows.items()}


class ExampleLoader:
    """Batches of labelled texts: `loader(step)` -> tokens, segment_ids, positions [b, T], labels and
    weights [b], and ngrams [b, N] where the examples have them.

    b = B / hosts as in `PackedLoader`. T is the smallest of `buckets` that holds the longest example of
    the global batch, so every host pads to the same T; likewise N.
    transform: changes an example (subword sampling, word dropout) with a generator that depends only on
        (seed, place in the stream): the same whatever the number of hosts. Its result must fit the
        largest bucket. Every host transforms the whole global batch, to know its longest example.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        buckets: Sequence[int],
        *,
        pad_id: int = 0,
        transform: Transform | None = None,
        host_index: int = 0,
        host_count: int = 1,
    ):
        lengths = np.array([len(example.tokens) for example in examples])
        if list(buckets) != sorted(set(buckets)) or not buckets:
            raise ValueError(f"buckets={buckets}: expected one or more lengths, ascending")
        self.examples, self.buckets, self.pad_id, self.transform = examples, buckets, pad_id, transform
        self.order = BatchOrder(len(examples), batch_size, seed, lengths)
        self.part = host_part(batch_size, host_index, host_count)
        self._bucket(lengths.max())

    @property
    def steps_per_epoch(self) -> float:
        return self.order.num_records / self.order.batch_size

    @property
    def fingerprint(self) -> dict[str, int]:
        return self.order.fingerprint

    def __call__(self, step: int) -> Batch:
        examples = [self.examples[i] for i in self.order.indices(step)]
        if self.transform is not None:
            first = step * self.order.batch_size
            examples = [self.transform(e, self._rng(first + row)) for row, e in enumerate(examples)]
        length = self._bucket(max(len(example.tokens) for example in examples))
        mine = examples[self.part]
        batch = pad_batch([example.tokens for example in mine], length, self.pad_id)
        batch["weights"] = np.array([example.weight for example in mine], np.float32)
        ngrams = [example.ngrams for example in examples if example.ngrams is not None]
        if ngrams:
            batch["ngrams"] = pad_ngrams(ngrams)[self.part]
        return batch | {"labels": np.array([example.label for example in mine], np.int32)}

    def _bucket(self, longest: int) -> int:
        if longest > self.buckets[-1]:
            raise ValueError(
                f"buckets={self.buckets}: an example has {longest} tokens; add a larger bucket, or cut "
                "the examples (max_length, and in `transform`)"
            )
        return self.buckets[bisect.bisect_left(self.buckets, longest)]

    def _rng(self, place: int) -> np.random.Generator:
        return np.random.default_rng((self.order.seed, _TRANSFORM, place))


def to_device(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows {name: [B / hosts, ...]} as global arrays [B, ...], rows over the data axes.

    They must be the part of the batch that `sharding.host_share` says. Raises ValueError when several
    hosts have rows that the data axes do not divide.
    """
    _, hosts = sharding.host_share(mesh)
    rows, shards = len(next(iter(batch.values()))) * hosts, sharding.data_shards(mesh)
    if hosts > 1 and rows % shards:
        raise ValueError(
            f"batch of {rows} rows over {shards} data shards and {hosts} hosts: expected a multiple of "
            f"{' * '.join(sharding.DATA_AXES)}"
        )

    def place(values: np.ndarray) -> jax.Array:
        shape = (rows, *values.shape[1:])
        target = sharding.batch_sharding(mesh, shape)
        return jax.make_array_from_process_local_data(target, values, shape)

    return {name: place(values) for name, values in batch.items()}


def whole_to_device(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch {name: [B, ...]} that every host has whole, as global arrays, rows over the data axes."""
    return {name: sharding.put_batch(values, mesh) for name, values in batch.items()}


def this_host(mesh: Mesh) -> dict[str, int]:
    """Which rows of a batch are this host's, as the loaders take it."""
    index, count = sharding.host_share(mesh)
    return {"host_index": index, "host_count": count}


def prefetch(fetch: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[T]:
    """fetch(start), ..., fetch(stop - 1) in order, up to `depth` of them made ahead by a grain thread.

    What `fetch` raises is raised here when its step is due. The thread ends with the iterator: at the
    last step, at an error, or when the iterator is closed or dropped.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=depth)
    steps = iter(grain.MapDataset.range(start, stop).map(fetch).to_iter_dataset(options))
    try:
        yield from steps
    finally:
        steps.close()


def host_part(batch_size: int, host_index: int, host_count: int) -> slice:
    """Which rows of a global batch are this host's; ValueError when the hosts' parts are not equal."""
    if host_count < 1 or batch_size % host_count:
        raise ValueError(f"batch_size={batch_size}: expected a multiple of host_count={host_count}")
    if not 0 <= host_index < host_count:
        raise ValueError(f"host_index={host_index}: expected 0 to {host_count - 1}")
    size = batch_size // host_count
    return slice(host_index * size, (host_index + 1) * size)
