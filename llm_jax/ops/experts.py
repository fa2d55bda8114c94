"""Mixtures of experts: each token goes through a few of many feed-forward layers (Shazeer et al. 2017).

Letters: B batch, T tokens, N = B T, D embed, E experts, K of them for a token, F mlp, X expert shards.

    logits [B, T, E] -> `route` -> weights and numbers of the K experts of each token
    `expert_layer`: N K rows sorted by expert -> three grouped products -> back in order, summed over K

No token is ever dropped: groups have any size (as in MegaBlocks, Gale et al. 2023). On a mesh whose
`expert` axis is X, a device holds E / X experts. It is given the tokens of all X (one all-gather),
computes the rows of its own experts, and the sums go back to whose tokens they are (one reduce-scatter).
So shapes are fixed, N X K rows on each device, and how tokens choose moves only how many are computed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.grouped_matmul.api import grouped_matmul
from llm_jax.ops.attention import FullContext, Routing
from llm_jax.sharding import on_shards, shard, splits

TOKENS = ("batch", "seq", None)


def route(logits: jax.Array, count: int, *, normalize: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits [B, T, E] float32 -> weights [B, T, K], experts [B, T, K] int32, probabilities [B, T, E].

    The K = `count` most probable ones, weighted by their probabilities; normalize: which then sum to 1.
    """

    def local(logits):  # on shards, because XLA would gather all tokens for `top_k`
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probabilities, count)
        if normalize:
            weights /= weights.sum(axis=-1, keepdims=True)
        return weights, experts, probabilities

    return on_shards(local, [TOKENS], out_like=(0, 0, 0))(logits)


@dataclasses.dataclass(frozen=True)
class ExpertMatrices:
    """gate and up [E, F, D], down [E, D, F], in the dtype of the activations.

    layer: which of those that lead with a layer axis; None = they have none. A kernel reads its layer in
    place, where a slice would be copied first.
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    layer: jax.Array | None = None


def expert_layer(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    matrices: ExpertMatrices,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """x [B, T, D], weights [B, T, K] float32, experts [B, T, K] int32 -> [B, T, D] in the dtype of x.

    The sum over a token's experts of weight x down (activation(gate x) * (up x)).
    """
    count, width = matrices.gate.shape[-3:-1]
    divided = splits("expert", "experts", count)
    gathered = divided and splits("expert", "batch", x.shape[0])
    over = ["expert"] if divided and not gathered else []
    over += ["tensor"] if splits("tensor", "mlp", width) else []

    def local(x, routes, gate, up, down, *layer):
        shape, (x, routes) = x.shape, (a.reshape(-1, a.shape[-1]) for a in (x, routes))
        if gathered:
            x, routes = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, routes))
        weights, experts = jnp.split(routes, 2, axis=-1)
        held = gate.shape[-3]
        first = jax.lax.axis_index("expert") * held if divided else 0
        mine = ExpertMatrices(gate, up, down, *layer)
        out = _through_experts(x, weights, experts.astype(jnp.int32) - first, mine, activation)
        if gathered:
            out = jax.lax.psum_scatter(out, "expert", tiled=True)
        if over:
            out = jax.lax.psum(out, tuple(over))
        return (out.reshape(shape),)

    # Weights and numbers of experts as one array, so that they are gathered at once.
    routes = jnp.concatenate([weights, experts.astype(jnp.float32)], axis=-1)
    lead, layer = ((), ()) if matrices.layer is None else (("layers",), (matrices.layer,))
    of_up, of_down = (*lead, "experts", "mlp", "embed"), (*lead, "experts", "embed", "mlp")
    in_axes = [TOKENS, TOKENS, of_up, of_up, of_down, *[()] * len(layer)]
    given = (x, routes, matrices.gate, matrices.up, matrices.down, *layer)
    (out,) = on_shards(local, in_axes, out_like=(0,))(*given)
    return out


def _through_experts(x, weights, experts, matrices: ExpertMatrices, activation) -> jax.Array:
    """x [N, D], weights and experts [N, K] -> [N, D]. Experts beyond those there are add nothing."""
    held, chosen = matrices.gate.shape[-3], experts.shape[1]
    group = experts.reshape(-1)
    group = jnp.where((group >= 0) & (group < held), group, held)  # the rows of others come last
    order = jnp.argsort(group)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    sizes = jnp.sum(group[:, None] == jnp.arange(held)[None], axis=0, dtype=jnp.int32)

    def product(rows, matrix):
        return grouped_matmul(rows, matrix, sizes, layer=matrices.layer)

    rows = _spread(chosen, x, order, places)
    given = product(rows, matrices.gate), product(rows, matrices.up), weights.reshape(-1)[order]
    inner = _gated(activation, *given)
    return _collect(chosen, product(inner, matrices.down), order, places)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)  # keeps what goes in alone
def _gated(activation, gate, up, weights) -> jax.Array:
    """gate and up [N K, F], weights [N K] float32 -> activation(gate) up, weighted, [N K, F].

    Weighted here and not in the sum, because elements are multiplied here anyway.
    """
    inner = (activation(gate) * up).astype(jnp.float32)
    return (inner * weights[:, None]).astype(gate.dtype)


# Each is the other's transpose, and both gather rows: a gradient by default would scatter them.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(chosen: int, x, order, places):
    """x [N, D] -> [N K, D], the row of each choice in the order of experts."""
    return x[order // chosen]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(chosen: int, rows, order, places):
    """rows [N K, D] in the order of experts -> [N, D], the sums of each token's, taken in float32."""
    own = rows[places].reshape(-1, chosen, rows.shape[-1])
    return jnp.sum(own, axis=1, dtype=jnp.float32).astype(rows.dtype)


def _spread_forward(chosen, x, order, places):
    return _spread(chosen, x, order, places), (order, places)


def _collect_forward(chosen, rows, order, places):
    return _collect(chosen, rows, order, places), (order, places)


_spread.defvjp(_spread_forward, lambda chosen, saved, g: (_collect(chosen, g, *saved), None, None))
_collect.defvjp(_collect_forward, lambda chosen, saved, g: (_spread(chosen, g, *saved), None, None))


# --- The balance between experts -------------------------------------------------------------------


def count_routing(context: Any, probabilities: jax.Array, experts: jax.Array) -> Any:
    """The context, which has counted one layer's choices if it counts them (`FullContext.routing`)."""
    if not isinstance(context, FullContext) or context.routing is None:
        return context
    real = (context.segment_ids > 0).astype(jnp.float32)[..., None]
    chosen = jax.nn.one_hot(experts, probabilities.shape[-1], dtype=jnp.float32).sum(axis=2)
    sums = (shard(jnp.sum(a * real, axis=1), "batch", None) for a in (chosen, probabilities))
    routing = jax.tree.map(jnp.add, context.routing, Routing(*sums))
    return dataclasses.replace(context, routing=routing)


def no_routing(batch: int, experts: int) -> Routing:
    """What `FullContext.routing` counts up from; of so many texts."""
    return Routing(*(jnp.zeros((batch, experts), jnp.float32) for _ in range(2)))


def load_balancing_loss(routing: Routing, tokens: jax.Array, layers: int) -> jax.Array:
    """E times the sum over experts of (share of tokens that chose it) x (mean probability of it).

    routing: sums over the layers, of so many `tokens` [] each. It is K when all are used alike, and more
    otherwise (Fedus et al. 2021; of all layers together, as transformers has it).
    """
    rows = jnp.maximum(tokens * layers, 1.0)
    shares, means = (x.sum(axis=0) / rows for x in (routing.chosen, routing.probabilities))
    return shares.shape[0] * jnp.sum(shares * means)
