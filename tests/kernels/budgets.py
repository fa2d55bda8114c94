"""What kernels cost by the compiler's code, kept: `python tests/kernels/budgets.py` writes budgets.json.

Run it after a change that makes a kernel cheaper, or with another jax or libtpu, and read what changed;
with parts of names, as in `budgets.py paged v6e`, for those alone.
It takes several minutes and a libtpu that prints its machine code (docs/tpu_lab.md).
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from llm_jax.tpu.compile import compile_for, program_key  # noqa: E402
from llm_jax.tpu.profile import profile_program  # noqa: E402

FILE = Path(__file__).with_name("budgets.json")
ONE = {"v4": "v4:1x1x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
CASES = [
    *((f"forward/{chip}", "flash_attention", ONE[chip], {}) for chip in ONE),
    *((f"gradient/{chip}", "flash_attention", ONE[chip], {"gradient": True}) for chip in ONE),
    *(
        (f"forward/{name}/{chip}", "flash_attention", ONE[chip], options)
        for chip in ("v5e", "v6e", "tpu7x")
        for name, options in {
            "dim64": {"shape": "1x8x2x4096x64"},
            "dim256": {"shape": "1x8x2x4096x256"},
        }.items()
    ),
    *(
        (f"{kernel}/{name}/{chip}", kernel, ONE[chip], options)
        for chip in ONE
        for kernel, name, options in (
            ("paged_attention", "page16", {"page": 16}),
            ("paged_attention", "int8", {"dtype": "int8"}),
            ("paged_attention", "chunk", {"shape": "16x32x8x2048x128", "chunk": 256}),
            ("quantized_matmul", "int8", {}),
            ("quantized_matmul", "int4", {"weights": "int4"}),
            ("grouped_matmul", "forward", {}),
            ("grouped_matmul", "int8-tokens", {"shape": "8x64x14336x4096", "quantized": True}),
            ("grouped_matmul", "int8-few", {"shape": "8x16x14336x4096", "quantized": True}),
        )
    ),
    *(
        (f"{kernel}/{name}/tpu7x", kernel, ONE["tpu7x"], options)
        for kernel, name, options in (
            ("paged_attention", "fp8", {"dtype": "float8_e4m3fn"}),
            ("paged_attention", "int8-page16", {"dtype": "int8", "page": 16}),
            ("paged_attention", "dim64", {"shape": "32x12x12x1024x64", "page": 16}),
            ("paged_attention", "dim80", {"shape": "16x32x32x1024x80", "page": 16}),
            ("paged_attention", "dim96", {"shape": "16x32x8x1024x96"}),
            ("paged_attention", "dim256", {"shape": "16x8x4x1024x256"}),
            ("paged_attention", "heads16", {"shape": "32x16x1x4096x128"}),
            ("paged_attention", "chunk-dim80", {"shape": "16x8x8x512x80", "chunk": 128}),
            ("quantized_matmul", "fp8", {"weights": "float8_e4m3fn"}),
            ("grouped_matmul", "gradient-x", {"direction": "x"}),
            ("grouped_matmul", "gradient-w", {"direction": "w"}),
            ("grouped_matmul", "decode", {"shape": "128x256x2048x768"}),
        )
    ),
    *(
        (f"forward/{name}/v6e", "flash_attention", ONE["v6e"], options)
        for name, options in {
            "dim80": {"shape": "1x8x8x2048x80"},
            "dim96": {"shape": "1x8x4x2048x96"},
            "heads16": {"shape": "1x16x1x2048x128"},
            "documents": {"documents": 8},
            "window": {"window": 1024},
            "softcap": {"softcap": 50.0},
            "both_ways": {"causal": False},
            "float32": {"shape": "1x4x2x1024x128", "dtype": "float32"},
        }.items()
    ),
]


TARGET = "llm_jax.kernels.{}.cases:case"


def measure(kernel: str, topology: str, options: dict, cache: Path | None = None) -> dict:
    """Cycles and shares of one case, and the name of the program that they are those of."""
    target = TARGET.format(kernel)
    program = compile_for(target, topology, options, cache=cache)
    report = profile_program(program)
    kernels = report.kernels
    time = sum(k.estimate_us for k in kernels)
    peak = report.flops / (time * 1e-6 * program.chip.peak_flops)
    return {
        "issued_cycles": sum(k.issued_cycles + k.mxu_wait_cycles for k in kernels),
        "estimate_us": round(time, 1),
        "share_of_peak_flops": round(peak, 3),
        "compile_s": round(program.compile_s, 1),
        "versions": program.versions,
        "program": program_key(target, topology, options),
    }


def main(*only: str) -> None:
    """only: parts of the names of the cases to measure; the others stay as they are."""
    kept = json.loads(FILE.read_text()) if only else {}
    for name, kernel, topology, options in CASES:
        if not only or any(part in name for part in only):
            kept[name] = measure(kernel, topology, options)
            print(f"{name:32} {kept[name]}", flush=True)
    FILE.write_text(json.dumps({case[0]: kept[case[0]] for case in CASES}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
