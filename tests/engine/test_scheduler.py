"""The scheduler against a device that is played: pages hold what was written, sampling is a function.

`Device` runs every plan in order and checks that each row finds exactly its own prefix in its pages,
that no row reads what another writes in the same step, and, at the end, that every sequence has the
tokens it would have had alone.
"""

import collections
import dataclasses
import random
import statistics
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from llm_jax.engine.pages import PoolSpec
from llm_jax.engine.plan import SchedulerConfig
from llm_jax.engine.request import Reason, Request
from llm_jax.engine.scheduler import QueueFull, Scheduler

STOP = 0  # the token that ends a sequence
CONFIG = SchedulerConfig(
    max_rows=4, token_budget=32, page_size=4, pools=(PoolSpec(64),), max_length=64, alignment=4
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def sampled(request, sample, position):
    """The token at a position of a sequence: what sampling draws depends on nothing else."""
    draw = random.Random(f"{request.id} {sample} {position}").random()
    return STOP if draw < 0.04 else 1 + int(draw * 50) % 2


class Device:
    """Runs plans. A written token is the hash of all tokens up to it, as its keys and values are."""

    def __init__(self, config):
        self.config = config
        self.pages = collections.defaultdict(dict)  # (pool, page): {offset: content}
        self.host = {}
        self.owner, self.last = {}, {}  # by slot: the sequence, its newest token

    def run(self, plan):
        """Execute a plan; returns (tokens, stopped) for its commit."""
        self._move(plan)
        cost = len(plan.decodes) + sum(
            -(-row.count // self.config.alignment) * self.config.alignment for row in plan.chunks
        )
        assert cost == plan.cost <= self.config.token_budget
        assert len({id(row.sequence) for row in plan.rows}) == len(plan.rows)
        assert all(row.count == 1 for row in plan.decodes) and all(row.count > 1 for row in plan.chunks)
        chains = [self._write(row) for row in plan.rows]
        self._check_reads(plan, chains)
        tokens, stopped = {}, set()
        for index, row in enumerate(plan.rows):
            if row.samples and not row.sequence.request.search:
                tokens[index] = self._sample(row)
                if tokens[index][-1] == STOP:
                    stopped.add(index)
        return tokens, stopped

    def _move(self, plan):
        assert len({(pool, host) for pool, _, host in plan.offloads}) == len(plan.offloads)
        held = [(pool, host, dict(self.pages[pool, page])) for pool, page, host in plan.offloads]
        self.host.update({(pool, host): content for pool, host, content in held})
        for moves in (plan.copies, [(pool, page, host) for pool, page, host in plan.restores]):
            assert len({(m[0], m[2]) for m in moves}) == len(moves)
        for pool, page, _ in plan.restores:
            assert any(page in row.sequence.pages[pool] for row in plan.rows), "restored for nobody"
        copied = [(pool, to, dict(self.pages[pool, source])) for pool, source, to in plan.copies]
        self.pages.update({(pool, to): content for pool, to, content in copied})
        self.pages.update({(pool, to): self.host.pop((pool, host)) for pool, to, host in plan.restores})

    def _inputs(self, row):
        """All tokens up to the row's last, as the device has them."""
        sequence, stop = row.sequence, row.start + row.count
        if row.first:
            self.owner[sequence.slot] = sequence
        assert self.owner[sequence.slot] is sequence, "the slot was not set up"
        tokens = sequence.tokens[:stop]
        if row.drafted:
            assert row.count == 1 + row.drafted == 1 + len(sequence.draft)
            tokens = tokens + sequence.draft
        elif len(tokens) < stop:
            assert row.count == 1, "a prompt is known"
            tokens = self.last[sequence.slot]
        assert len(tokens) == stop
        return tokens

    def _write(self, row):
        tokens, sequence = self._inputs(row), row.sequence
        chain, content = [], hash(sequence.request.adapter)
        for token in tokens:
            content = hash((content, token))
            chain.append(content)
        for pool, pages in enumerate(sequence.pages):
            for at in range(row.start, row.start + row.count):
                page, offset = divmod(at, self.config.page_size)
                assert pages[page] > 0
                self.pages[pool, pages[page]][offset] = chain[at]
        self.last[sequence.slot] = tokens
        return chain

    def _check_reads(self, plan, chains):
        size = self.config.page_size
        readers = collections.defaultdict(set)
        for index, (row, chain) in enumerate(zip(plan.rows, chains, strict=True)):
            for pool, spec in enumerate(self.config.pools):
                begin = max(0, row.start - spec.window + 1) if spec.window else 0
                for at in range(begin, row.start + row.count):
                    page = row.sequence.pages[pool][at // size]
                    assert page > 0, "a visible page is gone"
                    assert self.pages[pool, page][at % size] == chain[at], "not its own tokens"
                    readers[pool, page].add(index)
        for index, row in enumerate(plan.rows):
            for pool, pages in enumerate(row.sequence.pages):
                for page in pages[row.start // size : -(-(row.start + row.count) // size)]:
                    assert readers[pool, page] == {index}, "written while another row reads it"

    def _sample(self, row):
        sequence, stop = row.sequence, row.start + row.count
        new = []
        for at in range(stop - row.drafted, stop + 1):
            new.append(sampled(sequence.request, sequence.sample, at))
            if new[-1] == STOP or at == stop or sequence.draft[at - stop] != new[-1]:
                break
        self.last[sequence.slot] = self.last[sequence.slot][: stop - row.drafted] + new
        return new


class Harness:
    """A scheduler, its device and the bookkeeping of a caller; operations for random tests."""

    def __init__(self, config):
        self.config, self.clock = config, Clock()
        self.scheduler, self.device = Scheduler(config, self.clock), Device(config)
        self.open = collections.deque()  # (plan, tokens, stopped)
        self.ended, self.begun = [], 0
        self.host_pages = config.host_pages + config.prefix_host_pages

    def add(self, prompt, new, **options):
        self.begun += 1
        try:
            self.scheduler.add(Request(f"r{self.begun}", tuple(prompt), new, **options))
        except (QueueFull, ValueError):
            return None
        return f"r{self.begun}"

    def plan(self):
        plan = self.scheduler.plan()
        if plan is not None:
            self.open.append((plan, *self.device.run(plan)))
        self._take(self.scheduler.poll())
        return plan

    def commit(self):
        self._take(self.scheduler.commit(*self.open.popleft()))
        self.search()

    def search(self):
        """Let searches go on whose beams are all computed; a beam has what follows one of the last."""
        rows = [row.sequence.request.id for plan, *_ in self.open for row in plan.rows]
        groups = collections.defaultdict(list)
        for sequence in self.scheduler.running:
            if sequence.request.search and sequence.request.id not in rows:
                groups[sequence.request.id].append(sequence)
        for id, beams in groups.items():
            request, begun = beams[0].request, bool(beams[0].generated)
            waited = beams if begun else beams[:1]
            if len(beams) < request.n or any(s.computed < s.length for s in waited):
                continue
            if len(beams[0].generated) + 1 >= request.max_new_tokens:
                self.scheduler.cancel(id, Reason.STOP)
                self._take(self.scheduler.poll())
                continue
            draw = random.Random(f"{id} {beams[0].tokens}")
            grown = [(draw.choice(waited), draw.choice([1, 2])) for _ in beams]
            wanted = [[*parent.tokens, token] for parent, token in grown]
            assert [s.tokens for s in self.scheduler.extend(grown)] == wanted

    def cancel(self, id):
        found = self.scheduler.cancel(id)
        self._take(self.scheduler.poll())
        return found

    def draft(self, right):
        """Drafts for the running sequences, of which the first `right` tokens will be accepted."""
        for sequence in self.scheduler.running:
            if not sequence.pending and not sequence.request.search:
                at = len(sequence.tokens)
                good = [sampled(sequence.request, sequence.sample, at + i) for i in range(right)]
                sequence.draft = [*good, 1, 2]

    def drain(self):
        """Run until all is done; in step, so that nothing hides behind the overlap."""
        for _ in range(100_000):
            if self.open:
                self.commit()
            elif self.scheduler.idle:
                break
            else:
                assert self.plan() is not None or self.scheduler.idle, "it stands still"
                self.check()
        self.check()
        load = self.scheduler.load()
        assert load.free_pages == load.total_pages and load.running == load.waiting == 0
        assert all(free == self.host_pages for free in load.free_host_pages)

    def check(self):
        """Every page is accounted for."""
        scheduler, kept = self.scheduler, 0
        assert all(len(s.pages[0]) == 0 for s in scheduler.waiting)
        slots = [s.slot for s in scheduler.running]
        assert len(set(slots)) == len(slots) <= self.config.max_rows
        assert all(0 <= slot < self.config.max_rows for slot in slots)
        for index, pool in enumerate(scheduler.pools):
            users = collections.Counter(p for s in scheduler.running for p in s.pages[index] if p >= 0)
            references = [pool.references(page) for page in range(1, pool.pages)]
            extra = [count - users[page] for page, count in enumerate(references, 1)]
            assert set(extra) <= {0, 1} and users[0] == 0
            kept += sum(extra)
            assert pool.free == references.count(0)
            assert pool.available == pool.pages - 1 - len(users)
            hosts = [p for s in scheduler.waiting for p in (s.host or [[]] * 9)[index] if p >= 0]
            hosts += scheduler.prefix._host_owner[index]
            free = scheduler._hosts[index]._free
            assert sorted(hosts + free) == list(range(self.host_pages))
            assert scheduler._hosts[index].kept <= self.config.prefix_host_pages
        assert kept == len(scheduler.prefix)
        self.check_prefixes()

    def check_prefixes(self):
        """Every page of the tree, here or on the host, holds the tokens that its node stands for."""
        nodes = [(root, hash(adapter)) for adapter, root in self.scheduler.prefix._roots.items()]
        seen = 0
        while nodes:
            node, content = nodes.pop()
            chain = {}
            for offset, token in enumerate(node.key):
                content = chain[offset] = hash((content, token))
            for pool, (page, host) in enumerate(zip(node.pages, node.hosts, strict=True)):
                assert page < 0 or host < 0
                assert page < 0 or self.device.pages[pool, page] == chain
                assert host < 0 or self.device.host[pool, host] == chain
                seen += (page >= 0) + (host >= 0)
            nodes += [(child, content) for child in node.children.values()]
        counts = self.scheduler.prefix.statistics
        there = sum(hosts.kept for hosts in self.scheduler._hosts)
        assert seen == len(self.scheduler.prefix) + there
        assert counts.offloaded == counts.restored + counts.dropped + there

    def _take(self, events):
        for event in events:
            if event.reason is not None:
                self.ended.append(event.sequence)
                self._check_tokens(event.sequence, event.reason)

    def _check_tokens(self, sequence, reason):
        request, got = sequence.request, sequence.generated
        if not request.search:
            begin = len(request.prompt)
            assert got == [sampled(request, sequence.sample, begin + i) for i in range(len(got))]
            assert STOP not in got[:-1]
            assert (reason == Reason.STOP) == (got[-1:] == [STOP])
        assert len(got) <= request.max_new_tokens
        if reason == Reason.LENGTH:
            assert len(got) == request.max_new_tokens
        assert sequence.finished == reason and sequence.slot == -1


POOLS = [
    (PoolSpec(14),),
    (PoolSpec(40),),
    (PoolSpec(20, window=3), PoolSpec(30)),
    (PoolSpec(14, window=5),),
    (PoolSpec(10, window=3), PoolSpec(40)),
    (PoolSpec(24), PoolSpec(26, window=1), PoolSpec(22, window=7)),
]


def random_config(draw):
    """A small SchedulerConfig; draw(list) picks one of a list."""
    offload, prefix_cache = draw([False, True]), draw([True, True, True, False])
    rows, alignment = draw([1, 3, 6]), draw([1, 4])
    return SchedulerConfig(
        max_rows=rows,
        token_budget=rows - 1 + draw([alignment, 8, 24]) + alignment,
        page_size=draw([1, 2, 4]),
        pools=draw(POOLS),
        max_length=30,
        max_queue=draw([3, 12]),
        prefix_cache=prefix_cache,
        alignment=alignment,
        chunk_tokens=draw([0, 4, 8]),
        preemption="offload" if offload else "recompute",
        host_pages=draw([6, 40]) if offload else 0,
        prefix_host_pages=draw([0, 1, 5, 30]) if prefix_cache else 0,
        aging_s=draw([0.5, 10.0, float("inf")]),
        watermark=draw([0.0, 0.1]),
    )


def random_request(draw):
    """Options of a request; few tokens and adapters, so that prefixes are shared."""
    length = draw([1, 2, 4, 5, 8, 9, 12, 17])
    prompt = [1] * (length // 2) + [draw([1, 2]) for _ in range(length - length // 2)]
    return {
        "prompt": prompt,
        "new": draw([1, 2, 5, 12]),
        "n": draw([1, 1, 1, 2, 3]),
        "search": draw([False, False, True]),
        "priority": draw([0, 0, 0, 1, 5]),
        "adapter": draw([None, None, "a"]),
        "reuse_prefix": draw([True, True, True, False]),
    }


def operate(harness, draw):
    """One random operation."""
    what = draw(["plan"] * 6 + ["commit"] * 6 + ["add"] * 4 + ["draft"] * 2 + ["cancel", "time"])
    if what == "plan" and len(harness.open) < 2:
        harness.plan()
    elif what == "commit" and harness.open:
        harness.commit()
    elif what == "add":
        deadline = draw([None, None, None, harness.clock.now + draw([0.1, 2.0])])
        harness.add(**random_request(draw), deadline=deadline)
    elif what == "cancel" and harness.begun:
        harness.cancel(f"r{draw(range(max(1, harness.begun - 8), harness.begun + 1))}")
    elif what == "draft":
        harness.draft(draw([0, 1, 3]))
    elif what == "time":
        harness.clock.now += draw([0.01, 0.3, 2.0])
    harness.check()


def run_random(seed, operations):
    """Random operations on one scheduler, then all the rest of the work."""
    choose = random.Random(seed).choice
    harness = Harness(random_config(choose))
    for _ in range(operations):
        operate(harness, choose)
    harness.drain()
    return harness


@pytest.mark.parametrize("seed", range(40))
def test_random(seed):
    run_random(seed, 120)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_random_long(part):
    """100 000 operations."""
    for seed in range(20 * part, 20 * part + 20):
        run_random(10_000 + seed, 500)


class Machine(RuleBasedStateMachine):
    """The same operations chosen by Hypothesis, which finds short failures."""

    @initialize(data=st.data())
    def begin(self, data):
        self.harness = Harness(random_config(lambda items: data.draw(st.sampled_from(items))))

    @rule(data=st.data())
    def operation(self, data):
        operate(self.harness, lambda items: data.draw(st.sampled_from(items)))

    @rule(right=st.integers(0, 3))
    def two_steps(self, right):
        while self.harness.open:
            self.harness.commit()
        self.harness.draft(right)
        self.harness.plan()
        self.harness.plan()

    def teardown(self):
        if hasattr(self, "harness"):
            self.harness.drain()


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


# One behaviour each.


def harness(**changes):
    return Harness(dataclasses.replace(CONFIG, **changes))


def rows(plan):
    """(id, sample, start, count) of each row."""
    return [(r.sequence.request.id, r.sequence.sample, r.start, r.count) for r in plan.rows]


@pytest.mark.parametrize(
    "change",
    [
        {"max_rows": 0},
        {"page_size": 0},
        {"alignment": 0},
        {"max_queue": 0},
        {"max_length": 1},
        {"token_budget": 6},
        {"chunk_tokens": 6},
        {"pools": ()},
        {"pools": (PoolSpec(1),)},
        {"pools": (PoolSpec(8, window=-1),)},
        {"preemption": "swap"},
        {"host_pages": 4},
        {"preemption": "offload"},
        {"prefix_host_pages": -1},
        {"prefix_host_pages": 4, "prefix_cache": False},
        {"aging_s": 0.0},
        {"watermark": 1.0},
    ],
)
def test_config_errors(change):
    with pytest.raises(
        ValueError, match=next(iter(change)).replace("preemption", "preemption|host_pages")
    ):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    "request_, says",
    [
        (Request("a", (), 4), "prompt"),
        (Request("a", (1,), 0), "max_new_tokens=0"),
        (Request("a", (1,), 4, n=5), "n=5.*max_rows=4"),
        (Request("a", (1,) * 60, 5), "max_length=64"),
        (Request("a", (1,) * 30, 8), "10 pages.*PoolSpec"),
    ],
)
def test_what_never_fits(request_, says):
    scheduler = Scheduler(dataclasses.replace(CONFIG, pools=(PoolSpec(10),)), Clock())
    with pytest.raises(ValueError, match=says):
        scheduler.add(request_)
    assert scheduler.idle


def test_window_pool_must_hold_a_chunk():
    scheduler = Scheduler(
        dataclasses.replace(CONFIG, pools=(PoolSpec(64), PoolSpec(8, window=9))), Clock()
    )
    with pytest.raises(ValueError, match="window=9"):
        scheduler.add(Request("a", (1,) * 40, 8))
    chunked = dataclasses.replace(scheduler.config, chunk_tokens=8)
    Scheduler(chunked, Clock()).add(Request("a", (1,) * 40, 8))


def test_queue_and_ids():
    scheduler = Scheduler(dataclasses.replace(CONFIG, max_queue=2), Clock())
    scheduler.add(Request("a", (1,), 4))
    with pytest.raises(ValueError, match="in use"):
        scheduler.add(Request("a", (1,), 4))
    scheduler.add(Request("b", (1,), 4))
    with pytest.raises(QueueFull, match="max_queue=2"):
        scheduler.add(Request("c", (1,), 4))
    assert scheduler.cancel("a") and not scheduler.cancel("a")
    assert [(e.sequence.key, e.reason) for e in scheduler.poll()] == [(("a", 0), Reason.CANCELLED)]
    scheduler.add(Request("a", (1,), 4))


def test_chunks_then_decodes_in_two_open_plans():
    h = harness(token_budget=16, chunk_tokens=8)
    h.scheduler.add(Request("a", (1,) * 13, 3))
    first, second = h.plan(), h.plan()
    assert rows(first) == [("a", 0, 0, 8)] and not first.rows[0].samples and first.rows[0].first
    assert rows(second) == [("a", 0, 8, 5)] and second.rows[0].samples and not second.rows[0].first
    with pytest.raises(ValueError, match="commit"):
        h.plan()
    with pytest.raises(ValueError, match="oldest"):
        h.scheduler.commit(second, {0: [1]})
    h.commit()
    third = h.plan()  # its input token is known to the device alone
    assert rows(third) == [("a", 0, 13, 1)] and third.rows[0].sequence.pending == 2
    h.commit()
    assert rows(h.plan()) == [("a", 0, 14, 1)]
    h.commit()
    assert h.plan() is None  # three tokens are on their way
    h.drain()


def test_a_row_after_a_stop_is_ignored():
    scheduler = Scheduler(CONFIG, Clock())
    scheduler.add(Request("a", (1, 2, 3), 9))
    first, second = scheduler.plan(), scheduler.plan()
    (event,) = scheduler.commit(first, {0: [7]}, {0})
    assert (event.tokens, event.reason) == ([7], Reason.STOP)
    scheduler.add(Request("b", (4,) * 30, 9))
    third = scheduler.plan()  # may use the same pages, as its step comes later
    assert third.released == [event.sequence] and rows(third) == [("b", 0, 0, 30)]
    assert scheduler.commit(second, {0: [8]}) == []
    assert event.sequence.generated == [7]


def test_samples_share_the_prompt():
    h = harness()
    h.scheduler.add(Request("a", (1,) * 10, 4, n=3))
    assert rows(h.plan()) == [("a", 0, 0, 10)]
    plan = h.plan()
    assert rows(plan) == [("a", 0, 10, 1), ("a", 1, 9, 1), ("a", 2, 9, 1)]
    assert len(plan.copies) == 2 and len({source for _, source, _ in plan.copies}) == 1
    assert [row.first for row in plan.rows] == [False, True, True]
    used = {page for s in h.scheduler.running for page in s.pages[0]}
    assert len(used) == 2 + 3  # two whole pages, and the partial one of each
    h.drain()


def test_samples_wait_for_all_of_a_prompt():
    h = harness(chunk_tokens=4)
    h.scheduler.add(Request("a", (1,) * 10, 4, n=3))
    starts = [rows(h.plan())]
    while len(starts[-1]) == 1 and starts[-1][0][1] == 0 and len(starts) < 3:
        h.commit()
        starts.append(rows(h.plan()))
    assert starts == [[("a", 0, 0, 4)], [("a", 0, 4, 4)], [("a", 0, 8, 2)]]
    assert h.scheduler.load().running == 3  # their rows are theirs already
    h.commit()
    assert len(h.plan().rows) == 3
    h.drain()


def test_a_sample_that_finds_no_page_for_its_copy():
    h = harness(pools=(PoolSpec(3),), watermark=0.0)
    h.scheduler.add(Request("a", (1,) * 8, 1, n=2))
    h.plan()
    h.commit()  # the first sample is done; the other would write to a page that the cache has too
    assert rows(h.plan()) == [("a", 1, 4, 4)]
    h.drain()


def test_the_last_pages_of_a_prefix_go_first():
    h = harness(pools=(PoolSpec(11),), watermark=0.0)
    h.scheduler.add(Request("a", (1,) * 33, 2))
    h.drain()
    h.scheduler.add(Request("b", (2,) * 12, 2))
    h.drain()
    h.scheduler.add(Request("c", (1,) * 33, 2))
    assert 20 <= h.plan().rows[0].start < 32
    h.drain()


def test_one_prefix_is_computed_once():
    config = dataclasses.replace(
        CONFIG, max_rows=64, token_budget=1024, page_size=16, alignment=16, pools=(PoolSpec(512),),
        max_length=1024,
    )  # fmt: skip
    h = Harness(config)
    for i in range(64):
        h.scheduler.add(Request(f"{i}", (1,) * 512 + (i,), 2))
    assert rows(h.plan()) == [("0", 0, 0, 513)]
    later = h.plan()
    assert later.tokens == 64 and all(row.start >= 512 for row in later.rows)
    h.drain()
    assert h.scheduler.statistics.hit_tokens == 63 * 512


def serve(h, id, prompt):
    """One request, to its end; its first plan."""
    h.scheduler.add(Request(id, prompt, 2))
    plan = h.plan()
    h.drain()
    return plan


def test_a_prefix_comes_back_from_the_host():
    h = harness(pools=(PoolSpec(10),), prefix_host_pages=20, watermark=0.0)
    serve(h, "a", (1,) * 33)
    plan = serve(h, "b", (2,) * 33)
    assert len(plan.offloads) == 8 and not plan.restores
    plan = serve(h, "c", (1,) * 33)
    assert rows(plan) == [("c", 0, 32, 1)] and len(plan.restores) == 8
    statistics = h.scheduler.prefix.statistics
    assert (statistics.hit_tokens, statistics.host_hit_tokens) == (32, 32)
    assert h.scheduler.statistics.host_hit_tokens == 32
    assert (statistics.offloaded, statistics.restored, statistics.dropped) == (16, 8, 0)


def test_two_begin_with_one_prefix_from_the_host():
    h = harness(pools=(PoolSpec(14),), prefix_host_pages=20, watermark=0.0)
    serve(h, "a", (1,) * 33)
    serve(h, "b", (2,) * 49)
    for id in ("c", "d"):
        h.scheduler.add(Request(id, (1,) * 33, 2))
    plan = h.plan()
    assert rows(plan) == [("c", 0, 32, 1), ("d", 0, 32, 1)] and len(plan.restores) == 8
    assert h.scheduler.running[0].pages[0][:8] == h.scheduler.running[1].pages[0][:8]
    h.drain()
    assert h.scheduler.statistics.host_hit_tokens == 32 < h.scheduler.statistics.hit_tokens


@pytest.mark.parametrize("kept, found", [(1, 4), (3, 12), (5, 20)])
def test_the_beginning_of_a_prefix_stays_on_a_small_host(kept, found):
    h = harness(pools=(PoolSpec(10),), prefix_host_pages=kept, watermark=0.0)
    serve(h, "a", (1,) * 33)
    plan = serve(h, "b", (2,) * 33)
    assert len(plan.offloads) == kept, "what would be forgotten in this very plan is not moved"
    assert h.scheduler.prefix.match((1,) * 33).tokens == found


def test_preempted_sequences_take_the_host_pages_of_prefixes():
    sizes = {"host_pages": 1, "prefix_host_pages": 19}
    h = harness(pools=(PoolSpec(14),), preemption="offload", watermark=0.0, **sizes)
    for i in range(4):
        h.scheduler.add(Request(f"{i}", (i,) * 8, 30))
    while not h.scheduler.idle:
        h.commit() if len(h.open) == 2 or h.plan() is None else None
        h.check()
    assert h.scheduler.statistics.offloads == h.scheduler.statistics.preemptions > 0
    assert h.scheduler.prefix.statistics.dropped > 0
    h.drain()


def test_prefix_of_another_adapter_is_not_shared():
    h = harness(max_rows=3)
    for adapter, reuse in (("a", True), ("b", True), ("a", False)):
        h.scheduler.add(Request(f"{adapter}{reuse}", (1,) * 9, 2, adapter=adapter, reuse_prefix=reuse))
    assert len(h.plan().rows) == 3
    h.drain()
    assert h.scheduler.statistics.hit_tokens == 0


def test_deadlines():
    h = harness(max_rows=1)
    h.scheduler.add(Request("a", (1,) * 5, 50, deadline=3.0))
    h.scheduler.add(Request("b", (1,) * 5, 50, deadline=1.0))
    h.plan()
    h.clock.now = 1.0
    h.plan()
    assert [(s.request.id, s.finished) for s in h.ended] == [("b", Reason.DEADLINE)]
    h.clock.now = 3.0
    (*_, event) = h.scheduler.commit(*h.open.popleft())
    assert event.reason == Reason.DEADLINE and event.sequence.request.id == "a"
    h.open.clear()
    assert not h.scheduler.running


def test_priority_goes_first_and_large_is_not_overtaken():
    h = harness(max_rows=2, pools=(PoolSpec(13),), watermark=0.0)
    h.scheduler.add(Request("running", (1,) * 20, 9))
    h.plan()
    h.scheduler.add(Request("large", (2,) * 40, 2))
    h.scheduler.add(Request("small", (3,), 2))
    h.scheduler.add(Request("urgent", (4,), 2, priority=1))
    assert "urgent" in {id for id, *_ in rows(h.plan())}
    order = []
    while not h.scheduler.idle:
        h.commit() if h.open else order.extend(id for id, *_ in rows(h.plan()))
    assert order.index("large") < order.index("small")


@pytest.mark.parametrize("right, got", [(0, 1), (2, 3), (3, 4)])
def test_drafts(right, got):
    h = harness(alignment=1)
    h.scheduler.add(Request("right", (1,) * 6, 20))
    h.plan()
    h.commit()
    (sequence,) = h.scheduler.running
    sequence.draft = [sampled(sequence.request, 0, 7 + i) for i in range(right)] + [9] * (3 - right)
    plan = h.plan()
    assert rows(plan) == [("right", 0, 6, 4)] and plan.rows[0].drafted == 3
    assert h.plan() is None  # its length is not known
    h.commit()
    assert sequence.computed == 6 + got and len(sequence.generated) == 1 + got
    h.drain()


def test_a_window_lets_pages_go():
    h = harness(pools=(PoolSpec(30), PoolSpec(30, window=6)), token_budget=16, chunk_tokens=8)
    h.scheduler.add(Request("a", (1,) * 40, 20, reuse_prefix=False))
    most = 0
    while not h.scheduler.idle:
        h.commit() if h.open else h.plan()
        held = [sum(page >= 0 for page in s.pages[1]) for s in h.scheduler.running]
        most = max([most, *held])
    assert most <= 4  # 5 tokens before a chunk of 8: at most so many pages of 4
    h.drain()


@pytest.mark.parametrize("preemption", ["recompute", "offload"])
def test_preempted_sequences_get_the_same_tokens(preemption):
    host = 40 if preemption == "offload" else 0
    h = harness(pools=(PoolSpec(14),), preemption=preemption, host_pages=host, watermark=0.0)
    for i in range(4):
        h.scheduler.add(Request(f"{i}", (i,) * 8, 30))
    while not h.scheduler.idle:
        h.commit() if len(h.open) == 2 or h.plan() is None else None
        h.check()
    statistics = h.scheduler.statistics
    assert statistics.preemptions > 0
    assert statistics.offloads == (statistics.preemptions if host else 0)
    assert len(h.ended) == 4  # with the right tokens: Harness checks
    h.drain()


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("window", [(), (PoolSpec(40, window=3),)])
@pytest.mark.parametrize("preemption", ["recompute", "offload"])
def test_preempted_while_a_draft_is_judged(preemption, window, right):
    host = 40 if preemption == "offload" else 0
    h = harness(
        pools=(PoolSpec(7), *window), alignment=1, preemption=preemption, host_pages=host, watermark=0.0
    )
    h.scheduler.add(Request("first", (1,) * 7, 10))
    h.scheduler.add(Request("last", (2,) * 8, 10))
    h.plan()
    h.commit()
    last = h.scheduler.running[1]
    last.draft = [sampled(last.request, 0, 9)] * right + [9] * (4 - right)
    h.plan()
    assert last.verifying
    h.plan()  # "first" needs the page that the draft took
    assert last.slot == -1 and last.pending == 5
    h.commit()
    assert len(last.generated) == 2 + right and last.computed == (9 + right if host else 0)
    while last.slot < 0:
        h.commit() if h.open else h.plan()
    assert len(last.pages[0]) == 3  # those of the refused tokens did not come back
    h.drain()
    assert {s.request.id for s in h.ended} == {"first", "last"}


def test_host_pages_of_a_cancelled_sequence_are_free():
    h = harness(pools=(PoolSpec(7),), preemption="offload", host_pages=9, watermark=0.0)
    for id in ("a2", "a3"):  # which do not stop by themselves
        h.scheduler.add(Request(id, (1,) * 8, 12, reuse_prefix=False))
    while not h.scheduler.waiting or not h.scheduler.waiting[0].host:
        assert not h.scheduler.idle
        h.commit() if h.open else h.plan()
    assert h.scheduler.load().free_host_pages < (9,)
    h.cancel("a3")
    assert h.scheduler.load().free_host_pages == (9,)
    h.drain()


def test_what_awaits_a_copy_is_not_offloaded():
    h = harness(
        pools=(PoolSpec(7, window=9),),
        chunk_tokens=8,
        preemption="offload",
        host_pages=40,
        prefix_cache=False,
        watermark=0.0,
    )
    h.scheduler.add(Request("long", (1,) * 24, 4, priority=1))
    h.scheduler.add(Request("low", (2,) * 7, 4, n=3))
    assert rows(h.plan()) == [("long", 0, 0, 8), ("low", 0, 0, 7)]
    plan = h.plan()  # the chunk takes the pages of two samples, one of which had just got its own
    assert rows(plan) == [("low", 0, 7, 1), ("long", 0, 8, 8)]
    assert len(plan.copies) == 1 and h.scheduler.statistics.preemptions == 2
    assert h.scheduler.statistics.offloads == 1
    h.drain()


def test_beams_share_pages_and_copy_where_they_part():
    h = harness()

    def step():
        tokens, stopped = h.device.run(plan := h.scheduler.plan())
        assert (tokens, stopped, h.scheduler.commit(plan, {})) == ({}, set(), [])
        return plan

    h.scheduler.add(Request("a", (1,) * 6, 8, n=3, search=True))
    step()
    first = h.scheduler.running[0]
    beams = h.scheduler.extend([(first, 1), (first, 2), (first, 3)])
    assert beams == list(h.scheduler.running) and beams[0] is first
    assert [s.tokens[6:] for s in beams] == [[1], [2], [3]] and {s.computed for s in beams} == {6}
    with pytest.raises(ValueError, match="'a', 1.* is not computed"):
        h.scheduler.extend([(beams[1], 4)] * 3)
    assert len(step().copies) == 2, "of the second page, for who writes to it before the last"
    grown = h.scheduler.extend([(beams[2], 4), (beams[1], 5), (beams[2], 6)])
    assert grown == [beams[2], beams[1], beams[0]], "the last takes the place of who has no child"
    assert [s.tokens[6:] for s in grown] == [[3, 4], [2, 5], [3, 6]]
    assert len(step().copies) == 1
    h.check()
    assert h.cancel("a")
    h.drain()


def test_replayed_decisions_are_the_same():
    def decisions():
        h, log = harness(pools=(PoolSpec(20),)), []
        for i in range(12):
            h.scheduler.add(Request(f"{i}", (i % 3,) * (3 + i), 9, n=1 + i % 2, adapter=f"a{i % 2}"))
        while not h.scheduler.idle:
            if len(h.open) == 2 or (plan := h.plan()) is None:
                h.commit()
            else:
                log.append((rows(plan), plan.copies, [s.pages for s in h.scheduler.running]))
        return log

    assert decisions() == decisions()


def test_half_of_all_cancelled_leaks_nothing():
    choose = random.Random(5).choice
    h = harness(pools=(PoolSpec(40), PoolSpec(40, window=8)), max_queue=400)
    ids = [h.add(**random_request(choose)) for _ in range(300)]
    doomed = [id for id in ids if id is not None and choose([True, False])]
    while not h.scheduler.idle:
        if doomed and choose([True, False]):
            h.cancel(doomed.pop())
        elif len(h.open) == 2 or h.plan() is None:
            if h.open:
                h.commit()
        h.check()
    h.drain()


def plan_and_commit_seconds(sequences=64, steps=200):
    """The median time of plan and commit together while so many sequences decode."""
    config = dataclasses.replace(
        CONFIG,
        max_rows=sequences,
        token_budget=2048,
        page_size=16,
        pools=(PoolSpec(4096),),
        max_length=4096,
    )
    scheduler, seconds = Scheduler(config, Clock()), []
    for i in range(sequences):
        scheduler.add(Request(f"{i}", tuple(range(i, i + 100)), 2000))
    for _ in range(steps):
        begin = time.perf_counter()
        plan = scheduler.plan()
        middle = time.perf_counter()
        tokens = {index: [7] for index, row in enumerate(plan.rows) if row.samples}
        resumed = time.perf_counter()
        scheduler.commit(plan, tokens)
        seconds.append(time.perf_counter() - resumed + middle - begin)
    return statistics.median(seconds)


def test_cost_of_a_step():
    assert min(plan_and_commit_seconds() for _ in range(3)) < 1e-3
