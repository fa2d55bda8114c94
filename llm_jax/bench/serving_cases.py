"""The engine's benchmarks: each gives records {case, ours, peer, ratio, unit, ...}, medians of rounds.

Every round has requests of its own, so that no prefix is known from the round before.
"""

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.bench.arrivals import completed_share, knee, plot_rates
from llm_jax.bench.peers import same_weights
from llm_jax.bench.serving import Times, Traffic, continuous_batches, mixed, serve, static_batches
from llm_jax.bench.setup import Setup, ran_on, record, skipped
from llm_jax.bench.timing import interleaved
from llm_jax.config import EngineConfig
from llm_jax.engine.engine import Engine
from llm_jax.infer.llm import LLM
from llm_jax.ops.sampling_params import SamplingParams

VOCAB = 30000  # ids that all shapes have
LONGEST = 800  # tokens of a request: 512 of a prompt, 256 new ones, and some


def engine_for(llm: LLM, rows: int, **changes: Any) -> Engine:
    """An engine with everything compiled."""
    return Engine(llm, EngineConfig(**({"max_rows": rows, "max_length": LONGEST} | changes)))


def mixed_traffic(setup: Setup) -> Iterator[dict[str, Any]]:
    """Many unequal requests at once beside transformers: static batches, and its continuous ones."""
    engine, times = engine_for(setup.llm, setup.max_rows), []
    traffic = [mixed(setup.requests, VOCAB, seed) for seed in range(setup.repeats + 1)]
    turns = {who: iter(traffic) for who in ("ours", "static", "continuous")}
    tokens = lambda each: sum(each.new_tokens)  # noqa: E731

    def ours():
        times.append(serve(engine, next(turns["ours"])))
        return times[-1].tokens_per_s

    def static():
        each = next(turns["static"])
        return tokens(each) / static_batches(setup.torch, setup.peer, each, setup.max_rows)

    def continuous():
        each = next(turns["continuous"])
        return tokens(each) / continuous_batches(setup.transformers, setup.peer, each)

    rivals = {"ours": ours, "static": static}
    try:
        continuous_batches(setup.transformers, setup.peer, mixed(1, VOCAB))
        rivals["continuous"] = continuous
    except Exception as error:  # of a peer whose continuous batching may not run here at all
        yield skipped(f"mixed_traffic/{setup.name}/continuous", error)
    speeds = interleaved(rivals, setup.repeats)
    figures = middle(times[1:]) | ran_on(setup.torch)
    for other in list(rivals)[1:]:
        yield record(f"mixed_traffic/{setup.name}/{other}", speeds["ours"], speeds[other], **figures)
    yield {"case": "compilations after the beginning", "count": engine.misses}


def arrivals(setup: Setup) -> Iterator[dict[str, Any]]:
    """The usual figures at several rates of Poisson arrivals, and up to which rate the engine keeps up.

    Raises ValueError for fewer requests than tell whether a queue grows, and for rates that are none.
    """
    if setup.requests < 8:
        raise ValueError(f"requests={setup.requests}: expected at least 8 of arrivals")
    if not setup.rates or min(setup.rates) <= 0:
        raise ValueError(f"rates={setup.rates}: expected one or more, above 0")
    engine, found = engine_for(setup.llm, setup.max_rows), []
    for seed, rate in enumerate(sorted(setup.rates)):
        traffic = mixed(setup.requests, VOCAB, seed, rate)
        times = serve(engine, traffic)
        ends = [came + each[-1] for came, each in zip(traffic.arrivals, times.tokens, strict=True)]
        figures = times.table() | {"completed_share": completed_share(traffic.arrivals, ends)}
        found.append({"case": f"arrivals/{setup.name}/rate{rate:g}", "rate": rate} | rounded(figures))
        yield found[-1]
    bound = setup.ttft_bound_s
    yield {"case": f"arrivals/{setup.name}/knee", "rate": knee(found, bound), "ttft_bound_s": bound}
    if setup.plot:
        plot_rates(found, bound, setup.plot, setup.name)


