"""A context that records and patches what stands at named points of the forward (see `ops/taps.py`).

Letters: B batch, T tokens, C tokens that are recorded, P patches at a point, S keys, N query heads.

The model calls `tap` at each point. Only a `TapContext` answers it: with every other context the value
is what it was, so a program without taps has no trace of them. Queries, keys, values, heads and maps
pass through `attend` anyway, and need no call of their own. Where key heads are repeated
(models/key_heads.py), the first of each is recorded and all are patched.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.ops.taps import MAPS, ROUTER, Patch, point_shape
from llm_jax.sharding import shard

Record = tuple[tuple[str, tuple[int, ...]], ...]  # points, and their layers: what a program is made for


def tap(context: Any, point: str, x: jax.Array, layer: jax.Array | int) -> tuple[jax.Array, Any]:
    """(x [B, T, ...] with what patches make of it, the context with what it recorded)."""
    return context.tap(point, x, layer) if isinstance(context, TapContext) else (x, context)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchRows:
    """The patches at one point, each of a run of tokens of one batch row."""

    values: jax.Array  # [B, P, ...] float32
    layers: jax.Array  # [B, P] int32
    first: jax.Array  # [B, P] int32, index among the T tokens
    end: jax.Array  # [B, P] int32; of none it is first
    add: jax.Array  # [B, P] bool, else replace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TapInputs:
    """What a step is told of its taps."""

    keep: jax.Array  # [B, C] int32, which of the T tokens are recorded
    patches: dict[str, PatchRows]  # by point


Span = tuple[int, Patch, int, int]  # batch row, patch, first and end among the T tokens


def pack_patches(
    config: ModelConfig, points: Collection[str], spans: Sequence[Span], batch: int
) -> dict[str, PatchRows]:
    """Spans at these points as arrays, on the host."""
    return {
        point: _pack([span for span in spans if span[1].point == point], config, point, batch)
        for point in sorted(points)
    }


def _pack(spans: Sequence[Span], config: ModelConfig, point: str, batch: int) -> Any:
    """P is a power of two, so that there are few shapes."""
    of_row = [[span for span in spans if span[0] == row] for row in range(batch)]
    most = 1 << (max(4, *map(len, of_row)) - 1).bit_length()
    values = np.zeros((batch, most, *point_shape(config, point)), np.float32)
    layers, first, end = np.zeros((3, batch, most), np.int32)
    add = np.zeros((batch, most), bool)
    for row, its in enumerate(of_row):
        for i, (_, patch, start, stop) in enumerate(its):
            values[row, i], layers[row, i], add[row, i] = patch.value, patch.layer, patch.mode == "add"
            first[row, i], end[row, i] = start, stop
    arrays: Any = (values, layers, first, end, add)
    return PatchRows(*arrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TapContext:
    """Another context, and what is recorded while the model runs with it.

    Maps need a context that has `attention_maps(layer, q, k, keep, positions=, window=, options=)` ->
    [B, C, N, S] float32, called after it attended.
    """

    inner: Any
    given: TapInputs
    records: dict[str, jax.Array]  # by point, [layers, B, C, ...]
    record: Record = dataclasses.field(metadata={"static": True})

    @classmethod
    def begin(
        cls, inner: Any, config: ModelConfig, record: Record, given: TapInputs, keys: int
    ) -> "TapContext":
        """With nothing recorded yet. keys: S of the maps."""
        records = {}
        for point, layers in record:
            wide = point in (MAPS, ROUTER)
            dtype = jnp.float32 if wide else jnp.dtype(config.compute_dtype)
            shape = (len(layers), *given.keep.shape, *point_shape(config, point, keys))
            records[point] = jnp.zeros(shape, dtype)
        return cls(inner, given, records, record)

    def tap(self, point: str, x: jax.Array, layer: jax.Array | int) -> tuple[jax.Array, "TapContext"]:
        """See the function `tap`."""
        if point in self.given.patches:
            x = _patched(x, self.given.patches[point], layer)
        return x, self._recorded(point, layer, _take(x, self.given.keep)) if self._has(point) else self

    def attend(self, layer, q, k, v, *, positions, window, options):
        """See `AttentionContext`."""
        q, context = self.tap("q", q, layer)
        k, context = context.tap("k", k, layer)
        v, context = context.tap("v", v, layer)
        how = {"positions": positions, "window": window, "options": options}
        out, inner = self.inner.attend(layer, q, k, v, **how)
        context = dataclasses.replace(context, inner=inner)
        if self._has(MAPS):
            maps = inner.attention_maps(layer, q, k, self.given.keep, **how)
            context = context._recorded(MAPS, layer, maps)
        return context.tap("heads", out, layer)

    def dropout(self, x, rate, layer, site):
        return self.inner.dropout(x, rate, layer, site)

    def results(self) -> dict[str, jax.Array]:
        """What was recorded, by point, [layers, B, C, ...]."""
        pin = lambda x: shard(x, None, "batch", *(None,) * (x.ndim - 2))  # noqa: E731
        return jax.tree.map(pin, self.records)

    def _has(self, point: str) -> bool:
        return point in self.records

    def _recorded(self, point: str, layer: jax.Array | int, x: jax.Array) -> "TapContext":
        """With x [B, C, ...] of a layer, if that is one of those wanted."""
        here = jnp.asarray(dict(self.record)[point]) == layer
        place = jnp.where(here.any(), jnp.argmax(here), len(here))  # one past the last is dropped
        held = self.records[point]
        if x.ndim == 4:  # heads
            x = x[:, :, :: x.shape[2] // held.shape[3]]
        new = held.at[place].set(x.astype(held.dtype), mode="drop")
        return dataclasses.replace(self, records=self.records | {point: new})


def _take(x: jax.Array, keep: jax.Array) -> jax.Array:
    """[B, C, ...] of [B, T, ...]."""
    return jax.vmap(lambda row, at: row[at])(x, keep)


def _patched(x: jax.Array, patches: PatchRows, layer: jax.Array | int) -> jax.Array:
    """x [B, T, ...], changed where patches of this layer say so and the same in every bit elsewhere."""
    if x.ndim == 4:  # heads
        values = jnp.repeat(patches.values, x.shape[2] // patches.values.shape[2], axis=2)
        patches = dataclasses.replace(patches, values=values)
    token = jnp.arange(x.shape[1])[None, None]
    here = (token >= patches.first[..., None]) & (token < patches.end[..., None])
    here &= (patches.layers == layer)[..., None]  # [B, P, T]
    replaces, adds = here & ~patches.add[..., None], here & patches.add[..., None]
    wide = lambda mask: mask.any(axis=1).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))  # noqa: E731
    chosen = _take(patches.values, jnp.argmax(replaces, axis=1)).astype(x.dtype)
    x = jnp.where(wide(replaces), chosen, x)
    exact = jax.lax.Precision.HIGHEST
    sums = jnp.einsum("bpt,bp...->bt...", adds.astype(jnp.float32), patches.values, precision=exact)
    return jnp.where(wide(adds), x + sums.astype(x.dtype), x)
