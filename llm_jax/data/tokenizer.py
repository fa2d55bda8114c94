"""Tokenizers: one interface over sentencepiece models, tokenizer.json, GPT-2 and BERT vocabularies.

    tokenizer = load_tokenizer("path/to/model")       # a directory or one of its files
    ids = tokenizer.encode("我喜欢编程。")             # list[int]
    text = tokenizer.decode(ids)
    stream = tokenizer.stream()                       # text as the ids arrive, see detokenize.py

`chat.py` renders conversations, `train_tokenizer.py` trains a sentencepiece tokenizer from text.
"""

from pathlib import Path

from llm_jax.data.detokenize import StreamingDecoder
from llm_jax.data.fast_tokenizer import (
    ByteTokenizer,
    FastTokenizer,
    load_bert_vocab,
    load_tokenizer_json,
    load_vocab_and_merges,
)
from llm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer, load_sentencepiece
from llm_jax.data.tokenizer_base import Tokenizer

__all__ = [
    "ByteTokenizer",
    "FastTokenizer",
    "SentencePieceTokenizer",
    "StreamingDecoder",
    "Tokenizer",
    "load_tokenizer",
]

_JSON = ("tokenizer.json", "tokenizer.json.gz")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm.model")
_OTHER = ("vocab.json", "vocab.txt")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in `path`, a directory or a single file.

    Of a directory the first that is there is taken: tokenizer.json, tokenizer.json.gz,
    tokenizer.model, spiece.model, spm.model, vocab.json (with merges.txt), vocab.txt (BERT). Of a
    file the kind follows from its name: .json or .json.gz, .model, vocab.json or merges.txt, .txt.
    tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja beside
    it are honoured.

    FileNotFoundError when there is nothing to load; ValueError, naming the file, when it is
    truncated, damaged or of a kind that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        return _load_file(_find(path))
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: no such file or directory")
    return _load_file(path)


def _find(directory: Path) -> Path:
    names = (*_JSON, *_SENTENCEPIECE, *_OTHER)
    found = next((directory / name for name in names if (directory / name).is_file()), None)
    if found is None:
        present = ", ".join(sorted(entry.name for entry in directory.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"no tokenizer in {directory}: looked for {', '.join(names)}; found {present}"
        )
    return found


def _load_file(path: Path) -> Tokenizer:
    if path.name in ("vocab.json", "merges.txt"):
        vocab, merges = path.with_name("vocab.json"), path.with_name("merges.txt")
        for needed in (vocab, merges):
            if not needed.is_file():
                raise FileNotFoundError(f"{path} needs {needed.name} beside it, and there is none")
        return load_vocab_and_merges(vocab, merges)
    if path.name.endswith((".json", ".json.gz")):
        return load_tokenizer_json(path)
    if path.suffix == ".model":
        return load_sentencepiece(path)
    if path.suffix == ".txt":
        return load_bert_vocab(path)
    raise ValueError(
        f"{path}: unknown kind of tokenizer file; expected *.json, *.json.gz, *.model "
        "(sentencepiece), vocab.json with merges.txt, or vocab.txt (BERT)"
    )
