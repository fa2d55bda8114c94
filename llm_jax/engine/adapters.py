"""The LoRA adapters of an engine: those it knows, on the host, and those that steps can use.

The device has a fixed number of places (models/adapter_bank.py). An adapter gets one when a request of
it begins, empty or that of the adapter that was used longest ago and has no running request; it is
written there before the next step. Where all places are in use the request waits, and others pass by it.
So that it does not wait forever, it claims the place with the fewest running requests: until it has one,
requests of that place's adapter that rank below it do not begin.
"""

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from llm_jax.checkpoint.peft import load_peft
from llm_jax.config import EngineConfig, nearest
from llm_jax.engine.request import Sequence
from llm_jax.infer.llm import LLM
from llm_jax.models.adapter_bank import AdapterBank, HostChange
from llm_jax.ops.linear import LowRank


class Places:
    """Which adapter is at which of `count` places. No arrays.

    In a step: `begin`, then the schedulers ask `may_begin`; `moved` has what is new, until cleared.
    """

    def __init__(self, count: int):
        self.moved: dict[int, str] = {}
        self._free = list(range(count))
        # Longest unused first.
        self._places: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._claims: dict[int, Sequence] = {}  # place: who waits for it
        self._running: collections.Counter[str] = collections.Counter()  # sequences at most

    def __getitem__(self, name: str) -> int:
        return self._places[name]

    def remove(self, name: str) -> None:
        """An adapter that nothing runs with is no more."""
        if (place := self._places.pop(name, None)) is not None:
            self.moved.pop(place, None)
            self._free.append(place)

    def begin(self, running: Iterable[Sequence]) -> None:
        """A step is to be planned while these run."""
        names = (sequence.request.adapter for sequence in running)
        self._running = collections.Counter(name for name in names if name is not None)
        for name in self._running:
            self._places.move_to_end(name)
        self._claims = {place: each for place, each in self._claims.items() if _waits(each)}

    def may_begin(self, sequence: Sequence) -> bool:
        """Whether a sequence can run now: its adapter, if it has one, has or gets a place."""
        name = sequence.request.adapter
        if name is None:
            return True
        place = self._places.get(name)
        if place is None:
            place = self._vacant(sequence)
            if place is None:
                self._claim(sequence)
                return False
            self._places[name] = place
            self.moved[place] = name
        elif not self._is_open(place, sequence):
            return False
        self._places.move_to_end(name)
        self._running[name] += 1
        return True

    def _is_open(self, place: int, sequence: Sequence) -> bool:
        """Whether nobody who ranks above the sequence waits for a place; its own claim is none."""
        claim = self._claims.get(place)
        return claim is None or not _waits(claim) or claim.rank >= sequence.rank

    def _vacant(self, sequence: Sequence) -> int | None:
        """A place that nothing runs in, taken from the adapter that has it."""
        idle = [place for name, place in self._places.items() if not self._running[name]]
        for place in (*self._free, *idle):
            if self._is_open(place, sequence):
                if place in self._free:
                    self._free.remove(place)
                else:
                    del self._places[next(name for name, p in self._places.items() if p == place)]
                return place
        return None

    def _claim(self, sequence: Sequence) -> None:
        """Have a place that is in use kept for a sequence, one for all that wait for its adapter."""
        name = sequence.request.adapter
        for place, other in self._claims.items():
            if other.request.adapter == name:
                self._claims[place] = min(other, sequence, key=lambda each: each.rank)
                return
        held = ((self._running[name], place) for name, place in self._places.items())
        if may := [pair for pair in held if self._is_open(pair[1], sequence)]:
            self._claims[min(may)[1]] = sequence


class Adapters:
    """The adapters of an engine by name. `params`: what a step takes; the LLM's own without places.

    In a step: `places` are given, then `write`, then `place` of each row. All but `pack` is for the
    engine's lock.
    """

    def __init__(self, llm: LLM, config: EngineConfig):
        self.params, self.swaps, self._llm = llm.params, 0, llm
        self.places, self._bank = Places(config.adapters), None
        self._known: dict[str, HostChange] = {}
        if config.adapters:
            sizes = (config.adapters, config.adapter_rank)
            self._bank = AdapterBank(llm.model, *sizes, llm.mesh, config.adapter_targets)
            self._held = self._bank.init(llm.params)
            self._write = self._bank.make_write(self._held)
            self.params = self._bank.attach(self._held, llm.params)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that requests may name."""
        return tuple(self._known)

    def pack(self, name: str, source: str | Path | Mapping[str, LowRank]) -> HostChange:
        """An adapter as the host keeps it; ValueError where it cannot be served. Takes no lock."""
        if self._bank is None:
            raise ValueError(
                f"adapter {name!r}: this engine has no room for adapters; set EngineConfig.adapters"
            )
        if isinstance(source, str | Path):
            try:
                source = load_peft(source, self._llm.model)
            except ValueError as error:
                raise ValueError(f"adapter {name!r}: {error}") from error
        for path, change in source.items():
            if not isinstance(change, LowRank):
                raise ValueError(
                    f"adapter {name!r} has {type(change).__name__} at {path!r}, expected a LowRank for "
                    "each path, as LoraModel.change and load_peft give them"
                )
        return self._bank.pack(source, name)

    def load(self, name: str, change: HostChange) -> None:
        """Let requests name it. ValueError where the name is in use."""
        if name in self._known:
            raise ValueError(f"adapter {name!r} is loaded already: unload it, or take another name")
        self._known[name] = change

    def unload(self, name: str) -> None:
        """Forget it; no request of it may be left."""
        del self._known[name]
        self.places.remove(name)

    def check(self, name: str | None) -> None:
        """ValueError for one that is not there, with the nearest that is."""
        if name is not None and name not in self._known:
            hint = nearest(name, self._known) if self._known else "; none is: call Engine.load_adapter"
            raise ValueError(f"adapter {name!r} is not loaded{hint}")

    def write(self) -> None:
        """Bring the adapters that got places to the device."""
        if not self.places.moved:
            return
        assert self._bank is not None
        for place, name in self.places.moved.items():
            change = self._bank.padded(self._known[name])
            self._held = self._write(self._held, np.int32(place), change)
            self.swaps += 1
        self.places.moved.clear()
        self.params = self._bank.attach(self._held, self._llm.params)

    def place(self, name: str | None) -> int:
        """Where the adapter of a row is; -1 for none."""
        return -1 if name is None else self.places[name]


def _waits(sequence: Sequence) -> bool:
    return sequence.finished is None and sequence.slot < 0
