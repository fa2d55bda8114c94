"""What other settings would have made of the requests of a trace.

`whatif` gives the recorded requests, at their times and with what came of them, to a scheduler with
another config, while `StepTime`, fitted to the recorded steps, says how long its steps would take.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llm_jax.engine.plan import Event, SchedulerConfig, StepPlan
from llm_jax.engine.request import Reason, Sequence
from llm_jax.engine.scheduler import Scheduler
from llm_jax.engine.trace import Trace, decision, refusal, request_of

PERCENTILES = (50, 90, 99)
SHORTEST_STEP = 1e-6  # seconds: the clock of a what-if always goes on


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step: a linear model."""

    step: float
    token: float  # of the budget
    decode: float  # rows of one token
    context: float  # tokens that the rows attend to

    def __call__(self, plan: StepPlan) -> float:
        return self.of(decision(plan) or {})

    def of(self, decided: dict) -> float:
        """The time of a plan's `decision`."""
        seconds = np.dot(dataclasses.astuple(self), _features(decided))
        return max(SHORTEST_STEP, float(seconds))


def _features(decided: dict) -> list[float]:
    """What StepTime's numbers are multiplied with."""
    counts, ends = zip(*((row[4], row[3] + row[4]) for row in decided["rows"]), strict=True)
    return [1.0, decided["cost"], counts.count(1), sum(ends)]


def fit_step_time(trace: Trace) -> StepTime:
    """The least-squares fit to the recorded steps, without negative numbers and without outliers.

    A step lasts from its plan, or the commit before if that was later, to its commit. Outliers are
    steps in which something was compiled, say. ValueError where no step was recorded.
    """
    rows, seconds = [], []
    for decided, begin, end in _steps(trace):
        rows.append(_features(decided))
        seconds.append(end - begin)
    if not rows:
        raise ValueError("the trace has no committed step: record some work")
    features, times = np.array(rows), np.array(seconds)
    numbers = _positive_fit(features, times)
    off = np.abs(features @ numbers - times)
    near = off <= 10 * np.median(off) + SHORTEST_STEP
    return StepTime(*map(float, _positive_fit(features[near], times[near])))


