"""Batches depend on (seed, step, host) alone; each record comes once per epoch; prefetch keeps order."""

import collections
import dataclasses
import math
import threading

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data import loader as loading
from llm_jax.data.packing import length_buckets, pack
from llm_jax.data.tasks import Example
from llm_jax.sharding import make_mesh

EPOCHS = 3


def examples(count: int, longest: int = 40) -> list[Example]:
    """Example i has label i, so that a batch tells which records it holds."""
    sizes = np.random.default_rng(count).integers(1, longest + 1, count)
    return [Example(f"text {i}", np.full(n, i % 50, np.int32), i) for i, n in enumerate(sizes)]


def example_loader(count=100, batch_size=8, seed=0, **options):
    return loading.ExampleLoader(examples(count), batch_size, seed, length_buckets(40), **options)


def packed_loader(count=100, batch_size=8, seed=0, **options):
    rows = pack([[i, i + 1, i + 2] for i in range(count)], 3)
    return loading.PackedLoader(rows, batch_size, seed, **options)


def drop_words(example: Example, rng: np.random.Generator) -> Example:
    keep = rng.random(len(example.tokens)) > 0.3
    keep[0] = True
    return dataclasses.replace(example, tokens=example.tokens[keep])


BOTH = pytest.mark.parametrize("make", [example_loader, packed_loader])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


# Order


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.booleans())
def test_each_epoch_is_a_permutation(count, batch_size, seed, by_length):
    lengths = np.arange(count) % 7 if by_length else None
    order = loading.BatchOrder(count, batch_size, seed, lengths)
    steps = math.ceil(EPOCHS * count / batch_size)
    stream = np.concatenate([order.indices(step) for step in range(steps)])
    for epoch in range(EPOCHS):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_differ():
    order = loading.BatchOrder(100, 10, 0)
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert order.epoch(0).tolist() != loading.BatchOrder(100, 10, 1).epoch(0).tolist()


@BOTH
def test_any_step_at_any_time_is_the_same(make):
    first, second = make(), make()
    forward = [first(step) for step in range(40)]
    for step in reversed(range(40)):
        assert_same(second(step), forward[step])
        assert_same(first(step), forward[step])


@BOTH
@pytest.mark.parametrize("transform", [None, drop_words])
def test_host_parts_make_the_global_batch(make, transform):
    options = {"transform": transform} if make is example_loader else {}
    parts = [make(**options, host_index=host, host_count=4) for host in range(4)]
    for step in (0, 12, 13):  # 12 holds the border of two epochs
        batches = [part(step) for part in parts]
        joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
        assert_same(joined, make(**options)(step))


def test_resume_continues():
    """Steps 5.. of a new loader, through prefetch, are what the first run would have seen."""
    run = list(loading.prefetch(example_loader(transform=drop_words), 0, 30))
    resumed = list(loading.prefetch(example_loader(transform=drop_words), 5, 30))
    assert len(resumed) == 25
    for before, after in zip(run[5:], resumed, strict=True):
        assert_same(before, after)


# Length buckets


def test_rows_are_the_examples_padded_to_the_smallest_bucket():
    data, loader = examples(100), example_loader(pad_id=49)
    for step in range(20):
        batch = loader(step)
        sizes = batch["segment_ids"].sum(1)
        assert batch["tokens"].shape[1] == min(b for b in (16, 24, 32, 40) if b >= sizes.max())
        for row, label in enumerate(batch["labels"]):
            np.testing.assert_array_equal(batch["tokens"][row, : sizes[row]], data[label].tokens)
            assert (batch["tokens"][row, sizes[row] :] == 49).all()


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_sorting_by_length_saves_padding_in_every_epoch(epoch):
    """1003 records do not divide into batches of 8, so later epochs begin inside a batch."""
    lengths = np.random.default_rng(1).integers(1, 200, 1003)

    def padded(order):
        steps = range(epoch * 1003 // 8, (epoch + 1) * 1003 // 8)
        return sum(8 * lengths[order.indices(step)].max() for step in steps)

    by_length = padded(loading.BatchOrder(1003, 8, 0, lengths))
    shuffled = padded(loading.BatchOrder(1003, 8, 0))
    assert by_length < 1.15 * lengths.sum() < 1.6 * lengths.sum() < shuffled


def test_batches_do_not_come_in_order_of_length():
    lengths = np.arange(640)
    order = loading.BatchOrder(640, 8, 0, lengths)
    means = [lengths[order.indices(step)].mean() for step in range(16)]  # one window
    assert abs(np.corrcoef(means, np.arange(16))[0, 1]) < 0.6


def test_transform_is_drawn_anew_in_each_epoch():
    loader = example_loader(count=8, transform=drop_words)
    sizes = collections.defaultdict(set)
    for step in range(10):
        batch = loader(step)
        for label, size in zip(batch["labels"], batch["segment_ids"].sum(1), strict=True):
            sizes[int(label)].add(int(size))
    assert sum(len(seen) > 1 for seen in sizes.values()) >= 6


# Errors


@BOTH
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"host_count": 3}, "batch_size=8.*host_count=3"),
        ({"host_index": 2, "host_count": 2}, "host_index=2"),
    ],
)
def test_loaders_refuse(make, options, reason):
    with pytest.raises(ValueError, match=reason):
        make(**options)


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match="step=-1"):
        packed_loader()(-1)


