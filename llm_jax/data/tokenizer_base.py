"""The one interface of every tokenizer, and what they all share: named ids, decoding, streaming."""

import abc
from collections.abc import Iterable, Mapping
from pathlib import Path

from llm_jax.data.detokenize import Detokenizer, StreamingDecoder
from llm_jax.data.tokenizer_config import ROLES, TokenizerConfig


class Tokenizer(abc.ABC):
    """Text to ids and back.

    vocab_size: one more than the largest id, so what an embedding table must hold at least.
    bos_id, eos_id, unk_id, pad_id, cls_id, sep_id, mask_id: None where the vocabulary has no such.
    special_tokens: text -> id of the tokens that carry no text: found in the input by `encode`,
        left out by `decode` unless asked for.
    chat_template, chat_templates: Jinja2 source (the default one, and all by name); see `chat`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        roles: Mapping[str, int],
        special_tokens: Mapping[str, int],
        detokenizer: Detokenizer,
        config: TokenizerConfig,
    ):
        self.vocab_size = vocab_size
        ids = [roles.get(role) for role in ROLES]
        (
            self.bos_id,
            self.eos_id,
            self.unk_id,
            self.pad_id,
            self.cls_id,
            self.sep_id,
            self.mask_id,
        ) = ids
        self.special_tokens = dict(special_tokens)
        self.config = config
        self._special_ids = frozenset(self.special_tokens.values())
        self._detokenizer = detokenizer

    @property
    def chat_templates(self) -> dict[str, str]:
        return dict(self.config.chat_templates)

    @property
    def chat_template(self) -> str | None:
        return self.config.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.config.chat_templates["default"] = template

    @property
    def bos_token(self) -> str | None:
        return None if self.bos_id is None else self.id_to_piece(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        return None if self.eos_id is None else self.id_to_piece(self.eos_id)

    @abc.abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Special tokens written out in it become their ids.

        add_special_tokens: also put the tokens that the model expects around a text (BOS, or [CLS]
            and [SEP], or whatever the tokenizer's files say). False for rendered chats, which hold
            them already.
        """

    @abc.abstractmethod
    def id_to_piece(self, id_: int) -> str:
        """The vocabulary entry of an id; ValueError when there is none."""

    @abc.abstractmethod
    def piece_to_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry, or None."""

    @abc.abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write files that `load_tokenizer` and transformers read; the directory is made."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ValueError for an id outside the vocabulary.

        Malformed UTF-8, which a model can produce, becomes U+FFFD.
        """
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return stream.push(ids) + stream.flush()

    def stream(self, *, skip_special_tokens: bool = True) -> StreamingDecoder:
        """A decoder for ids that arrive bit by bit; its pieces joined are `decode` of them all."""
        return StreamingDecoder(self._detokenizer, self._special_ids if skip_special_tokens else ())

    def _unknown_id(self, id_: int) -> ValueError:
        return ValueError(
            f"token id {id_} is not in the vocabulary of {self.vocab_size} tokens; "
            "the ids must come from the model that this tokenizer belongs to"
        )


def check_text(text: str) -> None:
    """TypeError or ValueError when `text` is not text that any tokenizer can take."""
    if not isinstance(text, str):
        raise TypeError(f"text must be str, got {type(text).__name__}; encode one text at a time")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate at character {error.start}, which is not Unicode text; "
            "read the input as UTF-8, or replace such characters first"
        ) from error
