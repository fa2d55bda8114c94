"""Pages have the users they were given, and idle ones are given up longest idle first."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.engine.pages import HostPages, OutOfPages, PagePool


def test_scratch_page_is_never_given_out():
    pool = PagePool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(OutOfPages, match="1 pages asked for, 0 of 4 available"):
        pool.allocate(1)


def test_what_is_refused_changes_nothing():
    pool = PagePool(4)
    pool.allocate(1)
    with pytest.raises(OutOfPages):
        pool.allocate(3)
    assert pool.free == pool.available == 2


def test_errors():
    with pytest.raises(ValueError, match="pages=1"):
        PagePool(1)
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.release(page)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(page)
    with pytest.raises(ValueError, match="free"):
        pool.share(page)
    with pytest.raises(ValueError, match="free or already kept"):
        pool.keep(page)
    with pytest.raises(ValueError, match="dropped twice"):
        pool.drop(page)


def test_idle_pages_are_taken_longest_idle_first():
    pool, evicted = PagePool(4), []
    pool.evict = lambda page: (evicted.append(page), pool.drop(page))[0]
    a, b, c = pool.allocate(3)
    for page in (a, b, c):
        pool.keep(page)
    for page in (b, c, a):
        pool.release(page)
    assert (pool.free, pool.available) == (0, 3)
    pool.share(b)  # in use again, and idle last
    pool.release(b)
    assert set(pool.allocate(2)) == {a, c} and evicted == [c, a]
    assert pool.references(b) == 1 and pool.is_idle(b)


@given(
    st.lists(
        st.tuples(st.sampled_from(["allocate", "share", "release", "keep", "drop"]), st.integers(0, 5))
    )
)
def test_counts(operations):
    """Against a model that counts."""
    pool, users, kept = PagePool(6), collections.Counter(), set()

    def drop(page):
        kept.remove(page)
        pool.drop(page)

    pool.evict = drop
    for what, n in operations:
        used = sorted(page for page in users if users[page])
        if what == "allocate" and n <= pool.available:
            new = pool.allocate(n)
            assert not set(new) & set(used) and len(set(new)) == n and 0 not in new
            users.update(new)
        elif what in ("share", "release") and used:
            page = used[n % len(used)]
            getattr(pool, what)(page)
            users[page] += 1 if what == "share" else -1
        elif what == "keep" and set(used) - kept:
            page = sorted(set(used) - kept)[0]
            pool.keep(page)
            kept.add(page)
        elif what == "drop" and kept:
            drop(sorted(kept)[n % len(kept)])
        assert [pool.references(p) for p in range(1, 6)] == [users[p] + (p in kept) for p in range(1, 6)]
        assert pool.free == sum(not pool.references(page) for page in range(1, 6))
        assert pool.available == sum(not users[page] for page in range(1, 6))


def test_host_pages_of_the_cache_give_way_to_sequences():
    hosts, gone = HostPages(4, most_kept=2), []
    hosts.evict = lambda page: (gone.append(page), hosts.drop(page))
    kept = [hosts.keep() for _ in range(2) if hosts.make_room()]
    assert hosts.make_room() and gone == kept[:1], "no more than two: the oldest goes"
    kept.append(hosts.keep())
    assert hosts.available == 4 and len(hosts.take(3)) == 3 and gone == kept[:2]
    with pytest.raises(OutOfPages, match="2 host pages asked for, 1 available"):
        hosts.take(2)
    assert hosts.take(1) == kept[2:] and not hosts.make_room(), "sequences do not give way"


def test_a_restored_host_page_rests_until_the_plan_is_made():
    hosts = HostPages(1, most_kept=1)
    hosts.rest(hosts.keep())
    assert hosts.available == hosts.kept == 0 and not hosts.make_room()
    hosts.settle()
    assert hosts.available == 1 and hosts.make_room()
