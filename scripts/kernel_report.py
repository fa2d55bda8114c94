"""What a TPU kernel costs by the count of its final machine code; no TPU is needed, libtpu is.

    python scripts/kernel_report.py --kernel=flash_attention --topology=v6e:1x1 --shape=1x32x8x4096x128
    python scripts/kernel_report.py --kernel=my_kernels.py:my_case --topology=v5e:1x1 --set="block=512"
    python scripts/kernel_report.py --kernel=llm_jax.tpu.examples:matmul --topology=v5e:1x1,v6e:1x1 \
        --set="bm=512,bn=1024" --set="bm=1024,bn=1024" --png=runs/matmul.png

--kernel names a function that returns a `llm_jax.tpu.case.Case`: package.module:function or
file.py:function. Each --set calls it with these options; several of them, or several topologies, are
shown side by side. docs/tpu_lab.md walks through it.
"""

import ast
import itertools
import json
from pathlib import Path

from absl import app, flags

from llm_jax import cli
from llm_jax.tpu import report as shown
from llm_jax.tpu.compile import compile_for
from llm_jax.tpu.plots import plot_reports
from llm_jax.tpu.profile import BLIND, profile_program

KERNEL = flags.DEFINE_string("kernel", None, "A kernel's name, module:function or file.py:function.")
SHAPE = flags.DEFINE_string("shape", None, "Passed to the function as shape=, such as 1x32x8x4096x128.")
TOPOLOGY = flags.DEFINE_list(
    "topology", ["v6e:1x1"], "TPU slices: v4, v5e, v5p, v6e, tpu7x with a shape."
)
SET = flags.DEFINE_multi_string("set", [""], "Options of the function: name=value, separated by commas.")
FLAGS = flags.DEFINE_string("libtpu_flags", "", "Further settings of libtpu.")
TIMEOUT = flags.DEFINE_float("timeout_s", 900.0, "Seconds for one compilation.", lower_bound=1)
PNG = flags.DEFINE_string("png", None, "Where to draw the roofline and the slots in use.")
TABLE = flags.DEFINE_bool("table", False, "A Markdown table, a column a program, as docs have it.")
JSON = flags.DEFINE_bool("json", False, "One JSON object a program on stdout, nothing else.")
BLINDNESS = flags.DEFINE_bool("blind", False, "Say what the count cannot see, and stop.")


def options(text: str) -> dict:
    """{"bm": 512} of "bm=512"; values are Python literals."""
    found = {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("no name")
        for keyword in call.keywords:
            found[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"--set={text!r}: expected name=value,name=value with Python literals"
        ) from error
    return found


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if BLINDNESS.value:
        return print(BLIND)
    if not KERNEL.value:
        raise ValueError("--kernel=: expected the name of a kernel, module:function or file.py:function")
    named = ":" not in KERNEL.value
    target = f"llm_jax.kernels.{KERNEL.value}.cases:case" if named else KERNEL.value
    shape = {"shape": SHAPE.value} if SHAPE.value else {}
    reports = []
    for topology, text in itertools.product(TOPOLOGY.value, SET.value):
        program = compile_for(
            target, topology, shape | options(text), flags=FLAGS.value, timeout_s=TIMEOUT.value
        )
        report = profile_program(program)
        reports.append(report)
        if JSON.value:
            print(json.dumps({"topology": topology} | report.record()), flush=True)
        elif len(TOPOLOGY.value) * len(SET.value) == 1 and not TABLE.value:
            print(shown.text(report))
    if (len(reports) > 1 or TABLE.value) and not JSON.value:
        print(shown.side_by_side(reports, TABLE.value))
    if PNG.value:
        plot_reports(reports, Path(PNG.value))
    return None


if __name__ == "__main__":
    cli.run(main)
