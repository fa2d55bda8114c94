"""Word vectors from counts: factors of how much more often tokens are near each other than by chance.

M[a, b] = max(0, log(p(a, b) / (p(a) q(b)))), positive pointwise mutual information, where p(a, b) is the
share of the pairs of tokens within a window, near ones counted more, and q(b) is proportional to
p(b) ** 0.75, so that rare tokens do not look like the best company. The vectors are U sqrt(S) of the
truncated singular value decomposition M ~ U S V'. Skip-gram with negative sampling finds a factor of
nearly the same matrix by gradients (Levy and Goldberg 2014); the choices made here are those of Levy,
Goldberg and Dagan 2015. With the vocabulary of a tokenizer it takes seconds.
"""

from collections.abc import Iterable

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import svds

WINDOW = 5  # tokens to each side; one at distance d counts (WINDOW + 1 - d) / WINDOW
SMOOTHING = 0.75  # of how often tokens are company
SCALE = 0.02  # root mean square of what comes out: that of random embeddings


def cooccurrence_vectors(documents: Iterable[np.ndarray], vocab_size: int, dim: int) -> np.ndarray:
    """Vectors [vocab_size, dim] float32 of tokens that have company; documents: token ids [T] int each.

    The root of their mean square is `SCALE`. Tokens that never have company get random vectors. The same
    on every run of one machine; axes come with any sign. Raises ValueError where not more than `dim`
    different tokens have company.
    """
    counts = _near(documents, vocab_size)
    known = np.flatnonzero(np.diff(counts.indptr))
    if len(known) <= dim:
        raise ValueError(
            f"embed_dim={dim}: expected less than {len(known)}, the different tokens of the texts, for "
            "vectors from their counts (embed_start='cooccurrence')"
        )
    rng = np.random.default_rng(0)
    vectors = rng.normal(0.0, SCALE, (vocab_size, dim)).astype(np.float32)
    table = _information(counts)[known][:, known]  # rows and columns of the same tokens
    left, singular, _ = svds(table, k=dim, v0=rng.random(len(known)).astype(np.float32))
    found = left * np.sqrt(singular)
    vectors[known] = found * (SCALE / np.sqrt(np.mean(found**2)))
    return vectors


def _near(documents: Iterable[np.ndarray], size: int) -> scipy.sparse.csr_array:
    """[size, size] float32: how often tokens stand within a window of one document, by distance."""
    apart = np.full(WINDOW, -1)  # between documents
    stream = np.concatenate([part for tokens in documents for part in (tokens, apart)] or [apart])
    counts = scipy.sparse.csr_array((size, size), dtype=np.float32)
    for distance in range(1, WINDOW + 1):
        a, b = stream[:-distance], stream[distance:]
        real = (a >= 0) & (b >= 0)
        weights = np.full(real.sum(), (WINDOW + 1 - distance) / WINDOW, np.float32)
        counts += scipy.sparse.coo_array((weights, (a[real], b[real])), (size, size)).tocsr()
    return (counts + counts.T).tocsr()


def _information(counts: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Positive pointwise mutual information of symmetric `counts`, as the head of this file has it."""
    pairs = counts.tocoo()
    often = np.asarray(counts.sum(axis=1), np.float64)
    company = often**SMOOTHING
    expected = often[pairs.row] * company[pairs.col] / company.sum()
    values = np.log(pairs.data / expected)
    kept = values > 0
    places = pairs.row[kept], pairs.col[kept]
    return scipy.sparse.coo_array((values[kept].astype(np.float32), places), counts.shape).tocsr()
