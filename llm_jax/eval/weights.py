"""How far a model with rounded weights is from itself in float32, on texts."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.compress.quantize import read_weights
from llm_jax.data.loader import to_device
from llm_jax.data.packing import batches_by_length, length_buckets
from llm_jax.eval.parity import token_ids
from llm_jax.models import Model, describe
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import data_shards
from llm_jax.tree import num_bytes

ROWS = 8  # texts at once


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Over all places that say something: tokens of a language model, texts of a classifier.

    mean_kl: of what the rounded model says from what the other does, in nats. top1_agreement: share of
    places with the same likeliest answer. Perplexities, of language models, of each text's own tokens.
    """

    weights: str
    places: int
    mean_kl: float
    top1_agreement: float
    perplexity: float | None
    float_perplexity: float | None
    megabytes: float
    float_megabytes: float


def agreement(directory: Path, prompts: Sequence[str], mesh: Mesh, weights: str) -> Agreement:
    """Compare the checkpoint with `weights`, as `LLM` takes them, with the same in float32.

    prompts: texts; none takes a few of our own. Raises ValueError for a model without such answers.
    """
    dtypes = dict.fromkeys(("param_dtype", "compute_dtype", "cache_dtype"), "float32")
    config = dataclasses.replace(load_config(directory), **dtypes)
    if config.head not in ("lm", "masked_lm", "classifier"):
        raise ValueError(f"head={config.head!r} of {directory}: expected one with logits to compare")
    param_dtype, scheme = read_weights(weights, "float32")
    texts = token_ids(directory, prompts, config)
    model = describe(config)
    rounded = describe(dataclasses.replace(config, param_dtype=param_dtype))
    both = load_hf(directory, model, mesh), load_hf(directory, rounded, mesh, scheme=scheme)
    forward, count = _make_forward(model), -(-ROWS // data_shards(mesh)) * data_shards(mesh)
    kl, same, losses = [], [], []
    with jax.set_mesh(mesh):
        for rows, batch in batches_by_length(texts, count, length_buckets(max(map(len, texts)))):
            placed = to_device(batch, mesh)
            pair = [forward(params, placed["tokens"], placed["segment_ids"]) for params in both]
            for row, *answers in zip(rows, *map(jax.device_get, pair), strict=False):
                text = texts[row]
                want, got = (_log_softmax(np.atleast_2d(x)[: len(text)]) for x in answers)
                kl.append((np.exp(want) * (want - got)).sum(axis=-1))
                same.append(want.argmax(axis=-1) == got.argmax(axis=-1))
                if config.head == "lm":
                    at = np.arange(len(text) - 1), text[1:]
                    losses.append((-want[at], -got[at]))
    kl = np.concatenate(kl)
    of_float, of_rounded = map(_perplexity, zip(*losses, strict=True)) if losses else (None, None)
    return Agreement(
        weights,
        kl.size,
        float(kl.mean()),
        float(np.concatenate(same).mean()),
        of_rounded,
        of_float,
        *(num_bytes(params) / 1e6 for params in reversed(both)),
    )


def _make_forward(model: Model) -> Callable:
    """f(params, tokens [B, T], segment_ids) -> logits [B, T, V], or [B, C] of a classifier."""

    @jax.jit
    def forward(params, tokens, segment_ids):
        net, context = model.bind(params), FullContext(segment_ids)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, context = net(tokens, positions, context)
        if model.config.head == "classifier":
            return net.classify(hidden, segment_ids, context)
        return net.unembed(hidden)

    return forward


def _perplexity(losses: Sequence[np.ndarray]) -> float:
    return float(np.exp(np.concatenate(losses).mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
