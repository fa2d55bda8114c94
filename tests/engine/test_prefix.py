"""The longest prefix that is there is found, and pages leave in the right order."""

import random

import pytest

from llm_jax.engine.pages import HostPages, PagePool, PoolSpec
from llm_jax.engine.prefix import PrefixCache

SIZE = 4


def make(*specs):
    pools = [PagePool(spec.pages) for spec in specs]
    return PrefixCache(SIZE, specs, pools), pools


def fill(cache, pools, tokens, adapter=None):
    """Compute tokens as a sequence that has ended: its whole pages stay."""
    matched, pages = cache.match([*tokens, -1], adapter)
    cache.use(len(tokens), matched, pages)
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
    assert cache.match(tokens) == (8, [pages[:2]])
    assert cache.match([*tokens, 99]) == (12, [pages])
    assert cache.match(tokens[:4]) == (0, [[]])
    assert cache.match([*tokens[:6], 99, 99, 99]) == (4, [pages[:1]])
    assert cache.match(tokens, "adapter") == (0, [[]])
    assert cache.match([]) == (0, [[]])


def test_an_adapter_is_forgotten_with_its_pages():
    cache, pools = make(PoolSpec(20), PoolSpec(20, 6))
    tokens = list(range(12))
    fill(cache, pools, tokens)
    fill(cache, pools, tokens, "adapter")
    cache.forget("adapter")
    cache.forget("never seen")
    assert cache.match(tokens, "adapter") == (0, [[], []])
    assert cache.match(tokens)[0] == 8 and len(cache) == 6
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
    matched, pages = cache.match([0] * 4 + [1] * 9)
    cache.use(13, matched, pages)  # these are in use now
    pools[0].allocate(3)  # one was free; two go, of the other branch
    assert cache.statistics.evictions == 2
    assert cache.match([0] * 4 + [2] * 9)[0] == 4
    assert cache.match([0] * 4 + [1] * 9) == (12, old)


def test_nothing_below_an_evicted_page_stays():
    cache, pools = make(PoolSpec(6))
    tokens = [0] * 8
    first = pools[0].allocate(1)
    cache.insert(tokens, [first], 1)
    own = pools[0].allocate(2)  # another sequence computed the same page, and one after it
    node = cache.insert(tokens, [own], 2)
    release(pools, [first])
    pools[0].allocate(3)  # takes `first`
    assert cache.match([*tokens, 1]) == (0, [[]]) and len(cache) == 0
    cache.insert(tokens, [own], 2, after=node)  # the node is no more: from the root
    assert cache.match([*tokens, 1]) == (8, [own])


def test_a_window_needs_only_its_pages():
    cache, pools = make(PoolSpec(20), PoolSpec(7, window=5))
    full, window = fill(cache, pools, list(range(24)))  # all six window pages are kept, and idle
    assert cache.match([*range(24), 99]) == (24, [full, [-1] * 5 + window[5:]])
    assert cache.match([*range(23), 99]) == (20, [full[:5], [-1] * 4 + window[4:5]])
    pools[1].allocate(1)  # takes the last page, the first to be idle
    assert cache.match([*range(24), 99])[0] == 20
    assert cache.match([*range(14), 99])[0] == 12
    pools[1].allocate(5)
    assert cache.match([*range(24), 99]) == (0, [[], []])
    assert len(cache) == 6  # the full pages are there still


def test_a_window_pool_alone_leaves_no_empty_nodes():
    cache, pools = make(PoolSpec(7, window=5))
    fill(cache, pools, list(range(24)))
    pools[0].allocate(6)
    assert len(cache) == 0 and not cache._roots[None].children


@pytest.mark.parametrize("seed", range(20))
def test_against_a_list_of_all_prefixes(seed):
    """Random sequences; what is matched has the pages that hold those very tokens."""
    choose = random.Random(seed)
    cache, pools = make(PoolSpec(12), PoolSpec(10, window=choose.choice([1, 4, 6])))
    holds = [{}, {}]  # by pool: page -> the tokens up to its end
    running = []
    for _ in range(200):
        if running and choose.random() < 0.5:
            release(pools, running.pop(choose.randrange(len(running))))
        tokens = [choose.randrange(2) for _ in range(choose.randrange(1, 4))] * 5
        matched, pages = cache.match(tokens)
        for index, held in enumerate(pages):
            for depth, page in enumerate(held):
                assert page < 0 or holds[index][page] == tokens[: (depth + 1) * SIZE]
        new = len(tokens) // SIZE - matched // SIZE
        idle = [sum(map(pool.is_idle, held)) for pool, held in zip(pools, pages, strict=True)]
        if any(new + n > pool.available for n, pool in zip(idle, pools, strict=True)):
            continue
        cache.use(len(tokens), matched, pages)
        for index, (pool, held) in enumerate(zip(pools, pages, strict=True)):
            held += pool.allocate(new)
            for depth in range(matched // SIZE, len(held)):
                holds[index][held[depth]] = tokens[: (depth + 1) * SIZE]
        cache.insert(tokens, pages, len(tokens) // SIZE)
        assert cache.match([*tokens, 9])[0] == len(tokens) // SIZE * SIZE
        running.append(pages)
    for pages in running:
        release(pools, pages)
    assert all(pool.available == pool.pages - 1 for pool in pools)
    assert len(cache) == sum(pool.pages - 1 - pool.free for pool in pools)
