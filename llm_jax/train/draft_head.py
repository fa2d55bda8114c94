"""A draft head for speculative decoding, trained on the hidden states of the model that it drafts for.

texts or token stores, as a language model reads them -> hidden states of the frozen model -> the head of
llm_jax/models/draft_head.py, trained by llm_jax/train/loop.py -> WORKDIR/draft_head, which engines load

The drafts are written down where they are judged: states[p, k - 1] is what the head has at position p
when it set out from p - k and has read the k tokens up to p. So it is judged by the model's own logits
at p, which are computed once for all k. What set out in another document does not count.

Letters: B rows, T tokens, t tokens of a chunk, D embed, V vocab, K tokens of a draft.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.draft_head import export_draft_head
from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import DraftHeadConfig, LanguageModelConfig, ModelConfig
from llm_jax.data.loader import this_host
from llm_jax.data.packing import NO_TARGET
from llm_jax.distributed import on_main
from llm_jax.models import Model, Params
from llm_jax.models.draft_head import DraftHead, DraftHeadModel, describe_draft_head, init_draft_head
from llm_jax.models.transformer import Transformer
from llm_jax.ops.attention import FullContext
from llm_jax.ops.losses import cross_entropy, distillation_kl, sum_over_chunks, top_hits
from llm_jax.sharding import fetch
from llm_jax.train.corpus import read_corpus
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import Batch, Metrics
from llm_jax.train.pretrained import load_pretrained
from llm_jax.tree import num_elements


@dataclasses.dataclass(frozen=True)
class DraftHeadResult:
    """How well the head guesses what the model would choose in held-out texts.

    An agreement is the share of the places at which the k-th token of a draft is the model's most likely
    one, when the tokens before it are the text's. Of what the model writes itself less is accepted.
    """

    loss: float  # nats per drafted token, weighted by `decay`
    agreement: tuple[float, ...]  # of the first, second, ... token of a draft
    agreement_before: tuple[float, ...]  # of the head as it was drawn
    accepted: float  # tokens of a draft until the first wrong one, if agreements were independent
    trained_parameters: int


@dataclasses.dataclass(frozen=True)
class HeadAndBase:
    """Both networks, bound to their parameters."""

    head: DraftHead
    base: Transformer


class Drafting:
    """A draft head in training beside its model; to the training loop it is the head."""

    def __init__(self, head: DraftHeadModel, base: Model):
        self.head, self.base = head, base
        self.shapes, self.axes, self.contract = head.shapes, head.axes, head.contract

    def shardings(self, mesh: Mesh) -> Params:
        """Those of the head."""
        return self.head.shardings(mesh)

    def bind(self, params: Params, base: Params) -> HeadAndBase:
        """Both networks, for `draft_head_loss`; call it inside a jit."""
        return HeadAndBase(self.head.bind(params), self.base.bind(base))


def draft_head_loss(
    nets: HeadAndBase,
    batch: Batch,
    key: jax.Array | None,
    *,
    steps: int,
    decay: float,
    base_weight: float,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(1 - base_weight) cross entropy of the text + base_weight KL(model || head), by drafted token.

    The k-th of K = `steps` drafted tokens counts decay^(k-1). Metrics: agreement_k, see
    `DraftHeadResult`. batch: tokens, targets, segment_ids, positions [B, T] int32. chunk: as in
    `vocabulary_loss`. `key` is unused: the model is served without dropout, and the head has none.
    """
    context = FullContext(batch["segment_ids"])
    hidden, _ = nets.base(batch["tokens"], batch["positions"], context)
    hidden = jax.lax.stop_gradient(hidden)
    states = draft_states(nets, hidden, batch["tokens"], steps)
    ahead = jnp.arange(1, steps + 1, dtype=jnp.int32)[None, None]
    inside = batch["positions"][..., None] >= ahead  # set out in the same document
    targets = jnp.where(inside, batch["targets"][..., None], NO_TARGET)

    sums = functools.partial(_sums, nets.base, base_weight)
    loss, agreed, count = sum_over_chunks(sums, (hidden, states, targets), chunk)
    weights = jnp.asarray(decay ** np.arange(steps), jnp.float32)
    metrics = {f"agreement_{k + 1}": (agreed[k], count[k]) for k in range(steps)}
    return jnp.sum(weights * loss), jnp.sum(weights * count), metrics


