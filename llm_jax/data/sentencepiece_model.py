"""The sentencepiece `.model` file read as data, and its conversion to a tokenizer.json.

The sentencepiece library encodes, but does not tell what a model's normaliser or piece types are;
its protobuf classes do, but each release of them demands a recent protobuf. The file is a plain
protocol buffer message
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto), of which a
dozen fields matter here, so they are read directly.

The conversion writes the same algorithm for the `tokenizers` library, so that `transformers` reads
the tokenizer without sentencepiece. The two libraries agree on most models, not on all (Unicode
normalisation by grapheme, ties between equal scores), so `differing_text` compares them.
"""

import dataclasses
import functools
import random
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from llm_jax.data.detokenize import SPACE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

# Appended to a serialized model, this second normalizer_spec (field 3, holding add_dummy_prefix =
# false) is merged into the first: repeated occurrences of a protobuf sub-message are one message.
WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclasses.dataclass(frozen=True)
class Piece:
    """One vocabulary entry: its text, log probability (or minus its rank) and type."""

    text: str
    score: float
    type: int


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a `.model` file that decide how text is segmented and joined again."""

    serialized_pieces: tuple[bytes, ...]  # read on demand: it takes 10 us for each
    model_type: str  # "unigram", "bpe", "word" or "char"
    byte_fallback: bool
    whitespace_as_suffix: bool
    unk_surface: str
    charsmap: bytes  # compiled Unicode normalisation, empty for none
    denormalizer_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(_piece(data) for data in self.serialized_pieces)

    @property
    def unk_id(self) -> int:
        return next(id_ for id_, piece in enumerate(self.pieces) if piece.type == UNKNOWN)

    def ids_of(self, *types: int) -> list[int]:
        """Ids of all pieces of the given types."""
        return [id_ for id_, piece in enumerate(self.pieces) if piece.type in types]


def parse_model(data: bytes) -> SentencePieceModel:
    """Read a serialized ModelProto, one that the sentencepiece library has accepted before."""
    fields = _fields(data)
    if not fields[2] or not fields[3]:
        raise ValueError(
            "the sentencepiece model has no trainer_spec or normalizer_spec; it is truncated"
        )
    trainer = _single(fields[2])
    normalizer = _single(fields[3])
    denormalizer = _single(fields[5])
    return SentencePieceModel(
        serialized_pieces=tuple(fields[1]),
        model_type=_MODEL_TYPES[trainer.get(3, 1)],
        byte_fallback=bool(trainer.get(35, 0)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        unk_surface=trainer.get(44, " \N{DOUBLE QUESTION MARK} ".encode()).decode(),
        charsmap=normalizer.get(2, b""),
        denormalizer_charsmap=denormalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _piece(data: bytes) -> Piece:
    fields = _single([data])
    return Piece(
        fields[1].decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, NORMAL)
    )


def _single(messages: list) -> dict[int, Any]:
    """The last value of every field of the (merged) occurrences of one sub-message."""
    return {number: values[-1] for message in messages for number, values in _fields(message).items()}


def round_scores(data: bytes, step: float) -> bytes:
    """The same serialized model with every piece's score rounded to a multiple of `step`.

    Unigram segmentation compares sums of scores, which sentencepiece forms in float32 and others in
    float64. With a power of two as step both are exact (in float32 up to 2**24 steps), so equally
    likely segmentations are ties everywhere, and every library resolves them alike.
    """
    rounded = bytearray(data)
    for number, piece, piece_end in _scan(data):
        for field, value, end in _scan(piece) if number == 1 else ():
            if field == 2:
                start = piece_end - len(piece) + end - 4
                score = round(struct.unpack("<f", value)[0] / step) * step
                rounded[start : start + 4] = struct.pack("<f", score)
    return bytes(rounded)


def _fields(data: bytes) -> dict[int, list]:
    """Field number -> values in order: int for varints, bytes for everything else."""
    fields: dict[int, list] = defaultdict(list)
    for number, value, _ in _scan(data):
        fields[number].append(value)
    return fields


def _scan(data: bytes) -> Iterator[tuple[int, Any, int]]:
    """Every field of a message in order: number, value, and the position where it ends."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
        else:
            if wire_type == 2:
                size, position = _varint(data, position)
            else:
                size = {1: 8, 5: 4}[wire_type]
            value, position = data[position : position + size], position + size
        yield key >> 3, value, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def to_tokenizers(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """The same segmentation for the `tokenizers` library, without BOS or EOS.

    Control pieces and the unknown one become special tokens found in the text, as
    `SentencePieceTokenizer` does. The dummy prefix is put before every stretch of text between
    them. ValueError for a model that cannot be expressed.
    """
    _check_convertible(model)
    unigram = model.model_type == "unigram"
    converted = tokenizers.Tokenizer(_unigram(model) if unigram else _bpe(model))
    converted.normalizer = normalizers.Sequence(list(_normalizers(model)))
    splits = list(_splits(model))
    if splits:
        converted.pre_tokenizer = pre_tokenizers.Sequence(splits)
    converted.decoder = decoders.Sequence(list(_decoders(model)))
    named = [model.pieces[id_].text for id_ in model.ids_of(CONTROL, UNKNOWN)]
    converted.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in named])
    return converted


