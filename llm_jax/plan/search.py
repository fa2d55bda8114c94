"""Meshes for a slice, and batches: compile what can fit, and rank it."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from llm_jax.plan.quote import Quote, arrays_of, hbm_limit, quote
from llm_jax.plan.workload import Workload, devices
from llm_jax.sharding import DATA_AXES

SERVING_AXES, TRAINING_AXES = ("data", "expert", "tensor"), ("data", "fsdp", "expert", "tensor")
AT_ONCE = 2  # compilations; each takes a gigabyte or two


def meshes(topology: str, axes: Sequence[str]) -> list[str]:
    """All meshes of a slice's devices over these axes, "data:2,tensor:8" and so on."""
    found = []
    for sizes in _factors(devices(topology), len(axes)):
        parts = [f"{name}:{size}" for name, size in zip(axes, sizes, strict=True) if size > 1]
        found.append(",".join(parts) or f"{axes[0]}:1")
    return found


def _factors(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write n as a product of so many numbers."""
    if parts == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        for rest in _factors(n // first, parts - 1):
            yield (first, *rest)


def candidates(
    work: Workload, topology: str, steps: Sequence[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """(meshes worth compiling, (mesh, why not) of the others).

    Left out are those that the model or the batch does not divide by, and those whose weights, cache and
    optimizer alone are more than a device has.
    """
    axes = TRAINING_AXES if "train" in steps else SERVING_AXES
    if not work.config.num_experts:
        axes = tuple(name for name in axes if name != "expert")
    good, bad = [], []
    for mesh in meshes(topology, axes):
        reason = _refuse(work, topology, mesh, steps)
        if reason:
            bad.append((mesh, reason))
        else:
            good.append(mesh)
    return good, bad


def _refuse(work: Workload, topology: str, mesh: str, steps: Sequence[str]) -> str:
    sizes = {name: int(n) for name, n in (part.split(":") for part in mesh.split(","))}
    config, tensor = work.config, sizes.get("tensor", 1)
    if config.num_experts % sizes.get("expert", 1):
        return f"expert={sizes['expert']} does not divide num_experts={config.num_experts}"
    if config.num_heads % tensor:
        return f"tensor={tensor} does not divide num_heads={config.num_heads}"
    shards = math.prod(n for name, n in sizes.items() if name in DATA_AXES)
    if work.batch % shards:
        return f"batch={work.batch} is no multiple of its {shards} data shards"
    needs = arrays_of(work, topology, mesh, steps)
    return "" if sum(needs.values()) <= hbm_limit(topology) else "does not fit: " + _sizes(needs)


def _sizes(needs: dict[str, int]) -> str:
    return ", ".join(f"{name} {n / (1 << 30):.1f} GiB" for name, n in needs.items())


def search(
    work: Workload, topology: str, steps: Sequence[str], said: Callable[[str], None], **options
) -> tuple[list[Quote], list[tuple[str, str]]]:
    """(quotes of all meshes that may fit, the fastest first; (mesh, why not) of the others)."""
    good, bad = candidates(work, topology, steps)
    quotes = _all([(work, mesh) for mesh in good], topology, steps, said, **options)
    return sorted(quotes, key=rank), bad


def sweep(
    work: Workload,
    topology: str,
    mesh: str,
    batches: Sequence[int],
    said: Callable[[str], None],
    **options,
) -> list[Quote]:
    """Quotes of decoding for several batches, in their order."""
    works = [(dataclasses.replace(work, batch=n), mesh) for n in batches]
    return _all(works, topology, ("decode",), said, **options)


def rank(found: Quote) -> tuple:
    """Sorts those that fit first, then by speed: of decoding, else of training, else of prompts."""
    speed = found.tokens_per_s or (1 / found.prefill_s if found.prefill_s else 0.0)
    return (not found.fits, -speed)


def pareto(quotes: Sequence[Quote]) -> list[Quote]:
    """Those than which none is both faster for one sequence and for all, by falling speed for one."""
    fits = [q for q in quotes if q.fits and q.tokens_per_s_per_sequence]
    front, most = [], 0.0
    speed = lambda q: (q.tokens_per_s_per_sequence or 0.0, q.tokens_per_s_per_chip or 0.0)  # noqa: E731
    for q in sorted(fits, key=speed, reverse=True):
        if (q.tokens_per_s_per_chip or 0.0) > most:
            front.append(q)
            most = q.tokens_per_s_per_chip or 0.0
    return front


def _all(
    works: Sequence[tuple[Workload, str]],
    topology: str,
    steps: Sequence[str],
    said: Callable[[str], None],
    **options,
) -> list[Quote]:
    def one(item: tuple[Workload, str]) -> Quote:
        work, mesh = item
        found = quote(work, topology, mesh, steps, **options)
        said(f"{topology} {mesh} batch {work.batch}: {'fits' if found.fits else 'does not fit'}")
        return found

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, works))
