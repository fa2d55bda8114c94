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

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.peft import export_peft
from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import FinetuneConfig
from llm_jax.data.conversations import Conversation, encode_conversation, read_conversations
from llm_jax.data.loader import PackedLoader
from llm_jax.data.packing import NO_TARGET, Batch, pack, row_batches
from llm_jax.data.tasks import split
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.models.lora import LoraModel
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import lm_loss
from llm_jax.train.pretrained import load_pretrained


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
    base = load_pretrained(config.init_from, mesh, field="init_from")
    model_config, tokenizer = base.model.config, base.tokenizer
    if config.row_tokens > model_config.max_positions:
        raise ValueError(
            f"row_tokens={config.row_tokens}: expected at most the {model_config.max_positions} "
            f"positions of {config.init_from}"
        )
    if config.chat_template:
        tokenizer.chat_template = config.chat_template
    kept, held_out = _read(config, tokenizer)
    dtypes = {"param_dtype": "", "compute_dtype": "", "cache_dtype": ""}  # those of who serves it
    begin_run(workdir, config, dataclasses.replace(model_config, **dtypes))
    tokenizer.save(workdir / "tokenizer")

    loader = PackedLoader(
        _rows(kept, config.row_tokens),
        config.batch_size,
        config.seed,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    objective = functools.partial(lm_loss, chunk=config.loss_chunk)
    batches = row_batches(_rows(held_out, config.row_tokens), config.batch_size)
    before = make_evaluate(base.model, objective, batches, mesh)(base.params)
    if config.lora is None:
        model, frozen = base.model, ()
        start = lambda _: base.params  # noqa: E731
    else:
        model, frozen = LoraModel(base.model, config.lora), (base.params,)
        start = functools.partial(model.init, base.params, mesh)
    evaluate = make_evaluate(model, objective, batches, mesh, frozen)
    task = Task(model, objective, loader, evaluate, start, frozen)
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)
    after = evaluate(state.best_params)
    if isinstance(model, LoraModel) and not (workdir / "adapter").exists():
        export_peft(workdir / "adapter", model, state.best_params, base=config.init_from)
    return FinetuneResult(
        loss=after["eval/loss"],
        perplexity=math.exp(after["eval/loss"]),
        accuracy=after["eval/accuracy"],
        loss_before=before["eval/loss"],
        tokens=sum(int(np.sum(batch["targets"] != NO_TARGET)) for batch in batches),
        trained_parameters=sum(math.prod(s.shape) for s in jax.tree.leaves(model.shapes)),
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
