"""What a request may look into and change inside the model: `Taps`, checked when made. Host only.

Letters: D embed, N query heads, K key/value heads, H head dim, E experts.

    point       shape        what it is
    embed       [D]          what enters the first layer
    q           [N, H]       queries, after their norm and rotation
    k, v        [K, H]       keys, likewise, and values: what the cache holds, each head once
    attn_probs  [N, keys]    the attention map; it cannot be patched
    heads       [N, H]       each head's mix of values, before the output projection
    attn_out    [D]          what attention gives, before a norm that may follow and the residual sum
    router      [E]          the router's logits, whose largest choose the experts of the token
    mlp_out     [D]          what the feed-forward layer gives, likewise
    resid       [D]          the residual stream after the layer
    final       [D]          what logits are computed from, after the last norm

`embed` and `final` are of the model, the others of each layer. `ops/tap_context.py` does it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.config.checks import choice

ONCE = ("embed", "final")
MAPS = "attn_probs"
ROUTER = "router"
POINTS = ("embed", "q", "k", "v", MAPS, "heads", "attn_out", ROUTER, "mlp_out", "resid", "final")
MODES = ("replace", "add")


@dataclasses.dataclass(frozen=True, eq=False)
class Patch:
    """One change of what stands at a point. ValueError names the field that cannot be.

    Attributes:
        point: one of POINTS, but for "attn_probs".
        value: an array of the point's shape, finite; it is rounded to the model's dtype.
        layer: which one, from 0; 0 for "embed" and "final".
        position: of the token, in prompt and answer from 0; None = every token.
        mode: "replace" what is there, or "add" to it. Those that replace go first.
    """

    point: str
    value: Any
    layer: int = 0
    position: int | None = None
    mode: str = "replace"

    def __post_init__(self):
        _check_point("Patch.point", self.point)
        if self.point == MAPS:
            raise ValueError(f"Patch.point={MAPS!r}: maps are read only; patch 'heads' or 'attn_out'")
        choice("Patch.mode", self.mode, MODES)
        _check_number("Patch.layer", self.layer)
        if self.position is not None:
            _check_number("Patch.position", self.position)
        if self.point in ONCE and self.layer:
            raise ValueError(f"Patch.layer={self.layer} of {self.point!r}: it is of no layer; use 0")
        value = np.asarray(self.value, np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"Patch.value at {self.point!r} has nan or inf: expected finite numbers")
        object.__setattr__(self, "value", value)


@dataclasses.dataclass(frozen=True)
class Taps:
    """What is recorded of one request, and what is changed in it.

    Attributes:
        record: points whose values come back, with all tokens that were inputs.
        layers: the layers that are recorded, in this order; None = all.
        patches: `Patch`es, of any layers.
    """

    record: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    patches: tuple[Patch, ...] = ()

    def __post_init__(self):
        if isinstance(self.record, str):
            raise ValueError(f"Taps.record={self.record!r}: expected a tuple, ({self.record!r},)")
        for point in self.record:
            _check_point("Taps.record", point)
        for layer in self.layers or ():
            _check_number("Taps.layers", layer)
        for name in ("record", "layers"):
            values = getattr(self, name)
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"Taps.{name}={values}: expected each of them once")
        if self.layers == ():
            raise ValueError("Taps.layers=(): expected layers, or None for all of them")
        if not (self.record or self.patches):
            raise ValueError("Taps(): expected something in record or patches; use None for no taps")
        replaced = [(p.point, p.layer, p.position) for p in self.patches if p.mode == "replace"]
        for i, (point, layer, position) in enumerate(replaced):
            others = {p[2] for p in replaced[:i] if p[:2] == (point, layer)}
            if others and (position is None or None in others or position in others):
                raise ValueError(
                    f"Taps.patches replace {point!r} of layer {layer} twice at position={position}: "
                    "keep one, or mode='add'"
                )

    def check(self, config: ModelConfig, tokens: int) -> None:
        """ValueError where the model has no such layer or shape, or so many tokens no such position."""
        if not config.num_experts:
            for name, points in (
                ("Taps.record", self.record),
                ("Patch.point", [p.point for p in self.patches]),
            ):
                if ROUTER in points:
                    raise ValueError(
                        f"{name}={ROUTER!r}: the model has no experts to choose among; leave it out"
                    )
        last = config.num_layers - 1
        for name, layers in (
            ("Taps.layers", self.layers or ()),
            ("Patch.layer", [p.layer for p in self.patches]),
        ):
            for layer in layers:
                if layer > last:
                    raise ValueError(f"{name}={layer}: expected a layer from 0 to {last}")
        for patch in self.patches:
            shape = point_shape(config, patch.point)
            if patch.value.shape != shape:
                raise ValueError(
                    f"Patch.value at {patch.point!r} has shape {patch.value.shape}: expected {shape}"
                )
            if patch.position is not None and patch.position >= tokens:
                raise ValueError(
                    f"Patch.position={patch.position}: expected less than {tokens}, the tokens that are "
                    "ever inputs (those of the prompt, and all new ones but the last)"
                )

    def spans(self, start: int, count: int, at: int) -> Iterator[tuple[Patch, int, int]]:
        """(patch, first, end) for `count` tokens from position `start`, which stand at `at` and on."""
        for patch in self.patches:
            if patch.position is None:
                yield patch, at, at + count
            elif start <= patch.position < start + count:
                place = at + patch.position - start
                yield patch, place, place + 1

    def recorded(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The layers of each recorded point; (0,) of those that are of the model."""
        layers = self.layers or tuple(range(config.num_layers))
        return {point: (0,) if point in ONCE else layers for point in self.record}


def point_shape(config: ModelConfig, point: str, keys: int = 0) -> tuple[int, ...]:
    """Shape of what stands at a point for one token, with so many keys to attend to."""
    if point in ("q", "heads"):
        return config.num_heads, config.head_dim
    if point in ("k", "v"):
        return config.num_kv_heads, config.head_dim
    if point == ROUTER:
        return (config.num_experts,)
    return (config.num_heads, keys) if point == MAPS else (config.embed_dim,)


def _check_point(field: str, point: str) -> None:
    choice(field, point, POINTS)


def _check_number(field: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"{field}={value!r}: expected a number from 0 on")
