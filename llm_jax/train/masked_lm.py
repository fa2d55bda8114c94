"""Masked-language-model training of an encoder: a task of its own, and what others can begin with.

texts -> tokenizer, given or trained on them -> packed rows, or a token store -> its rows
-> an encoder learns to guess hidden tokens (Devlin et al. 2019), from scratch or from a checkpoint,
trained by llm_jax/train/loop.py -> how well it guesses those of held-out texts

Its embeddings and layers then start a classifier or a reader, which leave the vocabulary head behind: by
`init_from`, or in one run by `pretrain`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.workdir import begin_run, load_start
from llm_jax.config import MaskedLanguageModelConfig, ModelConfig, PretrainConfig, unread
from llm_jax.data.loader import ExampleLoader, PackedLoader, this_host
from llm_jax.data.packing import Batch, pack, row_batches
from llm_jax.data.sources import read_listed
from llm_jax.data.store_rows import Source, SplitBatches, SplitRows, StoreLoader
from llm_jax.data.tasks import Encode, documents, split
from llm_jax.data.token_store import EVAL, is_store, open_store
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from llm_jax.distributed import main_first
from llm_jax.models import Model, Params, complete_params, describe
from llm_jax.models.heads import HEADS
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import Objective, masked_lm_loss
from llm_jax.train.pretrained import Start, find_start
from llm_jax.tree import flatten

MASK = "<mask>"  # of a tokenizer that is trained here
# How texts are read, split and cut: settings that a store was made with, and that no run on it reads
OF_TEXTS = ("text_field", "eval_data", "eval_fraction", "character_coverage")


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """What is learned from, and what it is judged by."""

    tokenizer: Tokenizer
    loader: PackedLoader | StoreLoader
    batches: Sequence[Batch]  # of the held-out part
    tokens: int  # of the held-out part


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModelResult:
    """How well the trained encoder guesses hidden tokens of held-out texts."""

    loss: float  # nats per hidden token
    perplexity: float  # per hidden token
    accuracy: float
    tokens: int  # of the held-out texts, hidden or not
    vocab_size: int  # what a blind guess chooses from


def run(
    config: MaskedLanguageModelConfig,
    workdir: str | Path,
    mesh: Mesh,
    *,
    echo: Callable[[Record], None] | None = None,
) -> MaskedLanguageModelResult:
    """Train (or resume) in `workdir`, then guess hidden tokens of the held-out texts.

    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    start = find_start(config.init_from) if config.init_from else None
    read = _read_store if is_store(config.data) else _read_texts
    corpus = read(config, start, workdir / "tokenizer", this_host(mesh))
    model_config = _model_config(config, start, corpus.tokenizer)
    objective = masked_lm_objective(corpus.tokenizer, config.mask_rate)
    begin_run(workdir, config, model_config)
    with main_first("tokenizer"):
        if not (workdir / "tokenizer").is_dir():
            corpus.tokenizer.save(workdir / "tokenizer")
    model = describe(dataclasses.replace(model_config, param_dtype="float32"))  # master weights

    first = None
    if start is not None:
        first = lambda key: load_start(start.path, model, mesh, key)[0]  # noqa: E731
    data = corpus.tokenizer, corpus.loader, corpus.batches
    params = fit_masked_lm(model, *data, config, mesh, workdir, start=first, echo=echo)
    numbers = make_evaluate(model, objective, corpus.batches, mesh)(params)
    loss = numbers["eval/loss"]
    return MaskedLanguageModelResult(
        loss=loss,
        perplexity=math.exp(loss),
        accuracy=numbers["eval/accuracy"],
        tokens=corpus.tokens,
        vocab_size=corpus.tokenizer.vocab_size,
    )


def fit_masked_lm(
    model: Model,
    tokenizer: Tokenizer,
    loader: PackedLoader | StoreLoader | ExampleLoader,
    batches: Sequence[Batch],
    config: PretrainConfig,
    mesh: Mesh,
    workdir: Path,
    *,
    start: Callable[[jax.Array], Params] | None = None,
    echo: Callable[[Record], None] | None = None,
) -> Params:
    """The best parameters of the masked LM `model` after training; it resumes from `workdir`.

    batches: the held-out part. start: see `Task`.
    """
    objective = masked_lm_objective(tokenizer, config.mask_rate)
    task = Task(model, objective, loader, make_evaluate(model, objective, batches, mesh), start)
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    return fit(task, config, mesh, workdir, steps=steps, echo=echo).best_params


def pretrain_encoder(
    stage: PretrainConfig,
    model: Model,
    tokenizer: Tokenizer,
    encode: Encode,
    texts: Iterable[str],
    held_out: Iterable[str],
    row_tokens: int,
    mesh: Mesh,
    workdir: Path,
    key: jax.Array,
    *,
    begin: Callable[[Model, jax.Array], Params] | None = None,
) -> Params:
    """First parameters of `model`: masked-LM training on `texts`, judged on `held_out`; heads by `key`.

    Texts as `encode` has them are packed into rows of `row_tokens`. The training has a workdir of its
    own, WORKDIR/pretrain, from which it resumes. begin: first parameters of the masked LM; None = random
    ones.
    """
    rows, judged = (pack(documents(part, encode), row_tokens) for part in (texts, held_out))
    loader = PackedLoader(rows, stage.batch_size, stage.seed, **this_host(mesh))
    batches = row_batches(judged, stage.batch_size)
    encoder = masked_lm_model(model.config, stage.dropout)
    start = functools.partial(begin, encoder) if begin else None
    place = workdir / "pretrain"
    trunk = fit_masked_lm(encoder, tokenizer, loader, batches, stage, mesh, place, start=start)
    return with_trunk(trunk, model, mesh, key)


