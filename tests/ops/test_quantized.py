"""The product with an int8 weight: beside float64, by every form, on every mesh, one layer of many."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.compress.quantize import Weight, round_rows
from llm_jax.kernels.choice import Choice
from llm_jax.kernels.forms import chosen
from llm_jax.kernels.quantized_matmul.api import quantized_matmul
from llm_jax.kernels.quantized_matmul.integers import MOST_DEPTH, split_rows
from llm_jax.ops import quantized
from llm_jax.ops.linear import LowRankBank, linear
from llm_jax.ops.quantized import QuantizedProblem, scannable
from llm_jax.sharding import make_mesh

LAYERS, HEADS, DIM, DEPTH = 3, 8, 4, 64
AXES = {"up": ("embed", "mlp"), "down": ("mlp", "embed"), "heads": ("embed", "heads")}


def drawn(kind="heads", stacked=True, round_x=False, dtype=np.float32, transposed=True):
    """(x [4, 5, C], QTensor, the weight [L?, *O, C] that it is, in float64)."""
    rng = np.random.default_rng(0)
    lead, out = (LAYERS,) if stacked else (), (HEADS, DIM) if kind == "heads" else (HEADS * DIM,)
    w = rng.standard_normal((*lead, HEADS * DIM, DEPTH)).astype(np.float32)
    values, scale = round_rows(w, np)
    q = jnp.asarray(values if transposed else values.swapaxes(-1, -2))
    leaf = Weight(lead, out, DEPTH, AXES[kind], transposed, round_x).like(q, jnp.asarray(scale))
    wide = values * scale.astype(np.float64)[..., None]
    return jnp.asarray(rng.standard_normal((4, 5, DEPTH)), dtype), leaf, wide.reshape(*lead, *out, DEPTH)


def exact(x, w, round_x=False):
    """x [..., C] times w [*O, C] in float64, the rows of x rounded first or not."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    if round_x:
        step = np.abs(x).max(-1, keepdims=True) / 127
        x = np.round(x / step) * step
    return np.tensordot(x, w, (-1, -1))


def close(got, want, tolerance=1e-6):
    np.testing.assert_allclose(
        np.asarray(got.astype(jnp.float32)), want, rtol=0, atol=tolerance * np.abs(want).max()
    )


@pytest.fixture
def take(monkeypatch):
    """f(form): from here on products are computed so; "pallas" is the TPU kernel, interpreted."""

    def switch(form):
        monkeypatch.setattr(quantized, "choose", lambda *_, **__: Choice(form, "for this test"))
        if form == "pallas":
            monkeypatch.setattr(
                quantized, "quantized_matmul", functools.partial(quantized_matmul, interpret=True)
            )

    return switch


