"""The process that compiles, started by `compile.compile_for`; its answer is the last line it prints.

It has a process of its own because libtpu reads its settings once, when it is loaded, and locks the
machine's TPU, where there is one.
"""

import base64
import glob
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.interpreters import mlir  # there is no public way to read a kernel's code,
from jax._src.pallas.mosaic import tpu_info  # nor to name the chip that a kernel asks for
from jaxlib.mlir import ir
from jaxlib.mosaic.python import tpu

from llm_jax.tpu.case import Case, kernel_integers
from llm_jax.tpu.topology import topology_devices

FORMAT = 3  # of what is kept; another number makes the old ones unread
KERNEL_KEPT = (
    ("bundles", "*-{name}-*-final_bundles.txt"),
    ("slots", "*-{name}-*-final_hlo-static-per-bundle-utilization.txt"),
    ("allocations", "*-{name}-*-original.txt"),
)
BODY = re.compile(r"(?<=\\22body\\22: \\22)([^\\]*)")  # of a kernel, in a lowered program
PLACES = re.compile(r", \\22debug_locations\\22: \\22[^\\]*\\22")  # beside the body since jax 0.12
KERNEL = re.compile(r'%([\w.\-]+) = [^\n]*? custom-call\([^\n]*custom_call_target="tpu_custom_call"')


def main(order: dict[str, Any]) -> None:
    """order: target, arguments, topology, flags, dump, cache ("" = compile nothing). Prints {"key",
    "cached"}, or what went wrong.

    That is {"wrong": message} where the order cannot be followed, {"refused": message} where the
    function cannot be traced, lowered or compiled.
    """
    try:
        devices = topology_devices(order["topology"])
        build = load(order["target"])
    except ValueError as error:
        print(json.dumps({"wrong": str(error)}))
        return
    pretend(devices[0])
    try:
        print(json.dumps(_compiled(order, build, devices)))
    except Exception as error:  # of the user's function, of Mosaic or of libtpu: all are the answer
        traceback.print_exc()
        print(json.dumps({"refused": f"{type(error).__name__}: {error}"}))


def _compiled(order: dict[str, Any], build: Callable[..., Any], devices: list[Any]) -> dict[str, Any]:
    options = dict(order["arguments"])
    if "devices" in inspect.signature(build).parameters:
        options["devices"] = devices
    case = build(**options)
    if not all(hasattr(case, name) for name in ("function", "args", "flops", "hbm_bytes")):
        raise TypeError(f"returned a {type(case).__name__}; expected a tpu.case.Case")
    start = time.perf_counter()
    lowered = _lower(case, devices)
    lower_s = time.perf_counter() - start
    text = lowered.as_text()
    of_key = (order["topology"], order["flags"], case, devices[0].client.platform_version)
    key = _key(text, *of_key)
    if not order["cache"]:
        return {"key": _key(without_places(text), *of_key), "cached": False}
    place = Path(order["cache"]) / key
    cached = place.is_dir()
    if not cached:
        start = time.perf_counter()
        compiled = lowered.compile(getattr(case, "options", {}))
        compile_s = time.perf_counter() - start
        versions = {"jax": jax.__version__, "libtpu": devices[0].client.platform_version}
        times = {"lower_s": lower_s, "compile_s": compile_s}
        found = {"versions": versions, "coords": _coords(case, devices[0], order["topology"])}
        _keep(place, order, case, compiled, times | found)
    return {"key": key, "cached": cached}


def without_places(text: str) -> str:
    """A lowered program without the files and lines that its Pallas kernels come from."""

    def bare(found: re.Match) -> str:
        with mlir.make_ir_context() as context:
            tpu.register_dialect(context)
            context.allow_unregistered_dialects = True
            module = ir.Module.parse(base64.b64decode(found[1]))
            return str(module.operation.get_asm(enable_debug_info=False))

    return BODY.sub(bare, PLACES.sub("", text))


