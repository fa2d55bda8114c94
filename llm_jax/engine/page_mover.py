"""Pages of the caches in the memory of the host, and all that moves pages before a step."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from llm_jax.engine.pages import SCRATCH
from llm_jax.engine.plan import StepPlan
from llm_jax.engine.programs import WRITTEN, Caches, Programs

TAKEN = 4  # batches of pages that may be on their way to the host; they take device memory


class PageMover:
    """Copies pages as plans say: within the device, to the host and back."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._host: dict[tuple[int, int, int], list[np.ndarray]] = {}  # by shard, pool, host page
        self._taken: collections.deque[tuple[int, np.ndarray, Any]] = collections.deque()

    def move(self, plans: list[StepPlan | None], caches: Caches) -> Caches:
        """The caches as the plans want them before their rows."""
        self._land()
        for pool in range(len(caches[0].pools)):
            of_pool = lambda name, pool=pool: [  # noqa: E731
                [pair for p, *pair in getattr(plan, name) if p == pool] if plan else [] for plan in plans
            ]
            for pairs in _batches(of_pool("offloads")):
                content = self._programs.take_pages(pool)(caches, pairs[..., 0].copy())
                for array in jax.tree.leaves(content):
                    array.copy_to_host_async()
                self._taken.append((pool, pairs[..., 1], content))
                self._land(TAKEN)
            for pairs in _batches(of_pool("copies"), SCRATCH):
                copy = self._programs.copy_pages(pool)
                caches = copy(caches, pairs[..., 0].copy(), pairs[..., 1].copy())
            for pairs in _batches(of_pool("restores")):
                self._land()
                content = self._kept(pool, pairs[..., 1], caches)
                caches = self._programs.put_pages(pool)(caches, pairs[..., 0].copy(), content)
        return caches

    def _land(self, left: int = 0) -> None:
        """Wait for pages on their way to the host, but for the `left` newest batches.

        A plan's arrive while its step runs; so the next step is still planned beside it.
        """
        while len(self._taken) > left:
            pool, hosts, content = self._taken.popleft()
            self._keep(pool, hosts, jax.tree.map(np.asarray, content))

    def _keep(self, pool: int, hosts: np.ndarray, content: Any) -> None:
        """Pages of a pool, [L, D n, ...], in host memory as `hosts` [D, n]; -1 is none."""
        for i, (d, n) in enumerate(np.ndindex(hosts.shape)):
            if hosts[d, n] >= 0:
                self._host[d, pool, int(hosts[d, n])] = [
                    x[:, i].copy() for x in jax.tree.leaves(content)
                ]

    def _kept(self, pool: int, hosts: np.ndarray, caches: Caches) -> Any:
        """What `_keep` was given."""
        places = [(d, pool, int(hosts[d, n])) for d, n in np.ndindex(hosts.shape)]
        none = next(self._host[place] for place in places if place in self._host)
        pages = [self._host.get(place, none) for place in places]
        arrays = [np.stack(parts, axis=1) for parts in zip(*pages, strict=True)]
        pools = tuple(cache.pools[pool] for cache in caches)
        return jax.tree.unflatten(jax.tree.structure(pools), arrays)


def _batches(pairs: list[list], fill: int = -1) -> Iterator[np.ndarray]:
    """Pairs of pages of each shard as [D, n, 2] arrays of one size, the rest (0, fill)."""
    for first in range(0, max(map(len, pairs)), WRITTEN):
        batch = np.full((len(pairs), WRITTEN, 2), (SCRATCH, fill), np.int32)
        for d, of_shard in enumerate(pairs):
            part = of_shard[first : first + WRITTEN]
            batch[d, : len(part)] = np.array(part, np.int32).reshape(-1, 2)
        yield batch
