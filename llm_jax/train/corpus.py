"""What a language model learns from and is judged by: texts that are packed here, or token stores.

texts -> tokenizer trained on the training texts -> documents -> packed rows
stores -> the tokenizer that made them -> rows that are read when they are needed
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm_jax.config import DataSource, LanguageModelConfig, unread
from llm_jax.data.joining import join_related
from llm_jax.data.loader import PackedLoader
from llm_jax.data.packing import NO_TARGET, Batch, pack, row_batches
from llm_jax.data.sources import read_texts
from llm_jax.data.store_rows import Source, SplitBatches, SplitRows, StoreLoader
from llm_jax.data.tasks import documents, split, split_tail
from llm_jax.data.token_store import EVAL, TokenStore, is_store, open_store
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_characters, train_sentencepiece
from llm_jax.distributed import main_first

# How texts are read, split and cut: settings that a store was made with, and that no run on it reads
OF_TEXTS = ("document", "eval_fraction", "eval_split", "tokenizer_kind", "character_coverage")


@dataclasses.dataclass(frozen=True)
class HeldOutPart:
    """The held-out documents of one source."""

    batches: Sequence[Batch]
    targets: int
    size: int  # bytes of the texts in UTF-8


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a model learns from and is judged by."""

    tokenizer: Tokenizer
    loader: PackedLoader | StoreLoader
    held_out: dict[str, HeldOutPart]  # by name of the source: the end of its path, and column


@dataclasses.dataclass(frozen=True)
class _Source:
    """An entry of `config.data` that names texts, read and split."""

    name: str
    texts: list[str]
    held_out: list[str]
    weight: float
    join: int


def read_corpus(config: LanguageModelConfig, directory: Path, **host: int) -> Corpus:
    """What `config.data` names, with the tokenizer in `directory`, which is put there when new.

    host: `host_index` and `host_count` of the loader, for one of several hosts.
    Raises ValueError for stores beside texts, stores that cannot be trained on together, and settings
    of texts beside stores.
    """
    stores = [source.path for source in config.sources if is_store(source.path)]
    others = [source.path for source in config.sources if not is_store(source.path)]
    if stores and others:
        raise ValueError(
            f"data: {stores[0]} is a token store and {others[0]} is not; expected only one kind. Make a "
            f"store of the texts too: scripts/prepare_data.py --tokenizer={stores[0]}/tokenizer"
        )
    read = _read_stores if stores else _read_texts
    return read(config, directory, host)


def _read_stores(config: LanguageModelConfig, directory: Path, host: dict[str, int]) -> Corpus:
    stores = [_open(source) for source in config.sources]
    unread(config, OF_TEXTS, f"a run on the token store {stores[0].directory}")
    with main_first("tokenizer"):
        given = directory
        if not directory.is_dir():
            given = Path(config.tokenizer or stores[0].directory / "tokenizer")
        tokenizer = load_tokenizer(given)
        for store in stores:
            store.check_tokenizer(tokenizer, str(given))
        if not directory.is_dir():
            tokenizer.save(directory)
    names, weights = _names(config.sources), [source.weight for source in config.sources]
    loader = StoreLoader(
        list(map(Source, names, stores, weights)),
        config.row_tokens,
        config.batch_size,
        config.seed,
        **host,
    )
    parts = (_held_out(store, config) for store in stores)
    return Corpus(tokenizer, loader, dict(zip(names, parts, strict=True)))


def _open(source: DataSource) -> TokenStore:
    """ValueError for a store without held-out part, or what only texts can have."""
    store = open_store(source.path)
    if EVAL not in store.splits:
        raise ValueError(
            f"{source.path} has no held-out part to judge the model by; prepare it again with "
            "--eval_fraction=0.01"
        )
    if source.field or source.join > 1:
        raise ValueError(
            f"data: field={source.field!r} and join={source.join} of {source.path}: expected '' and 1, "
            "as it is a token store"
        )
    return store


