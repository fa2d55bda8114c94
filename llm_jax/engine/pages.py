"""The pages of one pool: who uses them, which are free, which the prefix cache may give up.

A page is free, used by some sequences, or idle: kept by the prefix cache while no sequence uses it. Idle
pages are as good as free ones: `allocate` takes those idle for longest when the free ones run out. So
nothing here searches, and `available` is a sum of two numbers. `HostPages` does the same for copies of
pages in host memory.
"""

import collections
import dataclasses
from collections.abc import Callable

SCRATCH = 0  # the page that padding rows point at; never given out


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """A pool of device pages, the scratch page too. window: tokens that a query sees; 0 = all."""

    pages: int
    window: int = 0


class OutOfPages(RuntimeError):
    """More pages were asked for than are free or idle."""


class PagePool:
    """Counts the users of pages 1..pages-1."""

    def __init__(self, pages: int):
        if pages < 2:
            raise ValueError(
                f"pages={pages}: a pool needs at least 2, as page {SCRATCH} is never given out"
            )
        self.pages = pages
        self.evict: Callable[[int], None] | None = None  # by the prefix cache: must drop the page
        self._users = [0] * pages
        self._kept = [False] * pages
        self._free = list(range(pages - 1, SCRATCH, -1))  # a stack, low ids on top
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # longest idle first

    @property
    def free(self) -> int:
        """Pages that nobody uses or keeps."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that `allocate` can give: the free and the idle ones."""
        return len(self._free) + len(self._idle)

    def allocate(self, n: int) -> list[int]:
        """n pages with one user each; OutOfPages (and nothing changed) where fewer are available."""
        if n > self.available:
            raise OutOfPages(f"{n} pages asked for, {self.available} of {self.pages - 1} available")
        while len(self._free) < n:
            assert self.evict is not None, "only a cache keeps pages"
            self.evict(next(iter(self._idle)))
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, page: int) -> None:
        """One more user of a page that is in use or idle."""
        if not self.references(page):
            raise ValueError(f"page {page} is free: allocate it before it is shared")
        self._idle.pop(page, None)
        self._users[page] += 1

    def release(self, page: int) -> None:
        """One user less; the last one leaves the page idle where the cache keeps it, else free."""
        if not self._users[page]:
            raise ValueError(f"page {page} has no user left: it was released twice")
        self._users[page] -= 1
        if self._users[page]:
            return
        if self._kept[page]:
            self._idle[page] = None
        else:
            self._free.append(page)

    def references(self, page: int) -> int:
        """Users of a page, the prefix cache counted as one."""
        return self._users[page] + self._kept[page]

    def is_idle(self, page: int) -> bool:
        """Whether only the prefix cache holds the page."""
        return page in self._idle

    def keep(self, page: int) -> None:
        """The prefix cache holds a page that is in use."""
        if not self._users[page] or self._kept[page]:
            raise ValueError(f"page {page} is free or already kept: the cache keeps pages in use, once")
        self._kept[page] = True

    def drop(self, page: int) -> None:
        """The prefix cache lets go of a page; free now if nobody uses it."""
        if not self._kept[page]:
            raise ValueError(f"page {page} is not kept: it was dropped twice")
        self._kept[page] = False
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)


class HostPages:
    """Host pages of one pool: held by preempted sequences, or kept by the prefix cache, which gives way.

    A page that a restore reads can be written again only in a later step, as the offloads of a step go
    before its restores. So it rests until `settle`.
    """

    def __init__(self, pages: int, most_kept: int):
        self.evict: Callable[[int], None] | None = None  # by the prefix cache: must drop the page
        self._most_kept = most_kept
        self._free = list(range(pages))
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()  # oldest first
        self._resting: list[int] = []

    @property
    def available(self) -> int:
        """Pages that `take` can give: the free and the kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Pages of the prefix cache."""
        return len(self._kept)

    def take(self, n: int) -> list[int]:
        """n pages for a sequence; OutOfPages (and nothing changed) where fewer are available."""
        if n > self.available:
            raise OutOfPages(f"{n} host pages asked for, {self.available} available")
        while len(self._free) < n:
            self._evict_oldest()
        return [self._free.pop() for _ in range(n)]

    def release(self, page: int) -> None:
        """A sequence needs a page no more."""
        self._free.append(page)

    def make_room(self) -> bool:
        """Whether the prefix cache may keep one page more, be it instead of its oldest, which goes."""
        if len(self._kept) < self._most_kept and self._free:
            return True
        if not self._kept:
            return False
        self._evict_oldest()
        return True

    def keep(self) -> int:
        """A page for the prefix cache, after `make_room`."""
        page = self._free.pop()
        self._kept[page] = None
        return page

    def drop(self, page: int) -> None:
        """The prefix cache lets go of a page."""
        del self._kept[page]
        self._free.append(page)

    def rest(self, page: int) -> None:
        """Who had a page has it restored, in the plan that is being made."""
        self._kept.pop(page, None)
        self._resting.append(page)

    def settle(self) -> None:
        """The plan is made: pages that its restores read are free for the next one."""
        self._free += self._resting
        self._resting = []

    def _evict_oldest(self) -> None:
        assert self.evict is not None, "only a cache keeps pages"
        self.evict(next(iter(self._kept)))
