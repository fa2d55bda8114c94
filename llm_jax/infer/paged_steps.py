"""The jitted half of an engine's step: tokens of many sequences in one row of tokens, by pages.

Letters: D data shards, T tokens of a step, R rows, M pages of a row, S tokens that get logits, V vocab.

    logits, cache = forward(params, cache, last, packed)

A `StepShape` is all that a program is compiled for, so an engine has few. What the host says of a step
is one array, `packed` [D, X] int32, because each transfer has its price: `StepShape.empty()` gives it
to fill in by name, with rows that do nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.cache.paged import StepRows
from llm_jax.kernels.paged_attention.reference import token_rows
from llm_jax.kernels.paged_attention.types import Rows
from llm_jax.models import Model
from llm_jax.sharding import shard


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The sizes that a step is compiled for."""

    tokens: int  # T = rows where every row has one token, else a larger multiple of 16
    rows: int  # R
    samples: int  # S
    pages: int  # M
    pools: int

    @property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Shape of each part of `packed`, for one shard."""
        rows, table = (self.rows,), (self.rows, self.pages)
        return {
            "tokens": (self.tokens,),  # ids; -1 - s: the last one that slot s was given
            "starts": rows,
            "counts": rows,
            "lengths": rows,
            "decodes": (),
            "rows": (),
            "at": (self.samples,),  # which of the tokens get logits
            **{f"table{i}": table for i in range(self.pools)},
        }

    def empty(self, shards: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(`packed` of a step without rows, its parts [D, ...] by name to write into)."""
        packed = np.zeros((shards, sum(map(math.prod, self.fields.values()))), np.int32)
        parts = self._parts(packed)
        parts["counts"][:] = 1
        return packed, parts

    def unpack(self, packed: jax.Array) -> dict[str, jax.Array]:
        """The parts of `packed`, in a jitted function."""
        return self._parts(packed)

    def _parts(self, packed):
        parts, at = {}, 0
        for name, shape in self.fields.items():
            size = math.prod(shape)
            parts[name] = packed[:, at : at + size].reshape(-1, *shape)
            at += size
        return parts


@functools.lru_cache(maxsize=256)
def make_paged_forward(model: Model, shape: StepShape) -> Callable:
    """f(params, cache, last [D, slots] int32, packed [D, X] int32) -> (logits [D, S, V], cache).

    cache: a `PagedCache`, donated. last: the newest token of each slot, which the host may not know yet.
    """

    @functools.partial(jax.jit, donate_argnames="cache")
    def forward(params, cache, last, packed):
        net, parts = model.bind(params), shape.unpack(packed)
        tokens = parts["tokens"]
        known = jnp.take_along_axis(last, jnp.maximum(-1 - tokens, 0), axis=1)
        tokens = jnp.where(tokens >= 0, tokens, known)
        of_rows = [parts[name] for name in ("starts", "counts", "lengths", "decodes", "rows")]
        tables = tuple(parts[f"table{i}"] for i in range(shape.pools))
        positions = jax.vmap(lambda *x: token_rows(Rows(*x), shape.tokens)[1])(tables[0], *of_rows)
        positions = jnp.maximum(positions, 0)
        hidden, context = net(tokens, positions, cache.context(StepRows(tables, *of_rows)))
        hidden = jnp.take_along_axis(hidden, parts["at"][..., None], axis=1)
        return shard(net.unembed(hidden), "batch", None, None), context.cache.constrained()

    return forward
