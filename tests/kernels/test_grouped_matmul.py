"""The TPU kernels of the grouped product in interpret mode beside float64 in numpy, and its rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.kernels.chips import RULES
from llm_jax.kernels.grouped_matmul import api
from llm_jax.kernels.grouped_matmul.api import choose, grouped_matmul
from llm_jax.kernels.grouped_matmul.cases import case
from llm_jax.kernels.grouped_matmul.reference import reference_grouped_matmul
from llm_jax.kernels.grouped_matmul.rules import budget, even_part, product_blocks, weight_blocks
from llm_jax.kernels.grouped_matmul.tpu import Blocks
from llm_jax.kernels.grouped_matmul.tpu_weights import WeightBlocks
from llm_jax.tpu.races import run_checked

pytestmark = pytest.mark.lenient  # jax's simulator promotes
SMALL = Blocks(64, 128, (16, 32), 3)
SMALL_GRADIENTS = (Blocks(48, 128, (48,), 2, 1), WeightBlocks(64, 128, 128, (32, 64), 2))
KERNEL = {"implementation": "pallas", "interpret": True}


def drawn(seed, rows, columns, depth, groups, dtype=np.float32):
    """x [M, K], w [E, N, K] and a gradient [M, N] from a normal distribution."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, depth), (groups, columns, depth), (rows, columns))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def exact(x, w, sizes, grad=None):
    """The product in float64, or (the gradient of x, that of w) for a gradient of the product."""
    x, w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w))
    out, of_x, of_w = np.zeros((len(x), w.shape[1])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = x[rows] @ w[group].T
        if grad is not None:
            part = np.asarray(grad.astype(jnp.float32), np.float64)[rows]
            of_x[rows], of_w[group] = part @ w[group], part.T @ x[rows]
        start += size
    return out if grad is None else (of_x, of_w)


def close(got, wanted, relative=5e-6):
    """Equal but for this part of the largest."""
    got = np.asarray(got.astype(jnp.float32))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=relative * max(np.abs(wanted).max(), 1.0))


SIZES = [
    ([64, 64, 64, 64], 256),
    ([100, 0, 3, 5, 40, 60], 256),  # several groups in sixteen rows, and rows of none
    ([0, 7, 130, 0], 137),  # rows that are no multiple of 16; more than one visit
    ([0, 0], 40),
]


@pytest.mark.parametrize("implementation", ["pallas", "xla", "loop", "reference"])
@pytest.mark.parametrize(("sizes", "rows"), SIZES, ids=str)
def test_products_of_groups_of_any_size(sizes, rows, implementation):
    x, w, _ = drawn(0, rows, 384, 128, len(sizes))
    of_group = jnp.asarray(sizes, jnp.int32)
    if implementation == "reference":
        got = reference_grouped_matmul(x, w, of_group)
    elif implementation in ("xla", "loop"):
        got = grouped_matmul(x, w, of_group, implementation=implementation)
    else:
        got = grouped_matmul(x, w, of_group, blocks=SMALL, **KERNEL)
    close(got, exact(x, w, sizes))


