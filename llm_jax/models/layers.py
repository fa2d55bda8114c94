"""The layers as Flax NNX modules: they declare parameters and compute, and hold nothing else.

Letters: B batch, T tokens, D embed, N query heads, K key/value heads, H head dim, F mlp.
Every parameter declares its logical `axes` (for sharding) and `contract`, the axes a product sums
over (for initialisation and quantization). Weights are "out, in": the contracted axes come last.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.config import ModelConfig
from llm_jax.ops.attention import AttentionContext, AttentionOptions
from llm_jax.ops.linear import linear
from llm_jax.ops.norms import layer_norm, rms_norm
from llm_jax.ops.rope import apply_rope
from llm_jax.sharding import shard


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution up to x (Hendrycks & Gimpel 2016).

    By erf, as PyTorch has it: with the erfc of `jax.nn.gelu` XLA:CPU takes twice as long. In float32,
    also as there: in bfloat16 little would be left of 1 + erf where x is negative.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], contract: tuple[str, ...]
) -> nnx.Param:
    """A matrix drawn from N(0, 1 / fan_in), or N(0, 0.02) for a table that is looked up."""
    fan_in = math.prod(n for n, a in zip(shape, axes, strict=True) if a in contract)
    std = fan_in**-0.5 if contract else 0.02
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, contract=contract)


def vector(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A bias or a scale, filled with `value`."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, contract=())


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """x [B, T, ...] plus a bias of the trailing shape, if there is one."""
    if bias is None:
        return x
    b = bias.get_value().astype(x.dtype)
    return x + b.reshape((1,) * (x.ndim - b.ndim) + b.shape)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over a last axis of `dim`."""

    def __init__(self, cfg: ModelConfig, dim: int, axis: str):
        self.eps, self.plus_one, self.layer = cfg.norm_eps, cfg.norm_plus_one, cfg.norm == "layer"
        self.scale = vector(0.0 if cfg.norm_plus_one else 1.0, (dim,), (axis,))
        self.bias = vector(0.0, (dim,), (axis,)) if self.layer else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.bias is not None:
            return layer_norm(x, self.scale.get_value(), self.bias.get_value(), eps=self.eps)
        return rms_norm(x, self.scale.get_value(), eps=self.eps, plus_one=self.plus_one)


class Attention(nnx.Module):
    """Multi-head or grouped-query attention; where keys come from is the context's business."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, n, k, h = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        scale = cfg.head_dim**-0.5 if cfg.attn_scale is None else cfg.attn_scale
        windows = tuple(sorted(set(cfg.layer_windows)))
        self.options = AttentionOptions(cfg.causal, scale, cfg.attn_softcap, cfg.attention, windows)
        self.wq = weight(rngs, (n, h, d), ("heads", "head_dim", "embed"), ("embed",))
        self.wk = weight(rngs, (k, h, d), ("kv_heads", "head_dim", "embed"), ("embed",))
        self.wv = weight(rngs, (k, h, d), ("kv_heads", "head_dim", "embed"), ("embed",))
        # One axis for heads and head_dim: TPUs would copy a weight of three to flatten it, every time.
        self.wo = weight(rngs, (d, n * h), ("embed", "head_features"), ("head_features",))
        self.bq = vector(0.0, (n, h), ("heads", "head_dim")) if cfg.qkv_bias else None
        self.bk = vector(0.0, (k, h), ("kv_heads", "head_dim")) if cfg.qkv_bias else None
        self.bv = vector(0.0, (k, h), ("kv_heads", "head_dim")) if cfg.qkv_bias else None
        self.bo = vector(0.0, (d,), ("embed",)) if cfg.out_bias else None
        self.q_norm = Norm(cfg, h, "head_dim") if cfg.qk_norm else None
        self.k_norm = Norm(cfg, h, "head_dim") if cfg.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None,
        context: AttentionContext,
        layer: jax.Array | int,
        window: jax.Array | int,
    ) -> tuple[jax.Array, AttentionContext]:
        """x [B, T, D], positions [B, T] -> [B, T, D], context."""
        q = add_bias(linear(x, self.wq), self.bq)
        k = add_bias(linear(x, self.wk), self.bk)
        v = add_bias(linear(x, self.wv), self.bv)
        q, k = (y if norm is None else norm(y) for y, norm in ((q, self.q_norm), (k, self.k_norm)))
        if rotary is not None:
            q, k = apply_rope(q, *rotary), apply_rope(k, *rotary)
        out, context = context.attend(
            layer,
            shard(q, "batch", "seq", "heads", None),
            shard(k, "batch", "seq", "kv_heads", None),
            shard(v, "batch", "seq", "kv_heads", None),
            positions=positions,
            window=window,
            options=self.options,
        )
        out = shard(out, "batch", "seq", "heads", None).reshape(*out.shape[:2], -1)
        return add_bias(linear(out, self.wo), self.bo), context


class MLP(nnx.Module):
    """Feed-forward layer, gated (Shazeer 2020) or plain."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, f = cfg.embed_dim, cfg.mlp_dim
        self.activation = ACTIVATIONS[cfg.activation]
        self.gate = weight(rngs, (f, d), ("mlp", "embed"), ("embed",)) if cfg.gated_mlp else None
        self.up = weight(rngs, (f, d), ("mlp", "embed"), ("embed",))
        self.down = weight(rngs, (d, f), ("embed", "mlp"), ("mlp",))
        bias = cfg.mlp_bias
        self.gate_bias = vector(0.0, (f,), ("mlp",)) if bias and cfg.gated_mlp else None
        self.up_bias = vector(0.0, (f,), ("mlp",)) if bias else None
        self.down_bias = vector(0.0, (d,), ("embed",)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        h = add_bias(linear(x, self.up), self.up_bias)
        if self.gate is None:
            h = self.activation(h)
        else:
            gate = add_bias(linear(x, self.gate), self.gate_bias)
            h = self.activation(gate) * h
        h = shard(h, "batch", "seq", "mlp")
        return add_bias(linear(h, self.down), self.down_bias)


class Embed(nnx.Module):
    """Token, position and segment embeddings, summed."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d = cfg.embed_dim
        self.scale = math.sqrt(d) if cfg.embed_scale else None
        self.offset, self.dtype = cfg.position_offset, jnp.dtype(cfg.compute_dtype)
        self.tokens = weight(rngs, (cfg.vocab_size, d), ("vocab", "embed"), ())
        rows = cfg.max_positions + cfg.position_offset
        learned = cfg.positions == "learned"
        self.positions = weight(rngs, (rows, d), ("positions", "embed"), ()) if learned else None
        types = cfg.token_types
        self.types = weight(rngs, (types, d), ("types", "embed"), ()) if types else None
        self.norm = Norm(cfg, d, "embed") if cfg.embed_norm else None

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, token_types: jax.Array | None
    ) -> jax.Array:
        """tokens, positions, token_types [B, T] int32 -> [B, T, D] in the compute dtype."""
        x = self.lookup(tokens)
        if self.positions is not None:
            x += self.positions.get_value()[positions + self.offset].astype(self.dtype)
        if self.types is not None:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x += self.types.get_value()[types].astype(self.dtype)
        return x if self.norm is None else self.norm(x)

    def lookup(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] int32 -> the tokens' own embeddings [..., D]; no positions, no types."""
        table = shard(self.tokens.get_value(), "vocab", "embed")  # gathered over fsdp, as any weight
        x = table[tokens].astype(self.dtype)
        return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)
