"""Chats to learn from: JSONL of messages, and which of the tokens are the assistant's own words."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data.chat import encode_chat
from llm_jax.data.sources import data_files, read_records, record_field
from llm_jax.data.tokenizer_base import Tokenizer

Messages = list[dict[str, Any]]
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = "conversations"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """A chat as tokens."""

    tokens: np.ndarray  # [T] int32, of the whole rendered chat
    trained: np.ndarray  # [T] bool, what the assistant said, the end of its turn among it


def read_conversations(path: str | Path, field: str = "messages") -> list[Messages]:
    """The chats of JSONL (a file, or what `data_files` takes).

    In each record `field` is a list of {"role": ..., "content": ...}; where there is no such field,
    "conversations" may be one of {"from": "human", "value": ...}, as ShareGPT has them.
    Raises ValueError with file and line for anything else, or a chat without an assistant's turn.
    """
    chats = []
    for file in data_files(path):
        count = len(chats)
        for line, record in read_records(file):
            name = SHAREGPT if field not in record and SHAREGPT in record else field
            messages = record_field(file, line, record, name)
            if name == SHAREGPT:
                messages = from_sharegpt(messages)
            problem = what_is_wrong(messages)
            if problem is None and not any(message["role"] == "assistant" for message in messages):
                problem = "no message of the assistant, so there is nothing to learn"
            if problem:
                raise ValueError(f"{file}:{line}: field {name!r}: {problem}")
            chats.append(messages)
        if len(chats) == count:
            raise ValueError(f"{file}:1: the file holds no chats")
    return chats


def from_sharegpt(turns: Any) -> Any:
    """Turns {"from", "value"} as messages; what has another form stays, for `what_is_wrong` to name."""
    if not isinstance(turns, list) or not all(isinstance(t, dict) and "from" in t for t in turns):
        return turns
    return [
        {"role": _SHAREGPT_ROLES.get(t["from"], t["from"]), "content": t.get("value")} for t in turns
    ]


def what_is_wrong(messages: Any) -> str | None:
    """Why this is no list of messages with roles and texts; None where it is one."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return 'expected a list of {"role": ..., "content": ...}'
    for number, message in enumerate(messages):
        if message.get("role") not in ROLES:
            return f"message {number} has the role {message.get('role')!r}; expected one of {ROLES}"
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return f"message {number} has the content {message.get('content')!r}; expected a text"
    return None


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, first: int = 0
) -> Conversation:
    """The rendered chat in tokens, with each assistant's turn, from after its opening, marked.

    first: number of the message from which on turns are marked. The whole chat is tokenized at once, as
    it will be when the model is prompted; a turn's place in it is found by the tokens that the chat up
    to its beginning, and to its end, share with the whole.
    ValueError when the tokenizer's template renders the beginning of a chat otherwise than as the
    beginning of the whole: its turns cannot be told apart.
    """
    whole = encode_chat(tokenizer, messages, add_generation_prompt=False)
    trained = np.zeros(len(whole), bool)
    for number, message in enumerate(messages):
        if number < first or message["role"] != "assistant":
            continue
        before = encode_chat(tokenizer, messages[:number], add_generation_prompt=True)
        upto = messages[: number + 1]
        after = encode_chat(tokenizer, upto, add_generation_prompt=False)
        begin, end = _common_prefix(before, whole), _common_prefix(after, whole)
        # Where a turn begins or ends inside a token, the last tokens may be cut otherwise.
        if begin < len(before) - 2 or end < len(after) - 2 or end <= begin:
            raise ValueError(
                f"the chat template renders message {number} otherwise when the chat ends there, so the "
                "assistant's words cannot be found; train on chats that end with that message, or "
                "give another template"
            )
        trained[begin:end] = True
    return Conversation(np.array(whole, np.int32), trained)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    size = min(len(a), len(b))
    same = np.asarray(a[:size]) == np.asarray(b[:size])
    return size if same.all() else int(same.argmin())
