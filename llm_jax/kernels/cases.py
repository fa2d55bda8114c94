"""Kernels at the shapes that models use, for the laboratory, tests and tuning.

A case is what `llm_jax.tpu` compiles: a function, its arguments as shapes or, where they steer the
kernel, as arrays, and what its result needs at least.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class KernelCase(NamedTuple):
    """function(*args) needs `flops` operations and `hbm_bytes` of traffic at least; 0 = not known."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    flops: float = 0.0
    hbm_bytes: float = 0.0


def sizes(shape: str, letters: str) -> tuple[int, ...]:
    """(1, 32, 8) of "1x32x8" with the letters "BNK". Raises ValueError for another number of sizes."""
    try:
        found = tuple(int(n) for n in shape.split("x"))
    except ValueError:
        found = ()
    if len(found) != len(letters) or min(found, default=0) < 1:
        raise ValueError(
            f"shape={shape!r}: expected {'x'.join(letters)}, such as {'x'.join('1' * len(letters))}"
        )
    return found
