"""Which form of an operator runs: the fastest one that was measured on this very device.

Some operators have several forms with the same result up to rounding (`FORMS`). A step takes one when
it is traced, by the shapes that it has: what a table says (`scripts/tune.py --device` writes it), else
the operator's rule. Without a table nothing changes.

The table is the file that LLM_JAX_TUNED names, by default ~/.cache/llm_jax/tuned.json; "off" is none:
device -> operator -> key of a shape -> {"choice": form, "measured_us": {form: microseconds}}. "rule" as
the choice: no other form was worth it. A table holds for one device: steps on a mesh of several go by
the rule, as do those under `by_rule`.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import os
import platform
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from llm_jax.kernels.chips import device_kind
from llm_jax.kernels.choice import Choice

BLOCKS = {f"block={n}": n for n in (32, 64, 128, 256, 512)}  # queries of attention at once
FORMS = {
    "attention": ("pallas", "whole", *BLOCKS),
    "linear": ("dot", "swapped"),
    "paged_attention": ("pallas", "xla", "xla_together"),
}
RULE = "rule"
AGAIN = "run scripts/tune.py --device again, or remove the file"
VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")  # what XLA:CPU compiles for
CPU_FIELDS = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]


class Problem(Protocol):
    """An operator at a shape; a hashable value whose sizes are those of its bucket."""

    @property
    def operator(self) -> str:
        """One of `FORMS`."""
        ...

    @property
    def key(self) -> str:
        """Names the shape in a table."""
        ...


_chosen: dict[Problem, Choice] = {}  # of the whole process, as jit keeps what it traced
_by_rule: contextvars.ContextVar[bool] = contextvars.ContextVar("by_rule", default=False)


@contextlib.contextmanager
def by_rule() -> Iterator[None]:
    """What is traced inside takes every operator by its rule, whatever the table says."""
    token = _by_rule.set(True)
    try:
        yield
    finally:
        _by_rule.reset(token)


def pick(problem: Problem, rule: Choice, possible: Collection[str]) -> Choice:
    """The table's choice if it is one of `possible`, else `rule`; `chosen` tells of it from then on."""
    return note(problem, _picked(problem, rule, possible))


def note(problem: Problem, choice: Choice) -> Choice:
    """The same choice, of which `chosen` tells from then on: one that a caller named, say."""
    _chosen[problem] = choice
    return choice


def chosen() -> dict[Problem, Choice]:
    """The last choice for each operator and shape that was traced in this process."""
    return dict(_chosen)


def explain() -> list[str]:
    """Lines of text that tell what `chosen` does: the form, why, and what was measured."""
    if not _chosen:
        return ["no operator was traced yet"]
    lines = [f"device: {device_name()}; table: {table_path() or 'off'}"]
    for problem in in_order(_chosen):
        choice = _chosen[problem]
        lines.append(f"{problem.operator}: {problem.key}")
        lines.append(f"    {choice.implementation}: {choice.reason}")
        if choice.measured_us:
            times = sorted(choice.measured_us.items(), key=lambda x: x[1])
            lines.append("    " + ", ".join(f"{name} {us:.0f} us" for name, us in times))
    return lines


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """By operator and shape, rows=8 before rows=16."""

    def place(problem: Problem):
        parts = (word.partition("=") for word in problem.key.split())
        return problem.operator, [(name, int(size or 0)) for name, _, size in parts]

    return sorted(problems, key=place)


def _picked(problem: Problem, rule: Choice, possible: Collection[str]) -> Choice:
    if _by_rule.get():
        return dataclasses.replace(rule, reason=f"{rule.reason}; strict steps go by the rule")
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return dataclasses.replace(rule, reason=f"{rule.reason}; tables hold for one device")
    path = table_path()
    table = {} if path is None else read_table(path)
    entry = table.get(device_name(), {}).get(problem.operator, {}).get(problem.key) if table else None
    if entry is None:
        return dataclasses.replace(rule, reason=f"{rule.reason}; not measured here")
    name, times = entry["choice"], entry["measured_us"]
    if name == RULE:
        reason = f"{rule.reason}; measured, no other form was worth it"
        return dataclasses.replace(rule, reason=reason, measured_us=times)
    if name not in possible:
        reason = f"{rule.reason}; the table's {name} cannot run here"
        return dataclasses.replace(rule, reason=reason, measured_us=times)
    return Choice(name, "the fastest that was measured here", rule.possible, times)


def device_name() -> str:
    """The kind of the device that is computed on; of a CPU, what tells it from others."""
    kind = device_kind()
    if kind != "cpu":
        return kind
    shared = jax.local_device_count("cpu")
    return _cpu_name() + (f" as {shared} devices" if shared > 1 else "")


@functools.lru_cache
def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"{cpu_model(text) or platform.machine()}, {cores} cores"


def cpu_model(cpuinfo: str) -> str:
    """Maker, model and vector units of the first processor that Linux's /proc/cpuinfo describes."""
    pairs = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    flags = fields.get("flags", fields.get("Features", "")).split()
    words = [fields[name] for name in CPU_FIELDS if name in fields]
    return " ".join(words + [name for name in VECTORS if name in flags])


def table_path() -> Path | None:
    """Where the table is, or would be; None where LLM_JAX_TUNED=off."""
    named = os.environ.get("LLM_JAX_TUNED", "")
    if named == "off":
        return None
    return Path(named or "~/.cache/llm_jax/tuned.json").expanduser()


@functools.lru_cache
def read_table(path: Path) -> Table:
    """The table of a file, read once; empty if there is none. Raises ValueError for what is no table."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); {AGAIN}") from error
    for device, operators in _items(table, f"{path}"):
        for operator, entries in _items(operators, f"{path}, {device!r}"):
            if operator not in FORMS:
                raise ValueError(f"{path}: operator {operator!r}: expected {tuple(FORMS)}; {AGAIN}")
            for key, entry in _items(entries, f"{path}, {device!r}, {operator}"):
                _check(operator, entry, f"{path}, {operator}, {key!r}")
    return table


def _items(table: Any, place: str):
    if not isinstance(table, dict):
        raise ValueError(f"{place}: found {table!r:.60}, expected an object; {AGAIN}")
    return table.items()


def _check(operator: str, entry: Any, place: str) -> None:
    """An entry has a choice and times."""
    fields = dict(_items(entry, place))
    choice, times = fields.pop("choice", None), fields.pop("measured_us", None)
    names = (RULE, *FORMS[operator])
    if choice not in names:
        raise ValueError(f"{place}: choice={choice!r}: expected one of {names}; {AGAIN}")
    fine = isinstance(times, dict) and times and all(type(x) in (int, float) for x in times.values())
    if not fine or fields:
        raise ValueError(
            f"{place}: measured_us={times!r:.60} and {sorted(fields)}: expected microseconds by form, "
            f"and nothing else; {AGAIN}"
        )