@pytest.mark.parametrize("form", ["integers", "xla"])
@pytest.mark.parametrize("round_x", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_that_of_float64(form, round_x, transposed, dtype, take):
    take(form)
    x, leaf, wide = drawn(stacked=False, round_x=round_x, dtype=dtype, transposed=transposed)
    got = linear(x, leaf)
    assert got.dtype == dtype and got.shape == (4, 5, HEADS, DIM)
    close(got, exact(x, wide, round_x), 1e-6 if dtype == jnp.float32 else 2**-8)
    close(
        linear(x[:1, :1], leaf), exact(x[:1, :1], wide, round_x), 1e-6 if dtype == jnp.float32 else 2**-8
    )


def test_rows_of_zeros_and_rows_with_one_large_number():
    x, leaf, wide = drawn("up", stacked=False)
    x = x.at[0, 0].set(0).at[1, 1, 7].set(1e6)
    got = linear(x, leaf)
    close(got, exact(x, wide))
    close(got[2], exact(x[2], wide))  # what is large in one row is nothing to another
    assert not np.asarray(got[0, 0]).any()


@pytest.mark.parametrize(("dtype", "count", "bits"), [(jnp.float32, 3, 22), (jnp.bfloat16, 2, 14)])
def test_digits_add_up_to_the_rows(dtype, count, bits):
    x = jax.random.normal(jax.random.key(0), (7, 50), dtype)
    digits, scale = split_rows(x, count)
    assert all(d.dtype == jnp.int8 for d in digits) and len(digits) == count
    total = sum(np.asarray(d, np.float64) / 254.0**n for n, d in enumerate(digits)) * np.asarray(scale)
    most = np.abs(np.asarray(x.astype(jnp.float32))).max(axis=1, keepdims=True)
    assert (np.abs(total - np.asarray(x.astype(jnp.float32), np.float64)) <= 2.0**-bits * most).all()


def test_sums_hold_the_deepest_weights():
    worst = jnp.full((MOST_DEPTH, 1), -128, jnp.int8)
    got = quantized_matmul(jnp.ones((1, MOST_DEPTH)), worst, jnp.ones(1), implementation="integers")
    close(got, np.full((1, 1), -128.0 * MOST_DEPTH))
    with pytest.raises(ValueError, match="K=.* is more than"):
        deeper = jnp.ones((MOST_DEPTH + 1, 1), jnp.int8)
        quantized_matmul(jnp.ones((1, MOST_DEPTH + 1)), deeper, jnp.ones(1), implementation="integers")


@pytest.mark.parametrize("form", ["integers", "xla", "pallas"])
@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("mesh", ["", "tensor:8", "data:2,fsdp:2,tensor:2", "fsdp:4"])
def test_a_layer_of_many_on_a_mesh(mesh, kind, form, take):
    take(form)
    x, leaf, wide = drawn(kind, transposed=form == "integers")
    mesh = make_mesh(mesh)
    places = Weight((LAYERS,), leaf.out, DEPTH, leaf.axes, leaf.transposed, False).shardings(mesh)
    held = jax.tree.map(jax.device_put, leaf, places)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x, w, layer: linear(x, dataclasses.replace(w, layer=layer)))(x, held, 1)
    close(got, exact(x, wide[1]), 2e-6)


def test_heads_that_the_mesh_does_not_divide_stay_whole():
    x, leaf, wide = drawn("heads", stacked=False)
    leaf = dataclasses.replace(leaf, out=(2, 16))
    mesh = make_mesh("tensor:8")
    places = Weight((), leaf.out, DEPTH, leaf.axes, leaf.transposed, False).shardings(mesh)
    assert places.q.is_fully_replicated
    with jax.set_mesh(mesh):
        got = jax.jit(linear)(x, jax.tree.map(jax.device_put, leaf, places))
    close(got, exact(x, wide).reshape(4, 5, 2, 16))


def test_a_scan_slices_everything_but_quantized_weights():
    x, leaf, wide = drawn("up")
    layers = {"up": leaf, "bank": LowRankBank(leaf, None, None, None, 1), "b": jnp.arange(3.0)}
    sliced, of_layer = scannable(layers)
    assert [x.shape for x in jax.tree.leaves(sliced)] == [(3,)]

    def body(_, per_layer):
        part, layer = per_layer
        own = of_layer(part, layer)
        return None, linear(x, own["up"]) + linear(x, own["bank"]) + own["b"]

    _, got = jax.lax.scan(body, None, (sliced, jnp.arange(3)))
    close(got, np.stack([2 * exact(x, w) + i for i, w in enumerate(wide)]))


@pytest.mark.parametrize("form", ["integers", "xla"])
@pytest.mark.parametrize("round_x", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_is_that_of_the_weights_they_stand_for(form, round_x, transposed, take):
    """Rounding has no gradient of its own: it passes through."""
    take(form)
    x, leaf, wide = drawn("up", stacked=False, round_x=round_x, transposed=transposed)
    ones = jnp.asarray(np.random.default_rng(1).standard_normal((4, 5, HEADS * DIM)), jnp.float32)
    got = jax.grad(lambda x: jnp.sum(linear(x, leaf) * ones))(x)
    close(got, exact(ones, wide.T))


def test_what_ran_is_told():
    x, leaf, _ = drawn("up", stacked=False)
    linear(x, leaf)
    problem = QuantizedProblem("float32", False, 32, DEPTH, HEADS * DIM)
    assert problem.key == "float32 inner=64 out=32 rows=32"
    assert "products of integers are fast" in chosen()[problem].reason
    assert QuantizedProblem("float32", True, 32, 1, 2).key == "float32 rounded inner=1 out=2 rows=32"


def test_a_weight_that_does_not_fit_is_an_error():
    x, leaf, _ = drawn("up", stacked=False)
    with pytest.raises(AssertionError, match="does not fit activation"):
        linear(x[..., :-1], leaf)
