"""Tuned sizes: tables, which of table, rule and argument wins, and the search, with costs made up."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.bench import tuning as search
from llm_jax.bench.tuning import Cost, Outcome, keep, random_arrays, tune, tunings, wall_times
from llm_jax.kernels import tuning
from llm_jax.kernels.chips import RULES
from llm_jax.kernels.flash_attention import api as flash
from llm_jax.kernels.flash_attention.tpu import Blocks
from llm_jax.kernels.grouped_matmul import api as grouped
from llm_jax.kernels.grouped_matmul import cases as grouped_cases
from llm_jax.kernels.grouped_matmul.rules import (
    Sizes,
    product_blocks,
    product_plan,
    sized_blocks,
    widened_bytes,
)
from llm_jax.kernels.paged_attention import api as paged
from llm_jax.kernels.paged_attention.tpu_decode import DecodeSizes
from llm_jax.kernels.paged_attention.types import Rows, abstract_pages
from llm_jax.kernels.quantized_matmul.plan import Problem, plan, plan_rule
from llm_jax.kernels.quantized_matmul.tpu import Stream
from llm_jax.kernels.quantized_matmul.tpu_tiles import Tiles
from llm_jax.kernels.tuning import Tuning, bucket, read_table, table_key, tuned
from llm_jax.tpu.compile import CompileError

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"columns": 128, "depth": 1024, "ahead": 2}
ENTRY = {"case": {}, "sizes": SIZES, "estimate_us": 1, "rule_us": 2}
KINDS = {"flash_attention": (Blocks,), "paged_attention": (DecodeSizes,)}
KINDS["quantized_matmul"] = (Stream, Tiles)
KINDS["grouped_matmul"] = (Sizes,)
FLASH_KEY = "float32 groups=2 dim=16 tokens=256"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """write(kernel, generation, key, sizes): the only table that there is of this kernel."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._table.cache_clear()

    def write(kernel, generation, key, sizes):
        entry = ENTRY | {"sizes": sizes}
        (tmp_path / f"{kernel}.json").write_text(json.dumps({generation: {key: entry}}))
        tuning._table.cache_clear()

    yield write
    tuning._table.cache_clear()


def test_keys_and_buckets():
    assert [bucket(n) for n in (1, 2, 3, 16, 17, 4096, 4097)] == [1, 2, 4, 16, 32, 4096, 8192]
    found = table_key(jnp.dtype("bfloat16"), "int8", heads=32, tokens=bucket(3000))
    assert found == "bfloat16 int8 heads=32 tokens=4096"
    keys = {flash.blocks_key("bfloat16", 4, 128, tokens) for tokens in (2049, 4096)}
    assert keys == {"bfloat16 groups=4 dim=128 tokens=4096"}


@pytest.mark.parametrize("kernel", search.KERNELS)
def test_committed_tables(kernel):
    """Every entry is found by the shape it was made for, by the kernel's own names, and is worth it."""
    for generation, entries in tuning._table(kernel).items():
        for key, entry in entries.items():
            (found,) = tunings(kernel, generation, [entry["case"]])
            assert found.key == key
            assert entry["sizes"] in found.candidates[1:]
            assert tuned(kernel, generation, key, *KINDS[kernel]) is not None
            by = "measured" if "measured_us" in entry else "estimate"
            rule_us = entry["measured_rule_us" if by == "measured" else "rule_us"]
            assert entry[f"{by}_us"] < search.WORTH * rule_us + 0.01


def test_no_table_is_the_rule(tables):
    assert tuned("flash_attention", "v6e", FLASH_KEY, Blocks) is None
    tables("flash_attention", "v6e", "another", {"block_q": 1})
    assert tuned("flash_attention", "v6e", FLASH_KEY, Blocks) is None
    assert tuned("flash_attention", "v5e", "another", Blocks) is None


def test_quantized_matmul_goes_by_the_table_then_by_the_rule(tables):
    problem = Problem(16, 4096, 6144, 4096, jnp.dtype("bfloat16"), jnp.dtype("int8"), False)
    rule = RULES["TPU v6e"]
    assert plan(problem, rule) == plan_rule(problem, rule) != Stream(768, 2048, 3)
    key = "bfloat16 int8 rows=16 depth=4096 columns=6144 group=4096"
    tables("quantized_matmul", "v6e", key, {"columns": 768, "depth": 2048, "ahead": 3})
    assert plan(problem, rule) == Stream(768, 2048, 3)
    assert plan(problem, RULES["TPU v5e"]) == plan_rule(problem, RULES["TPU v5e"])
    tables("quantized_matmul", "v6e", key, {"rows": 16, "depth": 2048, "columns": 512})
    assert plan(problem, rule) == Tiles(16, 2048, 512)