@pytest.mark.parametrize(
    ("buckets", "reason"), [((8, 16), "tokens"), ((64, 16), "ascending"), ((), "one")]
)
def test_buckets_that_do_not_hold_the_examples_are_refused(buckets, reason):
    with pytest.raises(ValueError, match=rf"buckets=\(.*{reason}"):
        loading.ExampleLoader(examples(20), 4, 0, buckets)


def test_transform_that_makes_an_example_too_long_is_refused():
    def double(example, rng):
        return dataclasses.replace(example, tokens=np.tile(example.tokens, 41))

    with pytest.raises(ValueError, match="transform"):
        example_loader(transform=double)(0)


# To the device


@pytest.mark.parametrize("shape", ["data:1", "data:2,fsdp:2,tensor:2", "tensor:8"])
def test_to_device_keeps_the_values_and_splits_the_rows(shape):
    mesh = make_mesh(shape)
    batch = example_loader()(3)
    placed = loading.to_device(batch, mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, array in placed.items():
        np.testing.assert_array_equal(np.asarray(array), batch[name], strict=True)
        assert array.sharding.shard_shape(array.shape)[0] == 8 // parts


def test_to_device_refuses_rows_that_several_hosts_cannot_share(monkeypatch):
    monkeypatch.setattr(loading.sharding, "host_share", lambda mesh: (0, 2))
    with pytest.raises(ValueError, match="18 rows over 4 data shards and 2 hosts"):
        loading.to_device({"tokens": np.zeros((9, 4), np.int32)}, make_mesh("data:4"))


@pytest.mark.parametrize("rows", [8, 3])
def test_a_whole_batch_is_placed_as_rows_are(rows):
    mesh, values = make_mesh("data:2,tensor:2"), np.arange(rows * 5, dtype=np.int32).reshape(rows, 5)
    placed = loading.whole_to_device({"tokens": values}, mesh)["tokens"]
    np.testing.assert_array_equal(np.asarray(placed), values, strict=True)
    assert placed.sharding.shard_shape(placed.shape)[0] == (4 if rows == 8 else 3)


# Prefetch


def worker_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t is not threading.current_thread()}


def test_prefetch_fetches_ahead_and_no_further_than_depth():
    fetched, third = [], threading.Event()

    def fetch(step):
        fetched.append(step)
        if step == 7:
            third.set()
        return step

    steps = loading.prefetch(fetch, 5, 100, depth=2)
    assert next(steps) == 5
    assert third.wait(timeout=10)  # 6 and 7 were made while nobody asked
    assert next(steps) == 6
    assert max(fetched) <= 8
    steps.close()


def test_prefetch_gives_device_arrays_in_order():
    loader, mesh = packed_loader(), make_mesh("data:4")
    batches = loading.prefetch(lambda step: loading.to_device(loader(step), mesh), 3, 9)
    for step, batch in zip(range(3, 9), batches, strict=True):
        assert_same(jax.device_get(batch), loader(step))


def test_prefetch_raises_at_the_step_that_failed():
    def fetch(step):
        if step == 4:
            raise ValueError("step 4 is broken")
        return step

    seen = []
    with pytest.raises(ValueError, match="step 4 is broken"):
        for step in loading.prefetch(fetch, 0, 10):
            seen.append(step)
    assert seen == [0, 1, 2, 3]


def test_prefetch_of_nothing_is_empty():
    assert list(loading.prefetch(packed_loader(), 4, 4)) == []


def test_prefetch_thread_ends_with_the_iterator():
    before = worker_threads()
    steps = loading.prefetch(lambda step: step, 0, 1_000_000)
    next(steps)
    started = worker_threads() - before
    assert started
    steps.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
