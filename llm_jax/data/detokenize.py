"""Tokens back to text, all at once or as they arrive, with the same result.

Every supported tokenizer turns one id into a fixed run of bytes that depends on nothing but whether
any text came before it. So decoding is: look up the bytes, join, decode as UTF-8. A stream does the
same with an incremental UTF-8 decoder that keeps the bytes of an unfinished character, at a
constant cost per token and without looking back:

    stream = tokenizer.stream()
    for ids in generated:
        print(stream.push(ids), end="")
    print(stream.flush())

The pieces of text joined equal `tokenizer.decode` of all ids, always. A character is emitted when
its last byte has arrived; U+FFFD stands only for bytes that can never become a character (or, at
the flush, for a character cut off by the end).
"""

import codecs
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

# One U+FFFD for every malformed byte, as sentencepiece does; "replace" gives one for each maximal
# malformed subsequence, as byte-level BPE decoders do (Unicode standard, section 3.9).
REPLACE_EACH_BYTE = "llm_jax.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error(REPLACE_EACH_BYTE, _replace_each_byte)

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space inside a piece
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")

Piece = str | bytes
Step = Callable[[Piece, bool], Piece]  # (piece, whether it is the first) -> piece


@dataclasses.dataclass(frozen=True)
class Detokenizer:
    """How the ids of one vocabulary become bytes.

    render: (id, begun) -> (bytes, begun): the bytes of `id`, given whether the text has begun, and
        whether it has begun after it. ValueError when the vocabulary has no such id.
    errors: the codecs error handler for malformed UTF-8.
    strip: how many spaces at the very start of the text are dropped.
    skip_breaks: whether a skipped id cuts off an unfinished character, as sentencepiece has it; else
        the bytes on its two sides join, as in the tokenizers library.
    """

    render: Callable[[int, bool], tuple[bytes, bool]]
    errors: str = "replace"
    strip: int = 0
    skip_breaks: bool = False


class StreamingDecoder:
    """Text of a growing list of ids. See the module docstring; made by `Tokenizer.stream`."""

    def __init__(self, detokenizer: Detokenizer, skip: Collection[int]):
        self._render = detokenizer.render
        self._skip = skip
        self._strip = detokenizer.strip
        self._skip_breaks = detokenizer.skip_breaks
        self._utf8 = codecs.getincrementaldecoder("utf-8")(detokenizer.errors)
        self._begun = False

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that `ids` (one or several) complete; empty while a character is unfinished."""
        ids = ids if isinstance(ids, Iterable) else (ids,)
        return "".join([self._text(int(id_)) for id_ in ids])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was cut off, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _text(self, id_: int) -> str:
        if id_ in self._skip:
            return self.flush() if self._skip_breaks else ""
        return self._utf8.decode(self._bytes(id_))

    def _bytes(self, id_: int) -> bytes:
        data, self._begun = self._render(id_, self._begun)
        dropped = min(self._strip, len(data) - len(data.lstrip(b" ")))
        if data:
            self._strip = self._strip - dropped if dropped == len(data) else 0
        return data[dropped:]


def from_decoder_spec(spec: dict[str, Any] | None, id_to_piece: Callable[[int], str]) -> Detokenizer:
    """The Detokenizer for the `decoder` entry of a tokenizer.json.

    Supported: ByteLevel, WordPiece, Metaspace, none, and sequences of Replace (of a string),
    ByteFallback, Metaspace, ByteLevel, Fuse, closed by Strip (of leading spaces). Anything else is
    a
    ValueError: a decoder that is only nearly right would change text silently.
    """
    spec = spec or {"type": None}
    specs = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    strip = 0
    if len(specs) > 1 and specs[-1]["type"] == "Strip" and specs[-2]["type"] == "Fuse":
        strip = _leading_strip(specs[-1])
        specs = specs[:-1]
    steps = [_step(part) for part in specs]
    fallback = any(part["type"] == "ByteFallback" for part in specs)

    @functools.cache
    def render(id_: int, begun: bool) -> tuple[bytes, bool]:
        piece: Piece = id_to_piece(id_)
        for step in steps:
            piece = step(piece, not begun)
        return piece if isinstance(piece, bytes) else piece.encode(), True

    return Detokenizer(render, REPLACE_EACH_BYTE if fallback else "replace", strip)


def _leading_strip(spec: dict[str, Any]) -> int:
    if spec["content"] != " " or spec["stop"]:
        raise ValueError(f"tokenizer.json: decoder {spec} is not supported; only leading spaces are")
    return spec["start"]


def _step(spec: dict[str, Any]) -> Step:
    """One decoder as a function of (piece, first)."""
    match spec:
        case {"type": None}:
            return lambda piece, first: piece if first else " " + _str(piece)
        case {"type": "ByteLevel"}:
            return lambda piece, first: _byte_level(_str(piece))
        case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
            return functools.partial(_word_piece, prefix, cleanup)
        case {"type": "Metaspace", "replacement": mark}:
            drop_first = spec.get("prepend_scheme", "always") != "never"
            return functools.partial(_metaspace, mark, drop_first)
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return lambda piece, first: piece.replace(old, new) if isinstance(piece, str) else piece
        case {"type": "ByteFallback"}:
            return lambda piece, first: byte_piece(_str(piece)) or piece
        case {"type": "Fuse"}:
            return lambda piece, first: piece
    raise ValueError(
        f"tokenizer.json: decoder {spec} is not supported; expected ByteLevel, WordPiece, "
        "Metaspace, or a sequence of Replace (of a string), ByteFallback and Fuse with Strip last"
    )


def _str(piece: Piece) -> str:
    if isinstance(piece, bytes):
        raise ValueError("tokenizer.json: a decoder that yields bytes must be the last that maps pieces")
    return piece


def byte_piece(piece: str) -> bytes | None:
    """The byte that a fallback piece such as `<0x0A>` stands for, or None for any other piece."""
    found = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else None


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest from
    U+0100 on (Radford et al., GPT-2, 2019)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), 256),
    ]
    others = sorted(set(range(256)) - set(printable))
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF = byte_alphabet()


def _byte_level(piece: str) -> bytes:
    if all(char in _BYTE_OF for char in piece):
        return bytes(_BYTE_OF[char] for char in piece)
    return piece.encode()  # an added token, written as itself


# English contractions and punctuation that WordPiece splits off, in the order in which
# tokenizer.json's `cleanup` joins them again.
_CLEANUP: Sequence[tuple[str, str]] = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _word_piece(prefix: str, cleanup: bool, piece: Piece, first: bool) -> str:
    text = _str(piece)
    if not first:
        text = text.removeprefix(prefix) if text.startswith(prefix) else " " + text
    for old, new in _CLEANUP if cleanup else ():
        text = text.replace(old, new)
    return text


def _metaspace(mark: str, drop_first: bool, piece: Piece, first: bool) -> Piece:
    if isinstance(piece, bytes):
        return piece
    return piece.replace(mark, "" if first and drop_first else " ")
