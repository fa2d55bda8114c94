"""A quote on paper: what a step does written down by formulas (`sketch`) in place of a compiled program.

Needs no libtpu and takes milliseconds, so it is how a search chooses what to compile, and how slices are
quoted that would take hours. docs/plan.md says how far both ways are apart.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace

from jax.experimental.mesh_utils import create_device_mesh

from llm_jax.plan.quote import Quote, StepQuote, arrays_of, conclude, step_quote
from llm_jax.plan.sketch import Sketch
from llm_jax.plan.workload import Workload, device_kind, devices
from llm_jax.sharding import mesh_sizes
from llm_jax.tpu.chips import chip_of
from llm_jax.tpu.links import LINKS, Slice
from llm_jax.tpu.timing import Assumptions, time_program


def estimate(
    work: Workload,
    topology: str,
    mesh: str,
    steps: Sequence[str] = ("prefill", "decode"),
    *,
    assumptions: Assumptions = Assumptions(),  # noqa: B008 (frozen)
) -> Quote:
    """As `quote.quote`, without a compiler. Raises ValueError as that does."""
    memory = arrays_of(work, topology, mesh, steps)
    place, found = Slice(topology, device_order(topology, mesh)), {}
    for step in steps:
        for name in (step, "choose") if step == "decode" else (step,):
            found[name] = _step(Sketch(name, work, topology, mesh), place, assumptions)
    return dataclasses.replace(conclude(work, topology, mesh, memory, found, ""), paper=True)


def _step(sketch: Sketch, place: Slice, assumptions: Assumptions) -> StepQuote:
    program, chip = sketch.program(), chip_of(sketch.topology)
    line = time_program(program, chip, place, lambda x: sketch.costs[x.kernel], assumptions)
    memory = {"argument_bytes": 0, "temp_bytes": int(sketch.temporaries()), "code_bytes": 0}
    of = (sketch.name, sketch.work, sketch.topology, sketch.mesh)
    return step_quote(*of, line, program, **memory, compile_s=0.0)


def device_order(topology: str, mesh: str) -> tuple[tuple[int, ...], ...]:
    """Coordinates of a slice's devices in the order in which `sharding.make_mesh` has them.

    JAX looks at where devices are, not at what they are: stand-ins with coordinates will do.
    """
    name, _, shape = topology.partition(":")
    axes, cores = [int(n) for n in shape.split("x")], LINKS[chip_of(name).name].devices
    stand_ins = [
        SimpleNamespace(
            id=i,
            platform="tpu",
            device_kind=device_kind(topology),
            coords=[*reversed(at), *[0] * (3 - len(at))],
            core_on_chip=core,
            process_index=0,
            slice_index=0,
        )
        for i, (*at, core) in enumerate(itertools.product(*map(range, reversed(axes)), range(cores)))
    ]
    sizes = tuple(mesh_sizes(mesh, devices(topology)).values())
    try:
        grid = create_device_mesh(sizes, stand_ins)
    except NotImplementedError:
        grid = create_device_mesh(sizes, stand_ins, allow_split_physical_axes=True)
    return tuple((*d.coords[: len(axes)], d.core_on_chip) for d in grid.flat)
