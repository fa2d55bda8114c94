"""What a forward pass computes, from a model's shapes."""

import jax

from llm_jax.models.describe import Model
from llm_jax.models.moe import EXPERTS
from llm_jax.tree import flatten, num_elements

# Looked up, not multiplied
TABLES = ("embed/tokens", "embed/positions", "embed/types", "ngram_logits/table")


def forward_flops(model: Model, tokens: int, context: int) -> int:
    """Multiply-adds, times two, of a forward pass over `tokens` tokens that see `context` keys each.

    Matrices (of experts, those that a token has) and attention count, as in PaLM (Chowdhery et al. 2022,
    appendix B): not norms, activations and softmax, and a causal mask saves nothing. A training step is
    three times that; what rematerialization computes again does not count.
    """
    cfg = model.config
    sizes = jax.tree.map(lambda s, c: num_elements(s) if c else 0, model.shapes, model.contract)
    flat = flatten(sizes)
    matrices = sum(size for path, size in flat.items() if path not in (*TABLES, *EXPERTS))
    if cfg.num_experts:
        matrices += sum(flat[path] for path in EXPERTS) // cfg.num_experts * cfg.experts_per_token
    if cfg.tie_embeddings:
        matrices += cfg.vocab_size * cfg.embed_dim
    keys = sum(min(window, context) if window else context for window in cfg.layer_windows)
    return 2 * tokens * (matrices + 2 * cfg.num_heads * cfg.head_dim * keys)