def test_grouped_matmul_goes_by_the_table_then_by_the_rule(tables):
    shape, types = (4096, 8, 4096, 14336), ("bfloat16", "int8")
    rule = RULES["TPU v6e"]
    by_rule = product_blocks(rule, *shape, 2, 1)
    assert product_plan(rule, *shape, *types) == by_rule
    key = "bfloat16 int8 groups=8 rows=4096 depth=4096 columns=14336"
    sizes = {"block_rows": 512, "block_columns": 256, "buffers": 2, "row_buffers": 1}
    tables("grouped_matmul", "v6e", key, sizes)
    found = product_plan(rule, *shape, *types)
    assert (found.rows, found.columns, found.buffers, found.row_buffers) == (512, 256, 2, 1)
    assert found.passes == by_rule.passes  # the same numbers of rows at once
    assert product_plan(rule, *shape, "bfloat16", "bfloat16") == product_blocks(rule, *shape, 2, 2)
    fewer = product_plan(rule, 2100, *shape[1:], *types)  # of the same bucket
    assert fewer.rows == 512
    x = jax.ShapeDtypeStruct((4096, 4096), "bfloat16")
    w = jax.ShapeDtypeStruct((8, 14336, 4096), "int8")
    product, of_x, _ = grouped._plan(rule, x, w)
    assert product == found and of_x == product_blocks(rule, 4096, 8, 14336, 4096, 2, 1)


@pytest.mark.parametrize("rule", {rule.name: rule for rule in RULES.values()}.values(), ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4096, 8, 4096, 14336), (64, 8, 14336, 4096), (16, 8, 14336, 4096), (17, 4, 256, 384)],
)
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_sizes_of_the_rule_are_its_blocks(rule, shape, weights):
    """So that the first candidate of a search is what the kernel takes without a table."""
    itemsizes = 2, jnp.dtype(weights).itemsize
    blocks = product_blocks(rule, *shape, *itemsizes)
    sizes = Sizes(blocks.rows, blocks.columns, blocks.buffers, blocks.row_buffers)
    assert sized_blocks(rule, *shape[:2], sizes, widened_bytes(shape[2], *itemsizes)) == blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_rows": 64}, "give all four or none"),
        (
            {"block_rows": 64, "block_columns": 128, "buffers": 2, "row_buffers": 2, "direction": "x"},
            "none with direction='x'",
        ),
    ],
)
def test_sizes_of_a_grouped_case_come_together(options, message):
    with pytest.raises(ValueError, match=message):
        grouped_cases.case(**options)


class Taken(Exception):
    """Ends a kernel's call at the point where its sizes are known."""


def flash_blocks(monkeypatch, **options):
    """The blocks with which `flash_attention` calls its kernel, for 256 tokens."""

    def stop(*_, blocks, **__):
        raise Taken(blocks)

    monkeypatch.setattr(flash, "flash_forward", stop)
    q, k = jnp.zeros((1, 256, 2, 16)), jnp.zeros((1, 1, 256, 16))
    options = {"scale": 1.0, "causal": True, "implementation": "pallas"} | options
    with pytest.raises(Taken) as taken:
        flash.flash_attention(q, k, k, **options, interpret=True)
    return taken.value.args[0]


def test_flash_attention_argument_before_table_before_rule(tables, monkeypatch):
    by_rule = flash_blocks(monkeypatch)
    assert by_rule == Blocks(256, 256, 256, 256)
    sizes = {"block_q": 128, "block_k": 128, "tile_k": 128, "diagonal_tile": 128}
    tables("flash_attention", "tpu7x", FLASH_KEY, sizes)
    assert flash_blocks(monkeypatch) == Blocks(128, 128, 128, 128)
    given = Blocks(256, 128, 128, 128)
    assert flash_blocks(monkeypatch, blocks=given) == given
    for other in ({"window": 64}, {"softcap": 5.0}, {"causal": False}):  # what was not tuned for
        assert flash_blocks(monkeypatch, **other) == by_rule


def test_paged_attention_argument_before_table_before_rule(tables, monkeypatch):
    pages = abstract_pages(1, 16, 16, 2, 128, "float32")
    pages = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), pages)
    few = jnp.ones(2, jnp.int32)
    rows = Rows(jnp.arange(16).reshape(2, 8), jnp.arange(2), few, few, few[0] * 2, few[0] * 2)
    q, k = jnp.zeros((2, 4, 128)), jnp.zeros((2, 2, 128))

    def stop(*_, sizes, **__):
        raise Taken(sizes)

    monkeypatch.setattr(paged, "decode_attention", stop)

    def taken(sizes=None):
        options = {"scale": 1.0, "implementation": "pallas", "interpret": True}
        with pytest.raises(Taken) as found:
            paged.paged_attention(q, k, k, pages, rows, 0, sizes=sizes, **options)
        return found.value.args[0]

    by_rule = paged.size_rule(RULES["TPU7x"], q, pages, 8)
    assert taken() == by_rule.decode
    key = "float32 float32 heads=4 kv_heads=2 dim=128 page=16 rows=2 tokens=128"
    assert key == paged.decode_key(q, pages, 2, 8)
    tables("paged_attention", "tpu7x", key, {"pages_at_once": 2, "buffers": 5})
    assert taken() == DecodeSizes(2, 5) != by_rule.decode
    assert taken(by_rule) == by_rule.decode


