"""The TPU kernels of quantized matmuls in interpret mode, beside float64 in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.kernels.chips import RULES
from llm_jax.kernels.quantized_matmul import api
from llm_jax.kernels.quantized_matmul.api import choose, quantized_matmul
from llm_jax.kernels.quantized_matmul.plan import TRAITS, Problem, plan
from llm_jax.kernels.quantized_matmul.reference import quantize_rows
from llm_jax.kernels.quantized_matmul.tpu import Decode, Stream, stream
from llm_jax.kernels.quantized_matmul.tpu_tiles import Tiles
from llm_jax.tpu.races import run_checked

pytestmark = pytest.mark.lenient  # jax's simulator promotes
FEW = Stream(128, 1024, 2)
MANY = Tiles(32, 128, 128)
CHIPS = {rule.name: rule for rule in RULES.values()}
EXACT = {  # activations in float64
    None: lambda y: y,
    "silu": lambda y: y / (1 + np.exp(-y)),
    "gelu": lambda y: 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))),
    "gelu_tanh": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
    "relu": lambda y: np.maximum(y, 0),
}


def drawn(rows, depth, columns, weights="int8", group=0, dtype=np.float32, seed=0):
    """x, w, scale; the product is about as large as x."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, depth)), dtype)
    if weights.startswith("int"):
        most = 2 ** (int(weights[3:]) - 1)
        w, size = rng.integers(-most, most, (depth, columns)), most / 2
    else:
        w, size = rng.standard_normal((depth, columns)), 1.0
    shape = (depth // group, columns) if group else (columns,)
    scale = rng.uniform(0.5, 1.5, shape) / (size * math.sqrt(depth))
    return x, jnp.asarray(w).astype(weights), jnp.asarray(scale, jnp.float32)


def wide(x):
    """float64 in numpy."""
    return np.asarray(jnp.asarray(x).astype(jnp.float32)).astype(np.float64)


def dense(w, scale):
    """The weights in float64."""
    scale = wide(scale)
    return wide(w) * (np.repeat(scale, w.shape[0] // scale.shape[0], 0) if scale.ndim == 2 else scale)


def exact(x, w, scale, bias=None, residual=None, activation=None, quantize_x=False):
    """The product and its epilogue in float64."""
    left = wide(x)
    if quantize_x:
        step = np.abs(left).max(-1, keepdims=True) / 127
        left = np.round(left / np.where(step > 0, step, 1)) * step
    y = left @ dense(w, scale)
    y = EXACT[activation](y if bias is None else y + wide(bias))
    return y if residual is None else y + wide(residual)


def compare(x, w, scale, atol=2e-6, blocks=None, implementation="pallas", **options):
    """One implementation beside `exact`."""
    got = quantized_matmul(
        x,
        w,
        scale,
        blocks=blocks,
        implementation=implementation,
        interpret=implementation == "pallas",
        **options,
    )
    assert got.dtype == x.dtype
    np.testing.assert_allclose(wide(got), exact(x, w, scale, **options), atol=atol)


WEIGHTS = [
    ("int8", 0),
    ("int4", 0),
    ("int8", 128),
    ("int4", 64),
    ("float8_e4m3fn", 0),
    ("float8_e5m2", 128),
]


def fast(kinds, *chosen):
    """The kinds of weights, of which those that are not chosen are tested with the slow tests."""
    return [w if w in chosen else pytest.param(w, marks=pytest.mark.slow) for w in kinds]


@pytest.mark.parametrize(
    "weights", fast(WEIGHTS, ("int8", 0), ("int4", 64), ("float8_e4m3fn", 0)), ids=str
)
@pytest.mark.parametrize("blocks", [FEW, Tiles(32, 256, 128)], ids=["few", "many"])
def test_every_kind_of_weights(weights, blocks):
    compare(*drawn(5, 512, 256, *weights), blocks=blocks)


@pytest.mark.parametrize("weights", fast(WEIGHTS[:4], ("int8", 0), ("int4", 64)), ids=str)
@pytest.mark.parametrize("blocks", [FEW, Tiles(32, 256, 128)], ids=["few", "many"])
def test_rows_rounded_to_int8(weights, blocks, monkeypatch):
    arrays = drawn(5, 512, 256, *weights)
    # Where there are groups, the kernel for many rows rounds weights to bfloat16.
    atol = 2e-2 if weights[1] and isinstance(blocks, Tiles) else 2e-6
    compare(*arrays, blocks=blocks, quantize_x=True, atol=atol)  # by products of bfloat16
    monkeypatch.setattr(api, "chip_rule", lambda _: CHIPS["v6e"])
    compare(*arrays, blocks=blocks, quantize_x=True, atol=atol)  # by products of int8


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize(
    "activation",
    [None, "gelu", *(pytest.param(n, marks=pytest.mark.slow) for n in ("silu", "gelu_tanh", "relu"))],
)
def test_the_epilogue(activation, implementation):
    x, w, scale = drawn(6, 256, 128)
    rng = np.random.default_rng(1)
    bias = jnp.asarray(rng.standard_normal(128), jnp.float32)
    residual = jnp.asarray(rng.standard_normal((6, 128)), jnp.float32)
    options = {"bias": bias, "residual": residual, "activation": activation}
    compare(x, w, scale, implementation=implementation, **options)
    if activation == "gelu" and implementation == "pallas":
        compare(x, w, scale, blocks=MANY, **options)


@pytest.mark.parametrize("blocks", [MANY, None], ids=["many", "by rule"])
def test_bfloat16_differs_by_the_rounding_of_the_result(blocks):
    x, w, scale = drawn(20, 384, 256, dtype=jnp.bfloat16)
    residual = jnp.ones((20, 256), jnp.bfloat16)
    compare(x, w, scale, blocks=blocks, residual=residual, atol=2**-6)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_leading_axes_and_a_row_of_zeros(implementation):
    x, w, scale = drawn(6, 128, 128)
    x = x.at[1].set(0.0).reshape(2, 3, 128)
    compare(x, w, scale, implementation=implementation, quantize_x=True)
    y = quantized_matmul(x[0, 1], w, scale, implementation=implementation, interpret=True)
    assert y.shape == (128,) and not y.any()


@pytest.mark.parametrize("weights", fast(WEIGHTS[:4], ("int8", 0), ("int4", 64)), ids=str)
def test_weights_unpacked_from_words_on_two_cores(weights):
    x, w, scale = drawn(3, 2048, 384, *weights)
    options = {"activation": None, "int8": False, "int8_units": False, "decode": Decode.WORDS}
    got = stream(
        jnp.zeros(1, jnp.int32),
        x,
        w[None],
        scale if weights[1] else scale[None],
        None,
        None,
        blocks=Stream(128, 1024, 2),
        cores=2,
        vmem_limit=1 << 24,
        interpret=True,
        **options,
    )
    np.testing.assert_allclose(wide(got), exact(x, w, scale), atol=1e-2 if weights[1] else 2e-6)


@pytest.mark.parametrize("blocks", [FEW, Tiles(32, 128, 128)], ids=["few", "many"])
def test_every_float8_read_as_another_format(blocks, monkeypatch):
    monkeypatch.setattr(api, "chip_rule", lambda _: CHIPS["v6e"])
    x, _, scale = drawn(4, 256, 128)
    bits = np.tile(np.arange(256, dtype=np.uint8), 128).reshape(256, 128)
    bits[bits & 127 == 127] = 128  # not-a-number; -0 instead
    w = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float8_e4m3fn)
    tiny = jnp.where(jnp.abs(w.astype(jnp.float32)) < 2**-6, w, jnp.zeros_like(w))
    compare(x, w, scale, blocks=blocks, atol=2e-3)  # of some 1e3
    compare(x, tiny, scale, blocks=blocks, atol=1e-8)
    assert np.abs(exact(x, tiny, scale)).max() > 1e-4


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("group", [0, pytest.param(64, marks=pytest.mark.slow)])
def test_one_layer_of_many(implementation, group):
    layers = [drawn(3, 128, 256, "int8", group, seed=seed) for seed in range(3)]
    x, w, scale = layers[0][0], *(jnp.stack(arrays) for arrays in list(zip(*layers, strict=True))[1:])

    def scanned(blocks):
        def step(_, layer):
            options = {"implementation": implementation, "interpret": implementation == "pallas"}
            return None, quantized_matmul(x, w, scale, layer=layer, blocks=blocks, **options)

        return jax.lax.scan(step, None, jnp.arange(3))[1]

    for blocks in (FEW, MANY):
        for got, (_, w_one, scale_one) in zip(scanned(blocks), layers, strict=True):
            np.testing.assert_allclose(wide(got), exact(x, w_one, scale_one), atol=2e-6)
    x_grad = jax.grad(lambda x: quantized_matmul(x, w, scale, layer=2).sum())(x)
    wanted = np.tile(dense(layers[2][1], layers[2][2]).sum(1), (3, 1))
    np.testing.assert_allclose(x_grad, wanted, atol=1e-5)


@st.composite
def ragged(draw):
    """Any sizes, weights, groups and epilogue."""
    weights = draw(st.sampled_from([w for w, _ in WEIGHTS]))
    group = draw(st.sampled_from([0, 32, 64, 96]))
    depth = group * draw(st.integers(1, 5)) if group else draw(st.integers(1, 400))
    rows, columns = draw(st.integers(1, 90)), draw(st.integers(1, 300))
    arrays = drawn(rows, depth, columns, weights, group, seed=draw(st.integers(0, 2**31)))
    options = {"activation": draw(st.sampled_from(list(EXACT)))}
    options["quantize_x"] = weights.startswith("int") and draw(st.booleans())
    if draw(st.booleans()):
        options["bias"] = jnp.asarray(np.linspace(-1, 1, columns), jnp.float32)
    if draw(st.booleans()):
        options["residual"] = arrays[0][:, :1] * jnp.ones((1, columns))
    blocks = None if group or draw(st.booleans()) else MANY
    return arrays, blocks, options


def compare_ragged(case):
    (x, w, scale), blocks, options = case
    rounded = options["quantize_x"] and scale.ndim == 2
    compare(x, w, scale, blocks=blocks, atol=3e-2 if rounded else 4e-6, **options)


@settings(max_examples=4)
@given(ragged())
def test_some_ragged_shapes(case):
    compare_ragged(case)


@pytest.mark.slow
@settings(max_examples=60)
@given(ragged())
def test_any_ragged_shapes(case):
    compare_ragged(case)


@pytest.mark.slow
@settings(max_examples=20)
@given(
    rows=st.integers(1, 40),
    depth=st.integers(1, 20),
    columns=st.integers(1, 5),
    weights=st.sampled_from(WEIGHTS),
    ahead=st.integers(2, 4),
    quantize_x=st.booleans(),
    bf16=st.booleans(),
)
def test_any_stream(rows, depth, columns, weights, ahead, quantize_x, bf16):
    dtype = jnp.bfloat16 if bf16 else np.float32
    x, w, scale = drawn(rows, 128 * depth, 128 * columns, *weights, dtype=dtype)
    options = {
        "quantize_x": quantize_x and weights[0].startswith("int"),
        "blocks": Stream(128, 1024, ahead),
    }
    compare(x, w, scale, atol=4e-2 if bf16 else 4e-6, **options)


@pytest.mark.parametrize(
    ("blocks", "quantize_x"),
    [
        (Stream(128, 1024, 2), True),
        pytest.param(Stream(128, 1024, 3), False, marks=pytest.mark.slow),
        (MANY, True),
    ],
)
def test_the_kernels_have_no_races(blocks, quantize_x):
    depth, columns = (1152, 512) if isinstance(blocks, Stream) else (300, 200)
    x, w, scale = drawn(40, depth, columns)
    options = {"bias": jnp.ones(columns), "residual": jnp.ones((40, columns)), "quantize_x": quantize_x}

    def function(x, w, scale):
        return quantized_matmul(x, w, scale, blocks=blocks, interpret=True, **options)

    got = run_checked(function, x, w, scale)
    np.testing.assert_allclose(wide(got), exact(x, w, scale, **options), atol=4e-6)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize(
    ("weights", "activation"),
    [(("int8", 0), None), (("float8_e4m3fn", 64), "silu")]
    + [pytest.param(("int4", 32), name, marks=pytest.mark.slow) for name in EXACT],
    ids=str,
)
def test_gradients(weights, activation, implementation):
    x, w, scale = drawn(4, 128, 128, *weights)
    rng = np.random.default_rng(2)
    bias, residual = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((128,), (4, 128)))
    grad = jnp.asarray(rng.standard_normal((4, 128)), jnp.float32)

    def loss(x, bias, residual):
        y = quantized_matmul(
            x,
            w,
            scale,
            bias=bias,
            residual=residual,
            activation=activation,
            implementation=implementation,
            interpret=implementation == "pallas",
        )
        return jnp.sum(y * grad)

    value, got = jax.value_and_grad(loss, argnums=(0, 1, 2))(x, bias, residual)
    wanted_y = exact(x, w, scale, bias, residual, activation)
    np.testing.assert_allclose(value, np.sum(wanted_y * wide(grad)), rtol=1e-4)
    before, step = wide(x) @ dense(w, scale) + wide(bias), 1e-5
    slope = (EXACT[activation](before + step) - EXACT[activation](before - step)) / (2 * step)
    inner = wide(grad) * slope
    wanted = (inner @ dense(w, scale).T, inner.sum(0), wide(grad))
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_weights_and_scales_are_constants():
    x, w, scale = drawn(4, 128, 128)
    y, back = jax.vjp(functools.partial(quantized_matmul, quantize_x=True, interpret=True), x, w, scale)
    x_grad, w_grad, scale_grad = back(y)
    assert w_grad.dtype == jax.dtypes.float0 and not scale_grad.any()
    np.testing.assert_allclose(x_grad, wide(y) @ dense(w, scale).T, atol=1e-5)


def test_rows_are_rounded_to_nearest():
    rows, scale = quantize_rows(jnp.asarray([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(rows, [[127, -64, 32], [0, 0, 0]])
    np.testing.assert_allclose(scale, [[1 / 127], [0]])


@pytest.mark.parametrize("chip", list(CHIPS))
@pytest.mark.parametrize("weights", [("int8", 0), ("int4", 128)], ids=str)
def test_the_rule_streams_few_rows_and_tiles_many(chip, weights):
    name, group = weights
    for depth, columns in ((4096, 14336), (14336, 4096), (8192, 151936)):
        problem = Problem(
            16, depth, columns, group or depth, jnp.dtype(jnp.bfloat16), jnp.dtype(name), False
        )
        few = plan(problem, CHIPS[chip])
        assert isinstance(few, Stream) and columns % few.columns == 0
        assert few.ahead * few.columns * depth <= CHIPS[chip].vmem_bytes
        many = plan(Problem(**problem.__dict__ | {"rows": 4096}), CHIPS[chip])
        assert isinstance(many, Tiles) and many.rows == 512
        assert many.columns >= (512 if chip != "v4" else 128)
    assert isinstance(plan(Problem(**problem.__dict__ | {"columns": 50257}), CHIPS[chip]), Tiles)
    assert set(TRAITS) == set(CHIPS)


def test_the_choice_has_a_reason():
    x, w, scale = drawn(4, 128, 128)
    assert choose(x, w, scale, "TPU v5e").implementation == "pallas"
    assert "no kernel for cpu" in choose(x, w, scale, "cpu").reason
    assert choose(x, w, scale, "cpu").implementation == "integers"
    assert choose(x, w, jnp.ones((4, 128)), "cpu").implementation == "xla"
    for rounded, expected in ((False, "xla"), (True, "integers")):
        other = choose(x, w, scale, "TPU v5e", transposed=True, quantize_x=rounded)
        assert other.implementation == expected and "not [N, K]" in other.reason
    assert "float16" in choose(x.astype(jnp.float16), w, scale, "TPU v4").reason
    assert "groups of 16 rows" in choose(x, w, jnp.ones((8, 128)), "TPU v4").reason
    assert "is empty" in choose(x[:0], w, scale, "TPU v4").reason
    assert quantized_matmul(x[:0], w, scale).shape == (0, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cudnn"}, "implementation='cudnn': expected one of"),
        ({"implementation": "pallas"}, "implementation='pallas': there is no kernel for cpu"),
        (
            {"implementation": "integers", "scale": jnp.ones((2, 256))},
            "is not int8 or int4 with one scale",
        ),
        (
            {
                "implementation": "pallas",
                "transposed": True,
                "interpret": True,
                "w": jnp.ones((256, 128), jnp.int8),
            },
            r"implementation='pallas': the kernel takes w \[K, N\], not \[N, K\]; take 'xla' or None",
        ),
        ({"activation": "swish"}, "activation='swish': expected one of"),
        ({"x": jnp.ones((4, 64))}, r"x \(4, 64\) does not fit w \(128, 256\)"),
        ({"x": jnp.ones((4, 128), jnp.int32)}, "x of int32: expected floating-point"),
        ({"w": jnp.ones((128, 256))}, "w of float32: expected one of int8, int4"),
        (
            {"w": jnp.ones((128, 256), jnp.float8_e5m2), "quantize_x": True},
            "quantize_x=True with w of float8_e5m2",
        ),
        ({"w": jnp.ones(128, jnp.int8)}, r"expected \[K, N\] and \[N\]"),
        ({"layer": 0}, r"with `layer` \[L, ...\] both"),
        (
            {"layer": 2, "w": jnp.ones((2, 128, 256), jnp.int8), "scale": jnp.ones((2, 256))},
            r"layer=2 of w .* expected 0 to 1",
        ),
        ({"transposed": True}, r"x \(4, 128\) does not fit w \(256, 128\)"),
        ({"scale": jnp.ones(255)}, r"scale \(255,\) of float32 for w \(128, 256\): expected"),
        ({"scale": jnp.ones(256, jnp.bfloat16)}, "of bfloat16 for w"),
        ({"scale": jnp.ones((3, 256))}, "3 groups do not divide K=128"),
        ({"bias": jnp.ones(128)}, r"bias \(128,\) .* expected \[256\]"),
        ({"residual": jnp.ones((4, 128))}, r"residual \(4, 128\) .* expected \(4, 256\)"),
        ({"blocks": Stream(192, 1024, 2), "interpret": True}, "Stream takes columns that divide N=256"),
        ({"blocks": Stream(128, 512, 2), "interpret": True}, "depth must be a multiple of 1024"),
        (
            {"blocks": Tiles(32, 100, 128), "interpret": True},
            "expected depth in multiples of 128, or 128",
        ),
        ({"blocks": Tiles(20, 128, 128), "interpret": True}, "expected rows in multiples of 32, or 4"),
        ({"blocks": Tiles(0, 128, 128), "interpret": True}, "expected sizes of at least 1"),
        (
            {"blocks": Tiles(32, 256, 128), "scale": jnp.ones((2, 256)), "interpret": True},
            "depth must hold whole groups of 64 and divide K=128",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    x, w, scale = drawn(4, 128, 256)
    with pytest.raises(ValueError, match=message):
        quantized_matmul(**{"x": x, "w": w, "scale": scale} | change)
