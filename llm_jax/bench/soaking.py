"""An engine under everything that callers do, for a long time: what must not change, does not."""

import random
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

from llm_jax.engine.engine import Engine
from llm_jax.engine.scheduler import QueueFull
from llm_jax.infer.llm import LLM
from llm_jax.ops.sampling_params import SamplingParams

ABSURD: tuple[Callable[[Engine], Any], ...] = (
    lambda engine: engine.add([5], SamplingParams(temperature=-1)),
    lambda engine: engine.add([5], SamplingParams(top_p=2)),
    lambda engine: engine.add([5], SamplingParams(max_new_tokens=10**9)),
    lambda engine: engine.add([], SamplingParams()),
    lambda engine: engine.add([5] * (engine.max_length + 1), SamplingParams(max_new_tokens=1)),
    lambda engine: engine.add([10**9], SamplingParams(max_new_tokens=1)),
)


def soak(llm: LLM, engine: Engine, seconds: float, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Serve random requests, half of which are cancelled at random moments or raise in their callbacks;
    ten times as many come as can be served. A record every tenth of the time, and one at the end.

    Every request that ended by itself must have the tokens that `LLM.generate` gives: "wrong" counts
    those that had others. "leaked" pages, "compiled" programs after the beginning, "unrefused" absurd
    requests must be 0; "rss_mib" is the process's memory, at its largest.
    """
    rng = random.Random(seed)
    known = _known_requests(llm, rng, engine.max_length)
    counts = dict.fromkeys(("finished", "cancelled", "error", "refused", "wrong", "unrefused"), 0)
    running: dict[str, list[int]] = {}
    began, reported = time.monotonic(), 0
    while (now := time.monotonic() - began) < seconds or not engine.idle:
        while now < seconds and len(running) < 10 * engine.config.max_rows:
            prompt, params, wanted = rng.choice(known)
            on_text = _raises if rng.random() < 0.1 else None
            try:
                running[engine.add(prompt, params, on_text=on_text)] = wanted
            except QueueFull:
                counts["refused"] += 1
                break
        if rng.random() < 0.2:
            counts["unrefused"] += not _is_refused(engine, rng.choice(ABSURD))
        for name in [name for name in running if rng.random() < 0.01]:
            engine.cancel(name)
        for delta in engine.step():
            if delta.finish_reason:
                wanted = running.pop(delta.id)
                ended = delta.finish_reason in ("stop", "length")
                counts["finished" if ended else delta.finish_reason] += 1
                counts["wrong"] += ended and delta.output.token_ids != wanted
        if now * 10 // seconds > reported:
            reported = int(now * 10 // seconds)
            yield _record(engine, now, counts)
    yield _record(engine, time.monotonic() - began, counts)


def _known_requests(llm: LLM, rng: random.Random, longest: int) -> list[tuple]:
    """(prompt, parameters, the tokens that come of them)."""
    vocab, made = llm.model.config.vocab_size, []
    for i in range(24):
        prompt = [rng.randrange(5, vocab) for _ in range(rng.randrange(1, longest // 2))]
        new = rng.randrange(1, longest // 2)
        sampled = {"temperature": 0.8, "top_p": 0.9, "seed": i, "presence_penalty": 0.5} if i % 2 else {}
        params = SamplingParams(**({"max_new_tokens": new, "temperature": 0.0} | sampled))
        made.append((prompt, params))
    return [(*each, llm.generate([each[0]], each[1])[0].token_ids) for each in made]


def _raises(delta: Any) -> None:
    raise RuntimeError("a caller's own")


def _is_refused(engine: Engine, call: Callable[[Engine], Any]) -> bool:
    try:
        call(engine)
    except ValueError:
        return True
    return False


def _record(engine: Engine, seconds: float, counts: dict[str, int]) -> dict[str, Any]:
    loads = [scheduler.load() for scheduler in engine.schedulers]
    idle = engine.idle
    leaked = sum(t - f for x in loads for t, f in zip(x.total_pages, x.free_pages, strict=True))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rest = {"leaked": leaked if idle else None, "compiled": engine.misses, "rss_mib": memory}
    return {"seconds": round(seconds, 1), **counts, **rest}
