"""Word vectors from counts, against loops and a dense decomposition in float64."""

import itertools

import numpy as np
import pytest

from llm_jax.data.cooccurrence import SCALE, SMOOTHING, WINDOW, _information, _near, cooccurrence_vectors

VOCAB = 30


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    lengths = [0, 1, 2, 40, 7, 300, 3]
    return [rng.zipf(1.5, n).clip(max=25).astype(np.int32) for n in lengths]  # 26 to 29 never occur


def counted(documents):
    """The same counts, pair by pair."""
    counts = np.zeros((VOCAB, VOCAB))
    for tokens in documents:
        for i, j in itertools.permutations(range(len(tokens)), 2):
            if abs(i - j) <= WINDOW:
                counts[tokens[i], tokens[j]] += (WINDOW + 1 - abs(i - j)) / WINDOW
    return counts


def rms(values):
    return np.sqrt(np.mean(np.square(values)))


def information(counts):
    shares = counts / counts.sum()
    near = shares.sum(axis=0) ** SMOOTHING
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(shares / (shares.sum(axis=1)[:, None] * near / near.sum()))
    return np.nan_to_num(np.maximum(values, 0.0), posinf=0.0)


def test_counts_are_those_of_every_pair(documents):
    np.testing.assert_allclose(_near(documents, VOCAB).toarray(), counted(documents), rtol=1e-6)


def test_information_is_the_formula_in_float64(documents):
    found = _information(_near(documents, VOCAB)).toarray()
    np.testing.assert_allclose(found, information(counted(documents)), rtol=1e-5, atol=1e-6)


def test_vectors_are_the_best_factors_of_their_rank(documents):
    """Their products, U S U', are those of the dense decomposition."""
    dim = 6
    vectors = cooccurrence_vectors(documents, VOCAB, dim).astype(np.float64)
    table = information(counted(documents))
    left, singular, _ = np.linalg.svd(table)
    wanted = left[:, :dim] * np.sqrt(singular[:dim])
    known = counted(documents).any(axis=1)
    scale = SCALE / rms(wanted[known])
    np.testing.assert_allclose(
        (vectors @ vectors.T)[known][:, known],
        scale**2 * (wanted @ wanted.T)[known][:, known],
        rtol=1e-3,
        atol=1e-7,
    )
    assert rms(vectors[known]) == pytest.approx(SCALE, rel=1e-4)


def test_tokens_without_company_are_drawn(documents):
    alone = [*documents, np.array([29])]
    vectors = cooccurrence_vectors(alone, VOCAB, 6)
    assert np.isfinite(vectors).all() and rms(vectors[26:]) == pytest.approx(SCALE, rel=0.5)
    np.testing.assert_array_equal(vectors, cooccurrence_vectors(alone, VOCAB, 6))


def test_words_of_one_kind_are_near_each_other():
    """Of words that never meet, those are alike that have the same company."""
    rng = np.random.default_rng(0)
    texts = [
        np.array([kind * 10 + rng.integers(2), kind * 10 + rng.integers(2, 10)])
        for kind in rng.integers(3, size=3000)
    ]
    vectors = cooccurrence_vectors(texts, VOCAB, 6)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = units @ units.T
    kinds = np.arange(VOCAB) // 10
    heads = np.arange(VOCAB) % 10 < 2
    for group in (heads, ~heads):
        same = alike[np.ix_(group, group)][kinds[group][:, None] == kinds[group]]
        other = alike[np.ix_(group, group)][kinds[group][:, None] != kinds[group]]
        assert same.min() > 0.9 > 0.5 > other.max()


@pytest.mark.parametrize("texts", [[], [np.array([1, 2, 3])]])
def test_more_dimensions_than_words_are_refused(texts):
    with pytest.raises(ValueError, match="embed_dim=4: expected less than [03]"):
        cooccurrence_vectors(texts, VOCAB, 4)
