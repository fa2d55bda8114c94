"""Word vectors from raw text by skip-gram with negative sampling (Mikolov et al. 2013, arXiv:1310.4546).

texts -> tokenizer trained on them, whose pieces are the words -> packed rows -> the tables of
llm_jax/models/skip_gram.py, trained by llm_jax/train/loop.py -> loss on held-out texts

A pair is a word (the centre) and a word at most `window` places from it in the same text. Its loss is
-log s(u . v) - sum over K noise words n of log s(-u . v_n), with s the logistic function. Three things
differ from the C program word2vec, all for the sake of large products in place of single rows: frequent
words that are left out keep their place in the window; each row of the batch has a pool of noise words,
which all its pairs share (K / pool of each one's loss, so the expectation is the same); and the updates
are those of the loop's optimizer.

Letters: B rows, T tokens of a row, V vocab, D embed, P noise words of a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import WordVectorConfig
from llm_jax.data.loader import PackedLoader, this_host
from llm_jax.data.packing import Batch, pack, row_batches
from llm_jax.data.sources import read_listed
from llm_jax.data.tasks import documents, split
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from llm_jax.distributed import main_first
from llm_jax.models.skip_gram import SkipGram, WordTables
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import Metrics, Objective

NOISE_POWER = 0.75  # of a word's frequency, for the noise (the paper's value)


@dataclasses.dataclass(frozen=True)
class WordVectorResult:
    """What was trained, and how well it tells real neighbours from noise in held-out texts."""

    words: int  # in the vocabulary
    tokens: int  # of the training text
    loss: float  # nats per pair


def run(
    config: WordVectorConfig,
    workdir: str | Path,
    mesh: Mesh,
    *,
    echo: Callable[[Record], None] | None = None,
) -> WordVectorResult:
    """Train (or resume) in `workdir`; `infer.word_vectors.load_word_vectors` reads what comes out.

    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    texts = read_listed(config.data, field=config.text_field)
    kept, held_out = split(texts, config.eval_fraction, config.seed, text=lambda text: text)
    with main_first("tokenizer"):
        tokenizer = _tokenizer(config, kept, workdir / "tokenizer")
    begin_run(workdir, config, None)
    model = SkipGram(tokenizer.vocab_size, config.embed_dim)

    rows = _rows(tokenizer, kept, config.row_tokens)
    loader = PackedLoader(rows, config.batch_size, config.seed, **this_host(mesh))
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    counts = np.bincount(rows["tokens"][rows["segment_ids"] > 0], minlength=tokenizer.vocab_size)
    objective = make_objective(config, counts)
    batches = row_batches(_rows(tokenizer, held_out, config.row_tokens), config.batch_size)
    evaluate = make_evaluate(model, objective, batches, mesh)
    task = Task(model, objective, loader, evaluate, functools.partial(model.init, mesh))
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)
    loss = evaluate(state.best_params)["eval/loss"]
    return WordVectorResult(tokenizer.vocab_size, int(counts.sum()), loss)


def make_objective(config: WordVectorConfig, counts: np.ndarray) -> Objective:
    """`skip_gram_loss` for words that occur `counts` [V] times in the training text."""
    share = counts / counts.sum()
    with np.errstate(divide="ignore"):
        keep = np.sqrt(config.subsample / share) if config.subsample else np.ones(len(counts))
    noise = np.cumsum(counts**NOISE_POWER)
    return functools.partial(
        skip_gram_loss,
        window=config.window,
        negatives=config.negatives,
        pool=config.noise_pool,
        keep=np.minimum(keep, 1.0).astype(np.float32),
        noise=(noise / noise[-1]).astype(np.float32),
    )


def skip_gram_loss(
    net: WordTables,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    *,
    window: int,
    negatives: int,
    pool: int,
    keep: np.ndarray,
    noise: np.ndarray,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Loss of all pairs in the rows, one count per pair.

    batch: tokens, segment_ids [B, T] int32. keep [V]: probability that a place of the word is used in
    training. noise [V]: cumulative distribution of the noise words. Evaluation (key None) uses every
    place and the whole window, and draws the same noise each time.
    """
    pairs_key, noise_key = jax.random.split(jax.random.key(0) if key is None else key)
    pairs = draw_pairs(batch, None if key is None else pairs_key, window, keep)
    words = draw_noise(noise_key, (len(pairs), pool), noise)
    centers = net.centers[batch["tokens"]]  # [B, T, D]
    near = jnp.einsum("btd,bsd->bts", centers, net.contexts[batch["tokens"]])
    far = jnp.einsum("btd,bpd->btp", centers, net.contexts[words])
    count = pairs.sum(axis=2, dtype=jnp.float32)  # [B, T]
    weight = count * (negatives / pool)
    loss = jnp.sum(jax.nn.softplus(-near), where=pairs)
    return loss + jnp.sum(jax.nn.softplus(far).sum(axis=2) * weight), count.sum(), {}


def draw_pairs(
    batch: dict[str, jax.Array], key: jax.Array | None, window: int, keep: np.ndarray
) -> jax.Array:
    """Which places are centre and neighbour of each other, bool [B, T, T]: centre first.

    With a key each centre has a reach of its own, uniform in 1 to `window`, so that near words count
    more, and each place is used with the probability `keep` of its word.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    used, reach = segment_ids > 0, jnp.full(tokens.shape, window)
    if key is not None:
        reach_key, keep_key = jax.random.split(key)
        reach = jax.random.randint(reach_key, tokens.shape, 1, window + 1)
        used &= jax.random.uniform(keep_key, tokens.shape) < jnp.asarray(keep)[tokens]
    place = jnp.arange(tokens.shape[1])
    distance = jnp.abs(place[:, None] - place[None, :])[None]
    near = (distance > 0) & (distance <= reach[:, :, None])
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return near & same & used[:, :, None] & used[:, None, :]


def draw_noise(key: jax.Array, shape: tuple[int, ...], noise: np.ndarray) -> jax.Array:
    """Words of `shape` int32, drawn from the cumulative distribution `noise` [V]."""
    return jnp.searchsorted(jnp.asarray(noise), jax.random.uniform(key, shape), side="right")


def _tokenizer(config: WordVectorConfig, texts: Sequence[str], directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, put there first where there is none: the given one, or a new one."""
    if directory.is_dir():
        return load_tokenizer(directory)
    if config.tokenizer:
        load_tokenizer(config.tokenizer).save(directory)
        return load_tokenizer(directory)
    return train_sentencepiece(
        texts,
        directory,
        vocab_size=config.vocab_size,
        character_coverage=config.character_coverage,
    )


def _rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Batch:
    """The texts without special tokens, packed: leaves [R, length]."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return pack(documents(texts, encode), length)
