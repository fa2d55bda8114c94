"""Character n-grams of tokenized texts, as rows of a hashed table (Weinberger et al. 2009).

Letters: n n-grams of a text, B texts, N columns.
"""

import re
from collections.abc import Sequence

import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.data.tokenizer_base import Tokenizer

ABSENT = -1  # in a column that holds no n-gram
_SHORTEST = 128  # columns; fewer gain too little for one more program to compile
_BEYOND = 0x110000  # the first number that is no Unicode character
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a piece for one byte of a character that has no piece


class CharacterNgrams:
    """f(tokens) -> which rows of a table the character n-grams of a text have.

    The characters are those of the vocabulary's entries, in which a space is sentencepiece's "▁" or
    byte-level BPE's "Ġ", so they do not depend on how a text is cut into tokens. A special token is one
    character, and so is a byte that stands for itself ("<0xE6>").
    orders: the n's. buckets: rows of each order, which its n-grams share by a hash: order i has rows
    i * buckets to (i + 1) * buckets - 1.
    """

    def __init__(self, tokenizer: Tokenizer, orders: Sequence[int], buckets: int):
        self.orders, self.buckets = tuple(orders), buckets
        self._tokenizer, self._special = tokenizer, frozenset(tokenizer.special_tokens.values())
        self._spelt: dict[int, list[int]] = {}

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        """Token ids [T] -> rows [n] int32, each once, ascending."""
        characters = np.array([c for token in tokens for c in self._spell(int(token))], np.uint64)
        found = [self._rows(characters, i) for i in range(len(self.orders))]
        return np.unique(np.concatenate(found)).astype(np.int32)

    def _rows(self, characters: np.ndarray, place: int) -> np.ndarray:
        """Rows of all n-grams of one order, by the rounds of splitmix64 (Steele et al. 2014)."""
        order = self.orders[place]
        count = max(len(characters) - order + 1, 0)
        code = np.zeros(count, np.uint64)
        for i in range(order):
            code += characters[i : i + count] + np.uint64(0x9E3779B97F4A7C15)
            code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            code ^= code >> np.uint64(31)
        return code % np.uint64(self.buckets) + np.uint64(place * self.buckets)

    def _spell(self, token: int) -> list[int]:
        if token not in self._spelt:
            piece = self._tokenizer.id_to_piece(token)
            whole = token in self._special or _BYTE.fullmatch(piece)
            self._spelt[token] = [_BEYOND + token] if whole else [ord(c) for c in piece]
        return self._spelt[token]


def character_ngrams(tokenizer: Tokenizer, config: ModelConfig) -> CharacterNgrams | None:
    """The n-grams that a model of this `config` looks up; None = none."""
    if not config.ngram_orders:
        return None
    return CharacterNgrams(tokenizer, config.ngram_orders, config.ngram_buckets)


def pad_ngrams(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows [n] of each text -> [B, N] int32, filled with ABSENT; N is a power of two, at least 128."""
    columns = max(_SHORTEST, 1 << (max(map(len, rows)) - 1).bit_length())
    padded = np.full((len(rows), columns), ABSENT, np.int32)
    for row, found in zip(padded, rows, strict=True):
        row[: len(found)] = found
    return padded
