"""A cold start made warm: the programs that an engine on a slice will need, compiled here.

`export_cache` fills a directory of JAX's persistent compilation cache with all programs of an engine
(engine/programs.py) for devices that are not there. On the TPU VM, JAX_COMPILATION_CACHE_DIR names that
directory and nothing is compiled, if jax, jaxlib and libtpu are of the same versions and the pages are
those that are named: a program is found by its text, its options, its devices and these versions.
docs/plan.md says what of this was verified without a TPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llm_jax.config import EngineConfig
from llm_jax.plan.quote import hbm_limit
from llm_jax.plan.steps import device_bytes, mesh_on, serving_arrays
from llm_jax.plan.workload import CACHES, Workload
from llm_jax.sharding import data_shards
from llm_jax.tpu.compile import SETTINGS, library

ROOM = 0.8  # share of what weights leave that pages take; the rest is for what steps need meanwhile


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was compiled. settings: of the engine that will find it. programs: how many it has; new: how
    many of them were not there before.
    """

    settings: dict[str, Any]
    programs: int
    new: int
    seconds: float


def engine_settings(work: Workload, topology: str, mesh: str) -> dict[str, Any]:
    """Settings of an engine for a workload: its rows, lengths, and pages that fit beside the weights."""
    on = mesh_on(topology, mesh)
    shards = data_shards(on)
    _, params, cache = serving_arrays(work, on)
    one = device_bytes(cache) // (work.rows(shards) * work.pages)  # a page of each pool
    free = int(ROOM * (hbm_limit(topology) - device_bytes(params)))
    most = work.rows(shards) * work.pages + 1  # more would never be used
    count = min(free // one, most)
    if count < work.pages + 1:
        raise ValueError(
            f"batch={work.batch}, context={work.context}: only {max(count, 0)} pages of "
            f"{work.page_size} tokens fit beside the weights on {topology}; take more chips"
        )
    return {
        "max_rows": work.rows(shards),
        "token_budget": work.prefill_tokens,
        "max_length": work.context,
        "page_size": work.page_size,
        "pages": [count] * len(cache.pools),
        "cache_dtype": CACHES[work.cache],
    }


def export_cache(work: Workload, topology: str, mesh: str, directory: Path) -> Exported:
    """Compile all programs of the engine of `engine_settings` into a compilation cache.

    Raises ValueError where the model does not fit or libtpu is missing, RuntimeError where a program
    does not compile.
    """
    settings = engine_settings(work, topology, mesh)
    EngineConfig(**settings | {"pages": tuple(settings["pages"])})  # says what is wrong with them
    directory.mkdir(parents=True, exist_ok=True)
    order = {
        "workload": dataclasses.asdict(work),
        "topology": topology,
        "mesh": mesh,
        "settings": settings,
    }
    before, start = _entries(directory), time.perf_counter()
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    environment |= (
        SETTINGS
        | library()
        | {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(directory.absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")))
            ),
        }
    )
    done = subprocess.run(
        [sys.executable, "-m", "llm_jax.plan.export_worker", json.dumps(order)],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise RuntimeError(f"exporting for {topology}: {done.stderr[-3000:].strip()}")
    programs = json.loads(done.stdout.splitlines()[-1])["programs"]
    new = len(_entries(directory) - before)
    return Exported(settings, programs, new, time.perf_counter() - start)


def _entries(directory: Path) -> set[str]:
    """Names of the programs in a compilation cache."""
    return {path.name for path in directory.iterdir() if path.name.endswith("-cache")}
