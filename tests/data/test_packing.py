"""Packed rows hold every token once, keep documents apart and name the true next token."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.packing import length_buckets, pack, pad_batch

documents = st.lists(st.lists(st.integers(0, 99), max_size=30), min_size=1, max_size=40).filter(any)
lengths = st.integers(1, 16)


def segments(rows):
    """(tokens, targets, positions) of each segment of each row, in order."""
    for row in range(len(rows["tokens"])):
        ids = rows["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            inside = ids == segment
            yield tuple(rows[name][row][inside].tolist() for name in ("tokens", "targets", "positions"))


def expected_segments(documents, length):
    """The same, cut one by one."""
    for document in documents:
        targets = [*document[1:], -1]
        for start in range(0, len(document), length):
            tokens = document[start : start + length]
            yield tokens, targets[start : start + length], list(range(len(tokens)))


@given(documents, lengths)
def test_segments_are_the_pieces_of_the_documents(documents, length):
    found = Counter(map(str, segments(pack(documents, length))))
    assert found == Counter(map(str, expected_segments(documents, length)))


@given(documents, lengths)
def test_segments_are_runs_counted_from_one_and_padding_is_marked(documents, length):
    rows = pack(documents, length)
    for values in rows.values():
        assert values.dtype == np.int32 and values.shape == rows["tokens"].shape
    ids = rows["segment_ids"]
    assert (ids[:, 0] == 1).all()  # no empty row
    steps = np.diff(ids, axis=1)
    assert (((steps == 0) | (steps == 1)) | (ids[:, 1:] == 0)).all()
    padding = ids == 0
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # only at the end of a row
    assert (rows["targets"][padding] == -1).all()
    assert (rows["tokens"][padding] == 0).all() and (rows["positions"][padding] == 0).all()


@given(documents, st.integers(2, 16))
def test_no_row_could_have_been_emptied_into_another(documents, length):
    """Best fit leaves no two rows that fit into one."""
    fill = np.sort((pack(documents, length)["segment_ids"] > 0).sum(1))
    assert len(fill) < 2 or fill[:2].sum() > length


def test_pieces_go_into_the_tightest_gap():
    """4 must join 6, not 5, or 2 would need a third row."""
    assert len(pack([[1] * size for size in (2, 3, 4, 5, 6)], 10)["tokens"]) == 2


def test_rows_of_short_texts_are_nearly_full():
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 90, 2000)
    rows = pack([rng.integers(0, 50, size) for size in sizes], 128)
    assert (rows["segment_ids"] > 0).mean() > 0.98


@pytest.mark.parametrize(
    ("documents", "length", "reason"),
    [([], 4, "no tokens"), ([[], []], 4, "no tokens"), ([[3, -1]], 4, "id -1"), ([[1]], 0, "length=0")],
)
def test_pack_refuses(documents, length, reason):
    with pytest.raises(ValueError, match=reason):
        pack(documents, length)


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1), st.integers(9, 12))
def test_pad_batch_rows_are_the_sequences(sequences, length):
    batch = pad_batch(sequences, length, pad_id=7)
    for row, sequence in enumerate(sequences):
        free = length - len(sequence)
        assert batch["tokens"][row].tolist() == sequence + [7] * free
        assert batch["segment_ids"][row].tolist() == [1] * len(sequence) + [0] * free
        assert batch["positions"][row].tolist() == [*range(len(sequence))] + [0] * free
    assert {values.dtype for values in batch.values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("sequences", [[], [[1], []], [[1, 2, 3]]])
def test_pad_batch_refuses(sequences):
    with pytest.raises(ValueError, match="1 to 2 tokens"):
        pad_batch(sequences, 2)


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(100, (16, 24, 32, 48, 64, 96, 100)), (64, (16, 24, 32, 48, 64)), (20, (16, 20)), (5, (5,))],
)
def test_length_buckets_come_two_per_doubling(longest, expected):
    assert length_buckets(longest) == expected
