"""The transformer: one definition for every decoder and encoder family, by configuration.

Letters: B batch, T tokens, D embed, L layers, V vocab, C classes.

    tokens [B, T] -> Embed -> L x Block(Attention -> context.attend, MLP or MoE) -> norm
           -> hidden [B, T, D]
    hidden -> unembed -> logits [B, T, V]   or   -> pooled -> classify -> logits [B, C]
           or -> spans -> logits [B, T, 2]

Modules only describe: parameters flow as a nested dict, bound to the modules inside a jit
(llm_jax/models/describe.py). The L blocks are one block with every leaf stacked on a leading layer
axis, run by `lax.scan`, so that compile time does not grow with depth. Where the keys and values
come from (the batch, a cache) is the context's business: there is no decode mode here. What differs
between layers (window, rotary table) is data, scanned along.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.config import ModelConfig
from llm_jax.models.heads import ClassifierHead, LMHead, NgramLogits, Pooler, SpanHead, fold_parts, pool
from llm_jax.models.layers import MLP, Attention, Embed, Norm
from llm_jax.models.moe import MoE, hold_matrices
from llm_jax.models.pipeline import through_stages
from llm_jax.ops.attention import AttentionContext
from llm_jax.ops.quantized import scannable
from llm_jax.ops.rope import frequencies, rotary_tables
from llm_jax.ops.tap_context import tap
from llm_jax.sharding import shard, stages
from llm_jax.tree import is_per_layer

Context = TypeVar("Context", bound=AttentionContext)

REMAT = {  # what a layer keeps for its backward pass
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual; norms before, after, or both."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d = cfg.embed_dim
        before, after = cfg.norm_position != "post", cfg.norm_position != "pre"
        self.norm_sum, self.rate = cfg.norm_position == "post", cfg.dropout
        self.attn_norm = Norm(cfg, d, "embed") if before else None
        self.attn = Attention(cfg, rngs=rngs)
        self.attn_post_norm = Norm(cfg, d, "embed") if after else None
        self.mlp_norm = Norm(cfg, d, "embed") if before else None
        self.mlp = None if cfg.num_experts else MLP(cfg, rngs=rngs)
        self.moe = MoE(cfg, rngs=rngs) if cfg.num_experts else None
        self.mlp_post_norm = Norm(cfg, d, "embed") if after else None

    def __call__(self, x, positions, rotary, context, layer, window):
        """x [B, T, D] -> [B, T, D], context; see `Attention` for the other arguments."""
        h = x if self.attn_norm is None else self.attn_norm(x)
        h, context = self.attn(h, positions, rotary, context, layer, window)
        h, context = tap(context, "attn_out", h, layer)
        x = self._add(x, context.dropout(h, self.rate, layer, 0), self.attn_post_norm)
        h = x if self.mlp_norm is None else self.mlp_norm(x)
        if self.moe is not None:
            h, context = self.moe(h, context, layer)
        elif self.mlp is not None:
            h = self.mlp(h)
        h, context = tap(context, "mlp_out", h, layer)
        x = self._add(x, context.dropout(h, self.rate, layer, 1), self.mlp_post_norm)
        return tap(context, "resid", x, layer)

    def _add(self, x: jax.Array, h: jax.Array, norm: Norm | None) -> jax.Array:
        """The residual sum, normed as a whole (BERT), in its new part (Gemma), or not."""
        if norm is None:
            x = x + h
        else:
            x = norm(x + h) if self.norm_sum else x + norm(h)
        return shard(x, "batch", "seq", "embed")


class Transformer(nnx.Module):
    """Embedding, stacked blocks, final norm and heads of one `ModelConfig`."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = Embed(cfg, rngs=rngs)
        stack = nnx.vmap(
            lambda r: Block(cfg, rngs=r),
            transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"},
        )
        self.layers = stack(rngs.split(cfg.num_layers))  # every leaf [L, ...]
        self.norm = None if cfg.norm_position == "post" else Norm(cfg, cfg.embed_dim, "embed")
        self.lm_head = LMHead(cfg, rngs=rngs) if cfg.head in ("lm", "masked_lm") else None
        self.pooler = Pooler(cfg, rngs=rngs) if cfg.pooler else None
        self.classifier = ClassifierHead(cfg, rngs=rngs) if cfg.head == "classifier" else None
        self.ngram_logits = NgramLogits(cfg, rngs=rngs) if cfg.ngram_orders else None
        self.span = SpanHead(cfg, rngs=rngs) if cfg.head == "span" else None

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        context: Context,
        token_types: jax.Array | None = None,
    ) -> tuple[jax.Array, Context]:
        """tokens, positions, token_types [B, T] int32 -> hidden [B, T, D] and the context after."""
        x = self.embed(tokens, positions, token_types)
        x = context.dropout(shard(x, "batch", "seq", "embed"), self.cfg.dropout, 0, 2)
        x, context = tap(context, "embed", x, 0)
        x, context = self._through_layers(x, positions, context)
        return tap(context, "final", x if self.norm is None else self.norm(x), 0)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V] float32."""
        if self.lm_head is None:
            raise ValueError(f"head={self.cfg.head!r} has no vocabulary logits; expected 'lm'")
        return self.lm_head(hidden, self.embed.tokens)

    def sentence(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """hidden [B, T, D], mask [B, T] (0 = padding) -> pooled vectors [B, D]."""
        pooled = pool(hidden, mask, self.cfg.pooling)
        return pooled if self.pooler is None else self.pooler(pooled)

    def classify(
        self,
        hidden: jax.Array,
        mask: jax.Array,
        context: AttentionContext,
        ngrams: jax.Array | None = None,
    ) -> jax.Array:
        """Class logits [B, C] float32, the mean of all paths; arguments as `classify_parts` has them."""
        paths = self.classify_parts(hidden, mask, context, ngrams)
        return fold_parts(jnp.stack(paths).mean(axis=0), self.cfg.class_parts)

    def classify_parts(
        self,
        hidden: jax.Array,
        mask: jax.Array,
        context: AttentionContext,
        ngrams: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """hidden [B, T, D], mask [B, T] -> logits [B, P] float32 of the parts of the classes, by path.

        The first path is from the hidden states, a second one from the n-grams of a model that has
        `ngram_orders`. ngrams: [B, N] int32, as `data.ngrams` makes them.
        """
        if self.classifier is None:
            raise ValueError(f"head={self.cfg.head!r} has no classes; expected 'classifier'")
        pooled = context.dropout(self.sentence(hidden, mask), self.cfg.dropout, 0, 3)
        logits = self.classifier(pooled)
        if self.ngram_logits is None:
            return (logits,)
        if ngrams is None:
            orders = self.cfg.ngram_orders
            raise ValueError(f"ngrams=None: expected those of ngram_orders={orders}; see data.ngrams")
        return logits, self.ngram_logits(ngrams, context)

    def spans(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, T, D] -> logits [B, T, 2] float32 of an answer's first and last token."""
        if self.span is None:
            raise ValueError(f"head={self.cfg.head!r} finds no answers; expected 'span'")
        return self.span(hidden)

    def _through_layers(self, x: jax.Array, positions: jax.Array, context: Any) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> [B, T, D], context; blocks one by one, scanned, or scanned in stages."""
        graphdef, layers = nnx.split(self.layers)
        layers, windows = nnx.to_pure_dict(layers), self.cfg.layer_windows

        def block_at(positions):
            tables = self._rotary(positions)

            def block(x, context, params, layer, window):
                rotary = None if tables is None else _choose(tables, window)
                run: Any = nnx.merge(graphdef, params)
                return run(x, positions, rotary, context, layer, window)

            return block

        if is_per_layer(jax.tree.leaves(layers, is_leaf=is_per_layer)[0]):
            run_block = block_at(positions)
            if self.cfg.remat != "none":
                run_block = jax.checkpoint(
                    run_block, policy=REMAT[self.cfg.remat], static_argnums=(3, 4)
                )
            for i, window in enumerate(windows):
                params = jax.tree.map(lambda p, i=i: p[i], layers, is_leaf=is_per_layer)
                x, context = run_block(x, context, params, i, window)
            return x, context
        window = windows[0] if len(set(windows)) == 1 else None
        sliced, of_layer = scannable(hold_matrices(layers, context, self.cfg.compute_dtype))

        def scan(scanned, x, positions, context):
            block = block_at(positions)

            def body(carry, per_layer):
                slices, layer, varying = per_layer
                chosen = varying if window is None else window
                return block(*carry, of_layer(slices, layer), layer, chosen), None

            if self.cfg.remat != "none":
                body = jax.checkpoint(body, policy=REMAT[self.cfg.remat], prevent_cse=False)
            return jax.lax.scan(body, (x, context), scanned)[0]

        scanned = (sliced, jnp.arange(len(windows)), jnp.asarray(windows, jnp.int32))
        if stages() > 1:
            return through_stages(scan, scanned, x, positions, context, self.cfg.microbatches)
        return scan(scanned, x, positions, context)

    def _rotary(self, positions: jax.Array) -> list[tuple[jax.Array, jax.Array]] | None:
        """Tables (cos, sin) of full layers and, where they differ, of windowed layers."""
        cfg = self.cfg
        if cfg.positions != "rope":
            return None
        tables = [rotary_tables(positions, *frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling))]
        if cfg.local_rope_theta is not None:
            local = frequencies(cfg.head_dim, cfg.local_rope_theta, None)
            tables.append(rotary_tables(positions, *local))
        return tables


def _choose(tables: list, window: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The rotary table of a layer with this window."""
    if len(tables) == 1:
        return tables[0]
    if isinstance(window, int):
        return tables[window > 0]
    return jax.tree.map(lambda full, local: jnp.where(window > 0, local, full), *tables)
