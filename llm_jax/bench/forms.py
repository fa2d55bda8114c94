"""The forms of operators (`kernels.forms`) timed on the present device, and the table of the fastest.

The shapes are those of a model's own steps: they are traced, nothing is compiled but the operators.
Machines are seldom quiet, so forms take turns and the lower quartile of their times counts, which other
work disturbs least; one is chosen that takes 5% less than the rule's in both halves of the rounds.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.bench.tuning import random_arrays
from llm_jax.cache.choice import abstract_cache
from llm_jax.checkpoint.hf import load_config, resolve
from llm_jax.config import EngineConfig
from llm_jax.engine.engine import Engine
from llm_jax.infer.llm import LLM, demo_model
from llm_jax.infer.steps import make_forward, make_prefill
from llm_jax.kernels.cases import sizes
from llm_jax.kernels.chips import device_kind
from llm_jax.kernels.flash_attention.api import choose
from llm_jax.kernels.forms import (
    FORMS,
    RULE,
    Problem,
    chosen,
    device_name,
    in_order,
    read_table,
    table_path,
)
from llm_jax.kernels.paged_attention.api import PagedProblem, by_rule, paged_attention
from llm_jax.kernels.paged_attention.types import CHUNK_ALIGNMENT, Pages, Rows, abstract_pages
from llm_jax.models import Model, describe
from llm_jax.ops.attention import (
    AttentionOptions,
    AttentionProblem,
    FullContext,
    attention_in_blocks,
    attention_mask,
    block_of,
    self_attention,
)
from llm_jax.ops.linear import LinearProblem, by_form
from llm_jax.sharding import make_mesh
from llm_jax.tree import is_per_layer

WORTH = 0.95  # of the rule's time: a form that takes more is not chosen
COLD_BYTES = 64 << 20  # of weights that products go through, more than a processor's cache holds
SAMPLE_S = 2e-3  # a sample lasts so long at least

Run = Callable[[], Any]  # computes an operator once; what it returns is waited for


def shapes_of(
    model: str | None = None,
    *,
    engine: Mapping[str, Any] | None = None,
    batch: Sequence[int] | None = None,
    prompt_tokens: Sequence[int] = (64,),
    sequences: Sequence[str] = (),
) -> list[Problem]:
    """The operators of the steps of a model (its directory; None is the demo model).

    sequences: rows x tokens of training and of encoders, such as "4x256". Of causal language models
    besides: engine, settings of an `EngineConfig`; batch and prompt_tokens, rows of `LLM.generate` and
    tokens of their prompts, in all pairs; by default 1 and 8 rows. Raises ValueError for an encoder's.
    """
    directory = demo_model() if model is None else resolve(model)
    config = load_config(directory)
    config = dataclasses.replace(config, param_dtype="", compute_dtype="", cache_dtype="")
    mesh = make_mesh("")
    for text in sequences:
        _trace_sequences(describe(config), mesh, *sizes(text, "BT"))
    if config.causal and config.head == "lm":
        llm = LLM(directory, mesh=mesh)
        settings = {**(engine or {}), "compile_ahead": False}
        programs = Engine(llm, EngineConfig(**settings)).runner.programs
        for shape in programs.buckets.shapes(False):
            programs.trace(shape)
        for rows, tokens in itertools.product((1, 8) if batch is None else batch, prompt_tokens):
            _trace_generation(llm, rows, tokens)
    elif engine is not None or batch is not None:
        raise ValueError(f"{directory} is no causal language model: it has no engine, no batch")
    return in_order(chosen())


def _trace_generation(llm: LLM, batch: int, tokens: int) -> None:
    params = jax.tree.map(_abstract, llm.params)
    apart = any(map(is_per_layer, jax.tree.leaves(params["layers"], is_leaf=is_per_layer)))
    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    prompt = (number((batch, tokens)), number((batch,)))
    with jax.set_mesh(llm.mesh):
        cache = abstract_cache(llm.model.config, batch, tokens + 1, llm.mesh, per_layer=apart)
        jax.eval_shape(make_prefill(llm.model), params, cache, *prompt)
        jax.eval_shape(make_forward(llm.model), params, cache, number((batch,)))


def _trace_sequences(model: Model, mesh: Mesh, batch: int, tokens: int) -> None:
    def run(params, ids):
        return model.bind(params)(ids, ids, FullContext(ids))[0]

    with jax.set_mesh(mesh):
        jax.eval_shape(run, model.shapes, jax.ShapeDtypeStruct((batch, tokens), jnp.int32))


def measure(
    problem: Problem, repeats: int = 15, timer: Callable[[], float] = time.perf_counter
) -> dict[str, Any] | None:
    """The entry of a table for this operator at this shape; None where it has but one form here.

    Raises ValueError for less than two repeats.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: expected at least 2, 20 where other work runs")
    runs = forms_of(problem)
    if len(runs) < 2:
        return None
    rule = next(iter(runs))
    jax.block_until_ready(runs[rule]())
    start = timer()
    jax.block_until_ready(runs[rule]())
    calls = min(max(1, math.ceil(SAMPLE_S / max(timer() - start, 1e-9))), 50)

    def microseconds(run: Run) -> float:
        start = timer()
        for _ in range(calls):
            jax.block_until_ready(run())
        return (timer() - start) / calls * 1e6

    for run in runs.values():
        microseconds(run)  # compiles
    return entry_of([{name: microseconds(run) for name, run in runs.items()} for _ in range(repeats)])


