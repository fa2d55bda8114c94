"""A causal language model from texts or token stores: settings in, a trained workdir out.

corpus (llm_jax/train/corpus.py) -> decoder trained by llm_jax/train/loop.py
-> perplexity on the held-out documents
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import DistillConfig, LanguageModelConfig
from llm_jax.data.loader import this_host
from llm_jax.distributed import on_main
from llm_jax.models import Model, Params, describe, init_params
from llm_jax.train.corpus import HeldOutPart, read_corpus
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
    teacher = load_pretrained(config.distill.teacher, mesh, field="teacher") if config.distill else None
    if teacher is not None:
        save = functools.partial(teacher.tokenizer.save, workdir / "tokenizer")
        on_main("the teacher's tokenizer", save)
    corpus = read_corpus(config, workdir / "tokenizer", **this_host(mesh))
    steps = config.steps or round(config.epochs * corpus.loader.steps_per_epoch)
    size = corpus.tokenizer.vocab_size if teacher is None else teacher.model.config.vocab_size
    model_config = dataclasses.replace(config.model, vocab_size=size)
    begin_run(workdir, config, model_config)
    model = describe(dataclasses.replace(model_config, param_dtype="float32"))  # master weights
    objective = functools.partial(lm_loss, chunk=config.loss_chunk)
    parts = list(corpus.held_out.values())
    judges = [make_evaluate(model, objective, part.batches, mesh) for part in parts]

    def evaluate(params: Params) -> dict[str, float]:
        return _mean([judge(params) for judge in judges], parts)

    trained = functools.partial(objective, z_loss=config.z_loss)
    task = Task(model, trained, corpus.loader, evaluate)
    if config.distill is not None and teacher is not None:
        task = _distilled(task, model, teacher, config.distill, config.loss_chunk, mesh)
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)
    numbers = [judge(state.best_params) for judge in judges]
    measured = [_measured(found, [part]) for found, part in zip(numbers, parts, strict=True)]
    total = _measured(_mean(numbers, parts), parts)
    return LanguageModelResult(**vars(total), sources=dict(zip(corpus.held_out, measured, strict=True)))


def _mean(numbers: Sequence[dict[str, float]], parts: Sequence[HeldOutPart]) -> dict[str, float]:
    """Over the targets of all parts, of what was measured on each."""
    targets = [part.targets for part in parts]
    return {
        name: float(np.average([found[name] for found in numbers], weights=targets))
        for name in numbers[0]
    }


def _measured(numbers: dict[str, float], parts: Sequence[HeldOutPart]) -> HeldOut:
    loss, targets = numbers["eval/loss"], sum(part.targets for part in parts)
    bits = loss * targets / (sum(part.size for part in parts) * math.log(2))
    return HeldOut(loss, math.exp(loss), bits, numbers["eval/accuracy"], targets)


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
