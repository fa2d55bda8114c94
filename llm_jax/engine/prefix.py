"""Pages of tokens that were computed before, found again by the tokens: a radix tree of whole pages.

A node stands for one page of tokens after those of its parents, and names the page of every pool that
holds their keys and values; a root stands for an adapter. Sequences leave their pages here as they are
filled (`insert`), and a new one begins with those of its longest known prefix (`match`, `use`).

Kept pages that no sequence uses are idle (pages.py), and the pool evicts them by itself, idle for
longest first. A sequence releases its last page first, so leaves go before their parents. Without its
page in a pool of full attention a node is of no use, nor is what lies below: they leave the tree
together. Without one in a pool with a window it still is: tokens far enough after it do not see it.

With a host tier the content of an evicted page goes to a host page, and its node stays. When a sequence
begins with it (`use`) it comes back, to a device page that is shared as before. A node has a page of a
pool on the device or on the host, never on both. The host pages that came first are forgotten first.
"""

import dataclasses
import functools
from collections.abc import Sequence

from llm_jax.engine.pages import HostPages, PagePool, PoolSpec


@dataclasses.dataclass
class PrefixStatistics:
    """Counts since the start."""

    queries: int = 0  # sequences that began with `use`
    query_tokens: int = 0
    hit_tokens: int = 0  # of those, taken from here
    host_hit_tokens: int = 0  # of those, by pages that were on the host
    evictions: int = 0  # device pages, of all pools
    offloaded: int = 0  # of those, to host pages
    restored: int = 0  # host pages, to device pages
    dropped: int = 0  # host pages that were forgotten, or computed again


class Node:
    """A page of tokens. parent: None for a root, and for a node that has left the tree."""

    __slots__ = ("children", "depth", "hosts", "key", "pages", "parent")

    def __init__(self, key: tuple[int, ...], parent: "Node | None", pools: int):
        self.key = key
        self.parent = parent
        self.depth = parent.depth + 1 if parent else 0
        self.pages = [-1] * pools
        self.hosts = [-1] * pools
        self.children: dict[tuple[int, ...], Node] = {}

    def has(self, pool: int) -> bool:
        """Whether its keys and values of a pool are anywhere."""
        return self.pages[pool] >= 0 or self.hosts[pool] >= 0

    @property
    def empty(self) -> bool:
        """Whether it is a leaf without a page."""
        return not self.children and max(self.pages) < 0 and max(self.hosts) < 0


@dataclasses.dataclass(frozen=True)
class Match:
    """What is there of a sequence that is to begin: so many tokens, in pages by pool."""

    tokens: int
    pages: list[list[int]]  # -1: on the host, or not seen from there on
    hosts: list[list[int]]  # as long as `pages`; -1: not on the host, or not seen
    nodes: Sequence[Node] = ()  # of each page, where the prefix cache has found it