def draft_states(nets: HeadAndBase, hidden: jax.Array, tokens: jax.Array, steps: int) -> jax.Array:
    """hidden [B, T, D], tokens [B, T] int32 -> states [B, T, K, D], each where it is judged.

    The first k positions have no states of k steps: what is there comes from the end of the row.
    """
    embeddings = jax.lax.stop_gradient(nets.base.embed.lookup(tokens))
    state, states = hidden, []
    for _ in range(steps):
        state = nets.head(jnp.roll(state, 1, axis=1), embeddings)
        states.append(state)
    return jnp.stack(states, axis=2)


def _sums(
    base: Transformer, base_weight: float, hidden: jax.Array, states: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden [B, t, D], states [B, t, K, D], targets [B, t, K] -> losses, agreements, targets [K]."""
    wanted = jax.lax.stop_gradient(base.unembed(hidden))[:, :, None]  # [B, t, 1, V]
    drafted = base.unembed(states)
    loss = (1.0 - base_weight) * cross_entropy(drafted, targets)
    if base_weight:
        loss += base_weight * distillation_kl(drafted, wanted, targets, temperature=1.0)
    choice = jnp.where(targets >= 0, jnp.argmax(wanted, axis=-1).astype(jnp.int32), NO_TARGET)
    agreed = top_hits(drafted, choice)
    count = (targets >= 0).astype(jnp.float32)
    return loss.sum((0, 1)), agreed.sum((0, 1)), count.sum((0, 1))


def run(
    config: DraftHeadConfig,
    workdir: str | Path,
    mesh: Mesh,
    *,
    echo: Callable[[Record], None] | None = None,
) -> DraftHeadResult:
    """Train (or resume) in `workdir`, judge the head on held-out texts, and write WORKDIR/draft_head.

    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    base = load_pretrained(config.base, mesh, field="base")
    on_main("tokenizer", functools.partial(base.tokenizer.save, workdir / "tokenizer"))
    reading = _reading(config, base.model.config)
    corpus = read_corpus(reading, workdir / "tokenizer", **this_host(mesh))
    steps = config.steps or round(config.epochs * corpus.loader.steps_per_epoch)
    begin_run(workdir, config, None)
    width = config.width or 2 * base.model.config.embed_dim
    head = describe_draft_head(base.model.config, width)
    model, frozen = Drafting(head, base.model), (base.params,)
    objective = functools.partial(
        draft_head_loss,
        steps=config.draft_steps,
        decay=config.decay,
        base_weight=config.base_weight,
        chunk=config.loss_chunk,
    )
    held_out = [batch for part in corpus.held_out.values() for batch in part.batches]
    evaluate = make_evaluate(model, objective, held_out, mesh, frozen)
    start = functools.partial(init_draft_head, head, mesh)
    before = _agreement(evaluate(start(jax.random.key(config.seed))), config.draft_steps)
    task = Task(model, objective, corpus.loader, evaluate, start, frozen)
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)
    after = evaluate(state.best_params)
    _export(workdir / "draft_head", head, state.best_params, config.base)
    agreement = _agreement(after, config.draft_steps)
    return DraftHeadResult(
        loss=after["eval/loss"],
        agreement=agreement,
        agreement_before=before,
        accepted=float(np.cumprod(agreement).sum()),
        trained_parameters=num_elements(head.shapes),
    )


def _export(directory: Path, head: DraftHeadModel, params: Params, base: str) -> None:
    """Write the trained head, once."""
    values = fetch(params)

    def write() -> None:
        if not directory.exists():
            export_draft_head(directory, head, values, base=base)

    on_main("draft head", write)


def _reading(config: DraftHeadConfig, model: ModelConfig) -> LanguageModelConfig:
    """The settings of a language model's run that reads the same texts in the same way."""
    names = ("data", "document", "eval_fraction", "eval_split", "row_tokens", "loss_chunk")
    same = {
        name: getattr(config, name)
        for name in (*names, "optim", "batch_size", "steps", "epochs", "seed")
    }
    return LanguageModelConfig(model=model, **same)


def _agreement(numbers: dict[str, float], steps: int) -> tuple[float, ...]:
    return tuple(numbers[f"eval/agreement_{k + 1}"] for k in range(steps))
