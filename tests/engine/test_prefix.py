"""The longest prefix that is there is found, and pages leave in the right order."""

import random

import pytest

from llm_jax.engine.pages import HostPages, PagePool, PoolSpec
from llm_jax.engine.prefix import PrefixCache

SIZE = 4


def make(*specs, host=0):
    pools = [PagePool(spec.pages) for spec in specs]
    return PrefixCache(SIZE, specs, pools, [HostPages(host, host) for _ in specs]), pools


def found(cache, tokens, adapter=None):
    """(tokens, device pages) of a match."""
    match = cache.match(tokens, adapter)
    return match.tokens, match.pages


def fill(cache, pools, tokens, adapter=None):
    """Compute tokens as a sequence that has ended: its whole pages stay."""
    pages = cache.use(len(tokens), cache.match([*tokens, -1], adapter))
    for pool, held in zip(pools, pages, strict=True):
        held += pool.allocate(len(tokens) // SIZE - len(held))
    cache.insert(tokens, pages, len(tokens) // SIZE, adapter)
    release(pools, pages)
    return pages


def release(pools, pages):
    for pool, held in zip(pools, pages, strict=True):
        for page in reversed(held):
            if page >= 0:
                pool.release(page)


def test_whole_pages_and_one_token_left():
    cache, pools = make(PoolSpec(20))
    tokens = list(range(12))
    (pages,) = fill(cache, pools, tokens)
    assert found(cache, tokens) == (8, [pages[:2]])
    assert found(cache, [*tokens, 99]) == (12, [pages])
    assert found(cache, tokens[:4]) == (0, [[]])
    assert found(cache, [*tokens[:6], 99, 99, 99]) == (4, [pages[:1]])
    assert found(cache, tokens, "adapter") == (0, [[]])
    assert found(cache, []) == (0, [[]])


def test_an_adapter_is_forgotten_with_its_pages():
    cache, pools = make(PoolSpec(20), PoolSpec(20, 6))
    tokens = list(range(12))
    fill(cache, pools, tokens)
    fill(cache, pools, tokens, "adapter")
    cache.forget("adapter")
    cache.forget("never seen")
    assert found(cache, tokens, "adapter") == (0, [[], []])
    assert found(cache, tokens)[0] == 8 and len(cache) == 6
    assert [pool.free for pool in pools] == [16, 16]


def test_other_tails_share_their_prefix():
    cache, pools = make(PoolSpec(20))
    first = fill(cache, pools, [0] * 8 + [1] * 4)
    second = fill(cache, pools, [0] * 8 + [2] * 4)
    assert first[0][:2] == second[0][:2] and first[0][2] != second[0][2]
    assert len(cache) == 4 and pools[0].free == 15
    assert cache.statistics.queries == 2 and cache.statistics.hit_tokens == 8


def test_a_second_page_of_the_same_tokens_is_not_kept():
    cache, pools = make(PoolSpec(20))
    tokens = [0] * 8
    pages = [pools[0].allocate(2) for _ in range(2)]
    node = cache.insert(tokens, [pages[0]], 2)
    assert cache.insert(tokens, [pages[1]], 2) is node and node.pages == [pages[0][1]]
    for held in pages:
        release(pools, [held])
    assert len(cache) == 2 and pools[0].free == 17


def test_leaves_go_first_and_users_keep_theirs():
    cache, pools = make(PoolSpec(7))
    old = fill(cache, pools, [0] * 4 + [1] * 8)
    fill(cache, pools, [0] * 4 + [2] * 8)
    cache.use(13, cache.match([0] * 4 + [1] * 9))  # these are in use now
    pools[0].allocate(3)  # one was free; two go, of the other branch
    assert cache.statistics.evictions == 2
    assert found(cache, [0] * 4 + [2] * 9)[0] == 4
    assert found(cache, [0] * 4 + [1] * 9) == (12, old)


def test_nothing_below_an_evicted_page_stays():
    cache, pools = make(PoolSpec(6))
    tokens = [0] * 8
    first = pools[0].allocate(1)
    cache.insert(tokens, [first], 1)
    own = pools[0].allocate(2)  # another sequence computed the same page, and one after it
    node = cache.insert(tokens, [own], 2)
    release(pools, [first])
    pools[0].allocate(3)  # takes `first`
    assert found(cache, [*tokens, 1]) == (0, [[]]) and len(cache) == 0
    cache.insert(tokens, [own], 2, after=node)  # the node is no more: from the root
    assert found(cache, [*tokens, 1]) == (8, [own])


def test_a_window_needs_only_its_pages():
    cache, pools = make(PoolSpec(20), PoolSpec(7, window=5))
    full, window = fill(cache, pools, list(range(24)))  # all six window pages are kept, and idle
    assert found(cache, [*range(24), 99]) == (24, [full, [-1] * 5 + window[5:]])
    assert found(cache, [*range(23), 99]) == (20, [full[:5], [-1] * 4 + window[4:5]])
    pools[1].allocate(1)  # takes the last page, the first to be idle
    assert found(cache, [*range(24), 99])[0] == 20
    assert found(cache, [*range(14), 99])[0] == 12
    pools[1].allocate(5)
    assert found(cache, [*range(24), 99]) == (0, [[], []])
    assert len(cache) == 6  # the full pages are there still


def test_a_window_pool_alone_leaves_no_empty_nodes():
    cache, pools = make(PoolSpec(7, window=5))
    fill(cache, pools, list(range(24)))
    pools[0].allocate(6)
    assert len(cache) == 0 and not cache._roots[None].children


def test_an_evicted_page_comes_back_from_the_host():
    cache, pools = make(PoolSpec(4), host=3)
    tokens = [0] * 12
    (pages,) = fill(cache, pools, tokens)
    taken = pools[0].allocate(3)
    assert cache.moves() == (
        [(0, page, host) for page, host in zip(pages[::-1], (2, 1, 0), strict=True)],
        [],
    )
    pools[0].release(taken.pop())
    pools[0].release(taken.pop())
    match = cache.match(tokens)
    assert (match.tokens, match.pages, match.hosts) == (8, [[-1, -1]], [[0, 1]])
    (held,) = cache.use(12, match)
    assert cache.moves() == ([], [(0, held[0], 0), (0, held[1], 1)])
    assert found(cache, tokens) == (8, [held]), "they are shared"
    assert cache.statistics.host_hit_tokens == 8 and len(cache) == 2
    assert cache.match([*tokens, 1]).hosts == [[-1, -1, 2]], "the last one is there still"


def test_what_is_computed_again_leaves_the_host():
    cache, pools = make(PoolSpec(4), host=3)
    fill(cache, pools, [0] * 8)
    cache.insert([0] * 8, [pools[0].allocate(3)], 2)  # by one that did not look
    assert cache.moves() == ([], [])
    assert cache.match([0] * 9).hosts == [[-1, -1]] and len(cache) == 2
    assert cache.statistics.offloaded == cache.statistics.dropped == 0


def test_an_adapter_is_forgotten_on_the_host_too():
    cache, pools = make(PoolSpec(4), host=3)
    fill(cache, pools, [0] * 8, "adapter")
    pools[0].allocate(3)
    cache.moves()
    cache.forget("adapter")
    assert cache.statistics.dropped == 2 and found(cache, [0] * 9, "adapter") == (0, [[]])


def test_a_window_finds_its_pages_on_the_host():
    cache, pools = make(PoolSpec(20), PoolSpec(7, window=5), host=6)
    full, _ = fill(cache, pools, list(range(24)))
    pools[1].release(pools[1].allocate(6)[0])
    match = cache.match([*range(24), 99])
    assert match.pages == [full, [-1] * 6] and match.hosts[1][:5] == [-1] * 5 < match.hosts[1][5:]
    cache.use(25, match)
    assert cache.statistics.host_hit_tokens == SIZE


class Memory:
    """Which tokens end in each page of a pool, on the device and on the host."""

    def __init__(self, pools):
        self.device, self.host = ([{} for _ in range(pools)] for _ in range(2))

    def move(self, offloads, restores):
        """As a step does: all reads of the offloads come first."""
        read = [(pool, host, self.device[pool][page]) for pool, page, host in offloads]
        for pool, host, tokens in read:
            self.host[pool][host] = tokens
        for pool, page, host in restores:
            self.device[pool][page] = self.host[pool].pop(host)


@pytest.mark.parametrize("host", [0, 2, 9])
@pytest.mark.parametrize("seed", range(20))
def test_against_a_list_of_all_prefixes(seed, host):
    """Random sequences; what is matched has the pages that hold those very tokens."""
    choose = random.Random(seed)
    specs = PoolSpec(12), PoolSpec(10, window=choose.choice([1, 4, 6]))
    cache, pools = make(*specs, host=host)
    memory, running = Memory(2), []
    for _ in range(200):
        if running and choose.random() < 0.5:
            release(pools, running.pop(choose.randrange(len(running))))
        tokens = [choose.randrange(2) for _ in range(choose.randrange(1, 5))] * 5
        match = cache.match(tokens)
        new = [len(tokens) // SIZE - match.tokens // SIZE + sum(p >= 0 for p in h) for h in match.hosts]
        idle = [sum(map(pool.is_idle, held)) for pool, held in zip(pools, match.pages, strict=True)]
        if any(n + i > pool.available for n, i, pool in zip(new, idle, pools, strict=True)):
            continue
        pages = cache.use(len(tokens), match)
        for pool, held in zip(pools, pages, strict=True):
            held += pool.allocate(len(tokens) // SIZE - len(held))
        memory.move(*cache.moves())
        for holds, held in zip(memory.device, pages, strict=True):
            for depth, page in enumerate(held):
                if depth < match.tokens // SIZE:
                    assert page < 0 or holds[page] == tokens[: (depth + 1) * SIZE]
                else:
                    holds[page] = tokens[: (depth + 1) * SIZE]
        cache.insert(tokens, pages, len(tokens) // SIZE)
        assert found(cache, [*tokens, 9])[0] == len(tokens) // SIZE * SIZE
        running.append(pages)
    for pages in running:
        release(pools, pages)
    assert all(pool.available == pool.pages - 1 for pool in pools)
    assert len(cache) == sum(pool.pages - 1 - pool.free for pool in pools)
    assert (cache.statistics.host_hit_tokens > 0) == (host > 0)
