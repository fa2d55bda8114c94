"""Tokenizers run by the `tokenizers` library.

From tokenizer.json; from the older vocabulary files of GPT-2, RoBERTa, Qwen2 and BERT, for which
the same pipeline is built; and over bytes alone, for tests.
"""

import dataclasses
import gzip
import json
import types
import zlib
from pathlib import Path

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from llm_jax.data.detokenize import byte_alphabet, from_decoder_spec
from llm_jax.data.tokenizer_base import Tokenizer, check_text
from llm_jax.data.tokenizer_config import (
    TokenizerConfig,
    read_json,
    read_tokenizer_config,
    write_tokenizer_config,
)

# What a tokenizer.json that comes without any config usually calls its special tokens.
_USUAL_TOKENS = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]"),
    "pad": ("<pad>", "[PAD]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}
_BERT_TOKENS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_GPT2_TOKENS = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
_ROBERTA_TOKENS = {
    "bos": "<s>",
    "eos": "</s>",
    "unk": "<unk>",
    "pad": "<pad>",
    "cls": "<s>",
    "sep": "</s>",
    "mask": "<mask>",
}
# Classes whose post-processor transformers 4 rebuilds from add_bos_token and add_eos_token.
_BOS_EOS_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
_QWEN2_TOKENS = {"eos": "<|endoftext|>", "pad": "<|endoftext|>"}
# Splits as GPT-2 does, but digits one by one and letters with one leading character of any other
# kind.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two texts as one sequence of T tokens; the second one, or a window of it, can be read back."""

    ids: list[int]
    types: list[int]  # segment of each token, as the tokenizer's template has it
    in_second: list[bool]  # whether a token is of the second text (special tokens are of none)
    offsets: list[tuple[int, int]]  # characters [start, end) of a token in its text


class FastTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` with the options that its directory states.

    What is put around a text is up to tokenizer.json's own post-processor, except for the classes
    that `add_bos_token` and `add_eos_token` are made for (Llama, Gemma, Cohere): there they decide.
    Truncation and padding stored in a tokenizer.json are switched off: lengths are the caller's
    business.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig):
        backend.no_truncation()
        backend.no_padding()
        _add_tokens(backend, config)
        ids = backend.get_vocab(with_added_tokens=True)
        roles = {role: ids[text] for role, text in config.tokens.items()}
        _surround(backend, config, roles)
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        super().__init__(
            vocab_size=max(ids.values()) + 1,
            roles=roles,
            special_tokens={token.content: id_ for id_, token in added.items() if token.special},
            detokenizer=from_decoder_spec(_decoder_spec(backend), self.id_to_piece),
            config=config,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        check_text(text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pair(
        self, first: str, second: str, *, max_tokens: int, first_tokens: int, overlap: int
    ) -> list[Pair]:
        """`first` with each of the windows of `second` that it takes to read all of it.

        Each has at most `max_tokens` with the special tokens that the model expects around a pair; two
        neighbouring windows share `overlap` tokens. Of `first` no more than `first_tokens` are taken.
        Raises ValueError where no room, or no more than the overlap, is left for a window.
        """
        one, two = (self._backend.encode(text, add_special_tokens=False) for text in (first, second))
        one.truncate(first_tokens)
        room = max_tokens - len(one.ids) - self._backend.num_special_tokens_to_add(True)
        if room <= overlap:
            raise ValueError(
                f"max_tokens={max_tokens}: {room} are left for a window beside {first[:40]!r}; expected "
                f"more than the overlap={overlap} of two windows"
            )
        two.truncate(room, stride=overlap)
        whole = [self._backend.post_process(one, window) for window in (two, *two.overflowing)]
        return [Pair(e.ids, e.type_ids, [s == 1 for s in e.sequence_ids], e.offsets) for e in whole]

    def id_to_piece(self, id_: int) -> str:
        piece = self._backend.id_to_token(id_) if id_ >= 0 else None
        if piece is None:
            raise self._unknown_id(id_)
        return piece

    def piece_to_id(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        # The generic class takes tokenizer.json as it is; the named ones rebuild parts of it.
        write_tokenizer_config(directory, self.config, tokenizer_class="PreTrainedTokenizerFast")


class ByteTokenizer(FastTokenizer):
    """UTF-8 bytes as tokens, for tests: <pad> 0, <unk> 1, <s> 2, </s> 3, byte b is 4 + b."""

    def __init__(self):
        special = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>"}
        vocab = {text: id_ for id_, text in enumerate(special.values())}
        vocab |= {char: len(special) + byte for char, byte in byte_alphabet().items()}
        backend = _byte_level(models.BPE(vocab, []), pre_tokenizers.ByteLevel(False, use_regex=False))
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
        )
        super().__init__(backend, TokenizerConfig(tokens=special))


def load_tokenizer_json(path: Path) -> FastTokenizer:
    """The tokenizer in a `tokenizer.json`, gzipped or not, with the config files beside it."""
    text = _read_text(path)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON (truncated?): {error}") from error
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise ValueError(f"{path} is no tokenizer.json: it has no model with a vocab")
    with _Naming(path):
        backend = tokenizers.Tokenizer.from_str(text)
    config = read_tokenizer_config(path.parent)
    if not config.values and not config.tokens:
        config = config.with_default_tokens(_usual_tokens(backend))
    return FastTokenizer(backend, config)


def load_vocab_and_merges(vocab: Path, merges: Path) -> FastTokenizer:
    """Byte-level BPE from `vocab.json` and `merges.txt`, as GPT-2, RoBERTa or Qwen2 use it.

    Which of the three: `tokenizer_class`; without one, RoBERTa when the vocabulary has `<s>`,
    `</s>` and `<mask>`, else GPT-2.
    """
    config = read_tokenizer_config(vocab.parent)
    pieces = read_json(vocab)
    with _Naming(merges):
        bpe = models.BPE.from_file(str(vocab), str(merges))
    marked = {"<s>", "</s>", "<mask>"} <= pieces.keys()
    kind = config.tokenizer_class or ("RobertaTokenizer" if marked else "GPT2Tokenizer")
    prefix = config.option("add_prefix_space", False)
    match kind:
        case "GPT2Tokenizer":
            backend = _byte_level(bpe, pre_tokenizers.ByteLevel(prefix))
            config = config.with_default_tokens(_GPT2_TOKENS)
        case "RobertaTokenizer":
            backend = _byte_level(bpe, pre_tokenizers.ByteLevel(prefix))
            config = config.with_default_tokens(_ROBERTA_TOKENS)
            cls, sep = config.tokens["cls"], config.tokens["sep"]
            backend.post_processor = processors.RobertaProcessing(
                (sep, pieces[sep]), (cls, pieces[cls]), add_prefix_space=prefix
            )
        case "Qwen2Tokenizer":
            split = pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated")
            bytes_ = pre_tokenizers.ByteLevel(prefix, use_regex=False)
            backend = _byte_level(bpe, pre_tokenizers.Sequence([split, bytes_]))
            backend.normalizer = normalizers.NFC()
            config = config.with_default_tokens(_QWEN2_TOKENS)
        case _:
            raise ValueError(
                f"{vocab.parent}: tokenizer_class {kind} with vocab.json and merges.txt is not "
                "known; expected GPT2Tokenizer, RobertaTokenizer or Qwen2Tokenizer. Supply its "
                "tokenizer.json"
            )
    return FastTokenizer(backend, config)


def load_bert_vocab(path: Path) -> FastTokenizer:
    """WordPiece from a BERT `vocab.txt` (Devlin et al., 2018), one piece per line.

    `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` come from tokenizer_config.json.
    When nothing states `do_lower_case`, text is lower-cased unless the vocabulary has upper-case
    pieces.
    """
    pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    config = read_tokenizer_config(path.parent).with_default_tokens(_BERT_TOKENS)
    cls, sep, unk = (config.tokens[role] for role in ("cls", "sep", "unk"))
    missing = [token for token in (cls, sep, unk) if token not in vocab]
    if missing:
        raise ValueError(f"{path} is no BERT vocabulary: it lacks {', '.join(missing)}")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk))
    strip_accents = config.values.get("strip_accents")
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=config.option("do_lower_case", not any(map(_has_upper_case, pieces))),
        handle_chinese_chars=config.option("tokenize_chinese_chars", True),
        strip_accents=None if strip_accents is None else config.option("strip_accents", False),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece("##")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return FastTokenizer(backend, config)


def _has_upper_case(piece: str) -> bool:
    bracketed = piece[:1] + piece[-1:] in ("[]", "<>")  # a special token such as [CLS] or <S>
    return piece != piece.lower() and not bracketed


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error


class _Naming:
    """Turns the bare Exception of the tokenizers library into a ValueError naming the file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is Exception:
            raise ValueError(f"{self.path} was refused by the tokenizers library: {error}") from error


def _byte_level(bpe: models.BPE, splitter: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _usual_tokens(backend: tokenizers.Tokenizer) -> dict[str, str]:
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    found = {role: [t for t in texts if t in added] for role, texts in _USUAL_TOKENS.items()}
    return {role: texts[0] for role, texts in found.items() if texts}


def _add_tokens(backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Register the tokens that the config names; those the vocabulary lacks are put at its end."""
    known = backend.get_added_tokens_decoder()
    for id_, token in config.added.items():
        if id_ not in known:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != id_:
            raise ValueError(
                f"the config gives {token.content!r} the id {id_}, but in the vocabulary it has "
                f"{backend.token_to_id(token.content)}; the files belong to different tokenizers"
            )
    named = dict.fromkeys([*config.tokens.values(), *config.extra_special])
    known_special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    missing = [text for text in named if text not in known_special]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _surround(backend: tokenizers.Tokenizer, config: TokenizerConfig, roles: dict[str, int]) -> None:
    """Make the post-processor add BOS and EOS where the config states whether to, and counts."""
    if config.tokenizer_class not in _BOS_EOS_CLASSES:
        return
    ends = backend.encode("").ids  # what it adds as it is
    template = "$A"
    special = []
    changed = False
    for role, present in (("bos", ends[:1]), ("eos", ends[-1:])):
        now = roles.get(role) is not None and present == [roles[role]]
        wanted = config.option(f"add_{role}_token", now)
        changed |= wanted != now
        if wanted:
            if role not in config.tokens:
                raise ValueError(
                    f"tokenizer_config.json: add_{role}_token is true but no {role}_token is named"
                )
            token = config.tokens[role]
            template = f"{token} {template}" if role == "bos" else f"{template} {token}"
            special.append((token, roles[role]))
    if changed:
        backend.post_processor = processors.TemplateProcessing(
            single=template,
            pair=f"{template} {template.replace('$A', '$B')}",
            special_tokens=special,
        )


def _decoder_spec(backend: tokenizers.Tokenizer) -> dict | None:
    return None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
