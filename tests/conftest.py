"""One setting for all tests: eight CPU devices, no network, strict promotion.

The environment is set before jax is imported; JAX_PLATFORMS=tpu (or cuda) runs the tests on a device,
LLM_JAX_OPTIMIZED=1 with XLA's optimizations for a CPU, as users have them.
"""

import importlib.metadata
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = "--xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu" and "LLM_JAX_OPTIMIZED" not in os.environ:
    # Tests compile more than they compute: without LLVM's optimizations, in one module for a program
    # and not one for each core, that takes half the time.
    FLAGS += " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    # XLA's older way to make LLVM's code halves it again. Later versions lost it and refuse the flag.
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) <= (0, 10):
        FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
# A program that was compiled is found again: by a run that resumes, a script, another test process.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory()  # removed when the process ends that made it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("GLIBC_TUNABLES", "")  # scripts that tests run need not begin again for it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other by spinning
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
os.environ["LLM_JAX_TUNED"] = "off"  # what was measured on this machine decides nothing in tests

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from llm_jax.tpu.compile import CompileError, compile_for  # noqa: E402
from llm_jax.tpu.profile import profile_program  # noqa: E402

# Eight devices on a few cores can deadlock in a collective when steps are queued without waiting.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# A first example compiles, so its time says nothing; CI draws the same examples every time.
hypothesis.settings.register_profile("llm_jax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("llm_jax")


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Implicit dtype and rank promotion are errors, but for tests marked `lenient`."""
    lenient = request.node.get_closest_marker("lenient") is not None
    with (
        jax.numpy_dtype_promotion("standard" if lenient else "strict"),
        jax.numpy_rank_promotion("allow" if lenient else "raise"),
    ):
        yield


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """(target, topology, **arguments) -> the report, compiled once in this run."""
    cache = tmp_path_factory.mktemp("programs")
    try:
        program = compile_for(
            "llm_jax.tpu.examples:matmul",
            "v5e:1x1",
            {"size": 256, "bm": 128, "bk": 128, "bn": 128},
            cache=cache,
        )
        program.text("assembly.txt")
    except CompileError:
        raise
    except ValueError as error:  # no libtpu, or one that does not print its machine code
        pytest.skip(str(error))

    def report(target, topology, **arguments):
        return profile_program(compile_for(target, topology, arguments, cache=cache))

    report.cache = cache
    return report
