"""What the host keeps from step to step is what it would make anew: page tables, what is asked for."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np

from llm_jax.engine.live import Live, LiveRequests
from llm_jax.engine.page_tables import PageTables
from llm_jax.engine.request import Request, Sequence
from llm_jax.ops.sampling import GREEDY
from llm_jax.ops.sampling_params import SamplingParams

SLOTS, PAGES = 3, 5
CHANGES = ("append", "slide", "copy", "leave", "share")


def sequence(slot: int, pages: list[int]) -> Sequence:
    return Sequence(Request("r", (1,), 1), 0, (0.0, 0, 0), [1], [list(pages), pages[:1]], slot=slot)


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, SLOTS - 1), st.integers(1, 99))),
    st.lists(st.booleans(), min_size=1),
)
@hypothesis.settings(deadline=None)
def test_page_tables_are_those_of_the_lists(changes, looks):
    """Pages come, slide out of windows, are copied where they are shared; slots change hands."""
    tables = PageTables(1, SLOTS, 2, PAGES)
    running = [sequence(slot, [slot + 1]) for slot in range(SLOTS)]
    for n, (change, slot, page) in enumerate(changes):
        now, pages = running[slot], running[slot].pages[0]
        if change == "append" and len(pages) < PAGES:
            pages.append(page)
        elif change == "slide" and pages.count(-1) < len(pages):
            pages[pages.count(-1)] = -1
        elif change == "copy" and pages:
            pages[-1] = page
        elif change == "leave":
            running[slot] = sequence(slot, [page])
        elif change == "share":
            now.pages = [list(each) for each in running[page % SLOTS].pages]
        if not looks[n % len(looks)]:
            continue  # a table need not be asked for after every change
        order = list(reversed(running))
        slots = np.array([each.slot for each in order])
        for pool in range(2):
            wanted = np.zeros((SLOTS, PAGES), np.int32)
            for row, each in zip(wanted, order, strict=True):
                row[: len(each.pages[pool])] = np.maximum(each.pages[pool], 0)
            np.testing.assert_array_equal(tables.of(0, pool, order, slots), wanted)


def live(**changes) -> Live:
    plain = Live(SamplingParams(), GREEDY, (), 0, 0, [], None, 1, None, [], [], None, None, recorders=[])
    return dataclasses.replace(plain, **changes)


def test_requests_say_what_some_of_them_ask_for():
    requests = LiveRequests()
    requests["plain"] = live()
    assert not requests.some("mask", "grammars", "search", "taps", "prompt_logprobs")
    requests["a"] = live(mask=np.zeros(1, np.uint32))
    requests["b"] = live(params=SamplingParams(prompt_logprobs=0), mask=np.zeros(1, np.uint32))
    assert requests.some("mask")
    assert requests.some("search", "prompt_logprobs")
    del requests["b"]
    assert requests.some("mask")
    assert not requests.some("prompt_logprobs")
    del requests["a"]
    assert not requests.some("mask")
    assert list(requests) == ["plain"]
