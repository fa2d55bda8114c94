"""Quantized matmuls at shapes of models: `python scripts/kernel_report.py --kernel=quantized_matmul`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.cases import KernelCase, sizes
from llm_jax.kernels.chips import ChipRule
from llm_jax.kernels.quantized_matmul.api import quantized_matmul
from llm_jax.kernels.quantized_matmul.plan import CHUNK, Problem, plan_key, plan_rule
from llm_jax.kernels.quantized_matmul.tpu import LANES, Stream, bits_of
from llm_jax.kernels.quantized_matmul.tpu_tiles import Tiles
from llm_jax.kernels.tuning import Tuning, distinct


def case(
    shape: str = "16x4096x14336",
    weights: str = "int8",
    group: int = 0,
    quantize_x: bool = False,
    activation: str | None = None,
    bias: bool = False,
    residual: bool = False,
    dtype: str = "bfloat16",
    implementation: str = "pallas",
    rows: int = 0,
    depth: int = 0,
    columns: int = 0,
    ahead: int = 0,
) -> KernelCase:
    """shape: M x K x N. group: rows of weights with one scale, 0 = one a column.

    columns and depth, with ahead or with rows: the sizes of `tpu.Stream` or of `tpu_tiles.Tiles`; 0 =
    tuned or by the rule.
    """
    m, k, n = sizes(shape, "MKN")
    given = (rows or ahead, depth, columns)
    if (any(given) and not all(given)) or (rows and ahead):
        sizes_given = f"rows={rows}, ahead={ahead}, depth={depth}, columns={columns}"
        raise ValueError(f"{sizes_given}: give depth, columns and one of rows and ahead, or none")
    blocks = Tiles(rows, depth, columns) if rows else Stream(columns, depth, ahead)
    x = jax.ShapeDtypeStruct((m, k), dtype)
    y = jax.ShapeDtypeStruct((m, n), dtype)
    w = jax.ShapeDtypeStruct((k, n), weights)
    scale = jax.ShapeDtypeStruct((k // group, n) if group else (n,), jnp.float32)
    added = {"bias": jax.ShapeDtypeStruct((n,), jnp.float32)} if bias else {}
    added |= {"residual": y} if residual else {}
    function = functools.partial(
        quantized_matmul,
        activation=activation,
        quantize_x=quantize_x,
        implementation=implementation,
        blocks=blocks if all(given) else None,
    )

    def with_added(x, w, scale, *rest):
        return function(x, w, scale, **dict(zip(added, rest, strict=True)))

    arrays = (x, scale, y, *added.values())
    moved = k * n * bits_of(w.dtype) / 8 + sum(a.size * a.dtype.itemsize for a in arrays)
    return KernelCase(with_added, (x, w, scale, *added.values()), 2.0 * m * k * n, moved)


TUNED: tuple[dict[str, Any], ...] = tuple(  # Llama-3-8B: up and gate, down, q k v, o
    {"shape": shape} | weights
    for weights in ({"weights": "int8"}, {"weights": "int4", "group": 128})
    for shape in ("16x4096x14336", "16x14336x4096", "16x4096x6144", "16x4096x4096")
)


def tuning(
    rule: ChipRule,
    shape: str,
    weights: str = "int8",
    group: int = 0,
    quantize_x: bool = False,
    dtype: str = "bfloat16",
) -> Tuning:
    """Blocks to try, of such a `case`: of the kernel that the rule takes."""
    m, k, n = sizes(shape, "MKN")
    problem = Problem(m, k, n, group or k, jnp.dtype(dtype), jnp.dtype(weights), quantize_x)
    blocks = plan_rule(problem, rule)
    tried: list[Stream | Tiles] = [blocks]
    change = functools.partial(dataclasses.replace, blocks)
    widths = [w for w in range(LANES, min(n, 4096) + 1, LANES) if n % w == 0]
    tried += [change(columns=max([w for w in widths if w < blocks.columns], default=blocks.columns))]
    tried += [change(columns=min([w for w in widths if w > blocks.columns], default=blocks.columns))]
    if isinstance(blocks, Stream):
        tried += [change(depth=max(blocks.depth // 2 // CHUNK * CHUNK, CHUNK))]
        tried += [change(depth=blocks.depth * 2), change(ahead=max(blocks.ahead - 1, 2))]
    else:
        tried += [change(rows=max(blocks.rows // 2, min(32, m)))]
    options = {"shape": shape, "weights": weights, "group": group, "quantize_x": quantize_x}
    candidates = distinct([dataclasses.asdict(b) for b in tried])
    return Tuning(plan_key(problem), options | {"dtype": dtype}, candidates)
