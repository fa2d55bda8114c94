"""Preferences to learn from: JSONL of two answers to one prompt, the better one named, as packed rows.

file -> `Preference` (messages) -> `Pair` (tokens, and which of them the answers are) -> `pack_pairs`
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data.conversations import (
    Conversation,
    Messages,
    encode_conversation,
    from_sharegpt,
    what_is_wrong,
)
from llm_jax.data.packing import Batch, pack
from llm_jax.data.sources import data_files, read_records, record_field
from llm_jax.data.tokenizer_base import Tokenizer

SIDES = ("chosen", "rejected")
# Anthropic's HH-RLHF has whole chats as texts: "\n\nHuman: ...\n\nAssistant: ...".
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKER_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two ways in which a chat goes on, each opened by the assistant."""

    prompt: Messages  # what both begin with
    chosen: Messages
    rejected: Messages
    where: str  # file:line, for messages


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A preference as tokens: both whole chats, in which the tokens after the prompt are trained."""

    chosen: Conversation
    rejected: Conversation
    where: str

    @property
    def longest(self) -> int:
        """Tokens of the longer chat."""
        return max(len(self.chosen.tokens), len(self.rejected.tokens))


def read_preferences(path: str | Path) -> list[Preference]:
    """The preferences of JSONL (a file, or what `data_files` takes).

    Each record has "chosen" and "rejected", and may have "prompt". All three are texts or lists of
    {"role", "content"} (or {"from", "value"}): a text is what the user asks in "prompt", and what the
    assistant answers in the others. An answer that repeats the prompt, or has none, is a whole chat; as
    a text, that is one of "Human:" and "Assistant:", as HH-RLHF has them. Whatever messages both chats
    begin with are the prompt.
    Raises ValueError with file and line for anything else.
    """
    found = []
    for file in data_files(path):
        count = len(found)
        for line, record in read_records(file):
            where = f"{file}:{line}"
            prompt = _messages(where, "prompt", record["prompt"], "user") if "prompt" in record else []
            chats = []
            for side in SIDES:
                chat = _messages(where, side, record_field(file, line, record, side), "assistant")
                chats.append(chat if chat[: len(prompt)] == prompt else prompt + chat)
            found.append(_preference(where, *chats))
        if len(found) == count:
            raise ValueError(f"{file}:1: the file holds no preferences")
    return found


def _messages(where: str, field: str, value: Any, role: str) -> Messages:
    """A field as messages; a text that is no transcript is one message of `role`."""
    if isinstance(value, str) and _SPEAKER.match(value):
        messages = _transcript(value)
    elif isinstance(value, str):
        messages = [{"role": role, "content": value}]
    else:
        messages = from_sharegpt(value)
    if problem := what_is_wrong(messages):
        raise ValueError(f"{where}: field {field!r}: {problem}")
    return messages


def _transcript(text: str) -> Messages:
    """The turns of a text of "Human:" and "Assistant:", without an empty last one, which is to come."""
    _, *parts = _SPEAKER.split(text)
    turns = [
        {"role": _SPEAKER_ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns if turns[-1]["content"] else turns[:-1]


def _preference(where: str, chosen: Messages, rejected: Messages) -> Preference:
    """The two chats, cut where they part; ValueError where that is no choice between answers."""
    same = [a == b for a, b in zip(chosen, rejected, strict=False)]
    shared = (*same, False).index(False)
    if not shared:
        raise ValueError(
            f"{where}: chosen and rejected do not begin with the same message; expected a field "
            "'prompt', or whole chats that part after it"
        )
    for side, chat in zip(SIDES, (chosen, rejected), strict=True):
        rest = chat[shared:]
        if not rest or rest[0]["role"] != "assistant":
            has = f"a message of the {rest[0]['role']}" if rest else "nothing"
            raise ValueError(
                f"{where}: field {side!r}: has {has} after the {shared} messages that both begin with; "
                "expected an answer of the assistant"
            )
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:], where)


def encode_preference(tokenizer: Tokenizer, preference: Preference) -> Pair:
    """Both chats as `encode_conversation` renders them, only the assistant's tokens after the prompt
    marked as trained.

    ValueError naming file and line where the template cannot be trained with, or drops the difference.
    """
    prompt = preference.prompt
    try:
        chosen, rejected = (
            encode_conversation(tokenizer, [*prompt, *answer], first=len(prompt))
            for answer in (preference.chosen, preference.rejected)
        )
    except ValueError as error:
        raise ValueError(f"{preference.where}: {error}") from error
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise ValueError(f"{preference.where}: the chat template renders chosen and rejected alike")
    return Pair(chosen, rejected, preference.where)


def pack_pairs(pairs: Sequence[Pair], length: int) -> Batch:
    """Rows as `pack` makes them, leaves [R, length], of whole pairs: no pair is cut or split over rows.

    The k-th pair of a row, from 0, has its chosen chat in segment 2k + 1 and its rejected one in 2k + 2.
    ValueError naming file and line for a pair that does not fit a row.
    """
    for pair in pairs:
        size = len(pair.chosen.tokens) + len(pair.rejected.tokens)
        if size > length:
            raise ValueError(
                f"{pair.where}: both chats have {size} tokens together, more than row_tokens={length}; "
                "enlarge row_tokens, or leave the record out"
            )

    def joined(of: Callable[[Conversation, int], np.ndarray]) -> list[np.ndarray]:
        sides = [(pair.chosen, pair.rejected) for pair in pairs]
        return [np.concatenate([of(chat, side) for side, chat in enumerate(both)]) for both in sides]

    def placed(values: Sequence[np.ndarray]) -> np.ndarray:
        return pack(values, length)["tokens"]  # what lies where depends on the sizes alone

    # Nothing predicts the first token of a chat, although in the row the other chat stands before it.
    trained = joined(lambda chat, side: chat.trained & (np.arange(len(chat.tokens)) > 0))
    rows = pack(joined(lambda chat, side: chat.tokens), length, trained)
    second = placed(joined(lambda chat, side: np.full(len(chat.tokens), side)))
    return rows | {
        "segment_ids": np.where(rows["segment_ids"] > 0, 2 * rows["segment_ids"] - 1 + second, 0),
        "positions": placed(joined(lambda chat, side: np.arange(len(chat.tokens)))),
    }
