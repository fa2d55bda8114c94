"""Compile a function for TPU chips that are not there, and keep what the compiler says about it.

    program = compile_for("llm_jax.kernels.flash_attention.cases:case", "v6e:1x1", {"window": 1024})
    program.memory["temp_size_in_bytes"], program.kernels

Each compilation has a process of its own, which gets libtpu's settings before libtpu is loaded. Its
result is kept by content (the lowered program, the chip, the flags, libtpu's version), so the same is
compiled once.
"""

import dataclasses
import functools
import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.tpu.chips import Chip, chip_of

OLDEST = "0.0.52"  # the libtpu that this is known to read
INSTALL = f"pip install --no-deps --target=DIR libtpu=={OLDEST}; LLM_JAX_LIBTPU=DIR/libtpu/libtpu.so"
SETTINGS = {  # of the process that compiles
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what JAX finds there again leaves no code to read
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a TPU here, so nobody's lock matters
    "TPU_ACCELERATOR_TYPE": "",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
TIMEOUT_S = 900.0
# A flag for those who need the optimized program alone: the code takes as long to write as to make.
WITHOUT_CODE = "--xla_jf_dump_llo_pass_label_regex=^nothing$"
ADVICE = {  # what libtpu or Mosaic says: what to do
    r"ScopedVmemOom|memory space vmem": (
        "the blocks do not fit VMEM: take smaller ones, fewer buffers, or raise vmem_limit_bytes in "
        "pltpu.CompilerParams if the chip has more"
    ),
    r"memory space smem": "the scalars do not fit SMEM (1 MiB): prefetch fewer of them",
    r"memory space hbm|CompileTimeHbmOom": (
        "the arrays do not fit HBM: take more chips, shard more, or a smaller batch"
    ),
    r"last two dimensions of your block shape": (
        "make the last two axes of the block multiples of (8, 128), or as long as the array's"
    ),
    r"[Uu]nsupported|[Nn]ot implemented|NotImplementedError|not supported": (
        "Mosaic cannot do this on this chip: take another data type or block shape"
    ),
}


class CompileError(ValueError):
    """The compiler refused a program; the message ends in advice, `log` is all that it said."""

    def __init__(self, message: str, log: str):
        super().__init__(message)
        self.log = log


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler made of a function, as text, and what it says about it.

    memory: bytes of one device (argument_size_in_bytes, temp_size_in_bytes, ...). cost: XLA's own count,
    in which the body of a loop counts once. kernels: names of the Pallas kernels in the program; traced:
    what they were called before it was compiled. versions: of jax and libtpu. coords: of each device in
    the order of the program, the chip's place in the slice and then which device of the chip it is.
    """

    folder: Path
    topology: str
    target: str
    arguments: dict[str, Any]
    flops: float
    hbm_bytes: float
    memory: dict[str, int]
    cost: dict[str, float]
    kernels: tuple[str, ...]
    traced: tuple[str, ...]
    versions: dict[str, str]
    coords: tuple[tuple[int, ...], ...]
    lower_s: float
    compile_s: float
    cached: bool

    @property
    def chip(self) -> Chip:
        """The generation it is compiled for."""
        return chip_of(self.topology)

    def text(self, name: str) -> str:
        """One of the kept texts: "hlo.txt", "assembly.txt", "ranges.txt", "KERNEL.bundles.txt", ...

        Raises ValueError where libtpu wrote none.
        """
        path = self.folder / f"{name}.gz"
        if not path.is_file():
            raise ValueError(
                f"{name}: this libtpu does not print it; it takes {OLDEST} or newer, which an older jax "
                f"can use as well: {INSTALL}"
            )
        return gzip.decompress(path.read_bytes()).decode()

    @functools.cached_property
    def integers(self) -> list[tuple[str, dict[int, np.ndarray]]]:
        """(name, known integer operands) of every traced kernel, in the order of the program."""
        found: list[tuple[str, dict[int, np.ndarray]]] = [(name, {}) for name in self.traced]
        path = self.folder / "integers.npz"
        if path.is_file():
            with np.load(path) as arrays:
                for key in arrays.files:
                    kernel, operand = map(int, key.split("|"))
                    found[kernel][1][operand] = arrays[key]
        return found


def compile_for(
    target: str,
    topology: str,
    arguments: dict[str, Any] | None = None,
    *,
    flags: str = "",
    timeout_s: float = TIMEOUT_S,
    cache: Path | None = None,
) -> Program:
    """The program that libtpu makes for a slice such as "v5e:2x2".

    target: "package.module:function" or "file.py:function", which returns a `case.Case` when called with
    `arguments` (what JSON can hold) and, where it has a parameter of that name, devices= all of the
    slice. flags: further settings of libtpu (LIBTPU_INIT_ARGS). cache: where results are kept;
    `cache_folder()` by default. Raises ValueError for a wrong target or topology or where libtpu is
    missing, `CompileError` where the compiler refuses, TimeoutError after `timeout_s` seconds.
    """
    cache = cache_folder() if cache is None else cache
    answer = _ask(target, topology, arguments or {}, flags, timeout_s, str(cache.absolute()))
    return read_program(cache / answer["key"], cached=answer["cached"])


def program_key(target: str, topology: str, arguments: dict[str, Any] | None = None) -> str:
    """A name for all that `compile_for` would give the compiler, and its version: the same, the same
    program. Files and lines that kernels come from do not count. Nothing is compiled; raises as it does.
    """
    return _ask(target, topology, arguments or {}, "", TIMEOUT_S, "")["key"]


def _ask(
    target: str, topology: str, arguments: dict[str, Any], flags: str, timeout_s: float, cache: str
) -> dict[str, Any]:
    """The answer of a process that compiles to `cache`; "" = that lowers and names the program."""
    chip_of(topology)
    settings, what = SETTINGS | library(), f"{target} with {arguments} for {topology}"
    with tempfile.TemporaryDirectory(prefix="llm_jax_tpu_") as dump:
        order = {
            "target": target,
            "topology": topology,
            "arguments": arguments,
            "flags": flags,
            "dump": dump,
            "cache": cache,
        }
        inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        dumped = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true {flags}".strip()
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH")) if x)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "llm_jax.tpu.worker", json.dumps(order)],
                env=inherited | settings | {"LIBTPU_INIT_ARGS": dumped, "PYTHONPATH": paths},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{what}: not compiled within {timeout_s:.0f} s") from error
    log, last = done.stdout + done.stderr, done.stdout.splitlines()[-1:] if not done.returncode else []
    answer = json.loads(last[0]) if last else {"refused": f"the compiler died: {log[-1500:].strip()}"}
    if "wrong" in answer:
        raise ValueError(answer["wrong"])
    if "refused" in answer:
        said = answer["refused"]
        advice = next(
            (f" ({text})" for pattern, text in ADVICE.items() if re.search(pattern, said, re.S)), ""
        )
        raise CompileError(f"{what}: {said[:1500].strip()}{advice}", log)
    return answer


def read_program(folder: Path, *, cached: bool = True) -> Program:
    """A kept program."""
    record = json.loads((folder / "program.json").read_text())
    record |= {name: tuple(record[name]) for name in ("kernels", "traced")}
    record["coords"] = tuple(map(tuple, record["coords"]))
    return Program(folder=folder, cached=cached, **record)


def library() -> dict[str, str]:
    """The environment that names the libtpu to compile with; {} = the one that is installed.

    Raises ValueError where there is none.
    """
    chosen = os.environ.get("LLM_JAX_LIBTPU") or os.environ.get("TPU_LIBRARY_PATH")
    if chosen:
        if not Path(chosen).is_file():
            raise ValueError(f"LLM_JAX_LIBTPU={chosen!r}: no such file; expected a libtpu.so")
        return {"TPU_LIBRARY_PATH": chosen}
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"compiling for a TPU takes libtpu, and no TPU: {INSTALL}")
    return {}


def cache_folder() -> Path:
    """Where compiled programs are kept: $LLM_JAX_TPU_CACHE, else ~/.cache/llm_jax/tpu."""
    chosen = os.environ.get("LLM_JAX_TPU_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else home / "llm_jax" / "tpu"
