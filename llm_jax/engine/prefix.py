"""Pages of tokens that were computed before, found again by the tokens: a radix tree of whole pages.

A node stands for one page of tokens after those of its parents, and names the page of every pool that
holds their keys and values; a root stands for an adapter. Sequences leave their pages here as they are
filled (`insert`), and a new one begins with those of its longest known prefix (`match`, `use`).

Kept pages that no sequence uses are idle (pages.py), and the pool evicts them by itself, idle for
longest first. A sequence releases its last page first, so leaves go before their parents. Without its
page in a pool of full attention a node is of no use, nor is what lies below: they leave the tree
together. Without one in a pool with a window it still is: tokens far enough after it do not see it.
"""

import dataclasses
import functools
from collections.abc import Sequence

from llm_jax.engine.pages import PagePool, PoolSpec


@dataclasses.dataclass
class PrefixStatistics:
    """Counts since the start."""

    queries: int = 0  # sequences that began with `use`
    query_tokens: int = 0
    hit_tokens: int = 0  # of those, taken from here
    evictions: int = 0  # pages, of all pools


class Node:
    """A page of tokens. parent: None for a root, and for a node that has left the tree."""

    __slots__ = ("children", "depth", "key", "pages", "parent")

    def __init__(self, key: tuple[int, ...], parent: "Node | None", pools: int):
        self.key = key
        self.parent = parent
        self.depth = parent.depth + 1 if parent else 0
        self.pages = [-1] * pools
        self.children: dict[tuple[int, ...], Node] = {}


class PrefixCache:
    """The tree over the pages of `pools`, one of each spec."""

    def __init__(self, page_size: int, specs: Sequence[PoolSpec], pools: Sequence[PagePool]):
        self.page_size = page_size
        self.statistics = PrefixStatistics()
        self._windows = [spec.window for spec in specs]
        self._pools = pools
        self._roots: dict[str | None, Node] = {}
        self._owner: list[dict[int, Node]] = [{} for _ in pools]
        for index, pool in enumerate(pools):
            pool.evict = functools.partial(self._evict, index)

    def __len__(self) -> int:
        """Pages kept, of all pools."""
        return sum(map(len, self._owner))

    def match(self, tokens: Sequence[int], adapter: str | None = None) -> tuple[int, list[list[int]]]:
        """The longest known prefix: its tokens, and its pages by pool (-1: not seen from there on).

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
        best = self._without_gap(path)
        pages = [[node.pages[index] for node in path[:best]] for index in range(len(self._pools))]
        for held, window in zip(pages, self._windows, strict=True):
            hidden = self._hidden(window, best)
            held[:hidden] = [-1] * hidden
        return best * self.page_size, pages

    def use(self, tokens: int, matched: int, pages: Sequence[Sequence[int]]) -> None:
        """A sequence of so many tokens begins with what `match` found for it: one user more each."""
        self.statistics.queries += 1
        self.statistics.query_tokens += tokens
        self.statistics.hit_tokens += matched
        for pool, held in zip(self._pools, pages, strict=True):
            for page in held:
                if page >= 0:
                    pool.share(page)

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
                    depth = next((at for at in seen if path[at].pages[index] < 0), depth)
        return depth

    def _hidden(self, window: int, depth: int) -> int:
        """Leading pages that the first token after `depth` pages does not see."""
        return max(0, depth * self.page_size - window + 1) // self.page_size if window else 0

    def _evict(self, index: int, page: int) -> None:
        """Let go of an idle page, and of what is of no use without it."""
        node = self._owner[index][page]
        if self._windows[index]:
            self._drop(node, index)
            if not node.children and max(node.pages) < 0:
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

    def _drop(self, node: Node, index: int) -> None:
        page = node.pages[index]
        if page >= 0:
            node.pages[index] = -1
            del self._owner[index][page]
            self._pools[index].drop(page)
            self.statistics.evictions += 1

    def _prune(self, node: Node) -> None:
        """Take an empty leaf out, and the parents that are empty leaves then: all pools have windows."""
        while node.parent is not None and not node.children and max(node.pages) < 0:
            parent, node.parent = node.parent, None
            del parent.children[node.key]
            node = parent
