"""Mixtures of experts beside a loop over tokens in float64, on one device and split over eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llm_jax.ops.attention import FullContext
from llm_jax.ops.experts import (
    ExpertMatrices,
    count_routing,
    expert_layer,
    load_balancing_loss,
    no_routing,
    route,
)
from llm_jax.sharding import make_mesh

ROWS, LENGTH, WIDTH, EXPERTS, CHOSEN, MLP = 8, 3, 12, 8, 3, 16
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MESHES = ["expert:8", "data:2,expert:4", "expert:2,tensor:4", "fsdp:2,expert:4"]


def drawn(rows=ROWS, experts=EXPERTS, seed=0):
    """x [B, T, D], router logits [B, T, E], and the experts' matrices."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, LENGTH, WIDTH), (rows, LENGTH, experts))
    shapes += ((experts, MLP, WIDTH), (experts, MLP, WIDTH), (experts, WIDTH, MLP))
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def layer(x, logits, gate, up, down, normalize=True):
    weights, experts, _ = route(logits, CHOSEN, normalize=normalize)
    return expert_layer(x, weights, experts, ExpertMatrices(gate, up, down), jax.nn.silu)


def by_token(x, logits, gate, up, down, normalize=True):
    """The definition: each token by itself, float64."""
    x, logits, gate, up, down = (np.asarray(a, np.float64) for a in (x, logits, gate, up, down))
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        p = np.exp(logits[place] - logits[place].max())
        p /= p.sum()
        best = np.argsort(-p)[:CHOSEN]
        for e in best:
            weight = p[e] / p[best].sum() if normalize else p[e]
            g = gate[e] @ x[place]
            out[place] += weight * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ x[place])))
    return out


def densely(x, logits, gate, up, down):
    """All experts for all tokens, for jax to differentiate."""
    weights, experts, _ = route(logits, CHOSEN, normalize=True)
    given = jnp.sum(jax.nn.one_hot(experts, gate.shape[0]) * weights[..., None], axis=2)
    inner = jax.nn.silu(jnp.einsum("btd,efd->btef", x, gate)) * jnp.einsum("btd,efd->btef", x, up)
    return jnp.einsum("btef,edf,bte->btd", inner, down, given)


def gradients(fn, arrays):
    """(out, the gradient in every array) of a sum that tells all elements apart."""
    rng = np.random.default_rng(9)
    factors = jnp.asarray(rng.standard_normal(arrays[0].shape), jnp.float32)
    loss = lambda *arrays: (jnp.sum((out := fn(*arrays)) * factors), out)  # noqa: E731
    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(*arrays)
    return [out, *grads]


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_layer_is_a_weighted_sum_of_a_tokens_experts(normalize):
    arrays = drawn()
    out = jax.jit(functools.partial(layer, normalize=normalize))(*arrays)
    close([out], [by_token(*arrays, normalize=normalize)])


def test_gradients_are_those_of_all_experts_computed_for_all_tokens():
    arrays = drawn()
    close(gradients(layer, arrays), gradients(densely, arrays))


@pytest.mark.parametrize("rows, experts", [(ROWS, EXPERTS), slow(2, EXPERTS), slow(ROWS, 6), slow(2, 6)])
@pytest.mark.parametrize("mesh", [MESHES[2], *map(slow, [MESHES[0], MESHES[1], MESHES[3]])])
def test_any_mesh_gives_the_same_layer_and_gradients(mesh, rows, experts):
    """Also where texts or experts do not divide by it, and are whole on every device."""
    arrays = drawn(rows, experts)
    with jax.set_mesh(make_mesh(mesh)):
        ours = gradients(layer, arrays)
    close(ours, gradients(densely, arrays))


def test_all_tokens_may_choose_the_same_experts():
    """Nothing is dropped: one device of four then computes every row."""
    x, logits, *matrices = drawn()
    logits += jnp.where(jnp.arange(EXPERTS) < CHOSEN, 100.0, 0.0)[None, None]
    with jax.set_mesh(make_mesh("data:2,expert:4")):
        out = jax.jit(layer)(x, logits, *matrices)
    close([out], [by_token(x, logits, *matrices)])


@pytest.mark.parametrize("mesh", ["", "expert:2,tensor:4"])
def test_a_layer_of_stacked_matrices(mesh):
    x, logits, *matrices = drawn()
    others = drawn(seed=1)[2:]
    stacks = [jnp.stack(pair) for pair in zip(others, matrices, strict=True)]
    weights, experts, _ = route(logits, CHOSEN, normalize=True)

    @jax.jit
    def run(number):
        held = ExpertMatrices(*stacks, layer=number)
        return expert_layer(x, weights, experts, held, jax.nn.silu)

    with jax.set_mesh(make_mesh(mesh)):
        close([run(jnp.int32(1))], [by_token(x, logits, *matrices)])


def test_bfloat16_differs_by_its_own_roundings():
    arrays = drawn()
    x, *matrices = (a.astype(jnp.bfloat16) for a in (arrays[0], *arrays[2:]))
    out = jax.jit(layer)(x, arrays[1], *matrices)
    assert out.dtype == jnp.bfloat16
    wide = [a.astype(jnp.float32) for a in (x, *matrices)]
    wanted = by_token(wide[0], arrays[1], *wide[1:])
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, atol=2**-7 * np.abs(wanted).max())


@pytest.mark.parametrize("mesh", ["", "data:2,expert:4"])
def test_the_balance_is_that_of_transformers(mesh):
    logits = [drawn(seed=seed)[1] for seed in range(2)]
    segments = jnp.asarray(np.arange(LENGTH) < np.arange(1, ROWS + 1)[:, None], jnp.int32)

    @jax.jit
    def balance(segments, *logits):
        context = FullContext(segments, routing=no_routing(ROWS, EXPERTS))
        for one in logits:
            _, experts, probabilities = route(one, CHOSEN, normalize=True)
            context = count_routing(context, probabilities, experts)
        assert context.routing is not None
        return load_balancing_loss(context.routing, jnp.sum(segments, dtype=jnp.float32), len(logits))

    with jax.set_mesh(make_mesh(mesh)):
        ours = balance(segments, *logits)
    theirs = tuple(torch.tensor(np.asarray(x)).reshape(-1, EXPERTS) for x in logits)
    mask = torch.tensor(np.asarray(segments))
    wanted = load_balancing_loss_func(theirs, EXPERTS, CHOSEN, mask)
    np.testing.assert_allclose(float(ours), float(wanted), rtol=1e-6)
    plain = FullContext(segments)
    assert count_routing(plain, logits[0], jnp.zeros((ROWS, LENGTH, CHOSEN), jnp.int32)) is plain