def entry_of(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The entry for two rounds or more of microseconds by form, of which the first is the rule's."""
    rule, times = next(iter(rounds[0])), _quartiles(rounds)
    halves = [_quartiles(rounds[0::2]), _quartiles(rounds[1::2])]
    worth = [name for name in times if all(half[name] < WORTH * half[rule] for half in halves)]
    choice = min(worth, key=lambda name: times[name], default=RULE)
    return {"choice": choice, "measured_us": {name: round(us, 1) for name, us in times.items()}}


def _quartiles(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each form the time that a quarter of the rounds stayed below."""
    return {name: sorted(times[name] for times in rounds)[len(rounds) // 4] for name in rounds[0]}


def forms_of(problem: Problem) -> dict[str, Run]:
    """The forms that can run here, the rule's first, on random arrays."""
    match problem:
        case LinearProblem():
            return _of_linear(problem)
        case AttentionProblem():
            return _of_attention(problem)
        case PagedProblem():
            return _of_paged(problem)
    return {}


def _of_linear(problem: LinearProblem) -> dict[str, Run]:
    """Each time with the next of several copies of a weight: from memory, as in a model."""
    if not problem.has_forms:
        return {}
    weight = jax.ShapeDtypeStruct((problem.out, problem.inner), problem.dtype)
    copies = max(2, min(8, COLD_BYTES // (weight.size * weight.dtype.itemsize)))
    x = jax.ShapeDtypeStruct((problem.rows, problem.inner), problem.dtype)
    x, weight = random_arrays((x, weight))
    following = itertools.cycle([weight.copy() for _ in range(copies)])

    def of(form: str) -> Run:
        product = jax.jit(functools.partial(by_form, form))
        return lambda: product(x, next(following))

    return {form: of(form) for form in FORMS["linear"]}


def _of_attention(problem: AttentionProblem) -> dict[str, Run]:
    """Forward, and for training its gradient with it."""
    batch, tokens, dim = problem.batch, problem.tokens, problem.dim
    of = lambda heads: jax.ShapeDtypeStruct((batch, tokens, heads, dim), problem.dtype)  # noqa: E731
    q, k, v = random_arrays((of(problem.heads), of(problem.kv_heads), of(problem.kv_heads)))
    heads_major = jax.ShapeDtypeStruct((batch, problem.kv_heads, tokens, dim), k.dtype)
    rule = choose(q, heads_major)
    block = block_of("xla", tokens, problem.causal)
    others = [x for x in problem.blocks if block_of(x, tokens, problem.causal) != block]
    forms = ["xla", *others] if rule.implementation == "xla" else ["pallas", *problem.blocks]
    if rule.implementation == "xla" and rule.possible:
        forms.append("pallas")
    run = functools.partial(_attention, problem)
    return {form: _compiled(functools.partial(run, form), q, k, v) for form in forms}


def _attention(problem: AttentionProblem, form: str, q, k, v):
    """One form's result; of training, the gradients of its sum."""
    scale = problem.dim**-0.5
    positions = jnp.broadcast_to(jnp.arange(problem.tokens)[None], q.shape[:2])

    def forward(q, k, v):
        if form == "pallas":
            return self_attention(q, k, v, 0, AttentionOptions(problem.causal, scale))
        mask = attention_mask(positions, positions, window=0, causal=problem.causal)
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        how = {"scale": scale, "softcap": None, "causal": problem.causal}
        block = block_of(form, problem.tokens, problem.causal)
        return attention_in_blocks(q, k, v, mask, block=block, **how)

    if not problem.training:
        return forward(q, k, v)
    loss = lambda *args: forward(*args).astype(jnp.float32).sum()  # noqa: E731
    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


def _of_paged(problem: PagedProblem) -> dict[str, Run]:
    """Rows of lengths spread evenly up to the longest; in steps with chunks the last row is one."""
    rows = _rows(problem)
    count = problem.rows * rows.table.shape[1]
    shapes = abstract_pages(1, count, problem.page, problem.kv_heads, problem.dim, problem.of_pages)
    pages = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)]
    of = lambda heads: jax.ShapeDtypeStruct((problem.new, heads, problem.dim), problem.dtype)  # noqa: E731
    q, k, v = random_arrays((of(problem.heads), of(problem.kv_heads), of(problem.kv_heads)))
    rule = by_rule(q, pages[0], rows, device_kind())
    names = FORMS["paged_attention"] if rule.possible else FORMS["paged_attention"][1:]
    names = sorted(names, key=lambda name: name != rule.implementation)
    return {name: _in_place(name, problem.dim, (q, k, v), pages, rows) for name in names}


def _in_place(form: str, dim: int, qkv, pages: list[Pages], rows: Rows) -> Run:
    """Runs that pass the pages on to each other: a step donates them."""
    how = {"scale": dim**-0.5, "implementation": form}
    step = jax.jit(functools.partial(paged_attention, **how), donate_argnums=3)

    def run():
        out, pages[0] = step(*qkv, pages[0], rows, 0)
        return out

    return run


def _rows(problem: PagedProblem) -> Rows:
    count, most = problem.rows, problem.tokens // problem.page
    number = functools.partial(jnp.asarray, dtype=jnp.int32)
    lengths = [max(1, int((i + 0.5) / count * problem.tokens)) for i in range(count)]
    starts, counts, decodes = list(range(count)), [1] * count, count
    if problem.new > count:
        decodes = count - 1
        starts[-1] = -(-decodes // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
        counts[-1] = min(problem.new - starts[-1], problem.tokens)
        lengths[-1] = max(lengths[-1], counts[-1])
    table = jax.random.permutation(jax.random.key(0), count * most).reshape(count, most)
    described = (table, starts, counts, lengths, decodes, count)
    return Rows(*map(number, described))


def _compiled(function: Callable, *args: Any) -> Run:
    return functools.partial(jax.jit(function), *args)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def tune_device(
    model: str | None, cases: Iterable[Mapping[str, Any]], repeats: int, keep: bool = True
) -> Iterator[str]:
    """Measure what has several forms in these cases of `shapes_of`, and keep it in the table unless told
    otherwise; a line of text for each. Raises ValueError for what no case has.
    """
    path = table_path() if keep else None
    if keep and path is None:
        raise ValueError("LLM_JAX_TUNED=off: name a file for the table, or take --dry_run")
    problems: dict[Problem, None] = {}
    for case in cases:
        try:
            problems |= dict.fromkeys(shapes_of(model, **case))
        except TypeError as error:
            raise ValueError(f"case {case}: {error}") from error
    yield f"{device_name()}: {len(problems)} operators and shapes, table {path or 'not written'}"
    for problem in problems:
        entry = measure(problem, repeats)
        if entry is None:
            continue
        if path is not None:
            write({problem: entry}, path)
        times = ", ".join(f"{name} {us:.0f}" for name, us in entry["measured_us"].items())
        yield f"{problem.operator} {problem.key}: {entry['choice']} ({times} us)"


def write(entries: Mapping[Problem, dict[str, Any]], path: Path) -> None:
    """Write entries for the present device to a table, whose others stay."""
    read_table.cache_clear()
    table = {**read_table(path)}
    of_device = dict(table.get(device_name(), {}))
    for problem, entry in entries.items():
        known = of_device.get(problem.operator, {})
        of_device[problem.operator] = dict(sorted((known | {problem.key: entry}).items()))
    table[device_name()] = dict(sorted(of_device.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    read_table.cache_clear()
