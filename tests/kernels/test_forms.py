"""Forms of operators: their results are the same, and which one is traced follows from a table."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import LLM, EngineConfig
from llm_jax.bench import forms as measuring
from llm_jax.engine.engine import Engine
from llm_jax.infer.paged_steps import make_paged_forward
from llm_jax.kernels import forms
from llm_jax.kernels.choice import Choice
from llm_jax.kernels.paged_attention.api import PagedProblem, choose, paged_attention
from llm_jax.kernels.paged_attention.types import Rows, init_pages
from llm_jax.ops.attention import AttentionOptions, AttentionProblem, FullContext, attention_form
from llm_jax.ops.linear import LinearProblem, linear
from llm_jax.sharding import make_mesh
from tests.tiny import ENCODERS

ROOT = Path(__file__).resolve().parents[2]
LINEAR = LinearProblem("float32", 8, 16, 24)
SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 64, "page_size": 16, "compile_ahead": False}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """write(problem, choice, times): the only table there is, of this device or another."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("LLM_JAX_TUNED", str(path))
    monkeypatch.setattr(forms, "_chosen", {})
    known = {}

    def write(problem, choice, times=None, device=None):
        entry = {"choice": choice, "measured_us": times or {"dot": 9.0}}
        of_device = known.setdefault(device or forms.device_name(), {})
        of_device.setdefault(problem.operator, {})[problem.key] = entry
        path.write_text(json.dumps(known))
        forms.read_table.cache_clear()

    forms.read_table.cache_clear()
    yield write
    forms.read_table.cache_clear()


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def jaxpr_of_linear(rows=7, **options):
    return str(jax.make_jaxpr(functools.partial(linear, **options))(drawn(rows, 16), drawn(24, 16)))


def attended(q, k, **options):
    """Attention within a batch by the context of training: q [B, T, N, H], k [B, T, K, H]."""
    positions = jnp.broadcast_to(jnp.arange(q.shape[1])[None], q.shape[:2])
    context = FullContext(jnp.ones(q.shape[:2], jnp.int32))
    how = {"positions": positions, "window": 0, "options": AttentionOptions(scale=0.25, **options)}
    return context.attend(0, q, k, k + 1, **how)[0]


def test_linear_follows_the_table_by_bucket(table):
    by_rule = jaxpr_of_linear()
    assert "transpose" not in by_rule
    table(LINEAR, "swapped", {"dot": 9.0, "swapped": 4.0})
    assert "transpose" in jaxpr_of_linear(7) and "transpose" in jaxpr_of_linear(8)
    assert "transpose" not in jaxpr_of_linear(4) and "transpose" not in jaxpr_of_linear(9)
    choice = forms.chosen()[LINEAR]
    assert choice.implementation == "swapped" and choice.measured_us == {"dot": 9.0, "swapped": 4.0}
    table(LINEAR, "rule", {"dot": 4.0, "swapped": 9.0})
    assert jaxpr_of_linear() == by_rule and "no other form was worth it" in forms.chosen()[LINEAR].reason


def test_forms_of_linear_are_the_product(table):
    x, w = drawn(7, 16), drawn(24, 16, seed=1)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(linear(x, w), expected, atol=1e-5)
    table(LINEAR, "swapped")
    np.testing.assert_allclose(linear(x, w), expected, atol=1e-5)
    of_rows = linear(x.reshape(7, 1, 16), w.reshape(4, 6, 16))
    np.testing.assert_allclose(of_rows, expected.reshape(7, 1, 4, 6), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["rule", "whole", "block=32"])
def test_forms_of_attention_are_the_softmax(table, form, causal):
    problem = AttentionProblem("float32", causal, True, 4, 2, 8, 2, 128)
    table(problem, form)
    q, k = drawn(2, 70, 4, 8), drawn(2, 70, 2, 8, seed=1)
    attend = jax.jit(functools.partial(attended, causal=causal))
    gradient = jax.jit(jax.grad(lambda q: jnp.sum(attend(q, k) ** 2)))(q)
    assert forms.chosen()[problem].implementation == ("xla" if form == "rule" else form)

    keys, values = (np.repeat(np.asarray(x, np.float64), 2, axis=2) for x in (k, k + 1))
    scores = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), keys) * 0.25
    scores += np.triu(np.full((70, 70), -np.inf), 1) if causal else 0
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(attend(q, k), out, atol=1e-5)
    assert np.isfinite(gradient).all()
    shapes = [f"float32[2,2,{2 * n},{m}]" for n, m in ((32, 32 if causal else 70), (70, 70))]
    text = str(jax.make_jaxpr(attend)(q, k))
    assert (shapes[0].replace("float", "f") in text) == (form == "block=32")
    assert (shapes[1].replace("float", "f") in text) == (form in ("rule", "whole"))


