"""Direct preference optimization: a language model learns which of two answers is the better one.

JSONL of prompt, chosen and rejected -> pairs in tokens -> packed rows, each with the log-probabilities
that the reference gives its answers -> all parameters or LoRA adapters, trained by llm_jax/train/loop.py

The reference is the model that the run starts from (with LoRA: the base weights). Its log-probabilities
never change, so they are computed once, before training, and ride with the rows as two numbers a pair: a
step costs what a step of fine-tuning does, where the reference's forward pass would add a third to it,
and its parameters a second copy of the model. A resumed run computes them anew, from the same weights.

Letters: B rows, T tokens, P most pairs in a row; the last axis of [B, P, 2] is chosen, rejected.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.config import PreferenceConfig
from llm_jax.data import packing
from llm_jax.data.loader import whole_to_device
from llm_jax.data.packing import row_batches
from llm_jax.data.preferences import Pair, encode_preference, pack_pairs, read_preferences
from llm_jax.data.tasks import split
from llm_jax.models.transformer import Transformer
from llm_jax.ops.attention import FullContext
from llm_jax.ops.losses import cross_entropy, sum_over_chunks
from llm_jax.sharding import replicated
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import Batch, Metrics
from llm_jax.train.pretrained import Pretrained
from llm_jax.train.tuning import begin_tuning, export_adapter, load_base, rows_loader, tuned


@dataclasses.dataclass(frozen=True)
class PreferenceResult:
    """How well the model tells the better answer of held-out pairs from the other.

    A reward is beta times how much likelier, in nats, an answer is than under the reference. Before
    training it is 0, so that the loss is log 2, the accuracy 0.5 and the margin 0.
    """

    loss: float  # nats per pair
    accuracy: float  # share of pairs whose chosen answer has the larger reward
    margin: float  # mean reward of the chosen answers less that of the rejected ones
    chosen_reward: float
    rejected_reward: float
    likelier: float  # share of pairs whose chosen answer is likelier than the rejected one
    likelier_before: float
    pairs: int  # held out
    trained_parameters: int


def dpo_loss(
    net: Transformer,
    batch: Batch,
    key: jax.Array | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """-log sigmoid(reward of chosen - reward of rejected), one count per pair.

    reward = beta (log p - log p of the reference), of a whole answer (Rafailov et al. 2023,
    arXiv:2305.18290, equation 7). label_smoothing s mixes in the loss of the reversed pair, 1 - s and s
    (conservative DPO, Mitchell 2023). `key` is unused: dropout would be noise in the difference from a
    reference that has none, so the authors' code has it off too.

    batch: rows of `pack_pairs` [B, T], and reference [B, P, 2] float32. chunk: as in `vocabulary_loss`.
    """
    log_probs = answer_log_probs(net, batch, batch["reference"].shape[1], chunk=chunk)
    chosen, rejected = jnp.unstack(beta * (log_probs - batch["reference"]), axis=-1)
    margin = chosen - rejected  # [B, P]
    loss = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(margin)
    loss -= label_smoothing * jax.nn.log_sigmoid(-margin)
    numbers = jnp.arange(margin.shape[1], dtype=jnp.int32)
    pairs_of_row = batch["segment_ids"].max(axis=1, keepdims=True) // 2
    real = (numbers[None] < pairs_of_row).astype(jnp.float32)
    count = real.sum()
    likelier = log_probs[..., 0] - log_probs[..., 1]
    metrics = {
        "accuracy": _share_above_zero(margin),
        "margin": margin,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "likelier": _share_above_zero(likelier),
    }
    return jnp.sum(loss * real), count, {n: (jnp.sum(x * real), count) for n, x in metrics.items()}


def answer_log_probs(net: Transformer, batch: Batch, pairs: int, *, chunk: int) -> jax.Array:
    """Summed log p of each answer's tokens, [B, P, 2] float32 with P = `pairs`; 0 where there is none.

    batch: rows of `pack_pairs` [B, T], with at most P pairs each.
    """
    context = FullContext(batch["segment_ids"])
    hidden, _ = net(batch["tokens"], batch["positions"], context)
    answers = jnp.arange(1, 2 * pairs + 1, dtype=jnp.int32)

    def sums(hidden, targets, segments):
        log_probs = -cross_entropy(net.unembed(hidden), targets)  # [B, t]
        inside = segments[..., None] == answers[None, None]
        return jnp.sum(jnp.where(inside, log_probs[..., None], 0.0), axis=1)

    arrays = hidden, batch["targets"], batch["segment_ids"]
    return sum_over_chunks(sums, arrays, chunk).reshape(-1, pairs, 2)


def _share_above_zero(x: jax.Array) -> jax.Array:
    """1 where x is above 0, 0 where it is below; 0.5 for 0, as a guess has it."""
    return 0.5 + 0.5 * jnp.sign(x)


def with_reference(
    sets: Sequence[packing.Batch], base: Pretrained, batch_size: int, chunk: int, mesh: Mesh
) -> list[packing.Batch]:
    """Each of some sets of rows, and its "reference" [R, P, 2] float32: what `base` gives the answers.

    Computed on the mesh, by one program for all the sets, `batch_size` rows at a time.
    """
    pairs = max(int(rows["segment_ids"].max()) // 2 for rows in sets)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))  # every host takes it whole
    def log_probs(params, batch):
        return answer_log_probs(base.model.bind(params), batch, pairs, chunk=chunk)

    def reference(rows: packing.Batch) -> np.ndarray:
        batches = (whole_to_device(batch, mesh) for batch in row_batches(rows, batch_size))
        parts = [np.asarray(log_probs(base.params, batch))[:batch_size] for batch in batches]
        return np.concatenate(parts)[: len(rows["tokens"])]

    with jax.set_mesh(mesh):
        return [rows | {"reference": reference(rows)} for rows in sets]


def run(
    config: PreferenceConfig,
    workdir: str | Path,
    mesh: Mesh,
    *,
    echo: Callable[[Record], None] | None = None,
) -> PreferenceResult:
    """Train (or resume) in `workdir`, then measure the held-out pairs with what was trained.

    With LoRA the adapters are written to WORKDIR/adapter as PEFT reads them.
    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    base = load_base(config, mesh)
    kept, held_out = _read(config, base)
    sets = [pack_pairs(pairs, config.row_tokens) for pairs in (kept, held_out)]
    begin_tuning(config, base, workdir)
    rows, to_judge = with_reference(sets, base, config.batch_size, config.loss_chunk, mesh)

    loader = rows_loader(rows, config, mesh)
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    objective = functools.partial(
        dpo_loss, beta=config.beta, label_smoothing=config.label_smoothing, chunk=config.loss_chunk
    )
    batches = row_batches(to_judge, config.batch_size)
    before = make_evaluate(base.model, objective, batches, mesh)(base.params)
    part = tuned(config, base, mesh)
    evaluate = make_evaluate(part.model, objective, batches, mesh, part.frozen)
    task = Task(part.model, objective, loader, evaluate, part.start, part.frozen)
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)
    after = evaluate(state.best_params)
    export_adapter(workdir / "adapter", part.model, state.best_params, base=config.init_from)
    return PreferenceResult(
        **{name.removeprefix("eval/"): value for name, value in after.items()},
        likelier_before=before["eval/likelier"],
        pairs=len(held_out),
        trained_parameters=part.num_parameters,
    )


def _read(config: PreferenceConfig, base: Pretrained) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on, and those held out, in tokens; all pairs of a prompt stand on one side."""
    kept = read_preferences(config.data)
    if config.eval_data:
        held_out = read_preferences(config.eval_data)
    else:
        prompt = lambda preference: json.dumps(preference.prompt, sort_keys=True)  # noqa: E731
        kept, held_out = split(kept, config.eval_fraction, config.seed, text=prompt)

    def encoded(preferences: Sequence) -> list[Pair]:
        return [encode_preference(base.tokenizer, preference) for preference in preferences]

    sides = encoded(kept), encoded(held_out)
    positions = base.model.config.max_positions
    for pair in (*sides[0], *sides[1]):
        if pair.longest > positions:
            raise ValueError(
                f"{pair.where}: a chat has {pair.longest} tokens, more than the {positions} positions "
                f"of {config.init_from}; shorten the record, or leave it out"
            )
    return sides
