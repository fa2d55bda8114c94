"""A causal language model from text files: settings in, a trained workdir out.

sources -> texts -> tokenizer trained on the training texts -> documents -> packed rows
-> decoder trained by llm_jax/train/loop.py -> perplexity on the held-out documents
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import DistillConfig, LanguageModelConfig
from llm_jax.data.joining import join_related
from llm_jax.data.loader import PackedLoader
from llm_jax.data.packing import NO_TARGET, Batch, pack, row_batches
from llm_jax.data.sources import read_texts
from llm_jax.data.tasks import documents, split
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from llm_jax.models import Model, describe, init_params
from llm_jax.train.distill import Distillation, distillation_loss
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import lm_loss
from llm_jax.train.pretrained import Pretrained, load_pretrained


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How well a model predicts held-out documents."""

    loss: float  # nats per token
    perplexity: float  # per token
    bits_per_byte: float  # of UTF-8: comparable between tokenizers
    accuracy: float  # of the next token
    tokens: int  # that were predicted, the end of each document among them


@dataclasses.dataclass(frozen=True)
class LanguageModelResult(HeldOut):
    """The trained model on the held-out documents of all sources, and of each one."""

    sources: dict[str, HeldOut]  # by file name, and column where there is one


@dataclasses.dataclass(frozen=True)
class _Source:
    """One entry of `config.data`, read and split."""

    name: str
    texts: list[str]
    held_out: list[str]
    weight: float
    join: int


def run(
    config: LanguageModelConfig,
    workdir: str | Path,
    mesh: Mesh,
    *,
    echo: Callable[[Record], None] | None = None,
) -> LanguageModelResult:
    """Train (or resume) in `workdir`, then measure the held-out documents with what was trained.

    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    sources = [_read(config, entry) for entry in config.data]
    texts = [text for source in sources for text in _weighted(source, config.seed)]
    teacher = load_pretrained(config.distill.teacher, mesh, field="teacher") if config.distill else None
    if teacher is not None:
        teacher.tokenizer.save(workdir / "tokenizer")
    tokenizer = _tokenizer(config, texts, workdir / "tokenizer")
    size = tokenizer.vocab_size if teacher is None else teacher.model.config.vocab_size
    model_config = dataclasses.replace(config.model, vocab_size=size)
    begin_run(workdir, config, model_config)
    model = describe(dataclasses.replace(model_config, param_dtype="float32"))  # master weights

    kept = [text for source in sources for text in _documents(source, tokenizer, config.seed)]
    loader = PackedLoader(
        _rows(tokenizer, kept, config.row_tokens),
        config.batch_size,
        config.seed,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    objective = functools.partial(lm_loss, chunk=config.loss_chunk)
    trained = functools.partial(objective, z_loss=config.z_loss)
    held_out = {
        source.name: _joined(source.held_out, source, tokenizer, config.seed) for source in sources
    }
    batches = {
        name: row_batches(_rows(tokenizer, documents, config.row_tokens), config.batch_size)
        for name, documents in held_out.items()
    }
    every = [batch for part in batches.values() for batch in part]
    task = Task(model, trained, loader, make_evaluate(model, objective, every, mesh))
    if config.distill is not None and teacher is not None:
        task = _distilled(task, model, teacher, config.distill, config.loss_chunk, mesh)
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)

    def measure(batches: Sequence[Batch], documents: Sequence[str]) -> HeldOut:
        numbers = make_evaluate(model, objective, batches, mesh)(state.best_params)
        targets = sum(int(np.sum(batch["targets"] != NO_TARGET)) for batch in batches)
        size = sum(len(document.encode()) for document in documents)
        loss = numbers["eval/loss"]
        bits = loss * targets / (size * math.log(2))
        return HeldOut(loss, math.exp(loss), bits, numbers["eval/accuracy"], targets)

    parts = {name: measure(batches[name], held_out[name]) for name in batches}
    total = measure(every, [document for part in held_out.values() for document in part])
    return LanguageModelResult(**vars(total), sources=parts)


def _read(config: LanguageModelConfig, entry: Sequence) -> _Source:
    """The texts of an entry (path, field, weight) or (path, field, weight, join), some held out."""
    path, field, weight, *join = entry
    texts = read_texts(path, field=field) if field else read_texts(path)
    rest, out = split(texts, config.eval_fraction, config.seed, text=lambda text: text)
    name = "/".join([*Path(path).parts[-2:], *filter(None, [field])])
    return _Source(name, rest, out, weight, *(join or [1]))


def _distilled(
    task: Task, student: Model, teacher: Pretrained, config: DistillConfig, chunk: int, mesh: Mesh
) -> Task:
    """The same task, learned from a teacher as well; what is evaluated stays the text alone."""
    width, wanted = student.config.embed_dim, teacher.model.config.embed_dim
    if config.hidden_weight and width != wanted:
        raise ValueError(
            f"distill.hidden_weight={config.hidden_weight}: expected 0, or model.embed_dim={width} "
            f"equal to the {wanted} of the teacher"
        )
    objective = functools.partial(
        distillation_loss,
        temperature=config.temperature,
        weight=config.weight,
        hidden_weight=config.hidden_weight,
        chunk=chunk,
    )
    return dataclasses.replace(
        task,
        model=Distillation(student, teacher.model),
        objective=objective,
        start=lambda key: init_params(student, mesh, key),
        frozen=(teacher.params,),
    )


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
    return train_sentencepiece(
        texts,
        directory,
        vocab_size=config.model.vocab_size,
        model_type=config.tokenizer_kind,
        character_coverage=config.character_coverage,
    )


def _rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Batch:
    """The documents, each ended by EOS, packed: leaves [R, length]."""
    return pack(documents(texts, tokenizer.encode, tokenizer.eos_id), length)