def paged(counts=(1, 1, 1), past=(5, 20, 39), page=16, **options):
    """One step of paged attention of such rows, of 48 tokens at most: (attention, pages)."""
    number = functools.partial(jnp.asarray, dtype=jnp.int32)
    single = sum(n == 1 for n in counts)
    starts = [*range(single), *(16 * (i + 1) for i in range(len(counts) - single))]
    count = len(counts) if single == len(counts) else 16 * (1 + len(counts) - single)
    lengths = [n + m for n, m in zip(counts, past, strict=True)]
    table = np.random.default_rng(0).permutation(9).reshape(3, 3)
    rows = Rows(*map(number, (table, starts, counts, lengths, single, len(counts))))
    pages = init_pages(2, 9, page, 2, 8, dtype="float32")
    pages = jax.tree.map(lambda x: drawn(*x.shape, seed=2), pages)
    q, k = drawn(count, 4, 8), drawn(count, 2, 8, seed=1)
    run = functools.partial(paged_attention, scale=0.3, **options)
    return run, (q, k, k + 1, pages, rows, 1)


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 1, 7)])
@pytest.mark.parametrize("how", [{}, {"window": 4}, {"softcap": 2.0}])
def test_forms_of_paged_attention_are_the_same(counts, how):
    """`test_paged_attention` has "xla" beside float64."""
    run, args = paged(counts, **how)
    results = (jax.jit(functools.partial(run, implementation=x))(*args) for x in ("xla", "xla_together"))
    (out, pages), (other, others) = results
    np.testing.assert_allclose(out, other, atol=1e-6)
    np.testing.assert_array_equal(pages.tokens, others.tokens)


def test_paged_attention_follows_the_table_and_a_named_form_is_obeyed(table):
    run, args = paged()
    problem = PagedProblem.of(args[0], *args[3:5])
    assert problem.key == ("float32 float32 heads=4 kv_heads=2 dim=8 page=16 rows=4 tokens=64 new=4")
    text = lambda **options: str(jax.make_jaxpr(functools.partial(run, **options))(*args))  # noqa: E731
    loop, together = (text(implementation=x) for x in ("xla", "xla_together"))
    assert loop != together and text() == loop
    table(problem, "xla_together")
    assert text() == together and text(implementation="xla") == loop
    assert forms.chosen()[problem] == Choice("xla", "named by the caller")
    table(problem, "pallas")
    assert text() == loop and "cannot run here" in forms.chosen()[problem].reason
    with pytest.raises(ValueError, match="no kernel for cpu"):
        run(*args, implementation="pallas")
    table(problem, "xla_together")
    here, there = (choose(args[0], *args[3:5], kind) for kind in (None, "cpu"))
    assert (here.implementation, there.implementation) == ("xla_together", "xla")


def test_a_named_implementation_of_attention_is_obeyed(table):
    q, k = drawn(1, 64, 2, 8), drawn(1, 64, 2, 8)
    problem = AttentionProblem("float32", True, False, 2, 2, 8, 1, 64)
    table(problem, "block=32")
    named = functools.partial(AttentionOptions, True, 1.0, None)
    assert attention_form(q, k, named("auto"), training=False) == "block=32"
    assert attention_form(q, k, named("xla"), training=False) == "xla"
    with pytest.raises(ValueError, match="attention='pallas': there is no kernel for cpu"):
        attention_form(q, k, named("pallas"), training=False)


def test_other_devices_meshes_and_no_table_go_by_the_rule(table, monkeypatch):
    by_rule = jaxpr_of_linear()
    table(LINEAR, "swapped", device="another device")
    assert jaxpr_of_linear() == by_rule and "not measured here" in forms.chosen()[LINEAR].reason
    table(LINEAR, "swapped")
    assert jaxpr_of_linear() != by_rule
    with jax.set_mesh(make_mesh("tensor:2")):
        assert jaxpr_of_linear() == by_rule and "one device" in forms.chosen()[LINEAR].reason
    with jax.set_mesh(make_mesh("")):
        assert jaxpr_of_linear() != by_rule
    with forms.by_rule():
        assert jaxpr_of_linear() == by_rule and "strict" in forms.chosen()[LINEAR].reason
    monkeypatch.setenv("LLM_JAX_TUNED", "off")
    assert jaxpr_of_linear() == by_rule


