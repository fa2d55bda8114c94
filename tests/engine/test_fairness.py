"""Nobody waits forever: floods, large requests, long simulations."""

import collections
import random

import pytest

from llm_jax.engine.pages import PoolSpec
from llm_jax.engine.plan import SchedulerConfig
from llm_jax.engine.request import Request
from llm_jax.engine.scheduler import QueueFull, Scheduler

STEP_S = 0.01
CONFIG = dict(
    max_rows=8,
    token_budget=64,
    page_size=4,
    pools=(PoolSpec(129),),
    max_length=256,
    alignment=4,
    aging_s=1.0,
)


class Simulation:
    """Steps of STEP_S, two plans open; notes when each request came, began and ended."""

    def __init__(self, **changes):
        self.now, self.steps, self.events = 0.0, 0, 0
        self.scheduler = Scheduler(SchedulerConfig(**{**CONFIG, **changes}), lambda: self.now)
        self.added, self.began, self.ended = {}, {}, {}
        self._open = collections.deque()

    def add(self, id, prompt, new, **options):
        """Whether there was room in the queue."""
        try:
            self.scheduler.add(Request(id, prompt, new, **options))
        except QueueFull:
            return False
        self.added[id] = self.now
        self.events += 1
        return True

    def step(self):
        """One plan, and the commit of the one before."""
        plan = self.scheduler.plan()
        if plan is not None:
            self._open.append(plan)
            for row in plan.rows:
                self.began.setdefault(row.sequence.request.id, self.now)
        self.now += STEP_S
        self.steps += 1
        if len(self._open) == 2 or (plan is None and self._open):
            done = self._open.popleft()
            tokens = {index: [7] for index, row in enumerate(done.rows) if row.samples}
            self._note(self.scheduler.commit(done, tokens))
        self._note(self.scheduler.poll())
        return plan

    def _note(self, events):
        self.events += len(events)
        for event in events:
            if event.reason is not None:
                self.ended[event.sequence.request.id] = self.now

    def run(self, until=100_000):
        """Steps until all is done."""
        while not self.scheduler.idle:
            self.step()
            assert self.steps < until, "it does not end"
        load = self.scheduler.load()
        assert load.free_pages == load.total_pages


def test_low_priority_among_a_flood_of_high():
    flood = Simulation()
    for step in range(1500):
        if step == 20:
            flood.add("low", (1, 2, 3), 4)
        while len(flood.scheduler.waiting) < 16:
            flood.add(f"high {step} {len(flood.scheduler.waiting)}", (step,) * 8, 8, priority=5)
        flood.step()
    assert 3 < flood.began["low"] - 0.2 < 5.5  # five priorities are made up in 5 s, not before
    assert "low" in flood.ended


def test_without_aging_priority_is_all():
    flood = Simulation(aging_s=float("inf"))
    flood.add("low", (1, 2, 3), 4, priority=-1)
    for step in range(1000):
        while len(flood.scheduler.waiting) < 16:
            flood.add(f"high {step} {len(flood.scheduler.waiting)}", (step,) * 8, 8)
        flood.step()
    assert "low" not in flood.began
    flood.run()
    assert "low" in flood.ended


@pytest.mark.parametrize(
    "large", [{"prompt": (1,) * 200, "new": 40}, {"prompt": (1,) * 9, "new": 9, "n": 8}]
)
def test_large_among_a_flood_of_small(large):
    """It waits for pages or rows no longer than what runs already needs."""
    flood = Simulation(pools=(PoolSpec(65),))
    for step in range(400):
        if step == 20:
            flood.add("large", **large)
        while len(flood.scheduler.waiting) < 20:
            flood.add(f"small {step} {len(flood.scheduler.waiting)}", (step,) * 4, 20)
        flood.step()
    ahead = 24 * 20 * STEP_S / 8 + 1.0  # 24 requests of 20 steps came before, 8 at a time
    assert flood.began["large"] - 0.2 < ahead
    assert "large" in flood.ended


def test_first_come_first_served_within_a_priority():
    simulation = Simulation(max_rows=2)
    for i in range(20):
        simulation.add(f"{i}", (i,) * (1 + i % 7), 5, priority=i % 2)
    simulation.run()
    for parity in (0, 1):
        order = [simulation.began[f"{i}"] for i in range(parity, 20, 2)]
        assert order == sorted(order)
    assert max(simulation.began[f"{i}"] for i in range(1, 20, 2)) <= simulation.began["2"]


def test_a_prompt_gets_on_while_all_others_decode():
    simulation = Simulation(token_budget=11)  # the least for 8 rows
    for i in range(7):
        simulation.add(f"{i}", (i,), 200)
    for _ in range(20):
        simulation.step()
    simulation.add("prompt", (9,) * 100, 2)
    for _ in range(30):
        plan = simulation.step()
        assert len(plan.decodes) >= 7, "and the others go on"
    assert "prompt" in simulation.ended


def test_preemption_spares_the_higher_rank():
    simulation = Simulation(pools=(PoolSpec(21),), watermark=0.0, max_rows=4)
    for i in range(4):
        simulation.add(f"{i}", (i,) * 8, 60, priority=int(i == 3))
    simulation.run()
    assert simulation.scheduler.statistics.preemptions > 0
    assert simulation.ended["3"] == min(simulation.ended.values())
    assert simulation.ended["0"] <= simulation.ended["1"] <= simulation.ended["2"]


def mixed_load(simulation, seed, events):
    """Random requests at about the rate that can be served, until so many events were seen."""
    choose = random.Random(seed)
    number = 0
    while simulation.events < events:
        if choose.random() < 0.5:
            prompt = (choose.randrange(5),) * choose.choice([3, 20, 60]) + (number,)
            options = {"priority": choose.choice([0, 0, 2]), "n": choose.choice([1, 1, 1, 2])}
            simulation.add(f"{number}", prompt, choose.choice([1, 8, 30]), **options)
            number += 1
        if choose.random() < 0.05 and number:
            simulation.scheduler.cancel(f"{choose.randrange(max(0, number - 30), number)}")
        simulation.step()
    simulation.run(simulation.steps + 100_000)
    assert set(simulation.ended) == set(simulation.added)
    # At most 72 requests are ahead, two samples of 31 steps each, and those of 2 s later.
    begun = [simulation.began[id] - simulation.added[id] for id in simulation.began]
    assert max(begun) < 2.0 + 72 * 2 * 31 * STEP_S


@pytest.mark.parametrize("pages, preemption", [(129, "recompute"), (70, "offload")])
def test_bounded_wait(pages, preemption):
    host = 200 if preemption == "offload" else 0
    pools = (PoolSpec(pages), PoolSpec(pages, window=16))
    changes = dict(pools=pools, max_queue=64, preemption=preemption, host_pages=host, chunk_tokens=32)
    mixed_load(Simulation(**changes), 0, 10_000)


@pytest.mark.slow
def test_a_million_events():
    simulation = Simulation(
        pools=(PoolSpec(600), PoolSpec(400, window=64)),
        max_queue=64,
        max_rows=64,
        token_budget=256,
        chunk_tokens=64,
    )
    mixed_load(simulation, 1, 1_000_000)
    assert simulation.events >= 1_000_000
