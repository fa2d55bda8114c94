"""A small translator from sentence pairs: a causal model that continues a source with its target.

table of pairs -> pairs, some held out with all that resembles them -> one tokenizer of both languages
-> packed rows, of which the targets alone are predicted -> decoder trained by llm_jax/train/loop.py

WORKDIR/held_out.tsv has the held-out pairs: llm_jax/eval/translation.py translates them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import TranslationConfig
from llm_jax.data.loader import PackedLoader, this_host
from llm_jax.data.packing import NO_TARGET, Batch, pack, row_batches
from llm_jax.data.parallel import (
    SEPARATOR,
    SentencePair,
    encode_pair,
    read_pairs,
    split_pairs,
)
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from llm_jax.distributed import main_first, on_main
from llm_jax.models import describe
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import lm_loss


@dataclasses.dataclass(frozen=True)
class TranslationResult:
    """How well the model predicts the tokens of held-out translations, given all that precede them."""

    loss: float  # nats per token of the targets
    perplexity: float
    accuracy: float
    tokens: int  # of the held-out targets
    pairs: int  # to train on
    held_out: int


def run(
    config: TranslationConfig,
    workdir: str | Path,
    mesh: Mesh,
    *,
    echo: Callable[[Record], None] | None = None,
) -> TranslationResult:
    """Train (or resume) in `workdir`, then measure the held-out pairs with what was trained.

    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    pairs, held_out = _read(config)
    with main_first("tokenizer"):
        tokenizer = _tokenizer(config, pairs, workdir / "tokenizer")
    model_config = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    begin_run(workdir, config, model_config)
    on_main("held-out pairs", lambda: _write(workdir / "held_out.tsv", held_out, config))
    model = describe(dataclasses.replace(model_config, param_dtype="float32"))  # master weights

    rows = _rows(pairs, tokenizer, config.row_tokens)
    loader = PackedLoader(rows, config.batch_size, config.seed, **this_host(mesh))
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    objective = functools.partial(lm_loss, chunk=config.loss_chunk)
    batches = row_batches(_rows(held_out, tokenizer, config.row_tokens), config.batch_size)
    evaluate = make_evaluate(model, objective, batches, mesh)
    state = fit(Task(model, objective, loader, evaluate), config, mesh, workdir, steps=steps, echo=echo)
    numbers = evaluate(state.best_params)
    return TranslationResult(
        loss=numbers["eval/loss"],
        perplexity=math.exp(numbers["eval/loss"]),
        accuracy=numbers["eval/accuracy"],
        tokens=sum(int(np.sum(batch["targets"] != NO_TARGET)) for batch in batches),
        pairs=len(pairs),
        held_out=len(held_out),
    )


def _read(config: TranslationConfig) -> tuple[list[SentencePair], list[SentencePair]]:
    """The pairs to train on, and those held out."""
    fields = config.source_field, config.target_field
    pairs = read_pairs(config.data, *fields)
    if config.eval_data:
        return pairs, read_pairs(config.eval_data, *fields)
    return split_pairs(pairs, config.eval_fraction, config.seed)


def _write(path: Path, pairs: Sequence[SentencePair], config: TranslationConfig) -> None:
    """A table with the fields of the data; TAB and line ends within a text become spaces."""
    rows = [(config.source_field, config.target_field), *((p.source, p.target) for p in pairs)]
    lines = ["\t".join(" ".join(side.split()) for side in row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tokenizer(config: TranslationConfig, pairs: Sequence[SentencePair], directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, put there first where there is none: the given one, or a new one."""
    if not directory.is_dir() and config.tokenizer:
        load_tokenizer(config.tokenizer).save(directory)
    elif not directory.is_dir():
        train_sentencepiece(
            [side for pair in pairs for side in (pair.source, pair.target)],
            directory,
            vocab_size=config.model.vocab_size,
            character_coverage=config.character_coverage,
            control_symbols=(SEPARATOR,),
        )
    return load_tokenizer(directory)


def _rows(pairs: Sequence[SentencePair], tokenizer: Tokenizer, length: int) -> Batch:
    """Whole pairs, packed: leaves [R, length]. ValueError for a pair that does not fit a row."""
    encoded = [encode_pair(pair, tokenizer) for pair in pairs]
    for pair, (tokens, _) in zip(pairs, encoded, strict=True):
        if len(tokens) > length:
            raise ValueError(
                f"row_tokens={length}: the pair of {pair.source[:40]!r} has {len(tokens)} tokens; "
                "enlarge row_tokens, or leave it out"
            )
    return pack([tokens for tokens, _ in encoded], length, [targets for _, targets in encoded])
