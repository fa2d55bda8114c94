"""The GPU's kernels lower for CUDA on any machine; where there is XLA's CUDA compiler, what it makes of
them.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType

from llm_jax.kernels.cases import KernelCase
from llm_jax.kernels.flash_attention import cases as flash_cases
from llm_jax.kernels.paged_attention import api as paged_api
from llm_jax.kernels.paged_attention import cases as paged_cases
from llm_jax.sharding import abstract_device
from tests.kernels.gpu_compiler import TARGETS, CudaProgram, Kernel, compile_cuda, why_not

CALL = "__gpu$xla.gpu.triton"
FLASH = {
    "causal": {},
    "gradient": {"gradient": True},
    "window, soft cap": {"window": 1000, "softcap": 30.0, "gradient": True},
    "both ways": {"causal": False, "gradient": True},
    "documents": {"documents": 8, "gradient": True},
    "dim 64": {"shape": "1x12x12x1024x64", "gradient": True},
    "dim 80": {"shape": "1x8x8x2048x80", "gradient": True},
    "dim 96": {"shape": "1x8x4x2048x96", "gradient": True},
    "dim 256": {"shape": "1x8x4x4096x256", "gradient": True},
    "16 heads on one": {"shape": "1x16x1x2048x128", "gradient": True},
    "uneven": {"shape": "1x4x2x1000x128", "gradient": True},
    "float32": {"shape": "1x4x2x1024x128", "dtype": "float32", "gradient": True},
    "float32, dim 256": {"shape": "1x4x2x1024x256", "dtype": "float32", "gradient": True},
}
PAGED = {
    "single tokens": {},
    "pages of 16": {"page": 16},
    "int8": {"dtype": "int8"},
    "int8, pages of 16": {"dtype": "int8", "page": 16},
    "float8_e4m3fn": {"dtype": "float8_e4m3fn"},
    "float8_e5m2, pages of 64": {"dtype": "float8_e5m2", "page": 64},
    "float32": {"dtype": "float32"},
    "chunks": {"chunk": 256},
    "chunks, int8, pages of 16": {"chunk": 256, "dtype": "int8", "page": 16},
    "dim 64": {"shape": "32x12x12x1024x64", "chunk": 128},
    "dim 80": {"shape": "16x32x32x1024x80", "chunk": 128, "page": 16},
    "dim 96": {"shape": "16x32x8x1024x96", "chunk": 128},
    "dim 256": {"shape": "16x8x4x1024x256", "chunk": 128},
    "16 heads on one": {"shape": "32x16x1x4096x128", "chunk": 256},
    "a large pool": {"layers": 32, "shape": "64x32x8x8192x128", "chunk": 256},
}
SPILLS = {  # bytes that a thread keeps outside its registers; none in the other kernels
    ("H200", "documents", "flash_attention_keys"): 16,
    ("H200", "dim 256", "flash_attention_keys"): 8,
    ("H200", "uneven", "flash_attention_keys"): 40,
    ("H200", "float32", "flash_attention_keys"): 12,
    ("H200", "16 heads on one", "paged_attention"): 4,
    ("A100", "dim 96", "paged_attention__1"): 72,
}
FORWARD, GRADIENTS = {"flash_attention"}, {"flash_attention_keys", "flash_attention_queries"}
needs_compiler = pytest.mark.skipif(bool(why_not()), reason=why_not())


def layers_case(layers: int = 3, in_order: bool = False, **options) -> KernelCase:
    """A decode step's attention in a scan over layers with donated pages."""
    q, k, v, pages, rows, _ = paged_cases.case(layers=layers, **options).args

    def step(q, k, v, pages, rows):
        def layer(carry, index):
            q, pages = carry
            if in_order:
                attend = functools.partial(paged_api.contiguous_attention, scale=0.1)
                return attend(q, k, v, pages, index, rows.lengths - 1), None
            attend = functools.partial(paged_api.paged_attention, implementation="pallas", scale=0.1)
            return attend(q, k, v, pages, rows, index), None

        return jax.lax.scan(layer, (q, pages), jnp.arange(layers))[0]

    return KernelCase(jax.jit(step, donate_argnums=3), (q, k, v, pages, rows))


