"""Random segmentations of a unigram tokenizer, for training (subword regularisation).

Kudo, 2018 (https://arxiv.org/abs/1804.10959): segmentation x of a text has the probability
P(x)^alpha / Z, with P(x) the product of its pieces' probabilities. It is drawn exactly by filtering
backwards and sampling forwards. sentencepiece draws from the same distribution, but what it draws
from one seed differs from process to process (0.2.3), so a run could not be repeated.
"""

import bisect
import itertools
import math
from collections.abc import Sequence

import numpy as np

from llm_jax.data.sentencepiece_model import BYTE, NORMAL, UNKNOWN, USER_DEFINED, SentencePieceModel

UNKNOWN_PENALTY = 10.0  # below the rarest piece, as in sentencepiece
USER_DEFINED_PENALTY = 0.1  # below a run of the commonest piece, as there: likely, not certain
_NO_PREFIX = (-1, 0.0)  # of a text that no piece begins with


class SegmentationSampler:
    """Draws segmentations from a unigram model; ValueError for a model of another type."""

    def __init__(self, model: SentencePieceModel):
        if model.model_type != "unigram":
            raise ValueError(
                f"a {model.model_type} model: only unigram models sample segmentations; "
                "train one with model_type='unigram', or set subword_alpha=0"
            )
        scores = [piece.score for piece in model.pieces if piece.type == NORMAL]
        self._unknown = min(scores) - UNKNOWN_PENALTY
        self._unknown_id = next(i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
        self._bytes = {p.text: i for i, p in enumerate(model.pieces) if p.type == BYTE}
        self._pieces: dict[str, tuple[int, float] | None] = {}  # every prefix of a piece is a key
        for id_, piece in enumerate(model.pieces):
            if piece.type == NORMAL:
                self._add(piece.text, id_, piece.score)
            elif piece.type == USER_DEFINED:
                self._add(piece.text, id_, len(piece.text) * max(scores) - USER_DEFINED_PENALTY)

    def __call__(self, text: str, alpha: float, seed: int) -> list[int]:
        """Ids of one segmentation of the normalised `text`; the same for the same arguments."""
        totals = [0.0] * (len(text) + 1)  # log of the weight of all segmentations of text[start:]
        choices: list[tuple[list[tuple[int, int]], list[float]]] = [([], [])] * len(text)
        for start in reversed(range(len(text))):
            found = self._from(text, start)
            logs = [alpha * score + totals[end] for end, _, score in found]
            top = max(logs)
            weights = [math.exp(log - top) for log in logs]
            totals[start] = top + math.log(math.fsum(weights))
            choices[start] = [(end, id_) for end, id_, _ in found], weights
        draws = np.random.default_rng(seed).random(len(text)).tolist()
        ids: list[int] = []
        start = 0
        while start < len(text):
            found, weights = choices[start]
            bounds = list(itertools.accumulate(weights))
            end, id_ = found[bisect.bisect_right(bounds, draws[start] * bounds[-1], hi=len(bounds) - 1)]
            ids += self._spelled(text[start:end]) if id_ == self._unknown_id else [id_]
            start = end
        return ids

    def _add(self, text: str, id_: int, score: float) -> None:
        for end in range(1, len(text)):
            self._pieces.setdefault(text[:end], None)
        self._pieces[text] = id_, score

    def _from(self, text: str, start: int) -> list[tuple[int, int, float]]:
        """(end, id, score) of every piece that text[start:] begins with, or its unknown character."""
        found = []
        for end in range(start + 1, len(text) + 1):
            piece = self._pieces.get(text[start:end], _NO_PREFIX)
            if piece is _NO_PREFIX:
                break
            if piece is not None:
                found.append((end, *piece))
        if not found or found[0][0] != start + 1:
            found.append((start + 1, self._unknown_id, self._unknown))
        return found

    def _spelled(self, character: str) -> Sequence[int]:
        if not self._bytes:
            return [self._unknown_id]
        return [self._bytes[f"<0x{byte:02X}>"] for byte in character.encode()]
