"""Quotes on paper: products against PaLM's count, bytes and exchanges by hand, searches with them."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.models import describe
from llm_jax.models.cost import forward_flops
from llm_jax.plan import report
from llm_jax.plan.paper import device_order, estimate
from llm_jax.plan.quote import arrays_of, quote
from llm_jax.plan.search import TRAINING_AXES, candidates, ranked, search
from llm_jax.plan.sketch import Sketch
from llm_jax.plan.workload import Workload
from llm_jax.tpu.hlo import each

ROOT = Path(__file__).resolve().parents[2]


def operations(name: str, work: Workload, topology: str, mesh: str):
    """(sketch, [(operation, how often it runs)])."""
    sketch = Sketch(name, work, topology, mesh)
    return sketch, list(each(sketch.program()))


def products(sketch: Sketch, program, attention: bool) -> float:
    """FLOPs of one device, in attention or in all else."""
    total = 0.0
    for x, times in program:
        flops = sketch.costs[x.kernel].flops if x.kernel else x.flops
        total += times * flops * (x.name.startswith("attention") == attention)
    return total


SERVING = [
    ("llama3.1-8b", "v5e:2x4", "tensor:8"),
    ("llama3.1-8b", "v5e:2x4", "data:2,tensor:4"),
    ("gemma3-27b", "v6e:2x4", "data:2,tensor:4"),  # windows, tied embeddings
    ("mixtral-8x7b", "v6e:2x4", "expert:4,tensor:2"),
    ("mixtral-8x7b", "tpu7x:2x2x1", "data:2,expert:4"),
    ("gpt2-xl", "v4:2x2x1", "data:4"),
]


@pytest.mark.parametrize(("model", "topology", "mesh"), SERVING)
def test_a_decode_step_multiplies_as_palm_counts(model, topology, mesh):
    work = Workload(model, batch=64, context=1024)
    sketch, program = operations("decode", work, topology, mesh)
    size = math.prod(sketch.sizes.values())
    described = describe(work.config)
    dense = forward_flops(described, 64, 0)
    # Every device of a tensor axis computes the router, where there is one.
    assert products(sketch, program, attention=False) * size == pytest.approx(dense, rel=1e-4)
    scores = forward_flops(described, 64, 1024) - dense
    assert products(sketch, program, attention=True) * size == pytest.approx(scores, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "topology", "mesh"),
    [
        ("llama3.1-8b", "v5p:2x2x2", "fsdp:8"),
        ("llama3.1-8b", "v5p:2x2x2", "data:2,fsdp:2,tensor:2"),
        ("llama3.1-8b", "v5p:2x2x2", "fsdp:2,context:4"),
        ("mixtral-8x7b", "v5p:2x2x2", "fsdp:2,expert:4"),
        ("gpt2", "v5e:2x2", "data:4"),
    ],
)
def test_a_train_step_multiplies_three_times_as_much(model, topology, mesh):
    work = Workload(model, batch=16, context=1024, remat="none")
    sketch, program = operations("train", work, topology, mesh)
    size = math.prod(sketch.sizes.values())
    described = describe(work.config)
    dense = forward_flops(described, 16 * 1024, 0)
    assert products(sketch, program, attention=False) * size == pytest.approx(3 * dense, rel=1e-9)
    # Attention: of the forward pass half of what a mask leaves; the backward pass does 5 for its 2.
    scores = (forward_flops(described, 16 * 1024, 1024) - dense) / 2
    assert products(sketch, program, attention=True) * size == pytest.approx(3.5 * scores, rel=1e-9)
    # Full rematerialization: a forward pass more, without the logits and each layer's last product.
    sketch, program = operations("train", Workload(model, batch=16, context=1024), topology, mesh)
    config = work.config
    outside = 2 * 16 * 1024 * config.embed_dim * config.vocab_size
    chosen = max(config.experts_per_token, 1)
    last = 2 * 16 * 1024 * config.num_layers * config.embed_dim * config.mlp_dim * chosen
    expected = 4 * dense - outside - last
    assert products(sketch, program, attention=False) * size == pytest.approx(expected, rel=1e-9)


def test_a_decode_step_reads_weights_and_cache():
    work = Workload("llama3.1-8b", batch=32)
    sketch, program = operations("decode", work, "v5e:2x2", "tensor:4")
    moved = sum(n * (sketch.costs[x.kernel].hbm_bytes if x.kernel else x.hbm_bytes) for x, n in program)
    held = arrays_of(work, "v5e:2x2", "tensor:4", ("decode",))
    table = 128256 * 4096 * 2 / 4  # the embeddings, of which a few rows are read
    assert held["weights"] + held["cache"] - table < moved
    assert moved == pytest.approx(held["weights"] + held["cache"] - table, rel=0.02)  # and activations


def test_what_a_layer_exchanges():
    """By hand: 32 layers of width 4,096; 7 matrices of 218,103,808 numbers; logits' 525,336,576."""
    work = Workload("llama3.1-8b", batch=32)
    _, program = operations("decode", work, "v5e:2x2", "tensor:4")
    sums = [(x.collective, n) for x, n in program if x.opcode == "all-reduce"]
    assert sum(n for _, n in sums) == 2 * 32 + 1
    assert {c.bytes for c, _ in sums} == {32 * 4096 * 2}
    assert {c.groups for c, _ in sums} == {((0, 1, 2, 3),)}
    _, program = operations("train", Workload("llama3.1-8b", context=1024), "v5p:2x2x2", "fsdp:8")
    total = dict.fromkeys(("all-gather", "reduce-scatter"), 0.0)
    for x, n in program:
        if x.collective is not None:
            total[x.collective.kind] += n * x.collective.bytes
    assert total["reduce-scatter"] == 2 * (32 * 218103808 + 525336576)
    assert total["all-gather"] == 2 * (2 * 32 * 218103808 + 525336576)
    mesh = "data:2,expert:2,tensor:2"
    sketch, program = operations("decode", Workload("mixtral-8x7b", batch=8), "v5p:2x2x2", mesh)
    groups = {x.name: x.collective.groups for x, _ in program if x.collective is not None}
    assert groups["all-gather over expert"] == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert groups["all-reduce over tensor"] == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_stages_wait_for_each_other():
    """4 stages with 4 microbatches take 7 turns, with 16 they take 19 of a quarter of the size."""
    mesh = "stage:4,fsdp:2"
    times = {}
    for parts in (4, 16):
        work = Workload("llama3.1-8b", batch=32, context=1024, microbatches=parts)
        sketch, program = operations("train", work, "v5p:2x2x2", mesh)
        times[parts] = sum(n * x.flops for x, n in program if x.name == "layers/mlp/up")
    assert times[16] / times[4] == pytest.approx((19 / 16) / (7 / 4))
    work = Workload("llama3.1-8b", batch=32, context=1024)
    plain, cut = (
        estimate(each, "v5p:2x2x2", "fsdp:8", ("train",)).train_step_s
        for each in (work, dataclasses.replace(work, microbatches=4))
    )
    assert plain == cut  # without stages nothing is cut