def _check_convertible(model: SentencePieceModel) -> None:
    reasons = {
        f"model type {model.model_type}": model.model_type not in ("unigram", "bpe"),
        "spaces as suffix": model.whitespace_as_suffix,
        "unescaped spaces": not model.escape_whitespaces,
        "unused pieces": bool(model.ids_of(UNUSED)),
        "a denormalizer": bool(model.denormalizer_charsmap),
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise ValueError(
            f"a sentencepiece model with {', '.join(found)} has no tokenizer.json equivalent"
        )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    vocab = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(vocab, unk_id=model.unk_id, byte_fallback=model.byte_fallback)


def _bpe(model: SentencePieceModel) -> models.BPE:
    """Sentencepiece merges the neighbours whose union scores highest; `tokenizers` wants a ranked
    list of pairs: every split of every piece into two pieces, ranked by the piece's score.
    """
    vocab = {piece.text: id_ for id_, piece in enumerate(model.pieces)}
    mergeable = {piece.text for piece in model.pieces if piece.type == NORMAL}
    ranked = sorted((p for p in model.pieces if p.type == NORMAL), key=lambda p: -p.score)
    splits = ((p.text[:cut], p.text[cut:]) for p in ranked for cut in range(1, len(p.text)))
    return models.BPE(
        vocab,
        [(left, right) for left, right in splits if left in mergeable and right in mergeable],
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        # A user-defined symbol stands alone after the split and is no result of merges.
        ignore_merges=bool(model.ids_of(USER_DEFINED)),
    )


def _splits(model: SentencePieceModel) -> Iterator[pre_tokenizers.PreTokenizer]:
    """Cuts around symbols that are always whole, and inside text that must not become a byte."""
    symbols = [model.pieces[id_].text for id_ in model.ids_of(USER_DEFINED)]
    if symbols:
        longest_first = sorted(symbols, key=len, reverse=True)
        yield pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    if model.byte_fallback and (symbols or model.model_type == "unigram"):
        # The text "<0x41>" is no byte piece, but would be found as a whole word or by its score of
        # 0.
        yield pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")


def _normalizers(model: SentencePieceModel) -> Iterator[normalizers.Normalizer]:
    if model.charsmap:
        yield normalizers.Precompiled(model.charsmap)
    if model.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if model.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)


def _decoders(model: SentencePieceModel) -> Iterator[decoders.Decoder]:
    yield decoders.Replace(SPACE, " ")
    if model.byte_fallback:
        yield decoders.ByteFallback()
    yield decoders.Fuse()
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        yield decoders.Strip(" ", 1, 0)


# Text that tends to tell two tokenizers apart: scripts, spaces, combining marks, digits, controls.
PROBES = (
    "",
    " ",
    "Hello, world!  It's 2024-05-06; 3.14159 and 1,000,000.",
    "  leading, trailing and   inner spaces  ",
    "line one\nline two\r\n\n\ttabbed\u00a0no-break\u3000ideographic\u200bzero width",
    "我喜欢编程。今天天气真好，我们去公园玩吧！“引号”《书名》……",
    "繁體中文測試，混合English和数字１２３４５ＡＢＣ。",
    "かなカナ漢字ｶﾞｷﾞｸﾞ、日本語のテキスト。한국어 텍스트입니다.",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇳🇫🇷 ☕️ 😀😃",
    "مرحبا بالعالم، كيف الحال؟ ١٢٣ שלום עולם",
    "नमस्ते दुनिया, क्षत्रिय। สวัสดีชาวโลก ภาษาไทย မြန်မာ",
    "e\u0301cole café na\u0308ive A\u030a Å ﬁ ﬂ Ⅳ ½ ² ㎏ ™ ﷺ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # комментарий\n",
    "\x00\x01\x02\x1b[0m\x7f\x85\ufeff\ufffd\u2028",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!!!!! ============ ——————",
)


def differing_text(
    expected: Callable[[str], list[int]],
    actual: Callable[[str], list[int]],
    model: SentencePieceModel,
    texts: Iterable[str] = (),
) -> str | None:
    """A text that two encoders segment differently, or None when none is found.

    Tried are `texts`, PROBES, and every piece of the vocabulary in three random neighbourhoods.
    """
    surfaces = [p.text.replace(SPACE, " ") for p in model.pieces if p.type in (NORMAL, USER_DEFINED)]
    shuffle = random.Random(0)
    joined = []
    for _ in range(3):
        shuffle.shuffle(surfaces)
        joined += ["".join(surfaces[start : start + 16]) for start in range(0, len(surfaces), 16)]
    candidates = (*texts, *PROBES, *joined)
    return next((text for text in candidates if expected(text) != actual(text)), None)
