"""Meshes for a slice, and batches: rank on paper what can fit, compile the best, and rank that."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from llm_jax.plan.paper import estimate
from llm_jax.plan.quote import Quote, arrays_of, hbm_limit, quote
from llm_jax.plan.workload import Workload, devices
from llm_jax.sharding import DATA_AXES, MESH_AXES

SERVING_AXES, TRAINING_AXES = ("data", "expert", "tensor"), MESH_AXES
AT_ONCE = 2  # compilations; each takes a gigabyte or two
MOST = 8  # meshes that a search compiles
Ask = Callable[..., Quote]  # `quote`, or `estimate`


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
    config = work.config
    for axis, name, whole in (
        ("expert", "num_experts", config.num_experts),
        ("tensor", "num_heads", config.num_heads),
        ("stage", "num_layers", config.num_layers),
        ("fsdp", "embed_dim", config.embed_dim),
        ("context", "half of context", work.context // 2),  # see `sharding.balanced`
    ):
        if axis in sizes and whole % sizes[axis]:
            return f"{axis}={sizes[axis]} does not divide {name}={whole}"
    stages, shards = (
        sizes.get("stage", 1),
        math.prod(n for name, n in sizes.items() if name in DATA_AXES),
    )
    if work.batch % shards:
        return f"batch={work.batch} is no multiple of its {shards} data shards"
    if stages > 1 and (
        work.microbatches % stages or work.batch * stages % ((work.microbatches or stages) * shards)
    ):
        return f"microbatches={work.microbatches} do not fit stage={stages} and the batch"
    needs = arrays_of(work, topology, mesh, steps)
    return "" if sum(needs.values()) <= hbm_limit(topology) else "does not fit: " + _sizes(needs)


def _sizes(needs: dict[str, int]) -> str:
    return ", ".join(f"{name} {n / (1 << 30):.1f} GiB" for name, n in needs.items())


def ranked(
    work: Workload, topology: str, steps: Sequence[str]
) -> tuple[list[Quote], list[tuple[str, str]]]:
    """(quotes on paper of all meshes that may fit, the fastest first; (mesh, why not) of the others)."""
    good, bad = candidates(work, topology, steps)
    return sorted((estimate(work, topology, mesh, steps) for mesh in good), key=rank), bad


def search(
    work: Workload,
    topology: str,
    steps: Sequence[str],
    said: Callable[[str], None],
    most: int = MOST,
    **options,
) -> tuple[list[Quote], list[tuple[str, str]]]:
    """(quotes of the `most` meshes that are the fastest on paper, ranked; (mesh, why not) of others)."""
    found, bad = ranked(work, topology, steps)
    if found[most:]:
        said(f"of {len(found)} meshes the {most} that are the fastest on paper are compiled")
    left = [(q.mesh, f"slower on paper, {step_s(q) * 1e3:.2f} ms a step") for q in found[most:]]
    works = [(work, q.mesh) for q in found[:most]]
    return sorted(_all(works, topology, steps, said, **options), key=rank), left + bad


def best(work: Workload, topology: str, most: int = MOST) -> list[str]:
    """The meshes on which decoding is the fastest on paper."""
    return [q.mesh for q in ranked(work, topology, ("decode",))[0][:most]]


def step_s(found: Quote) -> float:
    """Seconds of the step that decides the speed; of prompts, of all of them."""
    return found.decode_step_s or found.train_step_s or found.prefill_s or 0.0


def sweep(
    work: Workload,
    topology: str,
    meshes: Sequence[str],
    batches: Sequence[int],
    said: Callable[[str], None],
    **options,
) -> list[Quote]:
    """Quotes of decoding on several meshes for several batches, in their order."""
    works = [(dataclasses.replace(work, batch=n), mesh) for mesh in meshes for n in batches]
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
    ask: Ask = quote,
    **options,
) -> list[Quote]:
    def one(item: tuple[Workload, str]) -> Quote:
        work, mesh = item
        found = ask(work, topology, mesh, steps, **options)
        said(f"{topology} {mesh} batch {work.batch}: {'fits' if found.fits else 'does not fit'}")
        return found

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, works))
