"""A decode step of a large model on a slice: in place, and at the speed of the memory."""

from pathlib import Path

import pytest

from llm_jax.tpu.compile import compile_for

pytestmark = pytest.mark.slow
STEP = f"{Path(__file__).with_name('decode_step.py')}:decode_step"
ENGINE = f"{Path(__file__).with_name('decode_step.py')}:engine_step"
PAGED = "llm_jax.kernels.paged_attention.cases:case"


def test_llama_8b_on_eight_v5e_copies_no_cache_and_takes_less_than_8_ms(lab):
    report = lab(STEP, "v5e:2x4")
    assert [kernel.kernel.partition(".")[0] for kernel in report.kernels] == ["paged_decode"]
    assert report.temp_bytes < 1 << 20, "the cache is 2 GiB a device; a copy of a layer 64 MiB"
    # XLA's operations by its own estimate; the kernel where its lengths are known, for every layer.
    layer = lab(PAGED, "v5e:1x1", shape="32x4x1x4096x128").kernels[0].estimate_us
    assert report.xla_us + 32 * layer < 8000


@pytest.mark.parametrize(("chunk", "kernels"), [(0, 1), (512, 3)])
def test_a_step_of_the_engine_copies_no_page(lab, chunk, kernels):
    report = lab(ENGINE, "v5e:2x4", chunk=chunk)
    names = {kernel.kernel.partition(".")[0] for kernel in report.kernels}
    assert len(names) == kernels, names
    assert report.temp_bytes < 64 << 20, "the pool is 2 GiB a device, its layers 64 MiB each"


@pytest.mark.parametrize(("step", "weights"), [(STEP, "int8"), (STEP, "w8a8"), (ENGINE, "int8")])
def test_int8_weights_are_read_where_they_are(lab, step, weights):
    """But for the vocabulary's, whose 16,032 columns a device are no whole tiles: XLA converts them."""
    program = compile_for(step, "v5e:2x4", {"weights": weights}, cache=lab.cache)
    products = [name for name in program.kernels if name.startswith("quantized_matmul")]
    assert len(products) == 7 and len(program.kernels) == 8
    assert program.memory["temp_size_in_bytes"] < 1 << 20, "a layer's weights are 26 MiB a device"
