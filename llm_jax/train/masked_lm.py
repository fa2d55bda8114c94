"""Masked-language-model training of an encoder: what a classifier can start from.

The model learns to guess hidden tokens of the unlabelled texts (Devlin et al. 2019). Its embeddings and
layers then start the classifier; the vocabulary head is left behind.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from llm_jax.config import ModelConfig
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.models import Model, Params, describe, init_params
from llm_jax.train.objectives import Objective, masked_lm_loss

HEADS = ("lm_head", "classifier", "pooler", "span")


def masked_lm_model(config: ModelConfig) -> Model:
    """The same encoder with a vocabulary head in place of its own; float32 master weights."""
    changes = {"head": "masked_lm", "tie_embeddings": True, "pooler": False, "param_dtype": "float32"}
    return describe(dataclasses.replace(config, num_classes=0, labels=(), **changes))


def masked_lm_objective(tokenizer: Tokenizer, rate: float) -> Objective:
    """`masked_lm_loss` with the tokenizer's mask token, or its unknown token where it has none."""
    mask_id = tokenizer.unk_id if tokenizer.mask_id is None else tokenizer.mask_id
    if mask_id is None:
        raise ValueError("the tokenizer has neither a mask nor an unknown token to hide others behind")
    return functools.partial(masked_lm_loss, mask_id=mask_id, vocab_size=tokenizer.vocab_size, rate=rate)


def with_trunk(trunk: Mapping, model: Model, mesh: Mesh, key: jax.Array) -> Params:
    """Parameters of `model`: embeddings and layers from `trunk`, heads at random."""
    fresh = init_params(model, mesh, key)
    return {name: fresh[name] if name in HEADS else trunk[name] for name in fresh}
