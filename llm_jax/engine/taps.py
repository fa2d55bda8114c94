"""What a step records and patches for the requests that want it, and how records of steps become whole.

A step with such rows is run by a program of its own, compiled where it is first needed: for the points
and layers that its requests record together, and the points that they patch. That there are few, it has
the largest shape with or without chunks, and records `FEW` tokens or all. Other steps have the plain
programs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.engine.plan import Row
from llm_jax.ops.tap_context import Record, Span, TapInputs, pack_patches
from llm_jax.ops.taps import MAPS, ONCE, Taps

FEW = 4  # tokens of a step, for which less is held and brought to the host


@dataclasses.dataclass
class StepTaps:
    """The taps of one step."""

    record: Record
    given: TapInputs  # of numpy arrays
    places: dict[tuple[int, int], int]  # (shard, row): where its tokens are among those recorded
    results: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # [layers, D, C, ...]

    def of_row(self, d: int, i: int, count: int, layers: dict[str, tuple[int, ...]]) -> dict:
        """What was recorded of a row's first `count` tokens at these layers, [layers, count, ...]."""
        at, had, found = self.places[d, i], dict(self.record), {}
        for point, wanted in layers.items():
            which = [had[point].index(layer) for layer in wanted]
            found[point] = np.asarray(self.results[point])[which, d, at : at + count]
        return found


def is_tapped(row: Row, taps: Taps | None) -> bool:
    """Whether a row is recorded or patched in its step."""
    return taps is not None and bool(taps.record or any(taps.spans(row.start, row.count, 0)))


def step_taps(
    config: ModelConfig,
    rows: list[list[Row]],
    starts: np.ndarray,
    tokens: int,
    taps: Callable[[Row], Taps | None],
) -> StepTaps | None:
    """The taps of a step's rows, by shard, whose tokens begin at `starts` [D, R]; None without any.

    tokens: T, places of the step for tokens. taps: of a row.
    """
    places: dict[tuple[int, int], int] = {}
    wanted: dict[str, set[int]] = {}
    points: set[str] = set()
    keep: list[list[int]] = [[] for _ in rows]
    spans: list[Span] = []
    for d, i, row in ((d, i, row) for d, of_shard in enumerate(rows) for i, row in enumerate(of_shard)):
        asked, at = taps(row), int(starts[d, i])
        if asked is None or not is_tapped(row, asked):
            continue
        spans += [(d, *span) for span in asked.spans(row.start, row.count, at)]
        points |= {patch.point for patch in asked.patches}
        if asked.record:
            places[d, i] = len(keep[d])
            keep[d] += range(at, at + row.count)
        for point, layers in asked.recorded(config).items():
            wanted.setdefault(point, set()).update(layers)
    if not (wanted or points):
        return None
    record = tuple((point, tuple(sorted(wanted[point]))) for point in sorted(wanted))
    given = TapInputs(_padded(keep, tokens), pack_patches(config, points, spans, len(rows)))
    return StepTaps(record, given, places)


def _padded(keep: list[list[int]], tokens: int) -> Any:
    """[D, C] int32 of each shard's tokens; C is 0, FEW or all."""
    most = max(map(len, keep))
    kept = np.zeros(
        (len(keep), min(FEW, tokens) if 0 < most <= FEW else tokens if most else 0), np.int32
    )
    for d, its in enumerate(keep):
        kept[d, : len(its)] = its
    return kept


class Recorder:
    """What was recorded of one continuation so far, token after token."""

    def __init__(self, taps: Taps, config: ModelConfig):
        self.layers, self.count = taps.recorded(config), 0
        self._pieces: dict[str, list[np.ndarray]] = {point: [] for point in self.layers}

    def add(self, start: int, count: int, found: dict[str, np.ndarray]) -> None:
        """Take in `count` tokens from position `start` on; those that are known are passed over, as
        what a sequence gave up with its pages is computed again.
        """
        assert start <= self.count, f"tokens {self.count} to {start} were not recorded"
        if start + count <= self.count:
            return
        for point, pieces in self._pieces.items():
            new = found[point][:, self.count - start : count]
            pieces.append(new[..., : start + count] if point == MAPS else new)
        self.count = start + count

    def whole(self) -> dict[str, np.ndarray]:
        """By point, [layers, tokens, ...], and see `Output.taps`. Empty if nothing was computed."""
        return {point: self._join(point, pieces) for point, pieces in self._pieces.items() if pieces}

    def _join(self, point: str, pieces: list[np.ndarray]) -> np.ndarray:
        if point != MAPS:
            joined = np.concatenate(pieces, axis=1)
            return joined[0] if point in ONCE else joined
        layers, _, heads, _ = pieces[0].shape
        maps = np.zeros((layers, heads, self.count, self.count), np.float32)
        at = 0
        for piece in pieces:
            maps[:, :, at : at + piece.shape[1], : piece.shape[3]] = piece.swapaxes(1, 2)
            at += piece.shape[1]
        return maps
