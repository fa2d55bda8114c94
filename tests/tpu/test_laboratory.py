"""Programs compiled for TPUs that are not there, and counted; needs a libtpu that prints its code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.tpu.chips import CHIPS
from llm_jax.tpu.compile import CompileError, compile_for, program_key

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).with_name("lab_cases.py")
SHARED = Path(os.environ.get("LLM_JAX_SHARED", ROOT.parent / "shared"))
ONE = {"v4": "1x1x1", "v5e": "1x1", "v5p": "1x1x1", "v6e": "1x1", "tpu7x": "1x1x1"}
TOPOLOGIES = [f"{name}:{shape}" for name, shape in ONE.items()]
MATMUL, XLA = "llm_jax.tpu.examples:matmul", "llm_jax.tpu.examples:xla_matmul"
pytestmark = pytest.mark.slow


def test_a_well_tiled_product_costs_what_xla_says_of_its_own(lab):
    ours, xla = lab(MATMUL, "v5e:1x1"), lab(XLA, "v5e:1x1")
    assert not xla.kernels
    assert ours.kernel_us == pytest.approx(xla.xla_us, rel=0.05)
    assert ours.kernels[0].share_of_peak_flops > 0.93


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_a_badly_tiled_product_costs_ten_times_as_much(lab, topology):
    assert lab(MATMUL, topology, bm=128, bk=128, bn=128).kernel_us > 10 * lab(MATMUL, topology).kernel_us


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_counts_agree_with_arithmetic_on_every_generation(lab, topology):
    size, bm, bk, bn = 2048, 256, 512, 512
    report = lab(MATMUL, topology, size=size, bm=bm, bk=bk, bn=bn)
    kernel, chip = report.kernels[0], CHIPS[topology.partition(":")[0]]
    # Each row of blocks reads y once, each column of blocks x, and the result is written once. The block
    # that was brought last stays where the next step wants it again.
    traffic = 2 * size**2 * (size // bm + size // bn + 1)
    assert kernel.hbm_bytes == pytest.approx(traffic, rel=0.03)
    least = size**3 / (chip.cores * chip.mxus * chip.macs)
    assert least <= kernel.issued_cycles + kernel.mxu_wait_cycles < 3 * least
    assert kernel.complete
    assert kernel.estimate_us >= max(kernel.compute_us, kernel.hbm_us) * 0.999
    steps = (size // bm) * (size // bn) * (size // bk) / chip.cores
    assert kernel.loops[0].iterations == pytest.approx(steps, abs=2)  # the pipeline's ends


@pytest.mark.parametrize("page", [16, 128])
def test_page_tables_drive_the_loops(lab, page):
    blocks = {"page": page, "pages_per_block": 8}
    kernel = lab(f"{CASES}:paged", "v6e:1x1", **blocks).kernels[0]
    reads = 2 * 32 * 8 * 4096 // page  # keys and values of each row, head and page
    assert kernel.dma["hbm->vmem"] == {"count": reads, "bytes": reads * page * 128 * 2}
    assert not kernel.blind
    assert kernel.share_of_hbm < 0.6, "far from the bandwidth, as is known of small pages"
    unknown = lab(f"{CASES}:paged", "v6e:1x1", **blocks, given=False).kernels[0]
    assert unknown.blind
    assert unknown.issued_cycles < kernel.issued_cycles


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "tpu7x:1x1x1"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("paged", {"page": 16, "pages_per_block": 16}), ("paged", {"page": 16, "ppcb": 16})),
        (("causal", {"block": 512}), ("splash", {"bq": 512, "bk": 512})),
    ],
)
def test_an_independent_count_agrees(lab, tmp_path, topology, ours, theirs):
    tool = SHARED / "tools" / "tpu_cycles.py"
    if not tool.is_file():
        pytest.skip(f"{tool}: not there")
    answer = tmp_path / "answer.json"
    options = [f"--kw={name}={value}" for name, value in theirs[1].items()]
    command = [sys.executable, tool, f"{tool.with_name('cases.py')}:{theirs[0]}", f"--topo={topology}"]
    chosen = os.environ.get("LLM_JAX_LIBTPU")
    # The TPU's compiler refuses the CPU's flags.
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment = inherited | ({"TPU_LIBRARY_PATH": chosen} if chosen else {})
    subprocess.run([*command, *options, f"--json={answer}"], check=True, env=environment, cwd=tmp_path)
    (counted,) = json.loads(answer.read_text())
    report = lab(f"{CASES}:{ours[0]}", topology, **ours[1])
    assert report.kernel_us == pytest.approx(sum(k["est_us"] for k in counted["kernels"]), rel=0.1)
    assert report.xla_us == pytest.approx(counted["fusion_us"], rel=0.1)


def test_many_chips(lab):
    program = compile_for(f"{CASES}:row_parallel", "v5e:2x2", cache=lab.cache)
    assert "all-reduce" in program.text("hlo.txt")
    assert program.memory["argument_size_in_bytes"] == 2 * (1024 + 4096) * 4096 // 4
    assert not program.kernels


def test_a_program_is_compiled_once(lab):
    arguments = {"size": 512, "bm": 256, "bk": 256, "bn": 256}
    first = compile_for(MATMUL, "v6e:1x1", arguments, cache=lab.cache)
    second = compile_for(MATMUL, "v6e:1x1", arguments, cache=lab.cache)
    other = compile_for(MATMUL, "v6e:1x1", arguments | {"bk": 128}, cache=lab.cache)
    assert (first.cached, second.cached, other.cached) == (False, True, False)
    assert second.folder == first.folder != other.folder
    assert not list(lab.cache.glob("part-*"))


@pytest.mark.parametrize(
    ("target", "topology", "arguments", "message"),
    [
        (
            MATMUL,
            "v5e:1x1",
            {"bm": 2048, "bk": 2048, "bn": 2048},
            r"(?s)64\.00M.*fit VMEM: take smaller",
        ),
        (MATMUL, "v5e:1x1", {"bm": 100}, "last two axes of the block multiples of"),
        (MATMUL, "v5e:1x1", {"blocks": 3}, "unexpected keyword argument 'blocks'"),
        (f"{CASES}:no_case", "v5e:1x1", {}, "returned a int; expected a tpu.case.Case"),
    ],
)
def test_refusals_come_with_advice(lab, target, topology, arguments, message):
    with pytest.raises(CompileError, match=message):
        compile_for(target, topology, arguments, cache=lab.cache)


@pytest.mark.parametrize(
    ("target", "topology", "message"),
    [
        (MATMUL, "v5e:3x1x7", "v5e:3x1x7.*libtpu refuses it"),
        (MATMUL, "v5e:two", "expected a shape such as v5e:2x2"),
        ("llm_jax.tpu.examples:product", "v5e:1x1", "has no 'product'"),
        ("llm_jax.tpu.exemples:matmul", "v5e:1x1", "No module named 'llm_jax.tpu.exemples'"),
        ("nowhere.py:matmul", "v5e:1x1", "no such file"),
        ("matmul", "v5e:1x1", "expected module:function"),
    ],
)
def test_wrong_orders_are_told_apart(lab, target, topology, message):
    with pytest.raises(ValueError, match=message) as error:
        compile_for(target, topology, cache=lab.cache)
    assert not isinstance(error.value, CompileError)


def test_time_is_limited(lab):
    with pytest.raises(TimeoutError, match="not compiled within"):
        compile_for(MATMUL, "v5e:1x1", {"size": 8192}, cache=lab.cache, timeout_s=0.5)


def test_the_script(lab, tmp_path):
    def script(*flags):
        command = [sys.executable, ROOT / "scripts" / "kernel_report.py", f"--kernel={MATMUL}", *flags]
        environment = os.environ | {"LLM_JAX_TPU_CACHE": str(lab.cache), "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, check=True
        ).stdout

    record = json.loads(script("--topology=v5e:1x1", "--json"))
    kernel = lab(MATMUL, "v5e:1x1").kernels[0]
    for name in (
        "issued_cycles",
        "estimate_us",
        "share_of_peak_flops",
        "share_of_hbm",
        "limit",
        "spills",
    ):
        assert record[name] == getattr(kernel, name)
    assert record["kernel"] == kernel.kernel
    assert record["topology"] == "v5e:1x1"
    assert record["vmem_bytes"] > 2 * (512 * 1024 + 1024 * 1024) * 2
    assert record["compile_s"] > 0

    text = script("--topology=v5e:1x1")
    assert "not measured on a TPU" in text
    assert f"{kernel.issued_cycles:,} cycles issued" in text
    rows = script("--topology=v5e:1x1", "--table").strip().splitlines()
    assert rows[1] == "| --- | --- |" and f"| issued cycles | {kernel.issued_cycles:,}.0 |" in rows
    picture = tmp_path / "picture.png"
    both = script("--topology=v5e:1x1", "--set=", "--set=bm=128,bk=128,bn=128", f"--png={picture}")
    assert "bm=128,bk=128,bn=128" in both
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "What this count cannot see" in script("--blind")


def test_a_program_is_named_by_what_the_compiler_is_given(tmp_path):
    """Lines that move do not change the name, another product does."""
    source = (ROOT / "llm_jax" / "tpu" / "examples.py").read_text()
    texts = (source, "# one more line\n" + source, source.replace("+= jnp.dot", "+= 2.0 * jnp.dot"))
    names = []
    for i, text in enumerate(texts):
        (tmp_path / f"example{i}.py").write_text(text)
        names.append(program_key(f"{tmp_path}/example{i}.py:matmul", "v5e:1x1"))
    assert names[0] == names[1] != names[2]
