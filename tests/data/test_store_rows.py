"""Rows out of stores: every token once an epoch, documents apart, batches a function of their number."""

import itertools
import json
import math
import tracemalloc
import zlib
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import store_rows
from llm_jax.data.loader import prefetch
from llm_jax.data.permutation import permuted
from llm_jax.data.store_rows import PERIOD, Source, SplitBatches, SplitRows, StoreLoader
from llm_jax.data.token_store import EVAL, TRAIN, open_store
from tests.data.small_store import write_store

documents = st.lists(st.lists(st.integers(0, 259), min_size=1, max_size=25), min_size=1, max_size=15)
lengths = st.integers(2, 9)


def numbered(directory, count, name=0, size=4):
    """A store of `count` rows of `size` tokens, row i all token i, each a document."""
    return write_store(directory / f"{count}-{name}", [[i] * size for i in range(count)])


def segments(batch):
    """(tokens, targets, positions) of each segment of each row, in order."""
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in range(1, ids.max() + 1):
            yield tuple(
                batch[n][row][ids == segment].tolist() for n in ("tokens", "targets", "positions")
            )


def windows(train, shard_tokens, length):
    """The same for documents that are cut one by one."""
    shards = [[]]
    for document in train:
        shards[-1].append(document)
        if sum(map(len, shards[-1])) >= shard_tokens:
            shards.append([])
    for shard in shards:
        flat = [
            (token, target, number)
            for number, document in enumerate(shard)
            for token, target in zip(document, [*document[1:], -1], strict=True)
        ]
        for start in range(0, len(flat), length):
            for _, part in itertools.groupby(flat[start : start + length], key=lambda x: x[2]):
                tokens, targets, _ = zip(*part, strict=True)
                yield list(tokens), list(targets), list(range(len(tokens)))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


# Rows


@settings(max_examples=60)
@given(documents, st.integers(1, 60), lengths)
def test_rows_are_the_windows_of_the_documents(tmp_path_factory, train, shard_tokens, length):
    directory = tmp_path_factory.mktemp("stores") / "store"
    rows = SplitRows(write_store(directory, train, shard_tokens=shard_tokens), TRAIN, length)
    batch = rows.read(np.arange(len(rows)))
    assert list(segments(batch)) == list(windows(train, shard_tokens, length))
    assert all(
        values.dtype == np.int32 and values.shape == (len(rows), length) for values in batch.values()
    )
    padding = batch["segment_ids"] == 0
    assert (batch["targets"][padding] == -1).all() and not batch["tokens"][padding].any()
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # at the ends of rows only
    order = np.random.default_rng(0).permutation(len(rows))
    assert_same(rows.read(order), {name: values[order] for name, values in batch.items()})


@settings(max_examples=30)
@given(documents, st.integers(1, 60), lengths)
def test_attention_and_targets_never_cross_documents(tmp_path_factory, train, shard_tokens, length):
    """Documents of one token each tell in every place whose token it is."""
    train = [[number % 260] * len(document) for number, document in enumerate(train)]
    directory = tmp_path_factory.mktemp("stores") / "store"
    rows = SplitRows(write_store(directory, train, shard_tokens=shard_tokens), TRAIN, length)
    batch = rows.read(np.arange(len(rows)))
    tokens, ids, targets = batch["tokens"], batch["segment_ids"], batch["targets"]
    together = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
    assert (tokens[:, :, None] == tokens[:, None, :])[together].all()
    assert (tokens == targets)[targets >= 0].all()
    assert (targets >= 0).sum() == sum(map(len, train)) - len(train)


def test_an_id_that_the_vocabulary_lacks_is_named(tmp_path):
    store = write_store(tmp_path / "store", [[5] * 10, [7, 8, 260, 9]])
    rows = SplitRows(store, TRAIN, 4)
    rows.read(np.array([0, 1]))  # tokens 0 to 8
    for row in (2, 3):  # where it is the target of a row's last token, or stands itself
        with pytest.raises(ValueError, match=r"train-00000\.bin: token 12 has the id 260 of 260"):
            rows.read(np.array([row]))


def test_rows_too_short_for_a_target_are_refused(tmp_path):
    with pytest.raises(ValueError, match="length=1"):
        SplitRows(numbered(tmp_path, 3), TRAIN, 1)


def test_held_out_rows_come_once_in_batches_that_are_full(tmp_path):
    held_out = [[i, i + 1, i + 2] for i in range(50)]
    rows = SplitRows(write_store(tmp_path / "store", [[1, 2]], held_out), EVAL, 8)
    batches = SplitBatches(rows, 4)
    assert len(batches) == math.ceil(len(rows) / 4) == 5 and len(rows) == 19
    assert all(values.shape == (4, 8) for batch in batches for values in batch.values())
    together = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert_same({n: v[:19] for n, v in together.items()}, rows.read(np.arange(19)))
    assert (together["targets"][19:] == -1).all() and not together["segment_ids"][19:].any()
    with pytest.raises(IndexError):
        batches[5]


