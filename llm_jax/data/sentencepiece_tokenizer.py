"""Tokenizers run by the sentencepiece library from a `.model` file (Kudo and Richardson, 2018)."""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, normalizers, processors

from llm_jax.data.detokenize import REPLACE_EACH_BYTE, SPACE, Detokenizer, byte_piece
from llm_jax.data.replacements import replacer
from llm_jax.data.sentencepiece_model import (
    BYTE,
    CONTROL,
    UNKNOWN,
    WITHOUT_DUMMY_PREFIX,
    differing_text,
    parse_model,
    to_tokenizers,
)
from llm_jax.data.subword_sampling import SegmentationSampler
from llm_jax.data.tokenizer_base import Tokenizer, check_text
from llm_jax.data.tokenizer_config import (
    TokenizerConfig,
    read_tokenizer_config,
    write_tokenizer_config,
)

_LOG = logging.getLogger(__name__)

# Classes that use the ids of the .model file as they are. Others (T5, XLM-R, ...) renumber pieces.
_PLAIN_CLASSES = (
    None,
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
    "PreTrainedTokenizer",
    "TokenizersBackend",
)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, with the conventions that Llama put around it.

    BOS is put before a text and EOS not after it, unless `add_bos_token` and `add_eos_token` of the
    config say otherwise. Control pieces (`<s>`), the unknown piece and added tokens written in a
    text become their ids; each stretch of text between them is encoded on its own, every one with
    the model's dummy prefix (with `"legacy": false` in the config, only one that opens the text). The
    `replacements` of the config are applied to each stretch first; `decode` does not take them back.

    model: the bytes of the `.model` file; ValueError when they are damaged or use a feature (spaces
    as suffix, a denormalizer) that decoding here does not have.
    """

    def __init__(self, model: bytes, config: TokenizerConfig):
        self._serialized = model
        self._processor = _processor(model)
        self.model = parse_model(model)
        if self.model.whitespace_as_suffix or self.model.denormalizer_charsmap:
            raise ValueError(
                "sentencepiece models with spaces as suffix or a denormalizer are not supported"
            )
        size = self._processor.vocab_size()
        self._types = _piece_types(self._processor)
        named = {
            id_: AddedToken(self._processor.id_to_piece(id_), special=True, normalized=False)
            for id_, kind in self._types.items()
            if kind in (CONTROL, UNKNOWN)
        }
        self._tokens = named | _added_tokens(config, self._processor)
        self._token_ids = {token.content: id_ for id_, token in self._tokens.items()}
        self._split = _splitter(self._tokens)
        self._replace = replacer(config.replacements)
        super().__init__(
            vocab_size=max([size, *(id_ + 1 for id_ in self._tokens)]),
            roles=self._roles(config),
            special_tokens={
                token.content: id_
                for id_, token in self._tokens.items()
                # the unknown piece stands for text that was lost, so decoding shows it
                if token.special and self._types.get(id_) != UNKNOWN
            },
            detokenizer=Detokenizer(functools.cache(self._render), REPLACE_EACH_BYTE, skip_breaks=True),
            config=config,
        )
        self._prefix_always = config.option("legacy", True)
        self._before = self._around("bos", self.bos_id, True)
        self._after = self._around("eos", self.eos_id, False)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        check_text(text)
        return self._surround(list(self._ids(text, _most_likely)), add_special_tokens)

    def encode_sampled(
        self, text: str, *, alpha: float, seed: int, add_special_tokens: bool = True
    ) -> list[int]:
        """A random segmentation of `text`, for training (subword regularisation, Kudo, 2018).

        alpha: inverse temperature over all segmentations (0.1 is usual; larger stays closer to
            `encode`).
        seed: 0 or more; the same seed gives the same ids, in every process.

        ValueError when the model is not a unigram model.
        """
        check_text(text)
        ids = self._ids(
            text, lambda processor, part: self._sampler(processor.normalize(part), alpha, seed)
        )
        return self._surround(list(ids), add_special_tokens)

    def id_to_piece(self, id_: int) -> str:
        if id_ in self._tokens:
            return self._tokens[id_].content
        if not 0 <= id_ < self._processor.vocab_size():
            raise self._unknown_id(id_)
        return self._processor.id_to_piece(id_)

    def piece_to_id(self, piece: str) -> int | None:
        return self._token_ids.get(piece, _lookup(self._processor, piece))

    def save(self, directory: str | Path, *, texts: Iterable[str] = ()) -> None:
        """Write tokenizer.model, tokenizer_config.json, and tokenizer.json if `to_fast` gives one.

        transformers reads tokenizer.json; without it, it converts tokenizer.model by its own rules.
        texts: passed to `to_fast`.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(self._serialized)
        (directory / "tokenizer.json").unlink(missing_ok=True)  # that of an earlier tokenizer
        kind = "LlamaTokenizer"
        roles = {
            f"{role}_token": self.id_to_piece(id_) for role, id_ in self._roles(self.config).items()
        }
        fast = self.to_fast(texts)
        if fast is None:
            _LOG.warning("%s has no exact tokenizer.json: transformers may differ", directory)
        else:
            fast.save(str(directory / "tokenizer.json"))
            kind = "PreTrainedTokenizerFast"
        write_tokenizer_config(
            directory,
            self.config,
            tokenizer_class=kind,
            legacy=self._prefix_always,
            add_bos_token=bool(self._before),
            add_eos_token=bool(self._after),
            added_tokens_decoder={str(id_): _fields(token) for id_, token in self._tokens.items()},
            **roles,
        )

    def to_fast(self, texts: Iterable[str] = ()) -> tokenizers.Tokenizer | None:
        """The same tokenizer for the `tokenizers` library, or None when there is no exact one.

        Exact means: the same ids for every vocabulary piece among random neighbours, for texts in
        many scripts, and for `texts`.
        """
        try:
            fast = to_tokenizers(self.model)
        except ValueError as error:
            _LOG.info("no tokenizer.json: %s", error)
            return None
        replacements = [normalizers.Replace(Regex(p), by) for p, by in self.config.replacements]
        fast.normalizer = normalizers.Sequence([*replacements, fast.normalizer])
        fast.add_tokens(list(self._tokens.values()))
        renamed = [t.content for id_, t in self._tokens.items() if fast.token_to_id(t.content) != id_]
        if renamed:
            _LOG.info("no tokenizer.json: added tokens %s rename pieces or leave gaps", renamed)
            return None
        fast.post_processor = self._template()
        marked = [f"a{text} b {text}c{text}{text}" for text in self._token_ids]
        differing = differing_text(
            self.encode, lambda text: fast.encode(text).ids, self.model, [*marked, *texts]
        )
        if differing is not None:
            _LOG.info("no tokenizer.json: the two libraries segment %r differently", differing)
            return None
        return fast

    def _template(self) -> processors.TemplateProcessing:
        before, after = (list(map(self.id_to_piece, ids)) for ids in (self._before, self._after))
        first, second = (" ".join([*before, part, *after]) for part in ("$A", "$B"))
        special = zip([*before, *after], [*self._before, *self._after], strict=True)
        return processors.TemplateProcessing(
            single=first, pair=f"{first} {second}", special_tokens=list(dict(special).items())
        )

    def _roles(self, config: TokenizerConfig) -> dict[str, int]:
        processor = self._processor
        ids: dict[str, int | None] = {"bos": processor.bos_id(), "eos": processor.eos_id()}
        ids |= {"pad": processor.pad_id(), "unk": processor.unk_id()}
        ids |= {role: self.piece_to_id(text) for role, text in config.tokens.items()}
        return {role: id_ for role, id_ in ids.items() if id_ is not None and id_ >= 0}

    def _around(self, role: str, id_: int | None, default: bool) -> list[int]:
        """BOS or EOS if it is put around a text; ValueError when asked for and there is none."""
        if not self.config.option(f"add_{role}_token", default and id_ is not None):
            return []
        if id_ is None:
            raise ValueError(
                f"tokenizer_config.json: add_{role}_token is true but there is no {role}_token"
            )
        return [id_]

    def _surround(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def _ids(self, text: str, segment: Callable[..., list[int]]) -> Iterator[int]:
        """segment: (processor, part of the text) -> ids."""
        for index, part in enumerate(self._split(text)):
            if isinstance(part, int):
                yield part
            elif part:
                prefixed = self._prefix_always or index == 0
                processor = self._processor if prefixed else self._unprefixed
                yield from segment(processor, self._replace(part))

    @functools.cached_property
    def _sampler(self) -> SegmentationSampler:
        return SegmentationSampler(self.model)

    @functools.cached_property
    def _unprefixed(self) -> sentencepiece.SentencePieceProcessor:
        return _processor(self._serialized + WITHOUT_DUMMY_PREFIX)

    def _render(self, id_: int, begun: bool) -> tuple[bytes, bool]:
        """The bytes of one id, as sentencepiece's own decoder gives them.

        The space that the dummy prefix put before the text is dropped; of models that remove extra
        spaces, every space that a piece before the first visible text begins with.
        """
        piece = self.id_to_piece(id_)
        kind = self._types.get(id_)
        if kind == UNKNOWN:
            return self.model.unk_surface.encode(), True
        if id_ in self._tokens:
            return piece.encode(), True
        byte = byte_piece(piece)
        if byte is not None and kind == BYTE:
            return byte, True
        collapses = self.model.remove_extra_whitespaces
        consumed = False
        if not begun and (self.model.add_dummy_prefix or collapses) and piece.startswith(SPACE):
            piece, consumed = piece.removeprefix(SPACE), not collapses
        return piece.replace(SPACE, " ").encode(), begun or consumed or bool(piece)


def load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """The tokenizer in a `.model` file, with the config files beside it."""
    config = read_tokenizer_config(path.parent)
    if config.tokenizer_class not in _PLAIN_CLASSES:
        raise ValueError(
            f"{path.parent}: {config.tokenizer_class} renumbers the pieces of its sentencepiece "
            "model in a way of its own, which is not supported; supply its tokenizer.json"
        )
    try:
        return SentencePieceTokenizer(path.read_bytes(), config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _most_likely(processor: sentencepiece.SentencePieceProcessor, part: str) -> list[int]:
    return processor.encode(part)


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise ValueError(f"no sentencepiece model, or a truncated one: {error}") from error
    if not processor.vocab_size():
        raise ValueError("an empty sentencepiece model; the file is truncated")
    return processor


def _piece_types(processor: sentencepiece.SentencePieceProcessor) -> dict[int, int]:
    """Id -> CONTROL, UNKNOWN or BYTE, for the pieces that are one of these."""
    ids = list(range(processor.vocab_size()))
    tests = {CONTROL: processor.is_control, UNKNOWN: processor.is_unknown, BYTE: processor.is_byte}
    return {
        id_: kind
        for kind, test in tests.items()
        for id_, holds in zip(ids, test(ids), strict=True)
        if holds
    }


def _added_tokens(
    config: TokenizerConfig, processor: sentencepiece.SentencePieceProcessor
) -> dict[int, AddedToken]:
    """Tokens that the config puts beyond the model's pieces, renames, or declares special."""
    added = dict(config.added)
    texts = {token.content for token in added.values()}
    end = max([processor.vocab_size(), *(id_ + 1 for id_ in added)])
    for text in dict.fromkeys([*config.tokens.values(), *config.extra_special]):
        if text not in texts:
            id_ = _lookup(processor, text)
            added[end if id_ is None else id_] = AddedToken(text, special=True, normalized=False)
            end += id_ is None
    return added


def _lookup(processor: sentencepiece.SentencePieceProcessor, piece: str) -> int | None:
    id_ = processor.piece_to_id(piece)  # the unknown id for a piece that does not exist
    return id_ if processor.id_to_piece(id_) == piece else None


def _splitter(tokens: dict[int, AddedToken]) -> Callable[[str], Iterator[str | int]]:
    """A function that cuts a text into stretches of text and, between them, ids of tokens found."""
    if not tokens:
        return lambda text: iter([text])
    longest_first = sorted(tokens, key=lambda id_: -len(tokens[id_].content))
    pattern = re.compile("|".join(_pattern(tokens[id_]) for id_ in longest_first))

    def split(text: str) -> Iterator[str | int]:
        start = 0
        for match in pattern.finditer(text):
            yield text[start : match.start()]
            yield longest_first[(match.lastindex or 1) - 1]  # one group for each token
            start = match.end()
        yield text[start:]

    return split


def _pattern(token: AddedToken) -> str:
    word = r"(?<!\w){}(?!\w)" if token.single_word else "{}"
    before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return before + word.format(f"({re.escape(token.content)})") + after


def _fields(token: AddedToken) -> dict[str, str | bool]:
    """An added token as tokenizer_config.json writes it."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {flag: getattr(token, flag) for flag in flags}
