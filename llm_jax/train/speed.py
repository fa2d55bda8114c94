"""How fast a run is, what it waits for, and a trace of some of its steps.

    perf/tokens_per_s    tokens of the batches that are not padding
    perf/steps_per_s
    perf/input_wait      share of the time in which the loop waited for a batch
    perf/tflops_per_s    10^12 FLOP/s of the model, all devices: tokens/s * 3 * forward_flops(one token)
    perf/mfu             that over the devices' bfloat16 peak (Chowdhery et al. 2022, appendix B)
    perf/memory_gib      most memory that a device of this host had in use, where the backend tells
    perf/host_memory_gib most resident memory of this process

Where the peak of a device is not in `PEAK_FLOPS`, as for CPUs, there is no perf/mfu; where the task's
model is no transformer, no perf/tflops_per_s either.
"""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.models import Model, Trainable
from llm_jax.models.cost import forward_flops

T = TypeVar("T")

# Dense bfloat16 FLOP/s by jax's device_kind. TPU: cloud.google.com/tpu/docs, the page of each version;
# NVIDIA: data sheets of A100, H100, H200 (SXM) and HGX B200, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # of a core, which is a device there
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
GIB = 1 << 30


class Clock:
    """Rates since the last reading; the first step (compilation) is left out."""

    def __init__(self, model: Trainable, mesh: Mesh):
        self._model, self._mesh = model, mesh
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, and leave the next step out."""
        self._tokens: list[jax.Array] | None = None
        self._length, self._waited, self._since = 0, 0.0, 0.0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, and how long each is waited for."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def count(self, tokens: jax.Array, length: int) -> None:
        """A step with so many tokens, in rows of `length`."""
        if self._tokens is None:
            jax.block_until_ready(tokens)
            self._tokens, self._since, self._waited = [], time.perf_counter(), 0.0
        else:
            self._tokens.append(tokens)
            self._length += length

    def rates(self) -> dict[str, float]:
        """The numbers above. Waits for the steps counted so far."""
        tokens = float(np.sum(jax.device_get(self._tokens))) if self._tokens else 0.0
        steps, seconds = len(self._tokens or ()), time.perf_counter() - self._since
        length, waited = self._length, self._waited
        self._tokens, self._length, self._waited, self._since = [], 0, 0.0, time.perf_counter()
        if not steps:
            return memory()
        numbers = {
            "perf/tokens_per_s": tokens / seconds,
            "perf/steps_per_s": steps / seconds,
            "perf/input_wait": waited / seconds,
        }
        if isinstance(self._model, Model):
            flops = 3 * forward_flops(self._model, 1, length // steps) * tokens / seconds
            numbers["perf/tflops_per_s"] = flops / 1e12
            peak = PEAK_FLOPS.get(self._mesh.devices.flat[0].device_kind)
            if peak is not None:
                numbers["perf/mfu"] = flops / (peak * self._mesh.size)
        return numbers | memory()


class Trace:
    """A profiler's trace of the steps `first` to `last`; leaving the context ends one that runs."""

    def __init__(self, directory: Path, first: int, last: int):
        self._directory, self._first, self._last = directory, first, last
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """`step`, counted from 1, is about to be dispatched."""
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """`step` was dispatched; the last one to be traced is waited for."""
        if self._running and step == self._last:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._running = False


def memory() -> dict[str, float]:
    """Peaks of device and host memory, GiB."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(s.get("peak_bytes_in_use", 0) for s in stats)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    host = {"perf/host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    return host | ({"perf/memory_gib": peak / GIB} if peak else {})
