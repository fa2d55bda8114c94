"""A kernel that forgets to wait for a DMA is caught, on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.tpu.examples import tiled_matmul
from llm_jax.tpu.races import RaceError, run_checked


def copied(x, *, waits: bool):
    """x [8, 128] + 1 by way of a buffer that a DMA fills; without `waits` it is read too early."""

    def kernel(x_ref, out_ref, buffer, semaphore):
        dma = pltpu.make_async_copy(x_ref, buffer, semaphore)
        dma.start()
        if waits:
            dma.wait()
        out_ref[...] = buffer[...] + 1.0
        if not waits:
            dma.wait()

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)


X = np.arange(1024, dtype=np.float32).reshape(8, 128)


@pytest.mark.lenient  # jax's simulator promotes
@pytest.mark.parametrize("eager", [False, True])
def test_a_seeded_race_is_caught(eager):
    with pytest.raises(RaceError, match=r"(?s)RACE DETECTED.*test_races\.py"):
        run_checked(lambda x: copied(x, waits=False), X, eager_dmas=eager)


@pytest.mark.lenient
@pytest.mark.parametrize("eager", [False, True])
def test_a_kernel_that_waits_is_clean(eager):
    got = run_checked(lambda x: copied(x, waits=True), X, eager_dmas=eager)  # after a race, too
    np.testing.assert_array_equal(got, X + 1)


@pytest.mark.lenient
def test_reads_beyond_a_buffer_are_errors():
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[pl.ds(pl.program_id(0) * 4, 8), :]

    def function(x):
        shape = jax.ShapeDtypeStruct((8, 128), x.dtype)
        whole = pl.BlockSpec(memory_space=pltpu.VMEM)
        return pl.pallas_call(kernel, out_shape=shape, grid=(2,), in_specs=[whole], out_specs=whole)(x)

    with pytest.raises(Exception, match=r"(?i)out.of.bounds"):
        run_checked(function, X)


@pytest.mark.lenient
def test_the_example_is_clean_and_right():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
    got = run_checked(lambda x, y: tiled_matmul(x, y, bm=128, bk=128, bn=128), x, y)
    exact = x.astype(np.float64) @ y.astype(np.float64)
    np.testing.assert_allclose(got, exact, atol=1e-4)
    assert jnp.asarray(got).dtype == jnp.float32
