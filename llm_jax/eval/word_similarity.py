"""Whether word vectors put related words near each other: pairs of a list against mixed pairs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.infer.word_vectors import WordVectors


@dataclasses.dataclass(frozen=True)
class PairScores:
    """How pairs of related words compare with pairs put together from different ones."""

    auc: float  # chance that a related pair has a larger cosine than a mixed one; 0.5 = no better
    related: float  # mean cosine
    mixed: float
    pairs: int  # of the list, both words of which are in the vocabulary
    listed: int


def score_pairs(words: WordVectors, pairs: Sequence[tuple[str, str]]) -> PairScores:
    """Scores of a list of related pairs; the mixed pairs are all (first of one, second of another).

    So the mixed pairs consist of the same words, as often. Pairs with a word that the vocabulary lacks
    are left out. Raises ValueError when fewer than two are left.
    """
    known = [pair for pair in pairs if pair[0] in words.words and pair[1] in words.words]
    if len(known) < 2:
        raise ValueError(
            f"{len(known)} of {len(pairs)} pairs have both words in the vocabulary; expected two or more"
        )
    first, second = (np.stack([words.vector(pair[side]) for pair in known]) for side in (0, 1))
    cosines = first @ second.T
    alike = np.array([[bool({*a} & {*b}) for b in known] for a in known])
    related, mixed = np.diagonal(cosines), cosines[~alike]
    return PairScores(
        auc(related, mixed), float(related.mean()), float(mixed.mean()), len(known), len(pairs)
    )


def auc(higher: np.ndarray, lower: np.ndarray) -> float:
    """Share of all (a of `higher`, b of `lower`) with a > b, ties counting half."""
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, side="left")
    ties = np.searchsorted(ordered, higher, side="right") - below
    return float((below + ties / 2).mean() / len(lower))
