"""Quotes as people read them: a page for one, a table for several, a curve for a sweep."""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from llm_jax.plan.export import Exported
from llm_jax.plan.quote import Quote, StepQuote
from llm_jax.plan.search import pareto

NOTE = "times are a model's, not measured: docs/plan.md says how far off it is"
SHOWN = 16  # meshes that were not compiled, with the reason
PAPER = "on paper: by formulas, nothing was compiled; temporaries are a guess"


def text(found: Quote) -> str:
    """A page about one quote."""
    work = found.workload
    lines = [
        f"{work.model} on {found.topology}, {found.mesh}: batch {work.batch}, context {work.context}, "
        f"weights {work.weights}, cache {work.cache}",
        *([PAPER] if found.paper else []),
        "",
        f"{'fits' if found.fits else 'DOES NOT FIT'}: "
        f"{gib(found.hbm_limit - found.free_bytes)} of {gib(found.hbm_limit)} a device"
        + (f", {gib(found.free_bytes)} free" if found.fits else ""),
    ]
    lines += [f"  {name:<12} {gib(n):>10}" for name, n in found.hbm_bytes.items()]
    if found.advice:
        lines += ["", found.advice]
    for step in found.steps.values():
        lines += ["", *_step(step)]
    lines += ["", *_speed(found), "", NOTE]
    return "\n".join(lines)


def _step(step: StepQuote) -> list[str]:
    limits = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in step.by_limit.items())
    lines = [
        f"{step.name}: {step.seconds * 1e3:.2f} ms for {step.tokens} tokens, limit: {step.limit} "
        f"(ms: {limits})",
        f"  {step.mfu:.1%} of peak FLOPs, {step.hbm_share:.1%} of HBM bandwidth; "
        + (f"compiled in {step.compile_s:.0f} s, " if step.compile_s else "")
        + f"temporaries {gib(step.temp_bytes)}",
    ]
    for kind, entry in step.collectives.items():
        lines.append(f"  {kind}: {entry['count']:.0f} a step, {entry['bytes'] / 1e6:.1f} MB")
    for seconds, times, name in step.longest[:5]:
        lines.append(f"  {seconds * 1e3:8.3f} ms  {times:4d} x {name}")
    if step.unknown_kernels:
        lines.append(f"  kernels of unknown cost: {', '.join(step.unknown_kernels)}")
    return lines


def _speed(found: Quote) -> list[str]:
    rows = (
        ("prefill of all prompts", found.prefill_s, "{:.3f} s"),
        ("decode step", found.decode_step_s and found.decode_step_s * 1e3, "{:.2f} ms"),
        ("train step", found.train_step_s, "{:.3f} s"),
        ("tokens/s of a sequence", found.tokens_per_s_per_sequence, "{:.1f}"),
        ("tokens/s of a chip", found.tokens_per_s_per_chip, "{:.1f}"),
        ("US$ an hour", found.usd_per_hour, "{:.2f}"),
        ("US$ a million tokens", found.usd_per_million_tokens, "{:.3f}"),
        ("US$ a million prompt tokens", found.usd_per_million_prompt_tokens, "{:.3f}"),
    )
    lines = [f"{name:<28} {form.format(value)}" for name, value, form in rows if value is not None]
    return lines + ([f"{'limit':<28} {found.limit}"] if found.limit else [])


def table(quotes: Sequence[Quote], refused: Sequence[tuple[str, str]] = ()) -> str:
    """Quotes side by side, in their order, and what was not compiled and why."""
    head = ("mesh", "batch", "fits", "GiB", "step ms", "prefill s", "tok/s seq", "tok/s chip", "$/Mtok")
    rows = [(*head, "limit")]
    for q in quotes:
        step = q.decode_step_s or q.train_step_s
        rows.append(
            (
                q.mesh,
                str(q.workload.batch),
                "yes" if q.fits else "no",
                f"{(q.hbm_limit - q.free_bytes) / (1 << 30):.1f}",
                number(step and step * 1e3, ".2f"),
                number(q.prefill_s, ".3f"),
                number(q.tokens_per_s_per_sequence, ".1f"),
                number(q.tokens_per_s_per_chip, ".1f"),
                number(q.usd_per_million_tokens, ".3f"),
                q.limit or "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"not compiled: {mesh}: {reason}" for mesh, reason in refused[:SHOWN]]
    lines += [f"not compiled: {len(refused) - SHOWN} more"] * (len(refused) > SHOWN)
    return "\n".join([*lines, "", *([PAPER] if any(q.paper for q in quotes) else []), NOTE])


def exported(made: Exported) -> str:
    """What was compiled ahead, and how an engine finds it."""
    settings = made.settings | {"pages": tuple(made.settings["pages"])}
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return (
        f"{made.programs} programs, {made.new} of them new, in {made.seconds:.0f} s. An engine that has "
        f"them:\n  JAX_COMPILATION_CACHE_DIR=DIR, EngineConfig({given})"
    )


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def gib(count: float) -> str:
    return f"{count / (1 << 30):.2f} GiB"


def write_sweep(quotes: Sequence[Quote], path: Path) -> None:
    """PATH.png: latency over throughput with the Pareto front; PATH.csv: the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = ("topology", "mesh", "fits", "decode_step_s", "tokens_per_s_per_sequence")
    fields += ("tokens_per_s_per_chip", "usd_per_million_tokens", "limit")
    front = pareto(quotes)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("batch", *fields, "pareto"))
        for q in quotes:
            writer.writerow((q.workload.batch, *(getattr(q, f) for f in fields), q in front))
    figure, axes = plt.subplots(figsize=(8, 5))
    axes.plot(
        [1e3 * (q.decode_step_s or 0.0) for q in front],
        [q.tokens_per_s_per_chip for q in front],
        "o-",
        label="Pareto front",
    )
    for q in (q for q in quotes if q.fits):
        at = (1e3 * (q.decode_step_s or 0.0), q.tokens_per_s_per_chip or 0.0)
        axes.plot(*at, ".", color="grey")
        axes.annotate(f" {q.workload.batch} ({q.mesh})", at, fontsize=7)
    first = quotes[0].workload
    axes.set(
        xlabel="ms a token of a sequence",
        ylabel="tokens/s of a chip",
        title=f"{first.model}, {quotes[0].topology}, context {first.context}; a model's times",
    )
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
