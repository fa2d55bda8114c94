"""Search a kernel's block sizes for chips that need not be there; what beats its rule goes to a table.

    python scripts/tune.py --kernel=flash_attention --topology=v6e:1x1
    python scripts/tune.py --kernel=quantized_matmul --topology=v5e:1x1 --case='{"shape": "8x4096x4096"}'
    python scripts/tune.py                                             # all kernels, all generations
    python scripts/tune.py --device --model=DIR --case='{"engine": {"max_rows": 16}, "batch": [1, 16]}'

Tables are llm_jax/kernels/tuned/KERNEL.json, by generation, dtype and shape; `--dry_run` writes none.
Each candidate is compiled in a process of its own (docs/tpu_lab.md says what that takes) and judged by
the count of its code; by wall time where the first device here is the chip. What was compiled before is
not compiled again.

--device measures the forms of operators (docs/kernels.md) on the device that is here, at the shapes of a
model's steps, and writes the fastest to the file that LLM_JAX_TUNED names. Its cases: "engine", settings
of EngineConfig; "batch" and "prompt_tokens" of LLM.generate; "sequences" of training and of encoders.
"""

import functools
import json
import sys
from pathlib import Path

from absl import app, flags
from tqdm import tqdm

from llm_jax import cli
from llm_jax.bench import forms, tuning

ALL = ["v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"]
TABLES = Path(__file__).resolve().parents[1] / "llm_jax" / "kernels" / "tuned"
KERNEL = flags.DEFINE_list("kernel", list(tuning.KERNELS), "Kernels to tune.")
TOPOLOGY = flags.DEFINE_list("topology", ALL, "TPU slices of one chip: what to tune for.")
CASE = flags.DEFINE_multi_string(
    "case", [], "Options of the kernel's case as JSON, instead of its own list of shapes."
)
TIMEOUT = flags.DEFINE_float("timeout_s", 120.0, "Seconds for one candidate.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 20, "Rounds of wall time.", lower_bound=1)
FOLDER = flags.DEFINE_string("tables", str(TABLES), "Folder of the tables.")
DRY = flags.DEFINE_bool("dry_run", False, "Write no table.")
DEVICE = flags.DEFINE_bool("device", False, "Measure forms of operators here, instead.")
MODEL = flags.DEFINE_string("model", None, "Whose operators, with --device; default: the demo model.")
NOT_WITH_DEVICE = ("kernel", "topology", "timeout_s", "tables")


def case(text: str) -> dict:
    """Options from JSON."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--case={text!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--case={text!r}: expected an object, such as {{'shape': '...'}} in JSON")
    return options


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    cases = [case(text) for text in CASE.value]
    for name in NOT_WITH_DEVICE if DEVICE.value else ["model"]:
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} {'with' if DEVICE.value else 'without'} --device: leave it out")
    if DEVICE.value:
        lines = forms.tune_device(MODEL.value, cases or [{}], REPEATS.value, keep=not DRY.value)
        for line in lines:
            print(line, flush=True)
        return
    work = [
        (kernel, topology, each)
        for topology in TOPOLOGY.value
        for kernel in KERNEL.value
        for each in tuning.tunings(kernel, topology, cases)
    ]
    judge = functools.partial(tuning.estimate, timeout_s=TIMEOUT.value)
    clock = functools.partial(tuning.wall_times, repeats=REPEATS.value)
    for kernel, topology, each in tqdm(work, unit="shape", disable=not sys.stderr.isatty()):
        here = tuning.is_here(topology.partition(":")[0])
        outcome = tuning.tune(kernel, topology, each, judge, clock if here else None)
        tqdm.write(f"{outcome.generation} {kernel} {outcome.key}")
        tqdm.write("".join(f"  {note}\n" for note in outcome.notes), end="")
        sys.stdout.flush()
        if not DRY.value:
            Path(FOLDER.value).mkdir(parents=True, exist_ok=True)
            tuning.keep(outcome, Path(FOLDER.value))


if __name__ == "__main__":
    cli.run(main)
