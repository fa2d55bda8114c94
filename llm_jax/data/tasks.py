"""From texts to what a task trains on: labelled examples, documents of token ids, a held-out split."""

import dataclasses
import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

Encode = Callable[[str], Sequence[int]]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One labelled text. The text stays, so that training may tokenize it anew (subword sampling)."""

    text: str
    tokens: np.ndarray  # [T] int32, T >= 1
    label: int
    weight: float = 1.0  # in the loss
    ngrams: np.ndarray | None = None  # [n] int32, of a model that looks them up; see `data.ngrams`


def classification_examples(
    texts: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    encode: Encode,
    max_length: int,
    ngrams: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[Example]:
    """One `Example` per text, cut to `max_length` tokens as `encode_within` does.

    ngrams: f(tokens) -> the n-grams of a text; None = the examples have none.
    """
    if len(texts) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(texts)} texts; expected one for each")
    examples = []
    for text, label in zip(texts, labels, strict=True):
        tokens = encode_within(text, encode, max_length)
        found = None if ngrams is None else ngrams(tokens)
        examples.append(Example(text, tokens, int(label), ngrams=found))
    return examples


def encode_within(text: str, encode: Encode, max_length: int) -> np.ndarray:
    """Token ids [T] int32 of `text`, 1 <= T <= max_length.

    A text that is too long loses its end, but keeps the tokens that `encode` puts behind every text
    ([SEP], EOS). Raises ValueError where the text has no tokens, or no room is left for it.
    """
    tokens = list(encode(text))
    if not tokens:
        raise ValueError(f"text {text[:40]!r} has no tokens; leave out empty texts")
    if len(tokens) > max_length:
        closing = _common_suffix(tokens, list(encode("")))
        if len(closing) >= max_length:
            raise ValueError(f"max_length={max_length}: expected more than {len(closing)} end tokens")
        tokens = tokens[: max_length - len(closing)] + closing
    return np.array(tokens, np.int32)


def documents(texts: Iterable[str], encode: Encode, eos_id: int | None = None) -> Iterator[np.ndarray]:
    """Token ids [T] int32 of each text for `packing.pack`, ended by `eos_id` unless that is None."""
    for text in texts:
        tokens = list(encode(text))
        if eos_id is not None and tokens[-1:] != [eos_id]:
            tokens.append(eos_id)
        yield np.array(tokens, np.int32)


def split(
    records: Sequence[T],
    fraction: float,
    seed: int,
    *,
    text: Callable[[T], str] = operator.attrgetter("text"),
) -> tuple[list[T], list[T]]:
    """(kept, held out): the held-out side has `fraction` of the records, both in their old order.

    Records with the same `text` stand on the same side, so that no held-out text was trained on. Texts
    are ranked by a hash of (seed, text): the split is the same on every machine, whatever the order of
    the records, and changes little when records are added.
    """
    counts = Counter(map(text, records))
    wanted = round(fraction * len(records))
    held_out, taken = set(), 0
    for candidate in sorted(counts, key=lambda t: _rank(seed, t)):
        if taken >= wanted:
            break
        held_out.add(candidate)
        taken += counts[candidate]
    if not 0 < taken < len(records):
        raise ValueError(
            f"fraction={fraction}: holds out {taken} of {len(records)} records "
            f"({len(counts)} different texts); expected some, and some to keep"
        )
    sides: tuple[list[T], list[T]] = ([], [])
    for record in records:
        sides[text(record) in held_out].append(record)
    return sides


def split_tail(texts: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """(kept, held out): the last `fraction` of all characters, in their order, is held out.

    The text that the border falls into is cut in two; of a single long text its end is held out.
    """
    kept, held_out = [], []
    left = int((1 - fraction) * sum(map(len, texts)))  # characters to keep
    for text in texts:
        parts = text[: max(left, 0)], text[max(left, 0) :]
        left -= len(text)
        for side, part in zip((kept, held_out), parts, strict=True):
            side += [part] if part else []
    if not (kept and held_out):
        raise ValueError(
            f"fraction={fraction}: leaves {len(kept)} texts and holds out {len(held_out)} of "
            f"{sum(map(len, texts))} characters; expected some of both"
        )
    return kept, held_out


def _rank(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()


def _common_suffix(a: list[int], b: list[int]) -> list[int]:
    size = 0
    while size < min(len(a), len(b)) and a[-size - 1] == b[-size - 1]:
        size += 1
    return a[len(a) - size :]