def test_places_are_those_of_the_slice():
    order = device_order("v5e:4x4", "data:4,tensor:4")
    assert len(set(order)) == 16
    # What exchanges most, tensor, has neighbours.
    for group in range(4):
        xs, ys, _ = zip(*order[4 * group : 4 * group + 4], strict=True)
        assert len(set(xs)) * len(set(ys)) == 4
    assert len(set(device_order("tpu7x:2x2x1", "tensor:8"))) == 8


def test_a_quote_on_paper_says_so():
    work = Workload("llama3.1-8b", batch=32)
    found = estimate(work, "v5e:2x2", "tensor:4")
    assert found.paper
    assert found.fits
    assert json.loads(json.dumps(found.record()))["paper"]
    assert "on paper" in report.text(found)
    assert "on paper" in report.table([found])
    assert found.decode_step_s == pytest.approx(8.5e-3, rel=0.05)  # as compiled, docs/scaling.md
    assert sum(found.steps["decode"].by_limit.values()) == pytest.approx(found.steps["decode"].seconds)


@pytest.mark.parametrize("mesh", ["tensor:2", "tenser:4", "fsdp:3"])
def test_what_cannot_be_quoted_is_refused_as_by_quote(mesh):
    messages = []
    for ask in (quote, estimate):
        with pytest.raises(ValueError, match=mesh.split(":")[0]) as refused:
            ask(Workload("gpt2", context=64), "v5e:2x2", mesh)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def test_a_search_compiles_the_fastest_on_paper():
    work = Workload("llama3.1-8b", batch=64, context=1024)
    asked, said = [], []

    def ask(work, topology, mesh, steps):
        asked.append(mesh)
        return estimate(work, topology, mesh, steps)

    on_paper, bad = ranked(work, "v5e:4x4", ("decode",))
    found, left = search(work, "v5e:4x4", ("decode",), said.append, 2, ask=ask)
    assert sorted(asked) == sorted(q.mesh for q in on_paper[:2])
    assert [q.mesh for q in found] == [q.mesh for q in on_paper[:2]]
    assert len(left) == len(on_paper) - 2 + len(bad)
    assert left[0][0] == on_paper[2].mesh
    assert left[0][1].startswith("slower on paper")
    assert f"of {len(on_paper)} meshes the 2" in said[0]


def test_training_is_searched_over_all_axes():
    work = Workload("llama3.2-1b", batch=64, context=1024)
    good, bad = candidates(work, "v5p:2x2x2", ("train",))
    named = {axis for mesh in good for axis in TRAINING_AXES if axis in mesh}
    assert named == {"stage", "data", "fsdp", "context", "tensor"}
    work = Workload("gpt2", batch=64, context=1022)
    _, bad = candidates(work, "v5e:2x4", ("train",))
    reasons = dict(bad)
    assert reasons["stage:8"] == "stage=8 does not divide num_layers=12"
    assert reasons["context:8"] == "context=8 does not divide half of context=511"


def test_the_script_needs_no_compiler(tmp_path):
    script = [sys.executable, ROOT / "scripts/plan.py", "--model=gpt2", "--context=64", "--paper"]
    script += ["--topology=v5e:2x2", "--steps=decode"]
    lines = subprocess.run([*script, "--json"], capture_output=True, text=True, check=True).stdout
    meshes = [json.loads(line)["mesh"] for line in lines.splitlines()]
    assert sorted(meshes) == ["data:2,tensor:2", "data:4", "tensor:4"]
    refused = subprocess.run([*script, "--most=2"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--most" in refused.stderr
    sweep = [*script[:-1], f"--sweep={tmp_path}/sweep", "--batches=4,8", "--most=1"]
    subprocess.run(sweep, capture_output=True, check=True)
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 3