def _positive_fit(features: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Least squares in which a factor that would be negative is left out."""
    used, numbers = list(range(features.shape[1])), np.zeros(features.shape[1])
    while used:
        found = np.linalg.lstsq(features[:, used], times, rcond=None)[0]
        if found.min() >= 0:
            numbers[used] = found
            break
        used.pop(int(found.argmin()))
    return numbers


def _steps(trace: Trace) -> Iterator[tuple[dict, float, float]]:
    """(decision, begin, end) of each committed step that had rows."""
    planned, before = {}, 0.0
    for record in trace.records:
        if record["call"] == "plan" and record["decision"]:
            planned[record["decision"]["number"]] = record
        elif record["call"] == "commit":
            plan = planned.pop(record["number"])
            if plan["decision"]["rows"]:
                yield plan["decision"], max(plan["t"], before), record["t"]
            before = record["t"]


class Meter:
    """Times of tokens, and what users feel of them."""

    def __init__(self):
        self.refused = 0
        self._arrived: dict[str, float] = {}
        self._times: dict[tuple[str, int], list[tuple[float, int]]] = {}

    def arrive(self, id: str, now: float) -> None:
        """A request was taken."""
        self._arrived[id] = now

    def tokens(self, key: tuple[str, int], count: int, now: float) -> None:
        """New tokens of a sequence."""
        if count:
            self._times.setdefault(key, []).append((now, count))

    def report(self) -> dict[str, Any]:
        """Seconds to the first token, seconds of each further one, and tokens a second."""
        first = {}
        for (id, _), times in self._times.items():
            first[id] = min(times[0][0], first.get(id, times[0][0]))
        counts = [sum(n for _, n in times) for times in self._times.values()]
        gaps = [
            (times[-1][0] - times[0][0]) / (count - times[0][1])
            for times, count in zip(self._times.values(), counts, strict=True)
            if count > times[0][1]
        ]
        ends = [times[-1][0] for times in self._times.values()]
        span = max(ends) - min(self._arrived.values()) if ends else 0.0
        return {
            "requests": len(self._arrived),
            "refused": self.refused,
            "tokens": sum(counts),
            "seconds": span,
            "tokens_per_s": sum(counts) / span if span else 0.0,
            "ttft_s": _percentiles([first[id] - self._arrived[id] for id in first]),
            "tpot_s": _percentiles(gaps),
        }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES} if values else {}


def measured(trace: Trace) -> dict[str, Any]:
    """`Meter.report` of the recorded run itself."""
    meter, recorded = Meter(), Recorded(trace)
    for record in trace.records:
        if record["call"] == "add":
            meter.refused += record["error"] is not None
            if record["error"] is None:
                meter.arrive(record["request"]["id"], record["t"])
        for id, sample, tokens, reason in record.get("events", ()):
            count = len(tokens)
            if id in recorded.searches:
                count = _searched(sample, len(recorded.searches[id]), reason)
            meter.tokens((id, sample), count, record["t"])
    return meter.report()


def _searched(sample: int, extensions: int, reason: str | None) -> int:
    """Tokens that the end of a beam brings: those of one text for all beams, which is as long."""
    return extensions + (reason == Reason.STOP) if sample == 0 else 0


def whatif(
    trace: Trace, config: SchedulerConfig, step_time: Callable[[StepPlan], float]
) -> dict[str, Any]:
    """`Meter.report` of the recorded requests under another config, and its Statistics.

    One step after the other, without overlap and drafts. A request that was refused, or ended from
    outside, may use all its max_new_tokens now; cancellations come at their recorded times. ValueError
    where two recorded requests had one id.
    """
    _check_ids(trace)
    recorded, meter, now = Recorded(trace), Meter(), 0.0
    inputs = [record for record in trace.records if _is_input(record)][::-1]
    scheduler = Scheduler(config, lambda: now)
    while inputs or not scheduler.idle:
        while inputs and inputs[-1]["t"] <= now:
            _feed(scheduler, meter, inputs.pop())
        plan = scheduler.plan()
        _count(meter, scheduler.poll(), now)
        if plan is None:
            now = max(now, inputs[-1]["t"]) if inputs else now
            continue
        now += step_time(plan) if plan.cost else 0.0
        events = scheduler.commit(plan, *recorded.answers(plan))
        recorded.advance(scheduler, plan)
        _count(meter, events + scheduler.poll(), now)
    return {**meter.report(), **dataclasses.asdict(scheduler.statistics)}


def _check_ids(trace: Trace) -> None:
    taken = [r["request"]["id"] for r in trace.records if r["call"] == "add" and r["error"] is None]
    again = [id for id, times in collections.Counter(taken).items() if times > 1]
    if again:
        raise ValueError(
            f"requests of the trace have the same id, {again[0]!r}: a what-if tells them apart by it; "
            "record a run in which each has its own"
        )


def _is_input(record: dict) -> bool:
    """Whether a call came from outside: searches that are over are cancelled with Reason.STOP."""
    return record["call"] == "add" or (record["call"] == "cancel" and record["reason"] != Reason.STOP)


def _feed(scheduler: Scheduler, meter: Meter, record: dict) -> None:
    if record["call"] == "cancel":
        scheduler.cancel(record["id"])
    elif refusal(scheduler, request_of(record["request"])):
        meter.refused += 1
    else:
        meter.arrive(record["request"]["id"], record["t"])


def _count(meter: Meter, events: list[Event], now: float) -> None:
    for event in events:
        sequence, count = event.sequence, len(event.tokens)
        if sequence.request.search:
            count = _searched(sequence.sample, len(sequence.generated), event.reason)
        meter.tokens(sequence.key, count, now)


class Recorded:
    """What came of the requests of a trace, for a run in which it comes again; token 0 beyond that.

    searches: by id, how the beams of each went on step by step: (parent's sample, token) of each.
    Neither tokens nor candidates depend on the settings, so a search goes the same way under others.
    """

    def __init__(self, trace: Trace):
        self.searches: dict[str, list[list[tuple[int, int]]]] = {}
        self._replies: dict[tuple[str, int], tuple[list[int], bool]] = {}  # whether it stopped by itself
        for record in trace.records:
            if record["call"] == "add" and record["request"]["search"]:
                self.searches.setdefault(record["request"]["id"], [])
            elif record["call"] == "extend":
                self.searches[record["id"]].append(record["beams"])
            for id, sample, tokens, reason in record.get("events", ()):
                before = self._replies.get((id, sample), ([], False))[0]
                self._replies[id, sample] = (before + tokens, reason == Reason.STOP)

    def answers(self, plan: StepPlan) -> tuple[dict[int, list[int]], set[int]]:
        """What the rows of a step sample, and which of them stop, for `Scheduler.commit`."""
        tokens, stopped = {}, set()
        for index, row in enumerate(plan.rows):
            if row.samples and not row.sequence.request.search:
                reply, stops = self._replies.get(row.sequence.key, ([], False))
                at = len(row.sequence.generated)
                tokens[index] = reply[at : at + 1] or [0]
                if stops and at + 1 >= len(reply):
                    stopped.add(index)
        return tokens, stopped

    def advance(self, scheduler: Scheduler, plan: StepPlan) -> None:
        """Let the searches of a committed plan go on, or end, where their beams are computed."""
        for id in dict.fromkeys(row.sequence.request.id for row in plan.rows):
            beams = [s for s in scheduler.running if s.request.id == id and s.request.search]
            if not beams:
                continue
            waited = beams if beams[0].generated else beams[:1]  # the others begin as the first did
            if all(beam.computed == beam.length for beam in waited):
                grown = self._grown(beams)
                if grown:
                    scheduler.extend(grown)
                else:
                    scheduler.cancel(id, Reason.STOP)

    def _grown(self, beams: list[Sequence]) -> list[tuple[Sequence, int]]:
        """How a search's beams, by sample, go on; [] where it is over."""
        request, at = beams[0].request, len(beams[0].generated)
        extensions = self.searches[request.id]
        stops = self._replies.get((request.id, 0), ([], False))[1]
        if at + 1 >= request.max_new_tokens or (stops and at >= len(extensions)):
            return []
        if at < len(extensions):
            return [(beams[sample], token) for sample, token in extensions[at]]
        return [(beam, 0) for beam in (beams if at else beams[:1] * request.n)]
