"""Integers that steer kernels are found by following the program from known arrays and constants."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.tpu.case import kernel_integers


def gather_rows(table, x, name="gather_rows"):
    """table [n] int32, x [m, 128] -> the rows of x that the table names."""

    def kernel(table_ref, x_ref, out_ref):
        out_ref[...] = x_ref[...]

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(table.shape[0],),
        in_specs=[pl.BlockSpec((8, 128), lambda i, table: (table[i], 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, table: (i, 0)),
    )
    shape = jax.ShapeDtypeStruct((8 * table.shape[0], 128), x.dtype)
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=shape, name=name)(table, x)


X = jax.ShapeDtypeStruct((64, 128), jnp.float32)
TABLE = np.array([3, 1, 2, 0], np.int32)


def test_an_argument_that_is_given_is_known():
    ((name, integers),) = kernel_integers(gather_rows, (TABLE, X))
    assert name == "gather_rows"
    np.testing.assert_array_equal(integers[0], TABLE)
    assert list(integers) == [0]


def test_what_is_computed_from_it_is_known_through_calls():
    @jax.jit
    def doubled(table):
        return jnp.cumsum(2 * table)

    def function(table, x):
        return jax.jit(lambda t, y: gather_rows(doubled(t), y))(table, x)

    ((_, integers),) = kernel_integers(function, (TABLE, X))
    np.testing.assert_array_equal(integers[0], np.cumsum(2 * TABLE))


def test_a_constant_is_known_and_a_shape_is_not():
    ((_, integers),) = kernel_integers(lambda x: gather_rows(jnp.asarray(TABLE), x), (X,))
    np.testing.assert_array_equal(integers[0], TABLE)
    unknown = jax.ShapeDtypeStruct(TABLE.shape, jnp.int32)
    ((_, integers),) = kernel_integers(gather_rows, (unknown, X))
    assert integers == {}


def test_kernels_come_in_the_order_of_the_program_and_out_of_loops():
    def function(table, x):
        first = gather_rows(table, x, "first")
        second = gather_rows(table + 1, x, "second")
        looped = jax.lax.scan(lambda c, _: (gather_rows(table, x, "looped"), None), first, length=3)[0]
        return second, looped

    found = kernel_integers(function, (TABLE, X))
    assert [name for name, _ in found] == ["first", "second", "looped"]
    np.testing.assert_array_equal(found[1][1][0], TABLE + 1)
    assert found[2][1] == {}, "a loop's body sees another argument each time"


def test_gradients_run_kernels_too():
    @jax.custom_vjp
    def f(x, table):
        return gather_rows(table, x, "forward")

    f.defvjp(
        lambda x, table: (f(x, table), (x, table)),
        lambda saved, g: (jnp.zeros_like(saved[0]) + gather_rows(saved[1], g, "backward").sum(), None),
    )
    found = kernel_integers(
        lambda x, t: jax.vjp(lambda y: f(y, t), x)[1](jnp.zeros((32, 128))), (X, TABLE)
    )
    names = [name for name, _ in found]
    assert names[-1] == "backward"
    np.testing.assert_array_equal(found[-1][1][0], TABLE)


def test_what_depends_on_the_device_is_not_known():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(table):
        first = jax.lax.axis_index("x") * 2
        return table + first + jax.lax.psum(jnp.int32(1), "x")

    def run(table):
        how = {"mesh": mesh, "in_specs": jax.P(None), "out_specs": jax.P(None)}
        return jax.shard_map(local, **how, check_vma=False)(table)

    assert kernel_integers(run, (np.arange(4, dtype=np.int32),)) == []


def test_what_is_too_large_to_steer_a_kernel_is_not_computed():
    """The numbers of all logits of a batch would take a terabyte."""

    def function(table, x):
        numbers = jax.lax.broadcasted_iota(jnp.int32, (1 << 20, 1 << 18), 1)
        return gather_rows(table, x), jnp.sum(numbers == table[0])

    ((_, integers),) = kernel_integers(function, (TABLE, X))
    np.testing.assert_array_equal(integers[0], TABLE)
