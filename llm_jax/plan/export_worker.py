"""The process in which `export.export_cache` compiles; its last line of output is its answer."""

import dataclasses
import json
import sys
from typing import Any

import jax

from llm_jax.cache.paged import abstract_paged, pool_windows
from llm_jax.config import EngineConfig
from llm_jax.engine.programs import Buckets, Programs
from llm_jax.infer.generate import Compiled
from llm_jax.infer.paged_steps import init_slots
from llm_jax.models import Model, Params
from llm_jax.plan.steps import serving_arrays
from llm_jax.plan.workload import Workload
from llm_jax.sharding import batch_sharding, make_mesh
from llm_jax.tpu.topology import topology_devices
from llm_jax.tpu.worker import pretend


@dataclasses.dataclass(frozen=True)
class Described:
    """What `Programs` asks of an LLM, without its arrays."""

    model: Model
    mesh: jax.sharding.Mesh
    params: Params
    compiled: Compiled


def main(order: dict[str, Any]) -> None:
    """order: workload, topology, mesh and settings of the engine. Prints {"programs": count}."""
    devices = topology_devices(order["topology"])
    pretend(devices[0])
    work, mesh = Workload(**order["workload"]), make_mesh(order["mesh"], devices)
    config = EngineConfig(**order["settings"] | {"pages": tuple(order["settings"]["pages"])})
    programs = engine_programs(work, mesh, config)
    programs.compile_all()
    print(json.dumps({"programs": programs.count}))


def engine_programs(work: Workload, mesh: jax.sharding.Mesh, config: EngineConfig) -> Programs:
    """The programs of an engine, described and not compiled; as `engine.runner` makes them."""
    model, params, _ = serving_arrays(work, mesh)
    llm: Any = Described(model, mesh, params, Compiled())
    cache = abstract_paged(model.config, config.pages, config.page_size, mesh, config.cache_dtype)
    slots = jax.eval_shape(lambda: init_slots(config.max_rows, model.config, mesh))
    slots = jax.tree.map(lambda x: x.update(sharding=batch_sharding(mesh, x.shape)), slots)
    per_row = -(-config.max_length // config.page_size)
    alignment = Buckets.row_alignment(mesh.devices.flat[0].device_kind, model.config)
    buckets = Buckets.of(config, per_row, len(pool_windows(model.config)), alignment)
    return Programs(llm, config, buckets, (cache,), slots)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
