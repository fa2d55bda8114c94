"""The search for a kernel's sizes: what each candidate costs, and an entry where the rule is beaten.

Candidates are compiled for the chip by `llm_jax.tpu`, each in a process of its own, and judged by the
count of their code; by wall time where the first device here is such a chip.
"""

import dataclasses
import functools
import importlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.bench.timing import interleaved
from llm_jax.kernels.chips import RULES, ChipRule
from llm_jax.kernels.tuning import Tuning, read_table
from llm_jax.tpu.chips import CHIPS, chip_of
from llm_jax.tpu.compile import CompileError, compile_for
from llm_jax.tpu.profile import profile_program

KERNELS = ("flash_attention", "grouped_matmul", "paged_attention", "quantized_matmul")
WORTH = 0.98  # of the rule's time: sizes that take more are not kept


class Cost(NamedTuple):
    """Microseconds of a program's kernels, and what its result takes at least on such a chip."""

    us: float
    floor_us: float = 0.0


Judge = Callable[[str, str, dict[str, Any]], Cost]  # of a kernel, a topology, options of its case
Clock = Callable[[str, list[dict[str, Any]]], list[float]]  # of a kernel and options: microseconds


@dataclasses.dataclass(frozen=True)
class Outcome:
    """entry: for the table, None where the rule is good. notes: what was tried, and why it ended so."""

    kernel: str
    generation: str
    key: str
    entry: dict[str, Any] | None
    notes: tuple[str, ...]


def estimate(kernel: str, topology: str, options: dict[str, Any], timeout_s: float = 120.0) -> Cost:
    """By the count of the compiler's code. Raises what `compile_for` does."""
    program = compile_for(_target(kernel), topology, options, timeout_s=timeout_s)
    report, chip = profile_program(program), program.chip
    floor = max(report.flops / chip.peak_int8, report.needed_bytes / chip.hbm_bandwidth)
    return Cost(report.kernel_us, floor * 1e6)


def tunings(kernel: str, generation: str, cases: Iterable[dict[str, Any]] = ()) -> list[Tuning]:
    """What to tune of a kernel: these cases, or those that come with it; of equal keys the first.

    Raises ValueError for a kernel or a generation that is not known, and for options a case lacks.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: expected one of {KERNELS}")
    module, rule = importlib.import_module(f"llm_jax.kernels.{kernel}.cases"), rule_of(generation)
    found: dict[str, Tuning] = {}
    for options in cases or module.TUNED:
        try:
            tuning = module.tuning(rule, **options)
        except TypeError as error:
            raise ValueError(f"case {options} of {kernel}: {error}") from error
        found.setdefault(tuning.key, tuning)
    return list(found.values())


def rule_of(generation: str) -> ChipRule:
    """By the name that topologies have. Raises ValueError for an unknown one."""
    return next(rule for rule in RULES.values() if rule.name == chip_of(generation).name)


def is_here(generation: str) -> bool:
    """Whether the first device is of this generation."""
    kind = jax.devices()[0].device_kind
    return kind in RULES and RULES[kind].name == generation


def tune(
    kernel: str, topology: str, tuning: Tuning, judge: Judge = estimate, clock: Clock | None = None
) -> Outcome:
    """Try every candidate of `tuning`. clock: measure those that compile, and go by that.

    Candidates that the compiler refuses or that take too long are skipped; so are all others where the
    rule's are, or where those cost within 2% of what such a chip needs at least. Raises ValueError where
    nothing can be compiled here.
    """
    generation = chip_of(topology).name
    outcome = functools.partial(Outcome, kernel, generation, tuning.key)
    by_rule, *others = tuning.candidates
    rule = _tried(judge, kernel, topology, tuning.options | by_rule)
    if not isinstance(rule, Cost):
        return outcome(None, (f"rule {_text(by_rule)}: {rule}",))
    notes = [f"rule {_text(by_rule)}: {rule.us:.1f} us"]
    if clock is None and rule.us * WORTH <= rule.floor_us:
        return outcome(None, (*notes, f"at most {rule.us / rule.floor_us - 1:.1%} above the least"))
    tried = [(by_rule, {"estimate_us": rule.us})]
    for sizes in others:
        cost = _tried(judge, kernel, topology, tuning.options | sizes)
        if isinstance(cost, Cost):
            tried.append((sizes, {"estimate_us": cost.us}))
        notes.append(f"{_text(sizes)}: {f'{cost.us:.1f} us' if isinstance(cost, Cost) else cost}")
    if clock is not None:
        times = clock(kernel, [tuning.options | sizes for sizes, _ in tried])
        tried = [(s, x | {"measured_us": t}) for (s, x), t in zip(tried, times, strict=True)]
        notes += [f"{_text(sizes)}: measured {x['measured_us']:.1f} us" for sizes, x in tried]
    by = "estimate_us" if clock is None else "measured_us"
    limit = tried[0][1][by] * WORTH
    better = sorted((x for x in tried if x[1][by] < limit), key=lambda x: x[1][by])
    for sizes, times in better:
        slower = _slower_under(judge, kernel, topology, tuning, sizes)
        if slower is None:
            entry = {"case": tuning.options, "sizes": sizes, **_both(times, tried[0][1])}
            notes.append(f"kept: {_text(sizes)}, {times[by] / tried[0][1][by] - 1:+.1%}")
            return outcome(entry, tuple(notes))
        notes.append(f"{_text(sizes)}: {slower}")
    return outcome(None, (*notes, "the rule is good"))


def _slower_under(judge: Judge, kernel: str, topology: str, tuning: Tuning, sizes) -> str | None:
    """The guard under which these sizes cost more than the rule's, None if there is none."""
    for guard in tuning.guards:
        options = tuning.options | guard
        rule = judge(kernel, topology, options | tuning.candidates[0])
        cost = _tried(judge, kernel, topology, options | sizes)
        if not isinstance(cost, Cost):
            return f"with {_text(guard)} {cost}"
        if cost.us > rule.us:
            return f"with {_text(guard)} {cost.us:.1f} us, the rule {rule.us:.1f} us"
    return None