def _held_out(store: TokenStore, config: LanguageModelConfig) -> HeldOutPart:
    split = store.splits[EVAL]
    batches = SplitBatches(SplitRows(store, EVAL, config.row_tokens), config.batch_size)
    targets = split.tokens - split.documents  # the first of a document is none
    return HeldOutPart(batches, targets, split.bytes)


def _read_texts(config: LanguageModelConfig, directory: Path, host: dict[str, int]) -> Corpus:
    sources = [
        _read(config, source, name)
        for source, name in zip(config.sources, _names(config.sources), strict=True)
    ]
    texts = [text for source in sources for text in _weighted(source, config.seed)]
    with main_first("tokenizer"):
        tokenizer = _tokenizer(config, texts, directory)
    kept = [text for source in sources for text in _documents(source, tokenizer, config.seed)]
    rows = _rows(tokenizer, kept, config.row_tokens)
    loader = PackedLoader(rows, config.batch_size, config.seed, **host)
    held_out = {}
    for source in sources:
        texts = _joined(source.held_out, source, tokenizer, config.seed)
        rows = _rows(tokenizer, texts, config.row_tokens)
        held_out[source.name] = HeldOutPart(
            row_batches(rows, config.batch_size),
            targets=int(np.sum(rows["targets"] != NO_TARGET)),
            size=sum(len(text.encode()) for text in texts),
        )
    return Corpus(tokenizer, loader, held_out)


def _names(sources: Sequence[DataSource]) -> list[str]:
    """The ends of their paths, and columns; whole paths where the ends are the same."""
    columns = ["/" * bool(source.field) + source.field for source in sources]
    whole = [source.path + column for source, column in zip(sources, columns, strict=True)]
    ends = [
        "/".join(Path(source.path).parts[-2:]) + column
        for source, column in zip(sources, columns, strict=True)
    ]
    return [end if ends.count(end) == 1 else full for end, full in zip(ends, whole, strict=True)]


def _read(config: LanguageModelConfig, source: DataSource, name: str) -> _Source:
    """The texts of an entry of `data`, some held out."""
    texts = read_texts(source.path, field=source.field or "text", split=config.document)
    if config.eval_split == "tail":
        rest, out = split_tail(texts, config.eval_fraction)
    else:
        rest, out = split(texts, config.eval_fraction, config.seed, text=lambda text: text)
    return _Source(name, rest, out, source.weight, source.join)


def _weighted(source: _Source, seed: int) -> list[str]:
    """The texts of one epoch: all of them `weight` times; of a fraction, a random part once."""
    whole, part = divmod(source.weight, 1.0)
    order = np.random.default_rng((seed, *source.name.encode())).permutation(len(source.texts))
    chosen = [source.texts[i] for i in order[: round(part * len(order))]]
    return source.texts * int(whole) + chosen


def _documents(source: _Source, tokenizer: Tokenizer, seed: int) -> list[str]:
    """The training documents of one epoch; texts that come several times are joined anew each time."""
    texts, size = _weighted(source, seed), max(len(source.texts), 1)
    passes = [texts[start : start + size] for start in range(0, len(texts), size)]
    return [
        document
        for number, part in enumerate(passes)
        for document in _joined(part, source, tokenizer, seed + number)
    ]


def _joined(texts: list[str], source: _Source, tokenizer: Tokenizer, seed: int) -> list[str]:
    return join_related(texts, tokenizer.encode, source.join, seed) if source.join > 1 else texts


def _tokenizer(config: LanguageModelConfig, texts: Sequence[str], directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, put there first where there is none: the given one, or a new one."""
    if directory.is_dir():
        return load_tokenizer(directory)
    if config.tokenizer:
        load_tokenizer(config.tokenizer).save(directory)
        return load_tokenizer(directory)
    sizes = {"vocab_size": config.model.vocab_size, "character_coverage": config.character_coverage}
    if config.tokenizer_kind == "char":
        return train_characters(texts, directory, **sizes)
    return train_sentencepiece(texts, directory, model_type=config.tokenizer_kind, **sizes)


def _rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Batch:
    """The documents, each ended by EOS, packed: leaves [R, length]."""
    return pack(documents(texts, tokenizer.encode, tokenizer.eos_id), length)