BROKEN = {
    "no JSON": "{",
    "tuned/x.json: found": "[]",
    "tuned/x.json, v6e: found": '{"v6e": 3}',
    "expected an object": '{"v6e": {"k": 3}}',
    "sizes=None": json.dumps({"v6e": {"k": {n: x for n, x in ENTRY.items() if n != "sizes"}}}),
    "whole numbers": json.dumps({"v6e": {"k": ENTRY | {"sizes": {"a": 1.5}}}}),
    "above 0": json.dumps({"v6e": {"k": ENTRY | {"sizes": {"a": 0}}}}),
    "case=3": json.dumps({"v6e": {"k": ENTRY | {"case": 3}}}),
    "rule_us": json.dumps({"v6e": {"k": {n: x for n, x in ENTRY.items() if n != "rule_us"}}}),
    "expected numbers": json.dumps({"v6e": {"k": ENTRY | {"more": 1}}}),
}


@pytest.mark.parametrize(("message", "text"), BROKEN.items(), ids=list(BROKEN))
def test_broken_tables_are_refused(message, text):
    with pytest.raises(ValueError, match=message):
        read_table(text, "x.json")


def test_names_that_no_kernel_has_are_refused(tables):
    tables("quantized_matmul", "v6e", "k", {"columns": 128})
    with pytest.raises(ValueError, match=r"quantized_matmul.json, v6e, 'k'.*'ahead'.*'rows'"):
        tuned("quantized_matmul", "v6e", "k", Stream, Tiles)


TRIED = Tuning("key", {"shape": "s"}, [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}])


def judge(costs, kernel, topology, options, floor=0.0):
    """Costs by n, for a guard by (n, "guard"); an exception is raised."""
    assert (kernel, topology) == ("x", "v6e:1x1") and options["shape"] == "s"
    cost = costs[(options["n"], "guard") if options.get("guard") else options["n"]]
    if isinstance(cost, Exception):
        raise cost
    return Cost(cost, floor)


def tuned_by(costs, each=TRIED, floor=0.0, clock=None):
    return tune("x", "v6e:1x1", each, functools.partial(judge, costs, floor=floor), clock)


def test_the_best_is_kept():
    found = tuned_by({1: 100.0, 2: 97.0, 3: 90.123, 4: 120.0})
    assert found.entry == {
        "case": {"shape": "s"},
        "sizes": {"n": 3},
        "estimate_us": 90.12,
        "rule_us": 100.0,
    }
    assert found.notes[-1] == "kept: n=3, -9.9%" and len(found.notes) == 5


def test_within_two_percent_the_rule_is_good():
    found = tuned_by({1: 100.0, 2: 98.5, 3: 101.0, 4: 99.0})
    assert found.entry is None and found.notes[-1] == "the rule is good"


def test_nothing_is_tried_near_the_least():
    found = tuned_by({1: 101.0}, floor=100.0)  # a KeyError, were another one tried
    assert found.entry is None and found.notes[-1] == "at most 1.0% above the least"


def test_refused_and_slow_candidates_are_skipped_and_named():
    refused = CompileError("x with {} for v6e:1x1: no room\nat all", "")
    costs = {1: 100.0, 2: refused, 3: TimeoutError("too long"), 4: 95.0}
    found = tuned_by(costs)
    assert found.entry is not None and found.entry["sizes"] == {"n": 4}
    assert "n=2: skipped, no room" in found.notes and "n=3: skipped, too long" in found.notes
    found = tuned_by({1: CompileError("no room", "")})
    assert found.entry is None and found.notes == ("rule n=1: skipped, no room",)
    with pytest.raises(ValueError, match="no libtpu"):
        tuned_by({1: ValueError("no libtpu")})


def test_sizes_that_slow_a_guard_are_not_kept():
    costs = {1: 100.0, 2: 80.0, 3: 90.0, 4: 70.0, (1, "guard"): 300.0, (2, "guard"): 301.0}
    costs |= {(3, "guard"): 299.0, (4, "guard"): TimeoutError("too long")}
    found = tuned_by(costs, TRIED._replace(guards=({"guard": True},)))
    assert found.entry is not None and found.entry["sizes"] == {"n": 3}
    assert "n=2: with guard=True 301.0 us, the rule 300.0 us" in found.notes
    assert "n=4: with guard=True skipped, too long" in found.notes


