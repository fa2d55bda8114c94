"""Short texts joined into longer documents, so that a language model learns to go on after a stop."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def join_related(
    texts: Sequence[str], encode: Callable[[str], Sequence[int]], most: int, seed: int
) -> list[str]:
    """Documents of 2 to `most` texts each (the last may have fewer); every different text comes once.

    Texts whose rarest token is the same stand side by side, so that what is joined tends to be about
    one thing. A token that only one text has relates nothing and does not count. Between two texts
    comes a space, unless the first ends in a character that is not ASCII (as 。 does).
    The same (texts, seed) give the same documents; the number of texts of each is uniform. None has
    one text only: a model that has seen such documents often ends where a prompt of one sentence does.
    """
    if most < 2:
        raise ValueError(f"most={most}: expected 2 texts per document or more")
    rng = np.random.default_rng(seed)
    texts = list(dict.fromkeys(texts))
    tokens = [set(encode(text)) for text in texts]
    counts = Counter(token for found in tokens for token in found)
    rarest = [min(((counts[t], t) for t in found if counts[t] > 1), default=(0, 0)) for found in tokens]
    chance = rng.permutation(len(texts))
    order = sorted(range(len(texts)), key=lambda i: (rarest[i], chance[i]))
    documents, start = [], 0
    while start < len(order):
        stop = start + int(rng.integers(2, most + 1))
        documents.append(_join([texts[i] for i in order[start:stop]]))
        start = stop
    return documents


def _join(texts: Sequence[str]) -> str:
    parts = [text + " " * text[-1:].isascii() for text in texts[:-1]]
    return "".join([*parts, texts[-1]])
