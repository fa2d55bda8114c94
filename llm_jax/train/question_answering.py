"""Extractive question answering: questions on texts in, a trained workdir and its answers out.

file -> questions, some texts held out -> rows of question and window -> encoder with a span head, from a
Hugging Face directory, from masked-LM training on the texts, or from random numbers -> trained by
llm_jax/train/loop.py -> answers to the held-out questions, judged as CMRC 2018 does

WORKDIR/held_out.jsonl has the held-out questions: scripts/answer.py reads them.
"""

import dataclasses
import functools
import json
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.workdir import begin_run, load_start
from llm_jax.config import ModelConfig, QuestionAnsweringConfig
from llm_jax.data.fast_tokenizer import FastTokenizer
from llm_jax.data.loader import PackedLoader, this_host, whole_to_device
from llm_jax.data.packing import row_batches
from llm_jax.data.question_answering import (
    Question,
    Reading,
    choose,
    exact_match,
    f1,
    features,
    read_questions,
    reading_of,
)
from llm_jax.data.sources import read_listed
from llm_jax.data.tasks import split
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from llm_jax.distributed import main_first, on_main
from llm_jax.models import Model, Params, describe
from llm_jax.models.transformer import Transformer
from llm_jax.ops.attention import FullContext
from llm_jax.ops.losses import cross_entropy
from llm_jax.sharding import replicated
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.masked_lm import pretrain_encoder
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import Metrics
from llm_jax.train.pretrained import Start, find_start

HIDDEN = -1e30  # logit of what cannot be chosen


@dataclasses.dataclass(frozen=True)
class QuestionAnsweringResult:
    """The held-out questions as the trained model answers them; shares in [0, 1]."""

    exact_match: float
    f1: float
    questions: int
    answers: dict[str, str]  # question id -> the likeliest answer


def run(
    config: QuestionAnsweringConfig,
    workdir: str | Path,
    mesh: Mesh,
    *,
    echo: Callable[[Record], None] | None = None,
) -> QuestionAnsweringResult:
    """Train (or resume) in `workdir`, then answer the held-out questions with what was trained.

    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    questions, held_out = _read(config)
    found = find_start(config.init_from) if config.init_from else None
    with main_first("tokenizer"):
        tokenizer = _tokenizer(config, found, questions, workdir / "tokenizer")
    model_config = _model_config(config, found, tokenizer)
    reading = reading_of(config)
    trained = features(questions, tokenizer, reading)
    begin_run(workdir, config, model_config)
    on_main("held-out questions", lambda: _write(workdir / "held_out.jsonl", held_out))
    model = describe(dataclasses.replace(model_config, param_dtype="float32"))  # master weights

    loader = PackedLoader(trained.rows, config.batch_size, config.seed, **this_host(mesh))
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    judge = make_judge(model, held_out, tokenizer, reading, config.batch_size, mesh)
    start = None
    if found is not None:
        start = lambda key: load_start(found.path, model, mesh, key)[0]  # noqa: E731
    elif config.pretraining is not None:
        read, judged = (dict.fromkeys(q.context for q in part) for part in (questions, held_out))
        texts = [*read, *(read_listed(config.pretrain_data) if config.pretrain_data else ())]
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        data = (tokenizer, encode, texts, judged, config.max_tokens, mesh, workdir)
        start = functools.partial(pretrain_encoder, config.pretraining, model, *data)
    task = Task(model, span_loss, loader, lambda params: judge(params)[0], start)
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)
    numbers, answers = judge(state.best_params)
    return QuestionAnsweringResult(
        numbers["eval/exact_match"], numbers["eval/f1"], len(held_out), answers
    )


def span_loss(
    net: Transformer, batch: dict[str, jax.Array], key: jax.Array | None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Mean of the cross entropies of the first and the last token; rows of padding have none.

    batch: tokens, segment_ids, positions, token_types [B, T] and starts, ends [B], all int32.
    """
    logits = span_logits(net, batch, key)
    rows = jnp.any(batch["segment_ids"] > 0, axis=1).astype(jnp.float32)
    sides = [(logits[:, :, 0], batch["starts"]), (logits[:, :, 1], batch["ends"])]
    loss = sum(cross_entropy(scores, target) for scores, target in sides) / 2
    right = [jnp.argmax(scores, axis=1).astype(jnp.int32) == target for scores, target in sides]
    correct = (right[0] & right[1]).astype(jnp.float32)
    return jnp.sum(loss * rows), rows.sum(), {"accuracy": (jnp.sum(correct * rows), rows.sum())}


