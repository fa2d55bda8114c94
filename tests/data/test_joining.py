"""Joining short texts: nothing is lost, related texts meet, spaces fall where they should."""

import pytest

from llm_jax.data.joining import join_related


def encode(text):
    return [ord(c) for c in text]


def test_every_different_text_comes_once():
    texts = [f"{a}{b}." for a in "abcdef" for b in "uvwxyz"] * 2
    documents = join_related(texts, encode, 3, seed=0)
    assert sorted(" ".join(documents).split()) == sorted(set(texts))
    assert {len(document.split()) for document in documents[:-1]} == {2, 3}


def test_same_seed_same_documents():
    texts = [chr(0x4E00 + i) * 3 + "。" for i in range(50)]
    assert join_related(texts, encode, 3, seed=1) == join_related(texts, encode, 3, seed=1)
    assert join_related(texts, encode, 3, seed=1) != join_related(texts, encode, 3, seed=2)


def test_texts_that_share_a_rare_token_are_joined():
    texts = [c * 2 + "!" + end for c in "abcdefgh" for end in "xyz"]
    joined = [document for document in join_related(texts, encode, 2, seed=0) if " " in document]
    same = sum(first[0] == second[0] for first, second in map(str.split, joined))
    assert same / len(joined) > 0.5  # by chance 2 in 23


def test_space_after_ascii_only():
    english = [join_related(["I see.", "I do."], encode, 2, seed) for seed in range(8)]
    assert {document for documents in english for document in documents} == {
        "I see. I do.",
        "I do. I see.",
    }
    chinese = join_related(["我在。", "我说。", "我看。"], encode, 3, seed=3)
    assert not any(" " in document for document in chinese)


def test_most_is_checked():
    with pytest.raises(ValueError, match="most=1"):
        join_related(["a"], encode, 1, seed=0)
