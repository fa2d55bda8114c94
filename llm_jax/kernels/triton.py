"""Pallas' Triton backend, in which the GPU kernels are written. jax 0.12 warns that a later one will not
have it: `plgpu` is None then, and `choice.kernel_refusal` says so.
"""

import importlib
from typing import Any

try:
    plgpu: Any = importlib.import_module("jax.experimental.pallas.triton")
except ImportError:
    plgpu = None
