"""libtpu compiles the steps of generation and training for every TPU generation, with no TPU here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.tpu.compile import SETTINGS

SCRIPT = Path(__file__).with_name("compile_steps.py")
ROOT = SCRIPT.parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("v4:2x2x1", "data:2,tensor:2"),
        ("v5e:2x2", "tensor:4"),
        ("v5p:2x2x1", "fsdp:4"),
        ("v6e:2x2", "data:2,fsdp:2"),
        ("v6e:2x2", "expert:2,tensor:2"),
        ("v5e:2x4", "stage:2,fsdp:2,tensor:2"),
        ("tpu7x:2x2x1", "fsdp:2,tensor:4"),  # two devices a chip
    ],
)
def test_steps_compile_for_every_generation(topology, mesh):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('needs the libtpu of this jax: pip install "jax[tpu]"')
    # A fresh process: libtpu reads its settings once and locks the machine's TPU, where there is one.
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    output = subprocess.run(
        [sys.executable, SCRIPT, topology, mesh],
        env=inherited | SETTINGS | {"PYTHONPATH": paths},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    records = list(map(json.loads, output.splitlines()))
    found = {(record["model"], record["step"]): record for record in records}
    steps = ("train",) if "stage" in mesh else ("prefill", "decode", "train")
    models = ("gemma2", "llama", *(() if topology.startswith("tpu7x") else ("mixtral",)))
    wanted = [(model, step) for model in models for step in steps]
    wanted += [(model, step) for model in ("int8", "w8a8") for step in steps[:-1]]
    assert list(found) == wanted
    kernels = {
        "prefill": ["flash_attention"],
        "decode": ["paged_decode"],
        "train": ["flash_attention", "flash_attention_keys"],
    }
    grouped = {"train": ["grouped_matmul", "grouped_matmul_weights"]}
    for (model, step), record in found.items():
        experts = grouped.get(step, ["grouped_matmul"]) if model == "mixtral" else []
        rounded = ["quantized_matmul"] if model in ("int8", "w8a8") else []
        assert record["kernels"] == sorted(kernels[step] + experts + rounded)
    if "tensor" in mesh:  # the sums of attention and feed-forward outputs
        assert all("all-reduce" in record["collectives"] for record in found.values())
    if "expert" in mesh:
        for step in ("prefill", "train"):  # in a decode step so small a sum is an all-reduce
            assert {"all-gather", "reduce-scatter"} <= set(found["mixtral", step]["collectives"])
    if "stage" in mesh:  # activations go from stage to stage
        assert all("collective-permute" in record["collectives"] for record in found.values())
    if "fsdp" in mesh:  # parameters are brought together where they are used
        assert all("all-gather" in record["collectives"] for record in found.values())
