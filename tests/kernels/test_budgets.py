"""No kernel costs more than it did: issued cycles of committed cases, by the compiler's final code.

What the compiler is given is named by its content, without files and lines, and by the compiler's
version. Where that name is the one kept, so are the cycles, and nothing is compiled; LLM_JAX_COLD=1
compiles all.
"""

import json
import os

import pytest

from llm_jax.tpu.compile import CompileError, program_key
from tests.kernels import budgets

BUDGETS = json.loads(budgets.FILE.read_text())
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "kernel", "topology", "options"), budgets.CASES, ids=[case[0] for case in budgets.CASES]
)
def test_cycles_do_not_grow(name, kernel, topology, options, tmp_path):
    kept = BUDGETS[name]
    try:
        named = program_key(budgets.TARGET.format(kernel), topology, options)
        if named == kept["program"] and not os.environ.get("LLM_JAX_COLD"):
            return
        found = budgets.measure(kernel, topology, options, cache=tmp_path)
    except CompileError:
        raise
    except ValueError as error:  # no libtpu, or one that does not print its machine code
        pytest.skip(str(error))
    if found["versions"] != kept["versions"]:
        pytest.skip(
            f"kept for {kept['versions']}, found {found['versions']}: run tests/kernels/budgets.py"
        )
    assert found["issued_cycles"] <= 1.03 * kept["issued_cycles"]


def test_every_case_is_kept():
    assert list(BUDGETS) == [case[0] for case in budgets.CASES]