def masked_lm_model(config: ModelConfig, dropout: float | None = None) -> Model:
    """The same encoder with a vocabulary head in place of its own; float32 master weights.

    dropout: None = the encoder's.
    """
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    config = config.with_head("masked_lm")
    return describe(dataclasses.replace(config, tie_embeddings=True, param_dtype="float32"))


def masked_lm_objective(tokenizer: Tokenizer, rate: float) -> Objective:
    """`masked_lm_loss` with the tokenizer's mask token, or its unknown token where it has none.

    Special tokens ([CLS], <s>) are never hidden: they say nothing.
    """
    mask_id = tokenizer.unk_id if tokenizer.mask_id is None else tokenizer.mask_id
    if mask_id is None:
        raise ValueError("the tokenizer has neither a mask nor an unknown token to hide others behind")
    return functools.partial(
        masked_lm_loss,
        mask_id=mask_id,
        vocab_size=tokenizer.vocab_size,
        rate=rate,
        spared=tuple(sorted(tokenizer.special_tokens.values())),
    )


def with_trunk(trunk: Mapping, model: Model, mesh: Mesh, key: jax.Array) -> Params:
    """Parameters of `model`: embeddings and layers from `trunk`, heads at random."""
    kept = flatten({name: part for name, part in trunk.items() if name not in HEADS})
    return complete_params(kept, model, mesh, key)[0]


def _read_texts(
    config: MaskedLanguageModelConfig, start: Start | None, directory: Path, host: dict[str, int]
) -> _Corpus:
    """The texts that `config.data` names, packed; a tokenizer is trained where none is given."""
    texts, held_out = _split(config)
    given = config.tokenizer if start is None else start.tokenizer
    with main_first("tokenizer"):
        if directory.is_dir() or given:
            tokenizer = load_tokenizer(given or directory)
        else:
            tokenizer = _train_tokenizer(config, texts, directory)
    rows, judged = (
        pack(documents(part, tokenizer.encode), config.row_tokens) for part in (texts, held_out)
    )
    loader = PackedLoader(rows, config.batch_size, config.seed, **host)
    tokens = int(np.sum(judged["segment_ids"] > 0))
    return _Corpus(tokenizer, loader, row_batches(judged, config.batch_size), tokens)


def _read_store(
    config: MaskedLanguageModelConfig, start: Start | None, directory: Path, host: dict[str, int]
) -> _Corpus:
    """The token store in `config.data`, with the tokenizer that made it.

    Raises ValueError for one without held-out part, and settings of texts beside it.
    """
    store = open_store(config.data)
    if EVAL not in store.splits:
        raise ValueError(
            f"data={config.data!r} has no held-out part to judge the model by; prepare it again with "
            "--eval_fraction=0.01"
        )
    unread(config, OF_TEXTS, f"a run on the token store {config.data}")
    given = config.tokenizer if start is None else start.tokenizer
    tokenizer = load_tokenizer(given or store.directory / "tokenizer")
    store.check_tokenizer(tokenizer, str(given))
    source = Source(store.directory.name, store, 1.0)
    loader = StoreLoader([source], config.row_tokens, config.batch_size, config.seed, **host)
    batches = SplitBatches(SplitRows(store, EVAL, config.row_tokens), config.batch_size)
    return _Corpus(tokenizer, loader, batches, store.splits[EVAL].tokens)


def _split(config: MaskedLanguageModelConfig) -> tuple[list[str], list[str]]:
    """The texts to train on, and those held out."""
    texts = read_listed(config.data, field=config.text_field)
    if config.eval_data:
        return texts, read_listed(config.eval_data, field=config.text_field)
    return split(texts, config.eval_fraction, config.seed, text=lambda text: text)


def _train_tokenizer(
    config: MaskedLanguageModelConfig, texts: Sequence[str], directory: Path
) -> Tokenizer:
    """A tokenizer with a mask token, written to `directory`."""
    assert config.model is not None
    new = train_sentencepiece(
        texts,
        directory,
        vocab_size=config.model.vocab_size,
        character_coverage=config.character_coverage,
        control_symbols=(MASK,),
    )
    new.config.tokens["mask"] = MASK
    new.save(directory, texts=texts[:1000])
    return load_tokenizer(directory)


def _model_config(
    config: MaskedLanguageModelConfig, start: Start | None, tokenizer: Tokenizer
) -> ModelConfig:
    """The encoder with a vocabulary head; that of `start`, or as the config has it."""
    if start is None:
        assert config.model is not None
        return dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    found = start.config
    if found.causal:
        raise ValueError(f"init_from={start.path!r} is a {found.family!r} decoder; expected an encoder")
    start.check("row_tokens", config.row_tokens, tokenizer)
    dropout = found.dropout if config.dropout is None else config.dropout
    return dataclasses.replace(found.with_head("masked_lm"), dropout=dropout)
