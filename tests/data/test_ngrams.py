"""Character n-grams: which a text has, that each has one row, and how rows are padded."""

import string

import numpy as np
import pytest

from llm_jax.data.loader import ExampleLoader
from llm_jax.data.ngrams import ABSENT, CharacterNgrams, pad_ngrams
from llm_jax.data.packing import batches_by_length
from llm_jax.data.tasks import classification_examples
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece

TEXTS = [
    "我是一个热爱编程的程序员。",
    "这家餐厅的菜很好吃，服务也很热情。",
    "今天的天气很好，我们去公园散步。",
    "程序员今天很热情，服务很好。",
    "the cat sat on the mat, and the rat sat on the cat",
]
MANY = 1 << 29  # rows of an order: so many that two n-grams of these texts never share one


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pieces")
    return train_sentencepiece(TEXTS, directory, vocab_size=420, character_coverage=1.0)


def ngrams_of(text, order):
    """The n-grams of a text, as sentencepiece writes it: with a space before it."""
    written = "▁" + text.replace(" ", "▁")
    return {written[i : i + order] for i in range(len(written) - order + 1)}


def test_rows_are_those_of_the_ngrams_of_the_text(pieces):
    one, two = (CharacterNgrams(pieces, (order,), MANY) for order in (1, 2))
    ids = [pieces.encode(text, add_special_tokens=False) for text in TEXTS]
    assert any(len(pieces.id_to_piece(i)) > 1 for row in ids for i in row)
    for order, rows_of in ((1, one), (2, two)):
        rows, grams = [set(rows_of(i).tolist()) for i in ids], [ngrams_of(t, order) for t in TEXTS]
        for a in range(len(TEXTS)):
            for b in range(len(TEXTS)):
                assert len(rows[a] & rows[b]) == len(grams[a] & grams[b])


def test_the_segmentation_makes_no_difference(pieces):
    rows_of = CharacterNgrams(pieces, (1, 2, 3), 4096)
    for text in TEXTS:
        want, cuts = rows_of(pieces.encode(text)), set()
        for seed in range(8):
            ids = pieces.encode_sampled(text, alpha=0.1, seed=seed)
            cuts.add(tuple(ids))
            np.testing.assert_array_equal(rows_of(ids), want)
        assert len(cuts) > 1


def test_rows_are_in_the_part_of_their_order_ascending_each_once():
    rows_of, tokenizer = CharacterNgrams(ByteTokenizer(), (1, 3), 50), ByteTokenizer()
    rows = rows_of(tokenizer.encode("abcabcabd", add_special_tokens=False))
    assert rows.dtype == np.int32 and (np.diff(rows) > 0).all()
    assert (rows < 50).sum() <= 4 and 1 <= (rows >= 50).sum() <= 4 and rows.max() < 100
    for text, kinds in (("", 0), ("a", 1), ("ab", 2)):  # too short for three
        assert len(rows_of(tokenizer.encode(text, add_special_tokens=False))) == kinds


def test_the_order_of_characters_counts():
    tokenizer = ByteTokenizer()
    rows_of = CharacterNgrams(tokenizer, (2,), MANY)
    pairs = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    rows = [rows_of(tokenizer.encode(pair, add_special_tokens=False)).item() for pair in pairs]
    assert len(set(rows)) == len(pairs)


def test_special_tokens_and_single_bytes_are_one_character(pieces):
    rows_of = CharacterNgrams(pieces, (1,), MANY)
    unknown = pieces.encode("龘", add_special_tokens=False)  # three bytes, after a space or not
    assert [pieces.id_to_piece(i) for i in unknown[-3:]] == ["<0xE9>", "<0xBE>", "<0x98>"]
    assert len(rows_of(unknown[-3:])) == 3
    assert len(rows_of([pieces.bos_id, pieces.eos_id])) == 2


def test_the_hash_fills_the_rows_evenly():
    rows_of = CharacterNgrams(ByteTokenizer(), (2,), 1000)
    values = np.arange(300, dtype=np.uint64)
    counts = np.zeros(1000)
    for first in values:  # 90,000 pairs: mean 90, standard deviation 9.5 if they fall at random
        pairs = np.stack([np.full(300, first), values], 1).reshape(-1)
        np.add.at(counts, rows_of._rows(pairs, 0)[::2].astype(int), 1)
    assert counts.std() < 12 and counts.min() > 40 and counts.max() < 140


def test_rows_stay_as_checkpoints_have_them():
    """A trained table is of no use to another hash."""
    rows_of, tokenizer = CharacterNgrams(ByteTokenizer(), (1, 2), 65536), ByteTokenizer()
    rows = rows_of(tokenizer.encode("ab", add_special_tokens=False))
    assert rows.tolist() == [32021, 40369, 94059]


def test_padding():
    short, long = np.arange(3, dtype=np.int32), np.arange(129, dtype=np.int32)
    assert pad_ngrams([short, short[:0]]).shape == (2, 128)
    padded = pad_ngrams([short, long])
    assert padded.shape == (2, 256) and padded.dtype == np.int32
    np.testing.assert_array_equal(padded[0], [0, 1, 2] + [ABSENT] * 253)
    np.testing.assert_array_equal(padded[1, :129], long)


def of_rows(batch, rows_of):
    """What the n-grams of each row's own tokens are."""
    real = batch["segment_ids"] > 0
    return [rows_of(row[keep]).tolist() for row, keep in zip(batch["tokens"], real, strict=True)]


def test_batches_have_the_ngrams_of_their_own_rows_on_any_number_of_hosts():
    tokenizer = ByteTokenizer()
    rows_of = CharacterNgrams(tokenizer, (1, 2), 4096)
    texts = ["ab" * n + str(n) for n in range(1, 60)] + TEXTS[-1:]  # one has more than 128 n-grams
    texts.append("".join(map(chr, range(32, 127))))
    examples = classification_examples(texts, [0] * len(texts), tokenizer.encode, 128, rows_of)
    whole = ExampleLoader(examples, 8, 0, (128,))
    for step in range(8):
        batch = whole(step)
        found = [row[row != ABSENT].tolist() for row in batch["ngrams"]]
        assert found == of_rows(batch, rows_of)
        parts = [ExampleLoader(examples, 8, 0, (128,), host_index=i, host_count=2)(step) for i in (0, 1)]
        np.testing.assert_array_equal(np.concatenate([p["ngrams"] for p in parts]), batch["ngrams"])
    tokens, ngrams = [e.tokens for e in examples], [e.ngrams for e in examples]
    for places, batch in batches_by_length(tokens, 8, (64, 128), ngrams):
        found = [row[row != ABSENT].tolist() for row in batch["ngrams"]]
        assert found[: len(places)] == of_rows(batch, rows_of)[: len(places)]
        assert not any(found[len(places) :]), "rows of padding have none"