def _tried(judge: Judge, kernel: str, topology: str, options: dict[str, Any]) -> Cost | str:
    """The cost, or why it is skipped."""
    try:
        return judge(kernel, topology, options)
    except (CompileError, TimeoutError) as error:
        said = str(error).partition(f" for {topology}: ")[2] or str(error)
        line = said.partition("\n")[0]
        return f"skipped, {line:.200}"


def _both(times: dict[str, float], of_rule: dict[str, float]) -> dict[str, float]:
    """Rounded times of the sizes and of the rule, as the table has them."""
    both = times | {"rule_us": of_rule["estimate_us"]}
    if "measured_us" in times:
        both["measured_rule_us"] = of_rule["measured_us"]
    return {name: round(us, 2) for name, us in both.items()}


def _text(sizes: dict[str, Any]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def wall_times(
    kernel: str,
    cases: list[dict[str, Any]],
    *,
    repeats: int = 20,
    timer: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Microseconds of each case on the first device: medians of `repeats` rounds in which they take
    turns, on random arrays.
    """
    rivals = {str(i): _rival(kernel, options, timer) for i, options in enumerate(cases)}
    return [seconds * 1e6 for seconds in interleaved(rivals, repeats).values()]


def _rival(kernel: str, options: dict[str, Any], timer: Callable[[], float]) -> Callable[[], float]:
    """Seconds of one call, compiled before."""
    case = importlib.import_module(f"llm_jax.kernels.{kernel}.cases").case(**options)
    function = case.function if hasattr(case.function, "lower") else jax.jit(case.function)

    def run() -> float:
        args = jax.block_until_ready(random_arrays(case.args))  # anew, since a case may donate them
        start = timer()
        jax.block_until_ready(function(*args))
        return timer() - start

    return run


def random_arrays(args: Any, seed: int = 0) -> Any:
    """Normal numbers, or whole ones of -7 to 7, in place of shapes; arrays stay what they are."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(args))))

    def drawn(x: Any) -> jax.Array:
        key = next(keys)
        if isinstance(x, np.ndarray):
            return jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jax.random.randint(key, x.shape, -7, 8, jnp.int8).astype(x.dtype)
        wide = x.dtype if x.dtype.itemsize > 1 else jnp.bfloat16
        return jax.random.normal(key, x.shape, wide).astype(x.dtype)

    return jax.tree.map(drawn, args)


def keep(outcome: Outcome, folder: Path) -> None:
    """Write the entry to the kernel's table in `folder`, or remove the one that no longer beats the
    rule.
    """
    file = folder / f"{outcome.kernel}.json"
    table = read_table(file.read_text(), file.name) if file.is_file() else {}
    entries = dict(table.get(outcome.generation, {}))
    entries.pop(outcome.key, None)
    if outcome.entry is not None:
        entries[outcome.key] = outcome.entry
    table[outcome.generation] = dict(sorted(entries.items()))
    table = {name: table[name] for name in CHIPS if name in table}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(part, file)


def _target(kernel: str) -> str:
    return f"llm_jax.kernels.{kernel}.cases:case"