# Order


@settings(max_examples=200)
@given(st.one_of(st.integers(1, 70), st.integers(1, 5000)), st.lists(st.integers(0, 2**32), max_size=4))
def test_permuted_is_a_permutation(size, key):
    found = permuted(np.arange(size), size, key)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(size))
    places = np.random.default_rng(0).integers(0, size, 20)
    np.testing.assert_array_equal(permuted(places, size, key), found[places])


def test_permuted_numbers_stay_in_range_where_they_are_many():
    """More rows than 2^32, of which no list could be made."""
    size = 3 * 2**40 + 7
    places = np.concatenate([np.arange(10_000), size - 1 - np.arange(10_000)])
    found = permuted(places, size, (0, 1))
    assert len(set(found.tolist())) == 20_000 and 0 <= found.min() and found.max() < size
    # Spread over all of the range: Kolmogorov-Smirnov.
    assert scipy.stats.kstest(found / size, "uniform").pvalue > 1e-3


def test_every_order_of_few_comes_as_often():
    """All 24 orders of 4 things under 4800 keys: chi-squared with 23 degrees of freedom."""
    counts = Counter(tuple(permuted(np.arange(4), 4, (0, key)).tolist()) for key in range(4800))
    assert len(counts) == 24
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_neighbours_are_parted_as_by_chance():
    """One place in 1000 is followed by its own successor; 7 keys and sizes off the powers of two."""
    for key in range(7):
        size = 100_003 + 50_000 * key
        order = permuted(np.arange(size), size, (key,))
        followed = np.mean(np.abs(np.diff(order)) == 1) * size
        assert followed < 2 + 5 * math.sqrt(2)  # Poisson with mean 2
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / math.sqrt(size)


# Batches


def loader(sources, batch_size=4, seed=0, row_tokens=4, **hosts):
    """sources: (store, weight) ..."""
    named = [Source(f"s{n}", store, weight) for n, (store, weight) in enumerate(sources)]
    return StoreLoader(named, row_tokens, batch_size, seed, **hosts)


@pytest.mark.parametrize(("rows", "batch_size"), [(37, 4), (5, 16), (64, 8), (1, 3)])
def test_every_epoch_has_every_token_once(tmp_path, rows, batch_size):
    load = loader([(numbered(tmp_path, rows), 2.0)], batch_size)
    assert load.steps_per_epoch == rows / batch_size
    steps = math.ceil(4 * rows / batch_size)
    stream = np.concatenate([load(step)["tokens"] for step in range(steps)])
    epochs = [stream[e * rows : (e + 1) * rows] for e in range(4)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(rows))
    if rows > 30:
        assert len({epoch.tobytes() for epoch in epochs}) == 4, "each epoch has its own order"


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_make_the_same_global_batches(tmp_path, hosts):
    sources = [(numbered(tmp_path, 37), 3.0), (numbered(tmp_path, 11, 1), 1.0)]
    parts = [loader(sources, 8, host_index=host, host_count=hosts) for host in range(hosts)]
    whole = loader(sources, 8)
    for step in (0, 3, 4, 5, 900_000):
        batches = [part(step) for part in parts]
        assert_same(
            {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}, whole(step)
        )


def test_a_resumed_run_sees_the_same_batches(tmp_path):
    sources = [(numbered(tmp_path, 37), 3.0), (numbered(tmp_path, 11, 1), 1.0)]
    run = list(prefetch(loader(sources), 0, 40))
    for step, batch in enumerate(prefetch(loader(sources), 13, 40), 13):
        assert_same(batch, run[step])
    one = loader(sources)
    for step in reversed(range(40)):
        assert_same(one(step), run[step])
    other = loader(sources, seed=1)
    assert any((other(step)["tokens"] != run[step]["tokens"]).any() for step in range(5))


