"""Too little memory for a step, said so that one knows what to change."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.config import TrainConfig
from llm_jax.models import Model, Trainable
from llm_jax.sharding import data_shards
from llm_jax.train.state import TrainState

GIB = 1 << 30
Buffers = dict[str, tuple[int, str]]  # what: (bytes on one device, the settings that shrink it)


class OutOfMemory(MemoryError):
    """A device has no room for the step; the message names the three largest buffers."""


def out_of_memory(error: Exception, held: Buffers) -> OutOfMemory:
    """What to raise in place of XLA's RESOURCE_EXHAUSTED."""
    largest = sorted(held.items(), key=lambda item: -item[1][0])[:3]
    lines = [f"  {name}: {size / GIB:.3g} GiB; smaller by {by}" for name, (size, by) in largest]
    first = str(error).strip().splitlines()[0]
    return OutOfMemory(
        "the step does not fit into the memory of a device; the largest of what it holds "
        "there, by its shapes:\n" + "\n".join(lines) + f"\nXLA says: {first}"
    )


def buffers(
    model: Trainable, state: TrainState, config: TrainConfig, mesh: Mesh, length: int
) -> Buffers:
    """What a step on rows of `length` tokens holds on one device. state: with shardings.

    Parameters, gradients and moments are exact. Activations are what the backward pass of a layer is
    given, about 8 D + 3 F numbers a token (of K experts, K (2 D + 3 F) more) and N scores a pair of
    tokens; logits have a gradient too.
    """
    held = {
        "parameters and gradients": (2 * _on_a_device(state.params), "--mesh=fsdp:N, lora"),
        "optimizer state": (_on_a_device((state.opt_state, state.ema)), "--mesh=fsdp:N, lora"),
    }
    if isinstance(model, Model):
        cfg = model.config
        rows = math.ceil(config.batch_size / config.accumulate / data_shards(mesh))
        tokens, fewer = rows * length, "a larger accumulate, a smaller batch_size"
        mlps = 3 * cfg.mlp_dim
        if cfg.num_experts:
            mlps = cfg.experts_per_token * (2 * cfg.embed_dim + 3 * cfg.mlp_dim)
        numbers = 8 * cfg.embed_dim + mlps + cfg.num_heads * length
        size = tokens * cfg.num_layers * numbers * jnp.dtype(cfg.compute_dtype).itemsize
        held["activations"] = (size, f"{fewer}, shorter rows")
        if cfg.head in ("lm", "masked_lm"):
            chunk = getattr(config, "loss_chunk", 0) * rows or tokens
            held["logits"] = (2 * 4 * min(chunk, tokens) * cfg.vocab_size, f"a loss_chunk, {fewer}")
    return held


def _on_a_device(tree: object) -> int:
    """Bytes of the leaves' parts on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