def span_logits(net: Transformer, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
    """Logits [B, T, 2] float32 of each token to be the answer's first and last; padding is hidden."""
    context = FullContext(batch["segment_ids"], key)
    types = batch["token_types"] if net.cfg.token_types > 1 else None
    hidden, _ = net(batch["tokens"], batch["positions"], context, types)
    return jnp.where(batch["segment_ids"][:, :, None] > 0, net.spans(hidden), HIDDEN)


def make_judge(
    model: Model,
    questions: Sequence[Question],
    tokenizer: FastTokenizer,
    reading: Reading,
    batch_size: int,
    mesh: Mesh,
) -> Callable[[Params], tuple[dict[str, float], dict[str, str]]]:
    """f(params) -> ({"eval/loss", "eval/exact_match", ...}, {question id: answer})."""
    parts = features(questions, tokenizer, reading)
    batches = row_batches(parts.rows, batch_size)
    evaluate = make_evaluate(model, span_loss, batches, mesh)
    logits = jax.jit(
        lambda params, batch: span_logits(model.bind(params), batch, None),
        out_shardings=replicated(mesh),  # every host takes them all
    )

    def judge(params: Params) -> tuple[dict[str, float], dict[str, str]]:
        with jax.set_mesh(mesh):
            found = [jax.device_get(logits(params, whole_to_device(batch, mesh))) for batch in batches]
        answers = choose(questions, parts, np.concatenate(found), 1, reading.answer_tokens)
        texts = [spans[0].text if spans else "" for spans in answers]
        pairs = list(zip(texts, [question.answers for question in questions], strict=True))
        scores = {
            "eval/exact_match": float(np.mean([exact_match(*pair) for pair in pairs])),
            "eval/f1": float(np.mean([f1(*pair) for pair in pairs])),
        }
        ids = [question.id for question in questions]
        return evaluate(params) | scores, dict(zip(ids, texts, strict=True))

    return judge


def _read(config: QuestionAnsweringConfig) -> tuple[list[Question], list[Question]]:
    """The questions to train on, and those held out; all questions on a text stand on one side."""
    questions = read_questions(config.data)
    if config.eval_data:
        return questions, read_questions(config.eval_data)
    return split(questions, config.eval_fraction, config.seed, text=operator.attrgetter("context"))


def _write(path: Path, questions: Sequence[Question]) -> None:
    """A text with its questions a line, as `read_questions` reads it."""
    texts: dict[str, list[Question]] = {}
    for question in questions:
        texts.setdefault(question.context, []).append(question)
    lines = []
    for context, asked in texts.items():
        qas = [
            {"id": q.id, "question": q.question, "answers": q.answers, "answer_starts": q.starts}
            for q in asked
        ]
        lines.append(json.dumps({"context": context, "qas": qas}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _tokenizer(
    config: QuestionAnsweringConfig, found: Start | None, questions: Sequence[Question], directory: Path
) -> FastTokenizer:
    """The tokenizer in `directory`, put there first where there is none.

    It is the given one, that of `init_from`, or one trained on the texts and questions.
    """
    given = config.tokenizer or (str(found.tokenizer) if found else "")
    if not directory.is_dir() and given:
        load_tokenizer(given).save(directory)
    elif not directory.is_dir():
        assert config.model is not None
        texts = [*dict.fromkeys(q.context for q in questions), *(q.question for q in questions)]
        train_sentencepiece(texts, directory, vocab_size=config.model.vocab_size)
    tokenizer = load_tokenizer(directory)
    if not isinstance(tokenizer, FastTokenizer):
        raise ValueError(
            f"tokenizer={given!r} does not say where its tokens stand in the text; expected one with a "
            "tokenizer.json or a BERT vocab.txt"
        )
    return tokenizer


def _model_config(
    config: QuestionAnsweringConfig, start: Start | None, tokenizer: FastTokenizer
) -> ModelConfig:
    """The encoder with a span head; that of `init_from`, or as the config has it."""
    if start is None:
        assert config.model is not None
        return dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    found = start.config
    if found.causal:
        raise ValueError(
            f"init_from={config.init_from!r} is a {found.family!r} decoder; expected an encoder"
        )
    start.check("max_tokens", config.max_tokens, tokenizer)
    return found.with_head("span")