@settings(max_examples=12)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=5), st.integers(1, 9), st.integers(0, 2))
def test_mixtures_keep_their_weights_and_each_source_its_epochs(
    tmp_path_factory, weights, batch_size, seed
):
    directory = tmp_path_factory.mktemp("stores")
    sizes = [(5, 17, 8, 30, 3)[n] for n in range(len(weights))]
    # Row i of source n is all token 32 n + i.
    sources = [
        (write_store(directory / str(n), [[32 * n + i] * 4 for i in range(size)]), weight)
        for n, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    load = loader(sources, batch_size, seed)
    steps = 300 // batch_size
    stream = np.concatenate([load(step)["tokens"][:, 0] for step in range(steps)])
    drawn = stream // 32
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(drawn[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, len(stream) + 1)[:, None] * shares
    # Every beginning of the stream, and so every batch, has the weights but for single rows.
    assert np.abs(counts - exact).max() <= 1 + len(weights) / 2
    for n, size in enumerate(sizes):
        rows = stream[drawn == n] - 32 * n
        for start in range(0, len(rows), size):
            epoch = rows[start : start + size]
            assert len(set(epoch.tolist())) == len(epoch), "no row twice in an epoch"
            assert len(epoch) < size or set(epoch.tolist()) == set(range(size)), "and none left out"


def test_sources_go_on_from_one_period_to_the_next(tmp_path, monkeypatch):
    """The pattern of turns repeats, the rows do not begin anew."""
    monkeypatch.setattr(store_rows, "PERIOD", 64)
    other = write_store(tmp_path / "other", [[128 + i] * 4 for i in range(37)])
    load = loader([(numbered(tmp_path, 101), 2.0), (other, 1.0)], batch_size=16)
    stream = np.concatenate([load(step)["tokens"][:, 0] for step in range(64)])  # 16 periods
    for rows, size in ((stream[stream < 128], 101), (stream[stream >= 128] - 128, 37)):
        whole = rows[: len(rows) // size * size].reshape(-1, size)
        assert len(whole) > 5
        np.testing.assert_array_equal(np.sort(whole, axis=1), np.tile(np.arange(size), (len(whole), 1)))


def test_several_sources_have_no_common_epoch(tmp_path):
    sources = [(numbered(tmp_path, 5), 1.0), (numbered(tmp_path, 6), 1.0)]
    with pytest.raises(ValueError, match=r"epochs of \['s0', 's1'\]: expected steps"):
        _ = loader(sources).steps_per_epoch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"host_count": 3}, "batch_size=4.*host_count=3"),
        ({"row_tokens": 1}, "length=1"),
    ],
)
def test_loaders_refuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        loader([(numbered(tmp_path, 5), 1.0)], **options)


def test_steps_and_weights_that_mean_nothing_are_refused(tmp_path):
    store = numbered(tmp_path, 5)
    with pytest.raises(ValueError, match="step=-1"):
        loader([(store, 1.0)])(-1)
    with pytest.raises(ValueError, match=r"weight of s1=1e-06: expected 1.53e-05 or more"):
        loader([(store, 1.0), (store, 1e-6)])


def test_the_fingerprint_is_that_of_data_and_settings(tmp_path):
    """What changes the batches changes it, by a name that says what."""
    one, other = numbered(tmp_path, 5), numbered(tmp_path, 6)
    base = loader([(one, 1.0), (one, 1.0)]).fingerprint
    assert json.loads(json.dumps(base)) == base

    def changed(load):
        found = load.fingerprint
        assert found.keys() == base.keys()
        return {name for name in found if found[name] != base[name]}

    assert changed(loader([(one, 2.0), (one, 2.0)])) == set()
    assert changed(loader([(one, 1.0), (other, 1.0)])) == {"crc32 of s1"}
    weights = {f"rows of s{n} in {PERIOD}" for n in (0, 1)}
    assert changed(loader([(one, 1.0), (one, 3.0)])) == weights
    assert changed(loader([(one, 1.0), (one, 1.0)], seed=1)) == {"seed"}
    assert changed(loader([(one, 1.0), (one, 1.0)], row_tokens=5)) == {"row_tokens"}


def test_a_store_of_billions_of_tokens_is_neither_read_nor_listed(tmp_path):
    """Its file is a hole of 4 billion tokens: what is not touched takes no room."""
    store = write_store(tmp_path / "store", [[0] * 100])
    tokens = 4_000_000_000
    manifest = json.loads((store.directory / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    manifest["splits"]["train"]["tokens"] = shard["tokens"] = tokens
    manifest.pop("crc32")
    manifest["crc32"] = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    (store.directory / "manifest.json").write_text(json.dumps(manifest))
    with (store.directory / "train-00000.bin").open("r+b") as file:
        file.truncate(2 * tokens)
    np.array([0, tokens], "<i8").tofile(store.directory / "train-00000.idx")
    tracemalloc.start()
    load = loader([(open_store(store.directory), 1.0)], batch_size=8, row_tokens=1024)
    batch = load(123_456_789)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert load.steps_per_epoch == 4e9 / 1024 / 8
    assert batch["segment_ids"].all() and (batch["targets"] == 0).all()
    assert peak < 8 << 20, "the batch, and the order of turns"
