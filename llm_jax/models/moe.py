"""The feed-forward layer of a mixture of experts.

Letters: B batch, T tokens, L layers, D embed, E experts, K of them for a token, F mlp.

The experts' matrices are one array each, [E, out, in], as the grouped product takes them: "out, in" like
all weights, and an expert's matrix is what a checkpoint holds of it. Stacked over layers they are
[L, E, out, in], of which the product's kernel reads a layer in place. So a scan that is not
differentiated closes over them (`hold_matrices`): its slices would be copied, and so the weights of all
experts in every step, of which decoding reads a few.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.config import ModelConfig
from llm_jax.models.layers import ACTIVATIONS, weight
from llm_jax.ops.attention import FullContext
from llm_jax.ops.experts import ExpertMatrices, count_routing, expert_layer, route
from llm_jax.ops.tap_context import tap
from llm_jax.tree import OfLayer

MATRICES = ("gate", "up", "down")
MOE = "layers/moe/"  # how paths of its parameters begin
EXPERTS = tuple(MOE + name for name in MATRICES)


class MoE(nnx.Module):
    """K of E gated feed-forward layers for each token, chosen by a linear router."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        e, d, f = cfg.num_experts, cfg.embed_dim, cfg.mlp_dim
        self.chosen, self.normalize = cfg.experts_per_token, cfg.norm_expert_weights
        self.activation = ACTIVATIONS[cfg.activation]
        self.router = weight(rngs, (e, d), ("routes", "embed"), ("embed",))
        self.gate = weight(rngs, (e, f, d), ("experts", "mlp", "embed"), ("embed",))
        self.up = weight(rngs, (e, f, d), ("experts", "mlp", "embed"), ("embed",))
        self.down = weight(rngs, (e, d, f), ("experts", "embed", "mlp"), ("mlp",))

    def __call__(self, x: jax.Array, context: Any, layer: jax.Array | int) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> [B, T, D], context."""
        router = self.router.get_value().astype(x.dtype)
        logits = jnp.einsum("btd,ed->bte", x, router, preferred_element_type=jnp.float32)
        logits, context = tap(context, "router", logits, layer)
        weights, experts, probabilities = route(logits, self.chosen, normalize=self.normalize)
        context = count_routing(context, probabilities, experts)
        return expert_layer(x, weights, experts, self._matrices(x.dtype), self.activation), context

    def _matrices(self, dtype: jnp.dtype) -> ExpertMatrices:
        held = [param.get_value() for param in (self.gate, self.up, self.down)]
        if isinstance(held[0], OfLayer):
            return ExpertMatrices(*(w.stack for w in held), layer=held[0].layer)
        return ExpertMatrices(*(w.astype(dtype) for w in held))


def hold_matrices(layers: dict[str, Any], context: Any, dtype: str) -> dict[str, Any]:
    """Stacked parameters of the layers, with the experts' matrices as what a scan closes over.

    They are scanned where closing over them would cost more: in training, whose gradient would be added
    up whole in every layer; and where a layer's are made from them, by a cast or a gather over `fsdp`.
    """
    mesh, moe = jax.sharding.get_abstract_mesh(), layers.get("moe")
    if moe is None or isinstance(context, FullContext) or moe["gate"].dtype != jnp.dtype(dtype):
        return layers
    if not mesh.empty and mesh.shape["fsdp"] > 1:
        return layers
    return layers | {"moe": moe | {name: OfLayer(moe[name]) for name in MATRICES}}
