"""What our kernels cost in a step: from their operands, and from how long the sequences are.

The shares of the limits are those that the count of their machine code found (docs/kernels.md), the same
for every model here. A kernel that is not in these tables counts as the time model counts what it does
not know.
"""

import dataclasses
import math

from llm_jax.tpu.hlo import Array, Operation
from llm_jax.tpu.timing import GENERATIONS, KernelCost

# Share of the bfloat16 peak, and of HBM's bandwidth, by generation.
PEAK = {
    "flash_attention": (0.65, 0.81, 0.81, 0.44, 0.45),
    "flash_attention_keys": (0.54, 0.87, 0.87, 0.45, 0.46),
    "flash_attention_queries": (0.54, 0.87, 0.87, 0.45, 0.46),
    "paged_chunk": (0.66, 0.89, 0.92, 0.42, 0.43),
    "quantized_matmul": (0.88, 0.98, 0.98, 0.95, 0.98),
    # On units that multiply integers, where there are such.
    "quantized_matmul, 8-bit rows": (0.87, 1.95, 1.93, 1.72, 0.98),
    "grouped_matmul": (0.95, 0.98, 0.98, 0.78, 0.94),
    "grouped_matmul_weights": (0.95, 0.98, 0.98, 0.78, 0.94),
}
HBM = {
    "paged_decode": (0.98, 0.99, 0.98, 0.99, 0.99),
    "paged_decode, 8 bits": (0.25, 0.95, 0.93, 0.95, 0.87),
    "paged_write": (0.33, 0.85, 0.47, 0.68, 0.41),
    "quantized_matmul": (0.82, 0.97, 0.93, 0.96, 0.92),
    "quantized_matmul, 8-bit rows": (0.82, 0.97, 0.93, 0.96, 0.92),
}
SECOND = 0.9  # share of the limit that is not the kernel's usual one


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Tokens that a query sees: `decode` of a single token, `prefill` of a prompt's on average.

    windows: of each layer, 0 = none; layers count by their average, as one program runs them all.
    experts, chosen: of a mixture, how many there are and go through each token, all as often.
    """

    decode: int
    prefill: float
    windows: tuple[int, ...]
    experts: int = 0
    chosen: int = 0

    def seen(self, tokens: float) -> float:
        """Of so many, on average over layers."""
        return sum(min(tokens, w) if w else tokens for w in self.windows) / len(self.windows)

    def used(self, held: int, rows: int) -> float:
        """How many of the experts that are held some token chose, of so many rows of choices."""
        return held * (1 - (1 - self.chosen / self.experts) ** (rows / self.chosen))


def kernel_cost(x: Operation, generation: str, traffic: Traffic) -> KernelCost | None:
    """The cost of a kernel of llm_jax/kernels on a device; None for another."""
    known = COSTS.get(x.kernel)
    if known is None:
        return None
    flops, moved, name = known(x, traffic)
    return at_share(name, generation, flops, moved)


def at_share(name: str, generation: str, flops: float, moved: float) -> KernelCost:
    """The cost of a kernel that computes and moves so much, at the shares that it reaches."""
    at = GENERATIONS.index(generation)
    share = lambda table: table[name][at] if name in table else SECOND  # noqa: E731
    return KernelCost(flops, moved, share(PEAK), share(HBM))


def _decode(x: Operation, traffic: Traffic) -> tuple[float, float, str]:
    pool, queries = _pool(x), _of_rank(x.given, 3)[0]
    tokens = queries.dims[0] * traffic.seen(traffic.decode)
    eight = pool.dtype not in ("bf16", "f16", "f32")
    name = "paged_decode, 8 bits" if eight else "paged_decode"
    return 4 * math.prod(queries.dims[1:]) * tokens, tokens * _token_bytes(x), name


def _chunk(x: Operation, traffic: Traffic) -> tuple[float, float, str]:
    queries = _of_rank(x.given, 2, floating=True)[0]
    seen = traffic.seen(traffic.prefill)
    blocks = queries.dims[0] / 512  # each reads the keys again
    moved = 2 * queries.bytes + blocks * seen * _token_bytes(x)
    return 4 * math.prod(queries.dims) * seen, moved, "paged_chunk"


def _write(x: Operation, traffic: Traffic) -> tuple[float, float, str]:
    del traffic
    new = _of_rank(x.given, 2, floating=True)[:2]
    return 0.0, 2 * sum(a.bytes for a in new), "paged_write"


def _flash(x: Operation, traffic: Traffic) -> tuple[float, float, str]:
    queries, keys = _of_attention(x)[:2]
    return _attention(queries, keys, traffic, 2), _moved(x), "flash_attention"


def _flash_keys(x: Operation, traffic: Traffic) -> tuple[float, float, str]:
    _, queries, keys = _of_attention(x)[:3]  # keys with their tokens last come first
    products = 5 if len(x.made) > 2 else 4  # with or without the queries' gradient
    return _attention(queries, keys, traffic, products), _moved(x), "flash_attention_keys"


def _flash_queries(x: Operation, traffic: Traffic) -> tuple[float, float, str]:
    _, queries, keys = _of_attention(x)[:3]
    return _attention(queries, keys, traffic, 3), _moved(x), "flash_attention_queries"


def _of_attention(x: Operation) -> list[Array]:
    return [a for a in x.given if a.dtype in FLOATING and len(a.dims) >= 3]


def _attention(queries: Array, keys: Array, traffic: Traffic, products: int) -> float:
    """Of so many products of queries and keys [B, K, S, H]; a causal mask leaves half of them."""
    return products * 2 * math.prod(queries.dims) * traffic.seen(keys.dims[2]) / 2


def _quantized(x: Operation, traffic: Traffic) -> tuple[float, float, str]:
    del traffic
    given = [a for a in x.given if len(a.dims) >= 2]
    weight = next(a for a in given if len(a.dims) == 3)
    rows = next(a for a in given if len(a.dims) == 2)
    depth, columns = weight.dims[1:]
    moved = depth * columns * weight.bytes / math.prod(weight.dims) + rows.bytes + _bytes(x.made)
    name = "quantized_matmul" if rows.dtype in FLOATING else "quantized_matmul, 8-bit rows"
    return 2.0 * rows.dims[0] * depth * columns, moved, name


def _grouped(x: Operation, traffic: Traffic) -> tuple[float, float, str]:
    """The rows of all experts are there, those of the ones held are multiplied: see ops/experts.py."""
    sizes, _, rows, weights = x.given[:4]
    held, matrix = sizes.dims[0], weights.bytes / weights.dims[0]
    mine = held / traffic.experts
    columns = x.made[0].dims[1]
    moved = traffic.used(held, rows.dims[0]) * matrix + mine * _bytes((rows, *x.made))
    return mine * 2.0 * rows.dims[0] * rows.dims[1] * columns, moved, "grouped_matmul"


def _grouped_weights(x: Operation, traffic: Traffic) -> tuple[float, float, str]:
    left, right = _of_rank(x.given, 2, floating=True)[:2]
    mine = x.made[0].dims[0] / traffic.experts
    flops = mine * 2.0 * left.dims[0] * left.dims[1] * right.dims[1]
    return flops, mine * _bytes((left, right)) + _bytes(x.made), "grouped_matmul_weights"


COSTS = {
    "paged_decode": _decode,
    "paged_chunk": _chunk,
    "paged_write": _write,
    "flash_attention": _flash,
    "flash_attention_keys": _flash_keys,
    "flash_attention_queries": _flash_queries,
    "quantized_matmul": _quantized,
    "grouped_matmul": _grouped,
    "grouped_matmul_weights": _grouped_weights,
}
FLOATING = ("bf16", "f16", "f32")


def _of_rank(given: tuple[Array, ...], rank: int, floating: bool = False) -> list[Array]:
    return [a for a in given if len(a.dims) == rank and (a.dtype in FLOATING or not floating)]


def _pool(x: Operation) -> Array:
    """The pages [L, P, 2, Z, K H]."""
    return _of_rank(x.given, 5)[0]


def _token_bytes(x: Operation) -> float:
    """Keys and values of a token in one layer, and their scales [L, P, X, 128]."""
    pool = _pool(x)
    layers, pages, _, page, _ = pool.dims
    return sum(a.bytes for a in (pool, *_of_rank(x.given, 4))) / (layers * pages * page)


def _bytes(arrays: tuple[Array, ...]) -> float:
    return sum(a.hbm for a in arrays)


def _moved(x: Operation) -> float:
    return _bytes((*x.given, *x.made))