BROKEN = {
    "no JSON": "{",
    "expected an object": "[]",
    "expected an object; run": '{"cpu": {"linear": 3}}',
    "operator 'x'": '{"cpu": {"x": {}}}',
    "choice='fast'": '{"cpu": {"linear": {"k": {"choice": "fast", "measured_us": {"dot": 1}}}}}',
    "measured_us=None": '{"cpu": {"linear": {"k": {"choice": "dot"}}}}',
    "measured_us={'a': '1'}": '{"d": {"linear": {"k": {"choice": "dot", "measured_us": {"a": "1"}}}}}',
    r"\['more'\]": '{"d": {"linear": {"k": {"choice": "dot", "measured_us": {"a": 1}, "more": 1}}}}',
}


@pytest.mark.parametrize(("message", "text"), BROKEN.items(), ids=list(BROKEN))
def test_broken_tables_are_refused(table, message, text):
    path = forms.table_path()
    assert path is not None
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        jaxpr_of_linear()
    assert "scripts/tune.py --device" in str(error.value) and "tuned.json" in str(error.value)


def test_processors_are_told_apart_by_what_linux_says():
    intel = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\n"
    intel += "model name\t: Xeon\nflags\t\t: fpu avx avx2 avx512f amx_tile\n\nprocessor\t: 1\n"
    assert forms.cpu_model(intel) == "GenuineIntel 6 207 avx2 avx512f amx_tile"
    arm = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    assert forms.cpu_model(arm) == "0x41 0xd40 asimd sve" and forms.cpu_model("") == ""
    assert forms.device_name().endswith("cores as 8 devices")


def test_a_form_is_chosen_if_it_wins_in_both_halves():
    entry = measuring.entry_of
    steady = [{"dot": 10.0 + i, "swapped": 9.0 + i, "third": 5.0 + i} for i in range(8)]
    assert entry(steady) == {
        "choice": "third",
        "measured_us": {"dot": 12.0, "swapped": 11.0, "third": 7.0},
    }
    disturbed = [x | {"third": 100.0} if i in (1, 4, 6) else x for i, x in enumerate(steady)]
    assert entry(disturbed)["choice"] == "third"
    once = [{"dot": 10.0, "swapped": 1.0 if i % 2 else 10.0} for i in range(8)]
    assert entry(once)["choice"] == "rule"
    assert entry([{"dot": 10.0, "swapped": 9.6}] * 4)["choice"] == "rule"
    with pytest.raises(ValueError, match="repeats=1"):
        measuring.measure(LINEAR, 1)


PROBLEMS = [
    LINEAR,
    AttentionProblem("float32", True, True, 4, 2, 8, 1, 64),
    AttentionProblem("float32", False, False, 4, 2, 8, 1, 64),
    PagedProblem("float32", "float32", 4, 2, 8, 16, 2, 32, 2),
    PagedProblem("float32", "float32", 4, 2, 8, 16, 2, 32, 32),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"{problem.operator} {problem.key}")
def test_what_is_measured_is_what_a_step_looks_up(table, problem):
    """Each form can be run, and its trace is of the very problem."""
    runs = measuring.forms_of(problem)
    results = [jax.tree.leaves(run()) for run in runs.values()]
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)
    assert set(runs) <= {"xla", *forms.FORMS[problem.operator]}
    if problem.operator == "paged_attention":
        assert set(forms.chosen()) == {problem}


def test_tables_are_written_and_read(table, monkeypatch):
    """Entries of every operator of a model's steps; others and other devices' stay."""
    table(LINEAR, "swapped")
    table(LINEAR, "swapped", device="another device")
    entry = {"choice": "rule", "measured_us": {"a": 2.0, "b": 1.0}}
    monkeypatch.setattr(
        measuring, "measure", lambda problem, _: entry if problem.operator in forms.FORMS else None
    )
    case = {"engine": SIZES, "batch": [2], "prompt_tokens": [16], "sequences": ["2x16"]}
    lines = list(measuring.tune_device(None, [case], 2))
    assert "operators and shapes" in lines[0] and lines[1].endswith(": rule (a 2, b 1 us)")
    found = forms.read_table(forms.table_path())
    assert found["another device"]["linear"][LINEAR.key]["choice"] == "swapped"
    here = found[forms.device_name()]
    assert here["linear"][LINEAR.key]["choice"] == "swapped" and here["paged_attention"]
    assert any("training" in key for key in here["attention"])
    assert any("prompt" in key for key in here["attention"])
    with pytest.raises(ValueError, match="case {'batches': 3}"):
        list(measuring.tune_device(None, [{"batches": 3}], 2))
    monkeypatch.setenv("LLM_JAX_TUNED", "off")
    with pytest.raises(ValueError, match="LLM_JAX_TUNED=off"):
        list(measuring.tune_device(None, [case], 2))


