"""Short texts joined into longer documents, so that a language model learns to go on after a stop."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def join_related(
    texts: Sequence[str], encode: Callable[[str], Sequence[int]], most: int, seed: int
) -> list[str]:
    """Documents of 1 to `most` texts each; every different text comes once.

    Texts whose rarest token is the same stand side by side, so that what is joined tends to be about
    one thing. A token that only one text has relates nothing and does not count. Between two texts
    comes a space, unless the first ends in a character that is not ASCII (as 。 does).
    The same (texts, seed) give the same documents; the number of texts of each is uniform.
    """
    if most < 1:
        raise ValueError(f"most={most}: expected 1 text per document or more")
    rng = np.random.default_rng(seed)
    texts = list(dict.fromkeys(texts))
    tokens = [set(encode(text)) for text in texts]
    counts = Counter(token for found in tokens for token in found)
    rarest = [min(((counts[t], t) for t in found if counts[t] > 1), default=(0, 0)) for found in tokens]
    chance = rng.permutation(len(texts))
    order = sorted(range(len(texts)), key=lambda i: (rarest[i], chance[i]))
    documents, start = [], 0
    while start < len(order):
        stop = start + int(rng.integers(1, most + 1))
        documents.append(_join([texts[i] for i in order[start:stop]]))
        start = stop
    return documents


def _join(texts: Sequence[str]) -> str:
    parts = [text + " " * text[-1:].isascii() for text in texts[:-1]]
    return "".join([*parts, texts[-1]])