class PrefixCache:
    """The tree over the pages of `pools`, one of each spec, and over the `hosts` pages of each."""

    def __init__(
        self,
        page_size: int,
        specs: Sequence[PoolSpec],
        pools: Sequence[PagePool],
        hosts: Sequence[HostPages],
    ):
        self.page_size = page_size
        self.statistics = PrefixStatistics()
        self._windows = [spec.window for spec in specs]
        self._pools, self._hosts = pools, hosts
        self._roots: dict[str | None, Node] = {}
        self._owner: list[dict[int, Node]] = [{} for _ in pools]
        self._host_owner: list[dict[int, Node]] = [{} for _ in pools]
        self._offloads: dict[tuple[int, int], int] = {}  # of the next `moves`: pool, host: device page
        self._restores: list[tuple[int, int, int]] = []
        for index, (pool, host) in enumerate(zip(pools, hosts, strict=True)):
            pool.evict = functools.partial(self._evict, index)
            host.evict = functools.partial(self._evict_host, index)

    def __len__(self) -> int:
        """Device pages kept, of all pools."""
        return sum(map(len, self._owner))

    def match(self, tokens: Sequence[int], adapter: str | None = None) -> Match:
        """The longest known prefix.

        Whole pages, and at least one token is left over. In a pool with a window, the pages that the
        next token sees must all be there. Takes no reference: `use` does.
        """
        path = []
        node = self._roots.get(adapter)
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            node = node and node.children.get(tuple(tokens[start : start + self.page_size]))
            if node is None:
                break
            path.append(node)
        path = path[: self._without_gap(path)]
        pages, hosts = [], []
        for index, window in enumerate(self._windows):
            hidden = self._hidden(window, len(path))
            pages.append([-1] * hidden + [node.pages[index] for node in path[hidden:]])
            hosts.append([-1] * hidden + [node.hosts[index] for node in path[hidden:]])
        return Match(len(path) * self.page_size, pages, hosts, path)

    def use(self, tokens: int, match: Match) -> list[list[int]]:
        """A sequence of so many tokens begins with what `match` found just now: its pages by pool.

        They have one user more each. OutOfPages where device pages lack for those on the host.
        """
        self.statistics.queries += 1
        self.statistics.query_tokens += tokens
        self.statistics.hit_tokens += match.tokens
        back = sum(max(hosts) >= 0 for hosts in zip(*match.hosts, strict=True))
        self.statistics.host_hit_tokens += back * self.page_size
        for pool, host, pages, hosts in zip(
            self._pools, self._hosts, match.pages, match.hosts, strict=True
        ):
            for page in pages:
                if page >= 0:
                    pool.share(page)
            for page in hosts:
                if page >= 0:
                    host.rest(page)
        # What is used is safe now from what `_restore` evicts.
        for index, (pages, hosts) in enumerate(zip(match.pages, match.hosts, strict=True)):
            for at, page in enumerate(hosts):
                if page >= 0:
                    pages[at] = self._restore(match.nodes[at], index)
        return match.pages

    def moves(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """Offloads and restores (pool, device page, host page) since the last time, for one StepPlan."""
        offloads = [(pool, page, host) for (pool, host), page in self._offloads.items()]
        restores = self._restores
        self._offloads, self._restores = {}, []
        self.statistics.offloaded += len(offloads)
        self.statistics.restored += len(restores)
        for host in self._hosts:
            host.settle()
        return offloads, restores

    def insert(
        self,
        tokens: Sequence[int],
        pages: Sequence[Sequence[int]],
        count: int,
        adapter: str | None = None,
        after: Node | None = None,
    ) -> Node:
        """Keep the first `count` pages of a sequence, in use and filled with `tokens`; the last node.

        pages: by pool; -1 where the sequence has none. after: what this returned for the sequence
        before; the work is for the pages beyond it. A page of the same tokens that is here stays.
        """
        if after is None or (after.depth and after.parent is None):
            after = self._roots.setdefault(adapter, Node((), None, len(self._pools)))
        node = after
        for depth in range(node.depth, count):
            key = tuple(tokens[depth * self.page_size : (depth + 1) * self.page_size])
            node = node.children.get(key) or self._grow(node, key)
            for index, held in enumerate(pages):
                if node.pages[index] < 0 <= held[depth]:
                    self._keep(node, index, held[depth])
        return node

    def forget(self, adapter: str) -> None:
        """Let go of all pages of an adapter that no sequence uses any more."""
        if root := self._roots.pop(adapter, None):
            self._fell(root)

    def _grow(self, parent: Node, key: tuple[int, ...]) -> Node:
        node = parent.children[key] = Node(key, parent, len(self._pools))
        return node

    def _keep(self, node: Node, index: int, page: int) -> None:
        self._drop_host(node, index)
        self._pools[index].keep(page)
        self._owner[index][page] = node
        node.pages[index] = page

    def _without_gap(self, path: list[Node]) -> int:
        """How many nodes of a path may be used: none that the token after them sees lacks a page."""
        depth, before = len(path), -1
        while depth != before:
            before = depth
            for index, window in enumerate(self._windows):
                if window:
                    seen = range(depth - 1, self._hidden(window, depth) - 1, -1)
                    depth = next((at for at in seen if not path[at].has(index)), depth)
        return depth

    def _hidden(self, window: int, depth: int) -> int:
        """Leading pages that the first token after `depth` pages does not see."""
        return max(0, depth * self.page_size - window + 1) // self.page_size if window else 0

    def _evict(self, index: int, page: int) -> None:
        """Have the content of an idle page on the host, or forget it."""
        node = self._owner[index][page]
        room = self._hosts[index].make_room()  # what was forgotten for it may have been above the node
        if node.pages[index] != page:
            return
        if not room:
            self._forget_page(node, index)
            return
        self._drop(node, index)
        host = node.hosts[index] = self._hosts[index].keep()
        self._host_owner[index][host] = node
        self._offloads[index, host] = page

    def _evict_host(self, index: int, page: int) -> None:
        self._forget_page(self._host_owner[index][page], index)

    def _restore(self, node: Node, index: int) -> int:
        """A device page, with one user, for the content of a node's host page, which rests."""
        (page,) = self._pools[index].allocate(1)
        host, node.hosts[index] = node.hosts[index], -1
        del self._host_owner[index][host]
        self._keep(node, index, page)
        self._restores.append((index, page, host))
        return page

    def _forget_page(self, node: Node, index: int) -> None:
        """Let go of a node's page of a pool, wherever it is, and of what is of no use without it."""
        if self._windows[index]:
            self._drop(node, index)
            self._drop_host(node, index)
            self._prune(node)
            return
        assert node.parent is not None, "a root holds no page"
        del node.parent.children[node.key]
        self._fell(node)

    def _fell(self, node: Node) -> None:
        """Let go of all pages of a node and of those below it, which leave the tree."""
        gone = [node]
        while gone:
            node = gone.pop()
            node.parent = None
            gone.extend(node.children.values())
            node.children = {}
            for pool in range(len(self._pools)):
                self._drop(node, pool)
                self._drop_host(node, pool)

    def _drop(self, node: Node, index: int) -> None:
        page = node.pages[index]
        if page >= 0:
            node.pages[index] = -1
            del self._owner[index][page]
            self._pools[index].drop(page)
            self.statistics.evictions += 1

    def _drop_host(self, node: Node, index: int) -> None:
        page = node.hosts[index]
        if page >= 0:
            node.hosts[index] = -1
            del self._host_owner[index][page]
            self._hosts[index].drop(page)
            if self._offloads.pop((index, page), None) is None:  # else it never got there
                self.statistics.dropped += 1

    def _prune(self, node: Node) -> None:
        """Take an empty leaf out, and the parents that are empty leaves then: all pools have windows."""
        while node.parent is not None and node.empty:
            parent, node.parent = node.parent, None
            del parent.children[node.key]
            node = parent