def test_encoders_have_sequences_alone(table, tmp_path):
    ENCODERS["bert"].save(tmp_path / "bert")
    found = measuring.shapes_of(str(tmp_path / "bert"), sequences=["2x16", "4x32"])
    full = [problem for problem in found if isinstance(problem, AttentionProblem)]
    assert [(x.causal, x.training, x.batch, x.tokens) for x in full] == [
        (False, True, 2, 16),
        (False, True, 4, 32),
    ]
    with pytest.raises(ValueError, match="no engine"):
        measuring.shapes_of(str(tmp_path / "bert"), batch=[1])


@pytest.fixture(scope="module")
def llm():
    return LLM()


def step_text(engine, shape, strict):
    """The forward of a step as it is compiled, traced anew."""
    programs = engine.runner.programs
    params, caches, slots = programs._like
    forward = make_paged_forward.__wrapped__(engine.llm.model, shape, strict)
    with jax.set_mesh(programs.mesh):
        return forward.lower(params, caches[0], slots.newest, programs._packed(shape)).as_text()


def test_strict_steps_never_follow_a_table(table, llm):
    engine = Engine(llm, EngineConfig(**SIZES))
    shape = engine.runner.programs.buckets.shape(4, 0)
    plain, strict = (step_text(engine, shape, x) for x in (False, True))
    for problem in forms.chosen():
        if problem.operator != "cached_attention":
            table(problem, {"linear": "swapped", "paged_attention": "xla_together"}[problem.operator])
    assert step_text(engine, shape, True) == strict
    assert step_text(engine, shape, False) != plain


def test_an_engine_explains_every_operator(table, llm):
    assert forms.explain() == ["no operator was traced yet"]
    engine = Engine(llm, EngineConfig(**SIZES))
    shape = engine.runner.programs.buckets.shape(4, 0)
    step_text(engine, shape, False)
    problem = next(p for p in forms.chosen() if p.operator == "linear")
    table(problem, "swapped", {"dot": 9.0, "swapped": 4.0})
    step_text(engine, shape, False)
    lines = engine.explain()
    assert lines[0].startswith(f"device: {forms.device_name()}; table: ")
    at = lines.index(f"linear: {problem.key}")
    assert lines[at + 1 : at + 3] == [
        "    swapped: the fastest that was measured here",
        "    swapped 4 us, dot 9 us",
    ]
    at = next(i for i, line in enumerate(lines) if line.startswith("paged_attention: "))
    assert lines[at + 1] == "    xla: there is no kernel for cpu; not measured here"


COUNTED = """
import runpy, sys
from llm_jax import LLM
calls, generate = [], LLM.generate
LLM.generate = lambda self, *args, **options: calls.append(1) or generate(self, *args, **options)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("calls", len(calls))
"""


@pytest.mark.slow
def test_generate_explains_what_it_ran_once():
    script = ROOT / "scripts" / "generate.py"
    code = f"import sys; sys.argv = {[str(script), '--prompt=你好', '--max_new_tokens=4', '--explain']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code + COUNTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("calls 1\n")
    for operator in ("attention: float32 causal prompt", "cached_attention: ", "linear: "):
        assert f"\n{operator}" in done.stderr
    assert "table: off" in done.stderr


@pytest.mark.slow
def test_tune_measures_a_device_and_refuses_other_flags(tmp_path):
    table = tmp_path / "tuned.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LLM_JAX_TUNED": str(table)}
    case = {"engine": SIZES | {"max_rows": 2}, "batch": [2], "prompt_tokens": [16]}
    command = [sys.executable, ROOT / "scripts" / "tune.py", "--device", "--repeats=2"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, env=environment)
    done = run([*command, f"--case={json.dumps(case)}"])
    assert done.returncode == 0, done.stderr
    assert {"linear", "paged_attention"} == set(*map(set, json.loads(table.read_text()).values()))
    done = run([*command, "--topology=v6e:1x1"])
    assert done.returncode == 2 and "--topology with --device" in done.stderr
    done = run([sys.executable, ROOT / "scripts" / "tune.py", "--model=x"])
    assert done.returncode == 2 and "--model without --device" in done.stderr