@pytest.fixture
def on_h100():
    """Traced for one: kernels are chosen as there, and jax's lowering finds what it asks of a GPU."""
    device = abstract_device("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def lowered(case: KernelCase) -> str:
    function = case.function if hasattr(case.function, "trace") else jax.jit(case.function)
    allowed = [export.DisabledSafetyCheck.custom_call(CALL)]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.args)
    return export.export(function, platforms=["cuda"], disabled_checks=allowed)(*shapes).mlir_module()


@pytest.mark.usefixtures("on_h100")
@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_lowers(name):
    calls = lowered(flash_cases.case(**FLASH[name])).count(CALL)
    assert calls == (3 if FLASH[name].get("gradient") else 1)


@pytest.mark.usefixtures("on_h100")
@pytest.mark.parametrize("name", PAGED)
def test_paged_attention_lowers(name):
    calls = lowered(paged_cases.case(**PAGED[name])).count(CALL)
    assert calls == (2 if PAGED[name].get("chunk") else 1)


def checked(kernels: dict[str, Kernel], name: str, gpu: str) -> None:
    """No more spills than are known, and a block fits."""
    for kernel, found in kernels.items():
        assert found.spill_bytes <= SPILLS.get((gpu, name, kernel), 0), (kernel, found)
        assert found.shared_bytes <= TARGETS[gpu].shared_bytes, (kernel, found)


def of_pallas(program: CudaProgram, prefix: str) -> dict[str, Kernel]:
    return {name: x for name, x in program.kernels.items() if name.startswith(prefix)}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("gpu", "name"),
    [*(("H200", x) for x in FLASH), *((x, "gradient") for x in ("B200", "L40S", "A100"))],
)
def test_flash_attention_compiles(name, gpu):
    options = FLASH[name]
    program = compile_cuda("llm_jax.kernels.flash_attention.cases:case", gpu, options)
    kernels = of_pallas(program, "flash_attention")
    assert kernels.keys() == (FORWARD | GRADIENTS if options.get("gradient") else FORWARD)
    checked(kernels, name, gpu)
    if options.get("dtype") != "float32":
        for kernel in kernels.values():
            assert getattr(kernel, TARGETS[gpu].units)
            assert kernel.copies, "keys and values are not fetched ahead"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("gpu", "name"),
    [*(("H200", x) for x in (*PAGED, "in order")), *((x, "dim 96") for x in ("B200", "L40S", "A100"))],
)
def test_paged_attention_compiles_and_leaves_the_pages_in_place(name, gpu):
    options = PAGED.get(name, {"in_order": True})
    program = compile_cuda("tests.kernels.test_gpu_lowering:layers_case", gpu, options)
    kernels = of_pallas(program, "paged_attention")
    assert len(kernels) == (2 if options.get("chunk") else 1)
    checked(kernels, name, gpu)
    assert all(kernel.copies for kernel in kernels.values())
    pages = layers_case(**options).args[3].tokens
    size = math.prod(pages.shape) * pages.dtype.itemsize
    assert program.temp_bytes < size / 4
    shape = ",".join(map(str, pages.shape))
    assert not re.search(rf"\[{shape}\]\S* copy\(", program.hlo)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("which", ["engine", "decode"])
def test_a_step_of_single_tokens_copies_no_weight(which):
    """XLA copies slices of stacked weights, so `LLM` gives each layer arrays of its own."""
    apart = compile_cuda("tests.kernels.gpu_steps:step", "H200", {"which": which})
    assert apart.temp_bytes < 1 << 20  # the smallest matrix has 8 MiB
    assert of_pallas(apart, "paged_attention")
    stacked = compile_cuda("tests.kernels.gpu_steps:step", "H200", {"which": which, "apart": False})
    assert stacked.temp_bytes > 2 * 14336 * 4096, "no copies: stacks would do, and compile faster"


@pytest.mark.slow
@needs_compiler
def test_a_long_prompt_takes_the_flash_kernel():
    options = {"which": "prefill", "context": 8192}
    program = compile_cuda("tests.kernels.gpu_steps:step", "H200", options)
    kernels = of_pallas(program, "flash_attention")
    assert kernels and all(kernel.wgmma for kernel in kernels.values())
    checked(kernels, "prefill", "H200")
    scores = 32 * 8192**2 * 4  # float32, of all heads: what attention by XLA would hold in part
    assert program.temp_bytes < scores / 8
