"""Training a tokenizer from raw text: a sentencepiece model, or one token a character.

Unigram language model: Kudo, 2018. Byte-pair encoding: Sennrich et al., 2016.
"""

import io
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models

from llm_jax.data.fast_tokenizer import FastTokenizer
from llm_jax.data.replacements import Replacements, replacer
from llm_jax.data.sentencepiece_model import round_scores
from llm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llm_jax.data.tokenizer_config import TokenizerConfig

_LOG = logging.getLogger(__name__)

MODEL_TYPES = ("unigram", "bpe")
NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
# A constant, and not the number of cores: the sums of unigram training are split over the threads,
# so their number takes part in the rounding and with it in the result.
_THREADS = 4
_SCORE_STEP = 2.0**-7  # of a log probability; sums stay exact to -131072, some 16000 pieces
_SAMPLE = 2000  # lines on which tokenizer.json must agree with the model
_END = "</s>"  # of a tokenizer of characters, its only special token


def train_sentencepiece(
    texts: Iterable[str],
    output_dir: str | Path,
    *,
    vocab_size: int,
    model_type: str = "unigram",
    character_coverage: float = 0.9995,
    byte_fallback: bool = True,
    normalization: str = "identity",
    user_defined_symbols: Sequence[str] = (),
    control_symbols: Sequence[str] = (),
    replacements: Replacements = (),
) -> SentencePieceTokenizer:
    """Train on `texts` and write tokenizer.model, tokenizer.json and tokenizer_config.json.

    Ids: <pad> 0, <unk> 1, <s> 2, </s> 3, control symbols, user-defined symbols, with byte fallback
    256 bytes, then what was learnt. With the defaults decoding gives back every text unchanged, as
    no space is dropped and characters that were not learnt become bytes. The same texts and release
    of sentencepiece give the same tokenizer.

    texts: cut at line ends; empty lines are left out.
    vocab_size: wanted; a text too small for it gives fewer (logged), never more.
    model_type: "unigram", which `encode_sampled` needs, or "bpe".
    character_coverage: share of all characters in the text that become pieces, 0.98 to 1.0 (all).
    normalization: Unicode normalisation by sentencepiece's rule of that name. With anything but
        "identity" spaces are cleaned too, and tokenizer.json is written only if it is exact.
    user_defined_symbols: texts that are always one token.
    control_symbols: special tokens beyond the four, such as <|im_start|>.
    replacements: applied to the texts, and to all that the tokenizer will be given (`replacements.py`);
        what is put in place of something is always one token.

    ValueError when there is no text, or the vocabulary cannot even hold its characters.
    """
    _check(vocab_size, model_type, normalization, character_coverage)
    put = dict.fromkeys(by for _, by in replacements if by)
    lines = _lines(map(replacer(replacements), texts))
    sample = list(itertools.islice(lines, _SAMPLE))
    if not sample:
        raise ValueError("there is no text to train the tokenizer on: every text is empty")
    identity = normalization == "identity"
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(sample, lines),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            normalization_rule_name=normalization,
            remove_extra_whitespaces=not identity,
            allow_whitespace_only_pieces=identity,
            split_digits=True,
            max_sentence_length=1 << 24,  # bytes; longer lines would be left out silently
            user_defined_symbols=list(dict.fromkeys([*user_defined_symbols, *put])),
            control_symbols=list(control_symbols),
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"sentencepiece cannot train {vocab_size} pieces on this text: "
            f"{str(error).rstrip('. ')}. Enlarge vocab_size or lower character_coverage, so that "
            "all characters (and 256 bytes) fit"
        ) from error
    config = TokenizerConfig({"add_bos_token": True, "add_eos_token": False})
    if replacements:
        config.values["replacements"] = [list(pair) for pair in replacements]
    tokenizer = SentencePieceTokenizer(round_scores(model.getvalue(), _SCORE_STEP), config)
    if tokenizer.vocab_size < vocab_size:
        _LOG.warning("the text yields %d pieces, not the %d asked for", tokenizer.vocab_size, vocab_size)
    tokenizer.save(output_dir, texts=sample)
    return tokenizer


def train_characters(
    texts: Iterable[str],
    output_dir: str | Path,
    *,
    vocab_size: int,
    character_coverage: float = 1.0,
) -> FastTokenizer:
    """One token for each character of `texts`: write tokenizer.json and tokenizer_config.json.

    Ids: </s> 0, the 256 bytes, then the characters, frequent ones first. Nothing is put around a text,
    and every text comes back unchanged, with its line ends and spaces: a character that has no token
    becomes the bytes of its UTF-8.

    vocab_size: tokens at most; where it is too small for all characters, the rarest have none.
    character_coverage: share of all characters in the text that have tokens, above 0 up to 1 (all).

    ValueError when there is no text, or no room for a character beside the end and the bytes.
    """
    pieces = [_END, *(f"<0x{byte:02X}>" for byte in range(256))]
    if vocab_size <= len(pieces):
        raise ValueError(
            f"vocab_size={vocab_size}: expected more than {len(pieces)}, the end of a text and 256 bytes"
        )
    if not 0 < character_coverage <= 1:
        raise ValueError(f"character_coverage={character_coverage}: expected above 0, at most 1")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    if not counts:
        raise ValueError("there is no text to train the tokenizer on: every text is empty")
    characters = sorted(counts, key=lambda character: (-counts[character], character))
    before = itertools.accumulate((counts[character] for character in characters), initial=0)
    wanted = character_coverage * counts.total()
    pieces += [c for c, covered in zip(characters, before, strict=False) if covered < wanted]
    vocab = {piece: id_ for id_, piece in enumerate(pieces[:vocab_size])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = FastTokenizer(backend, TokenizerConfig(tokens={"eos": _END}))
    tokenizer.save(output_dir)
    return tokenizer


def _check(vocab_size: int, model_type: str, normalization: str, coverage: float) -> None:
    if vocab_size < 5:
        raise ValueError(f"vocab_size must exceed the 4 special tokens, got {vocab_size}")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}"
        )
    if not 0.98 <= coverage <= 1:  # what sentencepiece accepts
        raise ValueError(f"character_coverage must be in [0.98, 1], got {coverage}")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from filter(str.strip, text.split("\n"))