def prefix(setup: Setup) -> Iterator[dict[str, Any]]:
    """Time to the first token of requests with 512 tokens in common: with the prefix cache, without."""
    engines = {
        who: engine_for(setup.llm, setup.max_rows, prefix_cache=who == "ours")
        for who in ("ours", "peer")
    }
    seeds = {who: iter(range(100, 10**6)) for who in engines}

    def first(who):
        each = mixed(setup.requests, VOCAB, next(seeds[who]), prefix=512)
        each = Traffic(each.prompts, [1] * setup.requests, each.arrivals)
        return statistics.mean(t[0] for t in serve(engines[who], each).tokens)

    seconds = interleaved({who: lambda who=who: first(who) for who in engines}, setup.repeats)
    speeds = {who: 1 / value for who, value in seconds.items()}
    yield record(f"prefix/{setup.name}", speeds["ours"], speeds["peer"], "1/s to the first token")


def speculation(setup: Setup) -> Iterator[dict[str, Any]]:
    """One greedy request with prompt lookup and without, on a text that repeats itself and on another.

    Random weights write what nobody can guess. Without their blocks' results the same model, at the same
    cost, soon writes the same tokens for ever: then every draft is right.
    """
    pattern = np.random.default_rng(0).integers(5, VOCAB, 24).tolist()
    asked = SamplingParams(max_new_tokens=setup.new_tokens, temperature=0, ignore_eos=True)
    ways: dict[str, dict[str, Any]] = {"ours": {"speculation": "prompt_lookup"}, "peer": {}}
    for text, model in {"random": setup.llm, "repetitive": repeating(setup)}.items():
        engines = {who: engine_for(model, 1, **changes) for who, changes in ways.items()}

        def speed(engine):
            start = time.perf_counter()
            engine.generate([pattern * 8], asked)
            return setup.new_tokens / (time.perf_counter() - start)

        turns = {who: functools.partial(speed, engine) for who, engine in engines.items()}
        speeds = interleaved(turns, setup.repeats)
        steps = {who: engine.schedulers[0].statistics.steps for who, engine in engines.items()}
        per_step = {"tokens_per_step": round(steps["peer"] / steps["ours"], 2)}
        yield record(f"speculation/{setup.name}/{text}", speeds["ours"], speeds["peer"], **per_step)


def repeating(setup: Setup) -> LLM:
    """The same model, the blocks of which add nothing, so that a token tells the next one."""
    with setup.torch.no_grad():
        for name, weight in setup.peer.named_parameters():
            if name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight")):
                weight.zero_()
    return same_weights(setup.peer, dtype=setup.dtype)


def overhead(setup: Setup) -> Iterator[dict[str, Any]]:
    """Decoding a full batch: the engine beside the bare loop of a fixed batch."""
    asked = SamplingParams(max_new_tokens=setup.new_tokens, temperature=0, ignore_eos=True)
    for batch in setup.batches:
        engine = engine_for(setup.llm, batch, prefix_cache=False)
        ids = np.random.default_rng(0).integers(5, VOCAB, (batch, setup.prompt_tokens)).tolist()
        everything = Traffic(ids, [setup.new_tokens] * batch, [0.0] * batch)

        def ours(engine=engine, everything=everything):
            times = serve(engine, everything)
            began = max(each[0] for each in times.tokens)  # when all are past their prompts
            later = [t for each in times.tokens for t in each if t > began]
            return len(later) / (max(later) - began)

        def theirs(ids=ids):
            setup.llm.generate(ids, asked)
            return setup.llm.stats.decode_tokens_per_s

        speeds = interleaved({"ours": ours, "peer": theirs}, setup.repeats)
        share = round(engine.scheduling_s / max(engine.busy_s, 1e-9), 4)
        case = f"overhead/{setup.name}/batch{batch}"
        yield record(case, speeds["ours"], speeds["peer"], scheduling_share=share)


CASES = {
    "mixed_traffic": mixed_traffic,
    "arrivals": arrivals,
    "prefix": prefix,
    "speculation": speculation,
    "overhead": overhead,
}


def middle(times: list[Times]) -> dict[str, float]:
    """Medians of the usual figures over rounds."""
    tables = [each.table() for each in times]
    return rounded({key: statistics.median(table[key] for table in tables) for key in tables[0]})


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """With two decimals."""
    return {key: round(value, 2) for key, value in figures.items()}
