"""Texts that were seen before: the same ones by a hash, similar ones by MinHash.

Two texts are the same when their `normalized` forms are. They are near when the Jaccard similarity of
their sets of character 5-grams is high: it is estimated from MinHash signatures (Broder 1997), and
candidates are found by locality-sensitive hashing (Indyk & Motwani 1998), both of datasketch.
"""

import hashlib
import unicodedata

import numpy as np
from datasketch import LeanMinHash, MinHash, MinHashLSH

PERMUTATIONS = 128  # standard error of the estimate at 0.8: sqrt(0.8 * 0.2 / 128) = 0.035
NGRAM = 5  # characters
_SEED, _SCHEME = 1, "affine32"
_BLOCK = 8192  # n-grams whose hashes under all permutations are held at a time
_RECALL = 0.99  # of the pairs that are just similar enough, by the index; more of those that are more
_FACTORS = np.array([pow(0x9E3779B1, k, 1 << 32) for k in range(NGRAM)], np.uint32)
_EMPTY = MinHash(PERMUTATIONS, seed=_SEED, hashfunc=int, scheme=_SCHEME)


def normalized(text: str) -> str:
    """What makes two texts the same: NFKC, without case, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(text: str) -> bytes:
    """A hash of the normalized text, 16 bytes."""
    return hashlib.blake2b(normalized(text).encode(), digest_size=16).digest()


def ngrams(text: str) -> np.ndarray:
    """Hashes [n] uint32 of the different character 5-grams of the normalized text, ascending.

    A text of less than five characters is one 5-gram, filled with NUL.
    """
    codes = np.frombuffer(normalized(text).ljust(NGRAM, "\0").encode("utf-32-le"), np.uint32)
    windows = np.lib.stride_tricks.sliding_window_view(codes, NGRAM)
    return np.unique((windows * _FACTORS).sum(axis=1, dtype=np.uint32))


def signature(text: str) -> np.ndarray:
    """MinHash signature [128] uint32: equal values of two texts estimate their Jaccard similarity."""
    minhash, hashes = _EMPTY.copy(), ngrams(text)
    for start in range(0, len(hashes), _BLOCK):
        minhash.update_batch(hashes[start : start + _BLOCK].tolist())
    return minhash.hashvalues


class NearDuplicates:
    """Recognises texts that are like one that was kept.

    `threshold` is the least similarity of two that count as the same. Each text that is kept takes
    some 8 KB: its signature, and its entries in the index.
    """

    def __init__(self, threshold: float):
        if not 0 < threshold <= 1:
            raise ValueError(f"near_threshold={threshold}: expected a similarity in (0, 1]")
        self.threshold = threshold
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(threshold))
        self._kept: list[np.ndarray] = []

    def add(self, signature: np.ndarray) -> bool:
        """Whether no text that was kept is like this one; if so it is kept."""
        minhash = LeanMinHash(seed=_SEED, hashvalues=signature, scheme=_SCHEME)
        for candidate in self._index.query(minhash):
            if np.mean(self._kept[candidate] == signature) >= self.threshold:
                return False
        self._index.insert(len(self._kept), minhash, check_duplication=False)
        self._kept.append(signature)
        return True


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, values in each) of the index: texts whose signatures agree in a whole band are compared.

    Most values, and so fewest comparisons in vain, with which pairs at the threshold are found.
    """
    for size in range(PERMUTATIONS // 2, 0, -1):
        bands = PERMUTATIONS // size
        if 1 - (1 - threshold**size) ** bands >= _RECALL:
            return bands, size
    return PERMUTATIONS, 1