@pytest.mark.parametrize("implementation", ["pallas", "xla", "loop"])
@pytest.mark.parametrize(
    ("sizes", "rows", "columns", "depth"),
    [
        ([100, 0, 3, 5, 40, 60], 256, 256, 128),
        pytest.param([0, 7, 130, 0], 137, 128, 384, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients(sizes, rows, columns, depth, implementation):
    x, w, grad = drawn(1, rows, columns, depth, len(sizes))
    options = {"implementation": implementation}
    if implementation == "pallas":
        options = KERNEL | {"blocks": SMALL, "gradient_blocks": SMALL_GRADIENTS}
    of_group = jnp.asarray(sizes, jnp.int32)
    _, back = jax.vjp(lambda x, w: grouped_matmul(x, w, of_group, **options), x, w)
    of_x, of_w = back(grad)
    wanted_x, wanted_w = exact(x, w, sizes, grad)
    close(of_x, wanted_x)
    close(of_w, wanted_w)
    assert not np.any(np.asarray(of_w)[np.asarray(sizes) == 0])


@pytest.mark.parametrize("implementation", ["pallas", "xla", "loop"])
def test_one_of_stacked_layers(implementation):
    """As its slice: the product, the gradient of x, and int8 weights."""
    sizes, rows = [20, 0, 35, 9], 80
    x, w, grad = drawn(10, rows, 256, 128, 12)
    w, of_group = w.reshape(3, 4, 256, 128), jnp.asarray(sizes, jnp.int32)
    options = {"implementation": implementation}
    if implementation == "pallas":
        options = KERNEL | {"blocks": SMALL, "gradient_blocks": SMALL_GRADIENTS}

    @jax.jit
    def both(x, w, layer):
        product = lambda x: grouped_matmul(x, w, of_group, layer=layer, **options)  # noqa: E731
        out, back = jax.vjp(product, x)
        return out, back(grad)[0]

    for layer in (0, 2):
        out, of_x = both(x, w, jnp.int32(layer))
        close(out, exact(x, w[layer], sizes))
        close(of_x, exact(x, w[layer], sizes, grad)[0])
    whole = jnp.asarray(np.random.default_rng(1).integers(-128, 128, w.shape), jnp.int8)
    scale = jnp.asarray(np.random.default_rng(2).uniform(0.01, 0.02, (3, 4, 256)), jnp.float32)
    got = grouped_matmul(x, whole, of_group, scale=scale, layer=1, **options)
    close(got, exact(x, whole[1].astype(jnp.float32) * scale[1][..., None], sizes))


def test_the_kernel_has_no_gradient_of_stacked_weights():
    x, w, _ = drawn(11, 64, 128, 128, 4)
    product = lambda w: grouped_matmul(x, w, jnp.asarray([30, 34]), layer=1, **KERNEL).sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"no gradient for it with a layer; take w\[layer\]"):
        jax.grad(product)(w.reshape(2, 2, 128, 128))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the infinite rows
@pytest.mark.parametrize("implementation", [pytest.param("pallas", marks=pytest.mark.slow), "loop"])
def test_rows_of_others_do_not_reach_a_gradient(implementation):
    """Not even where they are infinite."""
    sizes, rows = [20, 30, 10], 80
    x, w, grad = drawn(2, rows, 128, 128, 3)
    x, grad = x.at[25:50].set(jnp.inf), grad.at[25:50].set(jnp.nan)
    options = {"implementation": implementation}
    if implementation == "pallas":
        options = KERNEL | {"gradient_blocks": SMALL_GRADIENTS}
    of_group = jnp.asarray(sizes)
    of_w = jax.vjp(lambda w: grouped_matmul(x, w, of_group, **options), w)[1](grad)[0]
    _, wanted = exact(x, w, sizes, grad)
    close(of_w[0], wanted[0])
    close(of_w[2], wanted[2])
    assert np.isnan(of_w[1]).all()


@pytest.mark.slow
def test_blocks_by_rule_and_under_jit():
    sizes = [50, 0, 200, 50]
    x, w, grad = drawn(3, 320, 256, 128, 4)

    @jax.jit
    def gradients(x, w, of_group):
        out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, of_group, **KERNEL), x, w)
        return out, *back(grad)

    out, of_x, of_w = gradients(x, w, jnp.asarray(sizes, jnp.int32))
    close(out, exact(x, w, sizes))
    wanted_x, wanted_w = exact(x, w, sizes, grad)
    close(of_x, wanted_x)
    close(of_w, wanted_w)


@pytest.mark.parametrize(
    "implementation", [pytest.param("pallas", marks=pytest.mark.slow), "xla", "loop"]
)
def test_bfloat16_differs_by_its_own_roundings(implementation):
    sizes = [100, 0, 3, 60]
    x, w, grad = drawn(4, 176, 256, 256, 4, jnp.bfloat16)
    options = KERNEL if implementation == "pallas" else {"implementation": implementation}
    of_group = jnp.asarray(sizes)
    out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, of_group, **options), x, w)
    of_x, of_w = back(grad)
    assert out.dtype == of_x.dtype == of_w.dtype == jnp.bfloat16
    wanted_x, wanted_w = exact(x, w, sizes, grad)
    for got, wanted in ((out, exact(x, w, sizes)), (of_x, wanted_x), (of_w, wanted_w)):
        close(got, wanted, 2**-8)


@pytest.mark.parametrize("implementation", ["pallas", "xla", "loop"])
def test_int8_weights(implementation):
    sizes, rows = [100, 0, 3, 40], 160
    x, _, grad = drawn(5, rows, 256, 128, 4)
    rng = np.random.default_rng(5)
    w = jnp.asarray(rng.integers(-128, 128, (4, 256, 128)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.01, 0.02, (4, 256)), jnp.float32)
    options = {"implementation": implementation}
    if implementation == "pallas":
        options = KERNEL | {"blocks": SMALL, "gradient_blocks": SMALL_GRADIENTS}
    of_group = jnp.asarray(sizes)
    out, back = jax.vjp(lambda x: grouped_matmul(x, w, of_group, scale=scale, **options), x)
    plain = np.asarray(w, np.float64) * np.asarray(scale, np.float64)[:, :, None]
    plain = jnp.asarray(plain, jnp.float32)
    close(out, exact(x, plain, sizes))
    close(back(grad)[0], exact(x, plain, sizes, grad)[0])
    close(reference_grouped_matmul(x, w, of_group, scale), exact(x, plain, sizes))


