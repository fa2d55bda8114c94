"""Supervised fine-tuning on chats: a language model learns the assistant's words, and only them.

JSONL of messages -> the tokenizer's chat template -> tokens, of which the assistant's are targets
-> packed rows -> all parameters or LoRA adapters, trained by llm_jax/train/loop.py
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from llm_jax.config import FinetuneConfig
from llm_jax.data.conversations import Conversation, encode_conversation, read_conversations
from llm_jax.data.packing import NO_TARGET, Batch, pack, row_batches
from llm_jax.data.tasks import split
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import lm_loss
from llm_jax.train.tuning import begin_tuning, export_adapter, load_base, rows_loader, tuned


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """How well the model predicts the assistant's words of held-out chats, before and after."""

    loss: float  # nats per token of the assistant
    perplexity: float
    accuracy: float  # of the next token
    loss_before: float
    tokens: int  # the assistant's, held out
    trained_parameters: int


def run(
    config: FinetuneConfig,
    workdir: str | Path,
    mesh: Mesh,
    *,
    echo: Callable[[Record], None] | None = None,
) -> FinetuneResult:
    """Train (or resume) in `workdir`, then measure the held-out chats with what was trained.

    With LoRA the adapters are written to WORKDIR/adapter as PEFT reads them.
    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    base = load_base(config, mesh)
    positions = base.model.config.max_positions
    if config.row_tokens > positions:
        raise ValueError(
            f"row_tokens={config.row_tokens}: expected at most the {positions} positions of "
            f"{config.init_from}"
        )
    kept, held_out = _read(config, base.tokenizer)
    begin_tuning(config, base, workdir)

    loader = rows_loader(_rows(kept, config.row_tokens), config, mesh)
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    objective = functools.partial(lm_loss, chunk=config.loss_chunk)
    batches = row_batches(_rows(held_out, config.row_tokens), config.batch_size)
    before = make_evaluate(base.model, objective, batches, mesh)(base.params)
    part = tuned(config, base, mesh)
    evaluate = make_evaluate(part.model, objective, batches, mesh, part.frozen)
    task = Task(part.model, objective, loader, evaluate, part.start, part.frozen)
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)
    after = evaluate(state.best_params)
    export_adapter(workdir / "adapter", part.model, state.best_params, base=config.init_from)
    return FinetuneResult(
        loss=after["eval/loss"],
        perplexity=math.exp(after["eval/loss"]),
        accuracy=after["eval/accuracy"],
        loss_before=before["eval/loss"],
        tokens=sum(int(np.sum(batch["targets"] != NO_TARGET)) for batch in batches),
        trained_parameters=part.num_parameters,
    )


def _read(config: FinetuneConfig, tokenizer: Tokenizer) -> tuple[list[Conversation], list[Conversation]]:
    """The chats to train on, and those held out, in tokens."""
    encode = functools.partial(encode_conversation, tokenizer)
    chats = read_conversations(config.data, config.messages_field)
    if config.eval_data:
        held_out = read_conversations(config.eval_data, config.messages_field)
    else:
        same = functools.partial(json.dumps, sort_keys=True)
        chats, held_out = split(chats, config.eval_fraction, config.seed, text=same)
    return [encode(chat) for chat in chats], [encode(chat) for chat in held_out]


def _rows(chats: Sequence[Conversation], length: int) -> Batch:
    return pack((chat.tokens for chat in chats), length, (chat.trained for chat in chats))
