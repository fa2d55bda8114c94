"""Programs compiled in this run, each once."""

import pytest

from llm_jax.tpu.compile import CompileError, compile_for
from llm_jax.tpu.profile import profile_program


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
