"""How far a model with rounded weights is from itself in float32, on texts."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.compress.quantize import read_weights
from llm_jax.eval.parity import our_outputs, token_ids
from llm_jax.models import describe
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
    kl, same, losses = [], [], []
    for batch in _batches(texts):
        pairs = (_log_probs(model, params, mesh, batch) for params in both)
        for text, want, got in zip(batch, *pairs, strict=True):
            kl.append((np.exp(want) * (want - got)).sum(axis=-1))
            same.append(want.argmax(axis=-1) == got.argmax(axis=-1))
            if config.head == "lm":
                after = text[1:]
                losses.append([-x[np.arange(len(after)), after] for x in (want, got)])
    kl = np.concatenate(kl)
    of_float, of_rounded = (np.concatenate(x) for x in zip(*losses, strict=True)) if losses else ([], [])
    return Agreement(
        weights,
        kl.size,
        float(kl.mean()),
        float(np.concatenate(same).mean()),
        *(float(np.exp(x.mean())) if len(x) else None for x in (of_rounded, of_float)),
        *(num_bytes(params) / 1e6 for params in reversed(both)),
    )


def _batches(texts: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
    for first in range(0, len(texts), ROWS):
        yield texts[first : first + ROWS]


def _log_probs(model, params, mesh: Mesh, texts: Sequence[list[int]]) -> list[np.ndarray]:
    """float64 [places, answers] of each text."""
    found = our_outputs(model, params, mesh, list(texts), "right")
    name = "class logits" if model.config.head == "classifier" else "logits"
    return [np.atleast_2d(_log_softmax(x.astype(np.float64))) for x in found[name]]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