@pytest.mark.slow
def test_cores_share_the_columns():
    """Three tiles of columns for two cores: the last one is computed by both."""
    x, w, _ = drawn(6, 160, 384, 128, 3)
    sizes = [70, 30, 60]
    spec = api._Spec(SMALL, *SMALL_GRADIENTS, 2, 1 << 24, True)  # interpret mode takes core after core
    given = (x, w, jnp.asarray(sizes), None, jnp.int32(0))
    close(spec.product(*given, 2), exact(x, w, sizes))
    grad = drawn(7, 160, 384, 128, 3)[2]
    of_w = api._grouped_backward(spec, given, grad)[1]
    close(of_w, exact(x, w, sizes, grad)[1])


@st.composite
def ragged(draw):
    """(sizes, rows, columns, depth, blocks, gradient blocks) of any kind."""
    sizes = draw(st.lists(st.integers(0, 90), min_size=1, max_size=6))
    rows = sum(sizes) + draw(st.integers(0 if any(sizes) else 1, 70))
    columns, depth = (draw(st.sampled_from([128, 256, 384])) for _ in range(2))
    of_rows = draw(st.sampled_from([32, 64, 96]))
    passes = draw(st.sampled_from([(of_rows,), (16, of_rows), (16, 32)]))
    buffers = draw(st.integers(2, 4))
    width = draw(st.sampled_from([128, 256]))
    blocks = Blocks(of_rows, min(columns, width), passes, buffers, draw(st.integers(1, 2)))
    of_x = dataclasses.replace(blocks, columns=min(depth, width))
    return sizes, rows, columns, depth, blocks, (of_x, WeightBlocks(of_rows, 128, 128, passes, buffers))


@pytest.mark.slow
@settings(max_examples=12)
@given(ragged())
def test_any_sizes_shapes_and_blocks(drawn_case):
    sizes, rows, columns, depth, blocks, gradient_blocks = drawn_case
    x, w, grad = drawn(sum(sizes), rows, columns, depth, len(sizes))
    options = KERNEL | {"blocks": blocks, "gradient_blocks": gradient_blocks}
    of_group = jnp.asarray(sizes, jnp.int32)
    out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, of_group, **options), x, w)
    close(out, exact(x, w, sizes))
    for got, wanted in zip(back(grad), exact(x, w, sizes, grad), strict=True):
        close(got, wanted)


@pytest.mark.parametrize("options", [KERNEL | {"blocks": SMALL}, {"implementation": "loop"}], ids=str)
def test_sizes_beyond_the_rows_are_cut(options):
    x, w, _ = drawn(8, 64, 128, 128, 3)
    of_group = jnp.asarray([40, 40, 40])
    got = grouped_matmul(x, w, of_group, **options)
    close(got, exact(x, w, [40, 24, 0]))


@pytest.mark.parametrize("direction", ["forward", pytest.param("gradient", marks=pytest.mark.slow)])
def test_the_kernels_have_no_races(direction):
    sizes = [20, 0, 35, 9]
    x, w, grad = drawn(9, 80, 256, 128, 4)
    blocks = Blocks(32, 128, (16, 32), 3)
    options = KERNEL | {"blocks": blocks, "gradient_blocks": (blocks, WeightBlocks(32, 128, 128, (32,)))}

    def product(x, w, of_group):
        return grouped_matmul(x, w, of_group, **options)

    def gradients(x, w, of_group, grad):
        return jax.vjp(lambda x, w: product(x, w, of_group), x, w)[1](grad)

    of_group = jnp.asarray(sizes, jnp.int32)
    if direction == "forward":
        close(run_checked(product, x, w, of_group), exact(x, w, sizes))
        return
    got = run_checked(gradients, x, w, of_group, grad)
    for one, wanted in zip(got, exact(x, w, sizes, grad), strict=True):
        close(one, wanted)


def test_the_choice_has_a_reason():
    def shapes(rows, groups, columns, depth, dtype=jnp.bfloat16):
        x = jax.ShapeDtypeStruct((rows, depth), dtype)
        return x, jax.ShapeDtypeStruct((groups, columns, depth), dtype)

    for kind in RULES:
        assert choose(*shapes(4096, 8, 14336, 4096), kind).implementation == "pallas"
        assert choose(*shapes(64, 128, 768, 2048), kind).implementation == "pallas"
    assert "no kernel for cpu" in choose(*shapes(64, 8, 128, 128), "cpu").reason
    assert "not in kernels/chips.py" in choose(*shapes(64, 8, 128, 128), "TPU v9").reason
    assert "float16" in choose(*shapes(64, 8, 128, 128, jnp.float16), "TPU v5e").reason
    assert "no rows" in choose(*shapes(0, 8, 128, 128), "TPU v5e").reason
    assert "multiples of 128" in choose(*shapes(64, 8, 128, 96), "TPU v5e").reason
    assert "do not fit VMEM" in choose(*shapes(64, 8, 1 << 16, 1 << 16), "TPU v4").reason


