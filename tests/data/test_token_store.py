"""What was written is read back; damage and another tokenizer are noticed."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import token_store
from llm_jax.data.token_store import EVAL, TRAIN, SplitWriter, fingerprint, is_store, open_store
from llm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from tests.data.small_store import write_store

ID = st.integers(0, 259)
documents = st.lists(st.lists(ID, min_size=1, max_size=20), min_size=1, max_size=12)


def read(store, split):
    """All documents of a split."""
    return [
        store.tokens(shard)[start:stop].tolist()
        for shard in store.splits[split].shards
        for start, stop in np.lib.stride_tricks.sliding_window_view(store.offsets(shard), 2)
    ]


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    train = [rng.integers(0, 260, rng.integers(1, 30)) for _ in range(40)]
    return write_store(tmp_path / "store", train, train[:5], shard_tokens=200)


@settings(max_examples=30)
@given(documents, documents, st.integers(1, 60))
def test_documents_come_back(tmp_path_factory, train, held_out, shard_tokens):
    directory = tmp_path_factory.mktemp("stores") / "store"
    store = write_store(directory, train, held_out, shard_tokens=shard_tokens)
    assert read(store, TRAIN) == train and read(store, EVAL) == held_out
    for split, given_documents in ((store.splits[TRAIN], train), (store.splits[EVAL], held_out)):
        sizes = list(map(len, given_documents))
        assert (split.documents, split.tokens, split.bytes) == (len(sizes), sum(sizes), 4 * sum(sizes))
        assert all(shard.tokens >= shard_tokens for shard in split.shards[:-1])
        # No shard has more than the document that filled it.
        assert all(shard.tokens < shard_tokens + max(sizes) for shard in split.shards)
    store.verify()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(260, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_ids_take_two_bytes_where_they_fit(vocab_size, dtype):
    assert token_store.id_dtype(vocab_size) == np.dtype(dtype)


def test_a_shard_without_documents_leaves_no_file(tmp_path):
    assert SplitWriter(tmp_path, EVAL, np.dtype("<u2"), 10).finish().shards == ()
    assert not list(tmp_path.iterdir())


def test_what_is_a_store(store, tmp_path):
    assert is_store(store.directory) and is_store(str(store.directory))
    assert not is_store(tmp_path) and not is_store(tmp_path / "absent") and not is_store("gs://a/b")


# Damage


def files(store):
    return sorted(path for path in store.directory.glob("*") if path.suffix in (".bin", ".idx", ".json"))


@settings(max_examples=150)
@given(data=st.data())
def test_every_flipped_bit_is_noticed(tmp_path_factory, data):
    """In headers too, and in the manifest."""
    directory = tmp_path_factory.mktemp("stores") / "store"
    store = write_store(directory, [[1, 2, 3], [4, 5]], [[6, 7]])
    path = data.draw(st.sampled_from(files(store)))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        open_store(directory).verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("left", [0, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_named_at_once(store, suffix, left):
    path = next(path for path in files(store) if path.suffix == suffix)
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    with pytest.raises(ValueError, match=path.name):
        open_store(store.directory)


def test_a_file_that_is_missing_is_named(store):
    for path in files(store)[:2]:
        moved = shutil.move(path, path.with_suffix(".gone"))
        with pytest.raises(FileNotFoundError, match=path.name):
            open_store(store.directory)
        shutil.move(moved, path)


def test_an_id_that_is_too_large_is_named_with_its_place(tmp_path):
    store = write_store(tmp_path / "store", [[5] * 10, [7, 8, 260, 9]])
    with pytest.raises(ValueError, match=r"train-00000\.bin: token 12 has the id 260 of 260"):
        store.verify()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not the manifest"),
        ('{"format": 1, "splits": 3, "crc32": 0}', "not the manifest"),
        ('{"format": 1}', "not the manifest"),
        ('{"format": 9, "splits": {}}', "format 9, this version reads 1"),
    ],
)
def test_what_is_no_manifest_is_refused(store, content, message):
    (store.directory / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=f"manifest.json: {message}"):
        open_store(store.directory)


# The tokenizer

TEXTS = ["one two three four five six seven", "我喜欢编程。", "eight nine ten eleven twelve"] * 4


def test_another_tokenizer_is_refused(store, tmp_path):
    store.check_tokenizer(load_tokenizer(store.directory / "tokenizer"), "itself")
    other = train_sentencepiece(TEXTS, tmp_path / "other", vocab_size=310)
    with pytest.raises(ValueError, match="made by another tokenizer than tokenizer=other"):
        store.check_tokenizer(other, "tokenizer=other")
    shutil.rmtree(store.directory / "tokenizer")
    other.save(store.directory / "tokenizer")
    with pytest.raises(ValueError, match="another tokenizer than the one in it"):
        store.verify()


def test_copies_of_a_tokenizer_have_its_fingerprint(tmp_path):
    """As tokenizer.model and as tokenizer.json; one trained on other text has another."""
    trained = train_sentencepiece(TEXTS, tmp_path / "a", vocab_size=310)
    trained.save(tmp_path / "b")
    copies = [load_tokenizer(path) for path in tmp_path.glob("*/tokenizer.*")]
    assert len(copies) == 4
    assert {fingerprint(copy) for copy in copies} == {fingerprint(trained)}
    other = train_sentencepiece([*TEXTS, "thirteen"], tmp_path / "c", vocab_size=310)
    assert len({fingerprint(t) for t in (trained, other, ByteTokenizer())}) == 3


def test_the_manifest_is_json_for_people_too(store):
    content = json.loads((store.directory / "manifest.json").read_text(encoding="utf-8"))
    assert content["splits"]["train"]["documents"] == 40 and content["vocab_size"] == 260
    assert content["crc32"] == store.crc32
