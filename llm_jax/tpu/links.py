"""How long devices of a slice take to exchange something, by the links between their chips.

The chips of a slice are the points of a box of two or three axes. Each is linked to its neighbours, and
along a closed axis the last to the first. A group of devices that exchange fills a part of that box.
Each chip must get (m - 1) / m of what an all-gather makes, over the links that it has inside the group:
one along an open axis, where the chips at its ends have no more, two along a closed one. The slowest
chip sets the time. A reduce-scatter is an all-gather backwards, an all-reduce is both; an all-to-all
waits for the middle of the longest axis. (jax-ml.github.io/scaling-book, "Sharded matrices".)

Sources of the figures: the pages v4, v5e, v5p, v6e and tpu7x of cloud.google.com/tpu/docs. They give
bytes a second of all links of a chip together: of v4 (6 links) and v5e (4) in one direction, 2400 and
1600 Gbit/s; of v5p (6), v6e (4) and tpu7x (6) in both, 1200, 800 and 1200 GB/s.
"""

import dataclasses
import math

from llm_jax.tpu.hlo import Collective

HOP_S = 0.5e-6  # from a chip to its neighbour, with the start of the exchange: assumed, not published
SHARE = 0.9  # of a link's bandwidth that exchanges reach (scaling-book, "How to think about TPUs")
INSIDE = 6.0  # tpu7x: between the two devices of a chip, times the bandwidth of a link


@dataclasses.dataclass(frozen=True)
class Links:
    """Of one generation. axes: of the box; bandwidth: bytes a second of a link in one direction."""

    axes: int
    bandwidth: float
    devices: int = 1  # of JAX, on a chip

    def closed(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which axes of a slice are closed: with two axes those of 16, a whole pod's; with three all
        where each is a multiple of 4, as optical switches join cubes of 4 x 4 x 4.
        """
        if self.axes == 2:
            return tuple(n == 16 for n in shape)
        return (all(n % 4 == 0 for n in shape),) * len(shape)


LINKS = {
    "v4": Links(3, 50e9),
    "v5e": Links(2, 50e9),
    "v5p": Links(3, 100e9),
    "v6e": Links(2, 100e9),
    "tpu7x": Links(3, 100e9, devices=2),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """The devices of a program on a slice such as "v5e:4x4".

    coords: of each device in the order of the program: its chip's, and which device of the chip it is.
    """

    topology: str
    coords: tuple[tuple[int, ...], ...]

    @property
    def links(self) -> Links:
        """Of the generation. Raises ValueError for one that is not known."""
        name = self.topology.partition(":")[0]
        if name not in LINKS:
            raise ValueError(f"topology={self.topology!r}: expected one of {', '.join(LINKS)}")
        return LINKS[name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis."""
        return tuple(int(n) for n in self.topology.partition(":")[2].split("x"))

    def seconds(self, exchange: Collective) -> float:
        """Of one exchange by all groups at the same time: the slowest group's."""
        if exchange.kind == "collective-permute":
            return self._permute(exchange)
        groups = exchange.groups or (tuple(range(len(self.coords))),)
        alike = {self._extents(group): group for group in groups}
        return max(self._group(exchange, group) for group in alike.values())

    def _extents(self, group: tuple[int, ...]) -> tuple[int, ...]:
        """How many places its devices have along each axis, and on a chip."""
        return tuple(len(set(axis)) for axis in zip(*(self.coords[i] for i in group), strict=True))

    def _group(self, exchange: Collective, group: tuple[int, ...]) -> float:
        if len(group) < 2:
            return 0.0
        *extents, inside = self._extents(group)
        link = self.links.bandwidth * SHARE
        chips = math.prod(extents)
        if chips == 1:
            return _rounds(exchange) * (exchange.bytes * (inside - 1) / inside / (link * INSIDE) + HOP_S)
        if inside < self.links.devices:  # the chips' other devices take the same links meanwhile
            link /= self.links.devices
        ways, hops, longest = 0, 0, 0.0
        for size, whole, closed in zip(extents, self.shape, self.links.closed(self.shape), strict=True):
            if size > 1:
                ring = closed and size == whole
                ways += 2 if ring else 1
                hops += size // 2 if ring else size - 1
                longest = max(longest, size / (8 if ring else 4))
        if exchange.kind == "all-to-all":
            return exchange.bytes * longest / link + hops * HOP_S
        once = exchange.bytes * (chips - 1) / chips / (link * ways)
        return _rounds(exchange) * (once + hops * HOP_S)

    def _permute(self, exchange: Collective) -> float:
        """Each sends to one other. The farthest sets the time: what lies between shares its links."""
        closed, farthest = self.links.closed(self.shape), 0
        for source, target in exchange.groups:
            along = zip(self.coords[source], self.coords[target], self.shape, closed, strict=False)
            steps = (min(abs(a - b), n - abs(a - b)) if ring else abs(a - b) for a, b, n, ring in along)
            farthest = max(farthest, sum(steps))
        link = self.links.bandwidth * SHARE * (1 if farthest else INSIDE)
        return max(farthest, 1) * (exchange.bytes / link + HOP_S)


def _rounds(exchange: Collective) -> int:
    return 2 if exchange.kind == "all-reduce" else 1