@pytest.mark.parametrize("rule", {rule.name: rule for rule in RULES.values()}.values(), ids=str)
def test_blocks_fit_their_chip(rule):
    shapes = [
        (4096, 8, 4096, 14336),
        (4096, 8, 14336, 4096),
        (64, 128, 2048, 768),
        (8192, 64, 2048, 1408),
    ]
    for rows, groups, depth, columns in shapes:
        b = product_blocks(rule, rows, groups, depth, columns, 2, 2)
        used = b.row_buffers * b.rows * depth + b.buffers * b.columns * depth + 2 * b.rows * b.columns
        assert 2 * used <= budget(rule)
        assert b.rows % b.passes[-1] == 0
        assert list(b.passes) == sorted(set(b.passes))
        assert b.columns % 128 == 0
        g = weight_blocks(rule, rows, columns, depth, 2)
        narrow = min(depth, columns)
        used = g.buffers * (g.rows * (narrow + g.columns) + narrow * g.columns) * 2
        assert used + 4 * narrow * g.columns <= budget(rule)
        assert g.rows % g.passes[-1] == 0
        assert (g.columns if columns >= depth else narrow) % g.tile == 0


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_few_rows_do_not_spill_a_small_memory(rows):
    """On v4 int8 weights of great depth are widened in their place, also for fewer rows than a pass."""
    v4, v5e = RULES["TPU v4"], RULES["TPU v5 lite"]
    assert product_blocks(v4, rows, 8, 14336, 4096, 2, 1).passes == (64,)
    for rule, itemsize in ((v4, 2), (v5e, 1)):
        assert product_blocks(rule, rows, 8, 14336, 4096, 2, itemsize).passes[0] <= 32
    x, w, _ = drawn(11, 16, 256, 128, 2)  # a visit of more rows than there are
    got = grouped_matmul(x, w, jnp.asarray([9, 7]), **KERNEL, blocks=Blocks(64, 128, (64,), 3))
    close(got, exact(x, w, [9, 7]))


@pytest.mark.parametrize(
    ("columns", "most", "width"),
    [(14336, 1024, 1024), (11008, 1024, 1024), (1408, 1024, 768), (768, 2048, 768), (4096, 292, 256)],
)
def test_columns_come_in_even_parts(columns, most, width):
    assert even_part(columns, most) == width


def test_what_does_not_fit_is_refused():
    x, w, _ = drawn(10, 64, 128, 128, 2)
    sizes, scale = jnp.asarray([10, 20]), jnp.ones((2, 128), jnp.float32)
    small = w.astype(jnp.int8)
    for expected, call in {
        "implementation='mosaic'": lambda: grouped_matmul(x, w, sizes, implementation="mosaic"),
        "no kernel for": lambda: grouped_matmul(x, w, sizes, implementation="pallas"),
        "multiples of 128": lambda: grouped_matmul(x[:, :64], w[:, :, :64], sizes, **KERNEL),
        "expected [M, K] and [E, N, K]": lambda: grouped_matmul(x, w[0], sizes),
        "group_sizes float32": lambda: grouped_matmul(x, w, sizes * 1.0),
        "group_sizes int32 (1,)": lambda: grouped_matmul(x, w, sizes[:1]),
        "w of bfloat16": lambda: grouped_matmul(x, w.astype(jnp.bfloat16), sizes),
        "scale=None with w of int8": lambda: grouped_matmul(x, small, sizes),
        "scale=(2, 128) with w of float32": lambda: grouped_matmul(x, w, sizes, scale=scale),
        "expected float32 (2, 128)": lambda: grouped_matmul(x, small, sizes, scale=scale[:1]),
        "stop_gradient(scale)": lambda: jax.grad(
            lambda scale: grouped_matmul(x, small, sizes, scale=scale, **KERNEL).sum()
        )(scale),
    }.items():
        with pytest.raises(ValueError, match=r".*") as error:
            call()
        assert expected in str(error.value)


def test_cases_of_the_laboratory():
    made = case("4x64x128x256", groups="random")
    assert made.flops == 2 * 64 * 128 * 256
    assert made.args[2].sum() == 64
    assert case("128x64x128x256").args[2].tolist().count(1) == 64
    for wrong in ({"direction": "y"}, {"direction": "w", "quantized": True}, {"groups": "other"}):
        with pytest.raises(ValueError, match="expected"):
            case("4x64x128x256", **wrong)