def test_wall_time_decides_on_the_chip_itself():
    def clock(kernel, cases):
        assert kernel == "x" and [case["n"] for case in cases] == [1, 3, 4]
        return [50.0, 40.0, 60.0]

    costs = {1: 100.0, 2: TimeoutError("too long"), 3: 130.0, 4: 90.0}
    found = tuned_by(costs, floor=99.0, clock=clock)  # the count is no reason to stop there
    assert found.entry is not None and found.entry["sizes"] == {"n": 3}
    assert found.entry["measured_us"] == 40.0 and found.entry["measured_rule_us"] == 50.0
    assert found.entry["estimate_us"] == 130.0 and found.entry["rule_us"] == 100.0
    read_table(json.dumps({"v6e": {"key": found.entry}}), "x.json")


def test_wall_times_are_medians_of_turns():
    case = {"shape": "16x256x256", "implementation": "xla"}
    cases = [case, case | {"weights": "int4", "group": 128}]
    seconds = iter([9, 9, 1, 10, 3, 20, 2, 90])  # a warming round, then three; rivals in turn
    now = iter([x for s in seconds for x in (0.0, s)])
    found = wall_times("quantized_matmul", cases, repeats=3, timer=lambda: next(now))
    assert found == [2e6, 20e6]


def test_random_arrays_follow_the_shapes():
    shapes = {"w": "int4", "x": "bfloat16", "f": "float8_e4m3fn", "i": "int32"}
    shapes = {name: jax.ShapeDtypeStruct((64, 3), dtype) for name, dtype in shapes.items()}
    given = np.arange(3, dtype=np.int32)
    found = random_arrays((shapes, given))
    for name, shape in shapes.items():
        array = found[0][name]
        assert array.shape == (64, 3) and array.dtype == shape.dtype
        assert np.asarray(array, np.float32).std() > 0.5
    np.testing.assert_array_equal(found[1], given)


def test_the_first_device_says_whether_time_is_measured(monkeypatch):
    assert not search.is_here("v6e")
    device = type("Device", (), {"device_kind": "TPU v6 lite"})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert search.is_here("v6e") and not search.is_here("v5e")


def test_tables_are_written_and_entries_removed(tmp_path):
    good = ENTRY | {"case": {"shape": "s"}}
    keep(Outcome("x", "v6e", "b", good, ()), tmp_path)
    keep(Outcome("x", "v4", "c", good, ()), tmp_path)
    keep(Outcome("x", "v6e", "a", good, ()), tmp_path)
    table = json.loads((tmp_path / "x.json").read_text())
    assert list(table) == ["v4", "v6e"] and list(table["v6e"]) == ["a", "b"]
    keep(Outcome("x", "v6e", "b", None, ()), tmp_path)
    assert list(json.loads((tmp_path / "x.json").read_text())["v6e"]) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("kernel", search.KERNELS)
def test_candidates_begin_with_the_rule_and_differ(kernel):
    for generation in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
        for each in tunings(kernel, generation):
            assert 2 <= len(each.candidates) <= 6
            assert len({tuple(x.values()) for x in each.candidates}) == len(each.candidates)
    with pytest.raises(ValueError, match="wrong"):
        tunings(kernel, "v6e", [{"wrong": 1}])


def test_unknown_kernels_and_generations_are_refused():
    with pytest.raises(ValueError, match="kernel='nothing': expected one of"):
        tunings("nothing", "v6e")
    with pytest.raises(ValueError, match="v9"):
        tunings("flash_attention", "v9")


@pytest.mark.slow
def test_script_tunes_a_small_shape(tmp_path):
    """By the compiler itself; the tables of the package stay as they are."""
    case = json.dumps({"shape": "16x1024x1024"})
    command = [sys.executable, ROOT / "scripts" / "tune.py", "--kernel=quantized_matmul"]
    command += ["--topology=v6e:1x1", f"--case={case}", f"--tables={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode == 2 and "libtpu" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    key = "bfloat16 int8 rows=16 depth=1024 columns=1024 group=1024"
    assert f"v6e quantized_matmul {key}\n  rule columns=" in done.stdout
    entries = json.loads((tmp_path / "quantized_matmul.json").read_text())["v6e"]
    assert ("kept:" in done.stdout) == (key in entries)


@pytest.mark.slow
def test_script_names_what_is_wrong():
    for flag, message in {"--case=[": "--case='['", "--kernel=none": "kernel='none'"}.items():
        command = [sys.executable, ROOT / "scripts" / "tune.py", "--topology=v6e:1x1", flag]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and message in done.stderr
