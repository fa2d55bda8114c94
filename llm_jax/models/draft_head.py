"""A draft head: one small cell, applied again and again, that guesses tokens ahead of its model.

The model's hidden state h_t of the newest token t, from which it chooses token t + 1, is the first
state. The cell reads one token at a time, and the model's own `unembed` says what it expects next:

    s_0 = h_t        s_k = cell(s_{k-1}, embedding of token t + k)        k = 1 ... K
    unembed(s_k) are the logits of token t + k + 1

    head = describe_draft_head(model.config, width=256)
    params = init_draft_head(head, mesh, key)                          a nested dict, as any model's
    state = head.bind(params)(state, net.embed.lookup(tokens))         inside a jit

There is neither attention nor a cache: what a draft knows of the text is in h_t. One cell for all
steps is the recurrent drafter of Zhang et al. 2024 (arXiv:2403.09919); that a step reads the token
before it is what sets it and Hydra (Ankner et al. 2024, arXiv:2402.05109) apart from independent heads.

Letters: D embed, F width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from llm_jax.config import ModelConfig
from llm_jax.models.describe import Params, make_draw, outline
from llm_jax.models.layers import ACTIVATIONS, Norm, weight
from llm_jax.ops.linear import linear
from llm_jax.sharding import shardings


class DraftHead(nnx.Module):
    """state + down(activation(up(norm(state), norm(token)))); it begins as the identity: `down` is 0."""

    def __init__(self, cfg: ModelConfig, width: int, *, rngs: nnx.Rngs):
        d = cfg.embed_dim
        self.activation = ACTIVATIONS[cfg.activation]
        self.state_norm, self.token_norm = Norm(cfg, d, "embed"), Norm(cfg, d, "embed")
        # Two matrices in place of one of both inputs side by side, which the mesh could not split alike.
        self.up_state = weight(rngs, (width, d), ("mlp", "embed"), ("embed",))
        self.up_token = weight(rngs, (width, d), ("mlp", "embed"), ("embed",))
        zeros = jnp.zeros((d, width), jnp.float32)
        self.down = nnx.Param(zeros, axes=("embed", "mlp"), contract=("mlp",))

    def __call__(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """state, token [..., D]: the state before a token, and its embedding -> the state after it."""
        h = linear(self.state_norm(state), self.up_state) + linear(self.token_norm(token), self.up_token)
        return state + linear(self.activation(h), self.down)


@dataclasses.dataclass(frozen=True, eq=False)
class DraftHeadModel:
    """What there is to know of a draft head before it has parameters, as `Model` has it. No arrays."""

    config: ModelConfig  # of the model that it drafts for
    width: int
    graphdef: nnx.GraphDef
    shapes: Params  # ShapeDtypeStruct in the parameter dtype of `config`
    axes: Params
    contract: Params

    def bind(self, params: Params) -> DraftHead:
        """The head with these parameters in it; call it inside a jit."""
        return nnx.merge(self.graphdef, params)

    def shardings(self, mesh: Mesh) -> Params:
        """NamedSharding of every parameter on `mesh`."""
        return shardings(self.axes, self.shapes, mesh)


@functools.lru_cache(maxsize=64)
def describe_draft_head(config: ModelConfig, width: int) -> DraftHeadModel:
    """A head of F = `width` for the language model of `config`, with nothing allocated.

    ValueError when that model does not predict next tokens, or for a width below 1.
    """
    if config.head != "lm" or not config.causal:
        raise ValueError(
            f"head={config.head!r}, causal={config.causal}: expected 'lm' and True, a model that "
            "predicts the next token"
        )
    if width < 1:
        raise ValueError(f"width={width}: expected 1 or more")
    config = config.with_dtypes(jax.default_backend())
    build = lambda rngs: DraftHead(config, width, rngs=rngs)  # noqa: E731
    return DraftHeadModel(config, width, *outline(build, config.param_dtype))


def init_draft_head(head: DraftHeadModel, mesh: Mesh, key: jax.Array) -> Params:
    """First parameters, born on their shards; with them every draft repeats the model's own choice."""
    build = lambda rngs: DraftHead(head.config, head.width, rngs=rngs)  # noqa: E731
    with jax.set_mesh(mesh):
        return make_draw(build, head.shapes, head.shardings(mesh))(key)
