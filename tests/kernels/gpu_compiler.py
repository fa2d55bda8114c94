"""Compile for NVIDIA GPUs that are not there: XLA's CUDA plugin needs none, ptxas says what comes of it.

    export LLM_JAX_CUDA=DIR       # as .ci/run makes it
    pip install --no-deps --target=DIR jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX nvidia-cuda-nvcc-cu12

    program = compile_cuda("tests.kernels.test_gpu_lowering:flash_case", "H200", {"dim": 80})
    program.kernels["_kernel"].spill_bytes

Each compilation has a process of its own: the plugin reads its settings once.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "LLM_JAX_CUDA"


class Target(NamedTuple):
    """What XLA asks of a GPU. units: the instructions of its matrix units, see `Kernel`."""

    kind: str
    units: str
    capability: tuple[int, int]
    arch: str
    multiprocessors: int
    shared_bytes: int
    bandwidth: int
    memory: int


TARGETS = {
    "H200": Target("NVIDIA H200", "wgmma", (9, 0), "sm_90a", 132, 232448, 4800 * 10**9, 141 * 10**9),
    "B200": Target("NVIDIA B200", "tcgen05", (10, 0), "sm_100a", 148, 232448, 8000 * 10**9, 180 * 10**9),
    "L40S": Target("NVIDIA L40S", "mma", (8, 9), "sm_89", 142, 101376, 864 * 10**9, 48 * 10**9),
    "A100": Target(
        "NVIDIA A100-SXM4-80GB", "mma", (8, 0), "sm_80", 108, 166912, 2039 * 10**9, 80 * 10**9
    ),
}
CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {t.shared_bytes}
  shared_memory_per_block_optin: {t.shared_bytes}
  threads_per_core_limit: 2048
  core_count: {t.multiprocessors}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {t.bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.9
  device_memory_size: {t.memory}
  cuda_compute_capability {{ major: {t.capability[0]} minor: {t.capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{t.kind}"
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel by ptxas: registers and spills of a thread, shared memory and threads of a block.

    mma, wgmma, tcgen05, copies: instructions, of the matrix units of Ampere and Ada, of Hopper, of
    Blackwell, and asynchronous copies.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    mma: int
    wgmma: int
    tcgen05: int
    copies: int


@dataclasses.dataclass(frozen=True)
class CudaProgram:
    """hlo: after all passes; temp_bytes: what it allocates besides arguments and results."""

    kernels: dict[str, Kernel]
    hlo: str
    temp_bytes: int


def why_not() -> str:
    """Why nothing can be compiled here; "" = it can."""
    folder = os.environ.get(VARIABLE, "")
    if not folder:
        return f"{VARIABLE} does not name a folder with jax's CUDA plugin and ptxas: see .ci/run"
    needed = ("jax_plugins/xla_cuda12", "jax_cuda12_plugin", "nvidia/cuda_nvcc/bin/ptxas")
    missing = [name for name in needed if not (Path(folder) / name).exists()]
    return f"{VARIABLE}={folder}: there is no {', '.join(missing)}" if missing else ""


def compile_cuda(target: str, gpu: str, arguments: dict[str, Any] | None = None) -> CudaProgram:
    """What XLA and ptxas make of a case for one of TARGETS.

    target: "module:function", which returns a `KernelCase` when called with `arguments`. Raises
    RuntimeError with the compiler's words where it refuses.
    """
    folder = Path(os.environ[VARIABLE]).resolve()
    nvcc = folder / "nvidia" / "cuda_nvcc"
    with tempfile.TemporaryDirectory(prefix="llm_jax_cuda_") as dump:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is found there again is not dumped
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder))),
            "PATH": os.pathsep.join((str(nvcc / "bin"), os.environ["PATH"])),
            "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={nvcc} --xla_dump_to={dump} --xla_dump_hlo_as_text",
        }
        order = json.dumps({"target": target, "gpu": gpu, "arguments": arguments or {}})
        found = subprocess.run(
            [sys.executable, __file__, order],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode:
            raise RuntimeError(f"{target} {arguments} for {gpu}:\n{found.stderr[-4000:]}")
        answer = json.loads(found.stdout.splitlines()[-1])
        launches = dict(
            re.findall(
                r"kCustomKernel .*?(\w+) grid: .*?shared_memory: (\d+)",
                "".join(x.read_text() for x in Path(dump).glob("*.thunk_sequence.txt")),
            )
        )
        kernels = {}
        for path in Path(dump).glob("*.ptx"):
            if path.stat().st_size:
                kernels |= _kernels(path, nvcc / "bin" / "ptxas", TARGETS[gpu].arch, launches)
    return CudaProgram(kernels, answer["hlo"], answer["temp_bytes"])


def _kernels(path: Path, ptxas: Path, arch: str, shared: dict[str, str]) -> dict[str, Kernel]:
    """Of a file of PTX, by name; shared: bytes of shared memory that they are launched with."""
    command = [str(ptxas), "-v", f"-arch={arch}", str(path), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    text = path.read_text()
    found = {}
    for name, spills, registers in re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", said, re.S
    ):
        body = text.split(f".entry {name}(")[1].split(".entry ")[0]
        threads = re.search(r"\.reqntid (\d+)", body)
        found[name] = Kernel(
            int(registers),
            int(spills),
            int(shared.get(name, 0)),
            int(threads[1]) if threads else 0,
            body.count("mma.sync"),
            body.count("wgmma.mma_async"),
            body.count("tcgen05.mma"),
            body.count("cp.async.c"),
        )
    return found


def main(order: dict[str, Any]) -> None:
    """The process that compiles; prints {"hlo", "temp_bytes"}."""
    import jax
    from jax.experimental import topologies

    config = CONFIG.format(t=TARGETS[order["gpu"]])
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=config, topology="1x1x1"
    )
    device = topology.devices[0]
    jax.devices = lambda *_: [device]  # kernels choose their tiles by the device that is there
    module, _, name = order["target"].partition(":")
    case = getattr(importlib.import_module(module), name)(**order["arguments"])
    sharding = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.args)
    function = case.function if hasattr(case.function, "trace") else jax.jit(case.function)
    compiled = function.trace(*args).lower(lowering_platforms=("cuda",)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    print(json.dumps({"hlo": compiled.as_text(), "temp_bytes": memory.temp_size_in_bytes}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