def load(target: str) -> Callable[..., Any]:
    """The function that "package.module:function" or "path/file.py:function" names."""
    source, _, name = target.rpartition(":")
    if not source or not name:
        raise ValueError(f"{target!r}: expected module:function or file.py:function")
    if source.endswith(".py"):
        sys.path.insert(0, str(Path(source).resolve().parent))
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        if spec is None or spec.loader is None or not Path(source).is_file():
            raise ValueError(f"{target!r}: no such file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise ValueError(f"{target!r}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{target!r}: {source} has no {name!r}")
    return getattr(module, name)


def pretend(device: Any) -> None:
    """Kernels that choose their blocks by "the" device are told of the one that is compiled for."""
    told = {"get_device_kind": device.device_kind, "get_num_device_cores": device.num_cores}
    for name, answer in told.items():
        if not hasattr(tpu_info, name):
            raise RuntimeError(
                f"this jax has no pallas tpu_info.{name}: llm_jax/tpu/worker.py needs a change"
            )
        module = sys.modules[getattr(tpu_info, name).__module__]  # since jax 0.12 it lies elsewhere
        setattr(module, name, lambda answer=answer: answer)
    jax.devices = lambda *_: [device]
    jax.local_devices = lambda *_, **__: [device]
    jax.default_backend = lambda: "tpu"


def _lower(case: Case, devices: list[Any]) -> jax.stages.Lowered:
    one = jax.sharding.SingleDeviceSharding(devices[0])

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or one
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    function = case.function if hasattr(case.function, "trace") else jax.jit(case.function)
    return function.trace(*jax.tree.map(placed, case.args)).lower(lowering_platforms=("tpu",))


def _coords(case: Case, first: Any, topology: str) -> list[tuple[int, ...]]:
    """Where the devices of the program are, in its order: that of the mesh of its arguments."""
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(case.args))
    meshes: Any = (s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding))
    devices = next((list(mesh.devices.flat) for mesh in meshes), [first])
    axes = topology.count("x") + 1
    return [(*device.coords[:axes], device.core_on_chip) for device in devices]


def _key(text: str, topology: str, flags: str, case: Case, version: str) -> str:
    """A name for all that the result depends on."""
    values = [x.tobytes() for x in jax.tree.leaves(case.args) if isinstance(x, np.ndarray)]
    options = [f"{name}={value}" for name, value in getattr(case, "options", {}).items()]
    parts = (FORMAT, text, topology, flags, case.flops, case.hbm_bytes, version, *options)
    return hashlib.sha256("\0".join(map(str, parts)).encode() + b"\0".join(values)).hexdigest()[:32]


def _keep(place: Path, order: dict[str, Any], case: Case, compiled: jax.stages.Compiled, record: dict):
    """Write what `compile.Program` reads to `place`, whole or not at all."""
    hlo = _hlo(compiled, order["dump"])
    names = list(dict.fromkeys(KERNEL.findall(hlo)))
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    record |= {
        "topology": order["topology"],
        "target": order["target"],
        "arguments": order["arguments"],
        "flops": case.flops,
        "hbm_bytes": case.hbm_bytes,
        "memory": {n: getattr(memory, n) for n in dir(memory) if n.endswith("_in_bytes")},
        "cost": {n: cost[n] for n in ("flops", "bytes accessed", "transcendentals") if n in cost},
        "kernels": names,
        "traced": [],
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="part-", dir=place.parent))
    try:
        texts = {"hlo.txt": hlo} | _listing(order["dump"])
        for kernel in names:
            for name, pattern in KERNEL_KEPT:
                texts[f"{kernel}.{name}.txt"] = _last(
                    order["dump"], pattern.format(name=glob.escape(kernel))
                )
        for name, text in texts.items():
            if text is not None:
                (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode(), 3))
        if names:
            known = kernel_integers(case.function, case.args)
            record["traced"] = [name for name, _ in known]
            arrays = {
                f"{n}|{i}": x for n, (_, integers) in enumerate(known) for i, x in integers.items()
            }
            np.savez_compressed(folder / "integers.npz", **arrays)
        (folder / "program.json").write_text(json.dumps(record))
        os.replace(folder, place)
    except OSError:
        if not place.is_dir():  # else another process was faster with the same
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hlo(compiled: jax.stages.Compiled, dump: str) -> str:
    """The optimized program; from the dump where jaxlib cannot read what a newer libtpu says."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return _last(dump, "*-TLP-hlo.txt") or ""


def _listing(dump: str) -> dict[str, str | None]:
    """The machine code of the whole program in one address space, and where in it each HLO is."""
    found = sorted(glob.glob(os.path.join(glob.escape(dump), "*TLP-*-assembly-pre-overlay.txt")))
    if not found:
        return {}
    program = os.path.basename(found[-1]).partition("-TLP-")[0]
    ranges = sorted(glob.glob(os.path.join(glob.escape(dump), f"{program}-TLP-*-hlo-details.txt")))
    names = {"assembly.txt": found[-1]} | ({"ranges.txt": ranges[0]} if ranges else {})
    return {name: Path(path).read_text(errors="replace") for name, path in names.items()}


def _last(dump: str, pattern: str) -> str | None:
    """The text of the last dump of this name: the final program's, and not of a pass tried before."""
    found = sorted(glob.glob(os.path.join(glob.escape(dump), pattern)))
    found = [path for path in found if "schedule-analysis" not in path and "<late-" not in path]
    return Path(found[-1]).read_text(encoding="utf-8", errors="replace") if found else None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
