"""Sentence pairs for a decoder-only translator: read, split without leaks, and written as one sequence.

    [BOS] source <|translate|> target [EOS]

The model continues what stands before the target, so any text generator translates:
`translation_prompt(text)` is the prompt.
"""

import dataclasses
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from llm_jax.data.sources import read_records
from llm_jax.data.tasks import split
from llm_jax.data.tokenizer_base import Tokenizer

SEPARATOR = "<|translate|>"  # a special token of the tokenizer


@dataclasses.dataclass(frozen=True)
class SentencePair:
    """A sentence and its translation."""

    source: str
    target: str


def translation_prompt(source: str) -> str:
    """What a trained translator continues with the translation of `source`."""
    return source + SEPARATOR


def read_pairs(path: str | Path, source_field: str, target_field: str) -> list[SentencePair]:
    """The pairs of a TSV, CSV or JSONL file; ValueError with file and line for a side that is blank."""
    pairs = []
    for line, record in read_records(path):
        sides = [record.get(field) for field in (source_field, target_field)]
        if not all(isinstance(side, str) and side.strip() for side in sides):
            raise ValueError(
                f"{path}:{line}: {source_field}={sides[0]!r}, {target_field}={sides[1]!r}; expected two "
                f"texts that are not blank (fields: {', '.join(record)})"
            )
        pairs.append(SentencePair(*map(str, sides)))
    if not pairs:
        raise ValueError(f"{path}:1: the file holds no pairs")
    return pairs


def split_pairs(
    pairs: Sequence[SentencePair], fraction: float, seed: int
) -> tuple[list[SentencePair], list[SentencePair]]:
    """(kept, held out): no source and no target stands on both sides, as one text has several partners.

    Pairs that share a source or a target, also by way of others, stay together; texts are compared by
    their letters and digits alone. See `tasks.split` for the rest.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            parents[name] = name = parents[parents[name]]
        return name

    for pair in pairs:
        one, other = root("s" + _bare(pair.source)), root("t" + _bare(pair.target))
        parents[max(one, other)] = min(one, other)
    return split(pairs, fraction, seed, text=lambda pair: root("s" + _bare(pair.source)))


def _bare(text: str) -> str:
    """Letters and digits in one case and width; the text itself when it has none."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if c.isalnum()) or text


def encode_pair(pair: SentencePair, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a pair, and which of them are to be predicted: those of the target, and its end.

    ValueError when the tokenizer has no end of text or no `SEPARATOR`.
    """
    if tokenizer.eos_id is None or SEPARATOR not in tokenizer.special_tokens:
        raise ValueError(
            f"the tokenizer lacks {'an end of text' if tokenizer.eos_id is None else SEPARATOR}; train "
            f"one with the control symbol {SEPARATOR}"
        )
    prompt = tokenizer.encode(translation_prompt(pair.source))
    target = [*tokenizer.encode(pair.target, add_special_tokens=False), tokenizer.eos_id]
    return prompt + target, [False] * len(prompt) + [True] * len(target)
