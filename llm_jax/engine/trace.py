"""What a scheduler was told and what it decided, line by line: to repeat it, or to ask what if.

`TraceWriter` is a scheduler that also writes every call. `replay` makes the same calls again and
compares each decision; a scheduler reads nothing but its calls and its clock, so any difference is a
change of the code. `whatif` gives the recorded requests, at their times and with their replies, to a
scheduler with another config, while `StepTime`, fitted to the recorded steps, says how long its steps
would take.

A trace is JSON lines: a header {"version", "config"}, then one record a call, "t" in seconds. It holds
the prompts and the replies as token ids.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from llm_jax.engine.pages import PoolSpec
from llm_jax.engine.plan import Event, SchedulerConfig, StepPlan
from llm_jax.engine.request import Reason, Request, Sequence
from llm_jax.engine.scheduler import QueueFull, Scheduler

VERSION = 1
PERCENTILES = (50, 90, 99)
SHORTEST_STEP = 1e-6  # seconds: the clock of a what-if always goes on


class TraceWriter(Scheduler):
    """A Scheduler that writes its calls to a text file, but for the `params` of requests."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float], file: TextIO):
        super().__init__(config, self._tick)
        self._outside, self._now, self._file = clock, 0.0, file
        self._write({"version": VERSION, "config": dataclasses.asdict(config)})

    def add(self, request: Request) -> None:
        error = None
        try:
            super().add(request)
        except (QueueFull, ValueError) as refusal:
            error = type(refusal).__name__
            raise
        finally:
            fields = {name: getattr(request, name) for name in _request_fields()}
            self._record("add", request=fields, error=error)

    def cancel(self, id: str, reason: Reason = Reason.CANCELLED) -> bool:
        self._tick()
        self._record("cancel", id=id, reason=reason)
        return super().cancel(id, reason)

    def end(self, sequence: Sequence, reason: Reason = Reason.STOP) -> None:
        self._tick()
        self._record("end", key=sequence.key, reason=reason)
        super().end(sequence, reason)

    def fork(self, sequence: Sequence, token: int | None = None) -> Sequence:
        self._tick()
        copy = super().fork(sequence, token)
        self._record("fork", key=sequence.key, token=token)
        return copy

    def poll(self) -> list[Event]:
        events = super().poll()
        if events:
            self._record("poll", events=_told(events))
        return events

    def plan(self) -> StepPlan | None:
        drafts = [(*s.key, s.draft) for s in self.running if s.draft and not s.verifying]
        plan = super().plan()
        self._record("plan", drafts=drafts, decision=decision(plan))
        return plan

    def commit(
        self, plan: StepPlan, tokens: Mapping[int, list[int]], stopped: Collection[int] = ()
    ) -> list[Event]:
        events = super().commit(plan, tokens, stopped)
        said = {"tokens": sorted(tokens.items()), "stopped": sorted(stopped)}
        self._record("commit", number=plan.number, **said, events=_told(events))
        return events

    def _tick(self) -> float:
        self._now = self._outside()
        return self._now

    def _record(self, call: str, **fields: Any) -> None:
        self._write({"call": call, "t": self._now, **fields})

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")


def decision(plan: StepPlan | None) -> dict | None:
    """All that a plan decides, as plain lists; of the pages of a row only the last of each pool."""
    if plan is None:
        return None
    rows = [
        (*r.sequence.key, r.sequence.slot, r.start, r.count, r.samples, r.first, r.drafted)
        + tuple(pages[-1] for pages in r.sequence.pages)
        for r in plan.rows
    ]
    moves = {name: getattr(plan, name) for name in ("copies", "offloads", "restores")}
    released = [s.key for s in plan.released]
    return {"number": plan.number, "cost": plan.cost, "rows": rows, **moves, "released": released}


@dataclasses.dataclass(frozen=True)
class Trace:
    """A recorded run."""

    config: SchedulerConfig
    records: list[dict]


def read_trace(path: str | Path) -> Trace:
    """The trace in a file; ValueError where it is none, or one of another version."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    try:
        header, *records = map(json.loads, lines)
        version, settings = header["version"], header["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no trace ({error!r}): give a file that TraceWriter wrote"
        ) from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, this code reads {VERSION}: record it again")
    return Trace(changed_config(None, settings), records)


def changed_config(config: SchedulerConfig | None, changes: Mapping[str, Any]) -> SchedulerConfig:
    """A config with some fields from JSON; pools are objects with the fields of PoolSpec."""
    names = [field.name for field in dataclasses.fields(SchedulerConfig)]
    unknown = sorted(set(changes) - set(names))
    if unknown:
        raise ValueError(f"a scheduler has no settings {unknown}: expected some of {names}")
    changes = dict(changes)
    if "pools" in changes:
        changes["pools"] = tuple(PoolSpec(**pool) for pool in changes["pools"])
    return dataclasses.replace(config, **changes) if config else SchedulerConfig(**changes)


def replay(trace: Trace) -> str | None:
    """Make the recorded calls again; None if every answer is the same, else the first that is not."""
    now = 0.0
    scheduler, plans = Scheduler(trace.config, lambda: now), {}
    for line, record in enumerate(trace.records, 2):
        now = record["t"]
        answer = _call(scheduler, plans, record)
        expected = {name: record[name] for name in answer}
        answer = json.loads(json.dumps(answer))  # tuples are lists there
        if answer != expected:
            return f"line {line}, {record['call']}: now {answer}, recorded {expected}"
    return None


def _call(scheduler: Scheduler, plans: dict[int, StepPlan], record: dict) -> dict:
    """Make one recorded call; returns its answer by the record's own names."""
    call = record["call"]
    if call == "add":
        return {"error": _refusal(scheduler, _request(record["request"]))}
    if call == "cancel":
        scheduler.cancel(record["id"], Reason(record["reason"]))
    elif call == "end":
        scheduler.end(_find(scheduler, record["key"]), Reason(record["reason"]))
    elif call == "fork":
        scheduler.fork(_find(scheduler, record["key"]), record["token"])
    elif call == "poll":
        return {"events": _told(scheduler.poll())}
    elif call == "plan":
        for id, sample, draft in record["drafts"]:
            _find(scheduler, (id, sample)).draft = draft
        plan = scheduler.plan()
        if plan is not None:
            plans[plan.number] = plan
        return {"decision": decision(plan)}
    else:
        plan = plans.pop(record["number"])
        events = scheduler.commit(plan, dict(record["tokens"]), record["stopped"])
        return {"events": _told(events)}
    return {}


def _find(scheduler: Scheduler, key: Collection) -> Sequence:
    return next(s for s in scheduler.running + scheduler.waiting if s.key == tuple(key))


def _refusal(scheduler: Scheduler, request: Request) -> str | None:
    """Add a request; the name of the error, if one is raised."""
    try:
        scheduler.add(request)
    except (QueueFull, ValueError) as error:
        return type(error).__name__
    return None


def _request_fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Request) if field.name != "params"]


def _request(fields: dict) -> Request:
    return Request(**{**fields, "prompt": tuple(fields["prompt"])})


def _told(events: list[Event]) -> list:
    return [(*event.sequence.key, event.tokens, event.reason) for event in events]


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
    meter = Meter()
    for record in trace.records:
        if record["call"] == "add":
            meter.refused += record["error"] is not None
            if record["error"] is None:
                meter.arrive(record["request"]["id"], record["t"])
        for id, sample, tokens, _ in record.get("events", ()):
            meter.tokens((id, sample), len(tokens), record["t"])
    return meter.report()


def whatif(
    trace: Trace, config: SchedulerConfig, step_time: Callable[[StepPlan], float]
) -> dict[str, Any]:
    """`Meter.report` of the recorded requests under another config, and its Statistics.

    One step after the other, without overlap, drafts and forks. A request that was refused, or ended
    from outside, may use all its max_new_tokens now; cancellations come at their recorded times.
    """
    replies, meter, now = _replies(trace), Meter(), 0.0
    inputs = [r for r in trace.records if r["call"] in ("add", "cancel")][::-1]
    scheduler = Scheduler(config, lambda: now)
    while inputs or not scheduler.idle:
        while inputs and inputs[-1]["t"] <= now:
            _feed(scheduler, meter, inputs.pop())
        plan = scheduler.plan()
        if plan is None:
            now = max(now, inputs[-1]["t"]) if inputs else now
            continue
        now += step_time(plan) if plan.cost else 0.0
        for event in scheduler.commit(plan, *_answers(plan, replies)):
            meter.tokens(event.sequence.key, len(event.tokens), now)
    return {**meter.report(), **dataclasses.asdict(scheduler.statistics)}


def _feed(scheduler: Scheduler, meter: Meter, record: dict) -> None:
    if record["call"] == "cancel":
        scheduler.cancel(record["id"])
    elif _refusal(scheduler, _request(record["request"])):
        meter.refused += 1
    else:
        meter.arrive(record["request"]["id"], record["t"])


def _replies(trace: Trace) -> dict[tuple[str, int], tuple[list[int], bool]]:
    """The tokens of each sequence, and whether it stopped by itself after them."""
    replies: dict[tuple[str, int], tuple[list[int], bool]] = {}
    for record in trace.records:
        for id, sample, tokens, reason in record.get("events", ()):
            before = replies.get((id, sample), ([], False))[0]
            replies[id, sample] = (before + tokens, reason == Reason.STOP)
    return replies


def _answers(plan: StepPlan, replies: dict) -> tuple[dict[int, list[int]], set[int]]:
    """What the rows of a step sample, as recorded; token 0 beyond that."""
    tokens, stopped = {}, set()
    for index, row in enumerate(plan.rows):
        if row.samples:
            reply, stops = replies.get(row.sequence.key, ([], False))
            at = len(row.sequence.generated)
            tokens[index] = reply[at : at + 1] or [0]
            if stops and at + 1 >= len(reply):
                stopped.add(index)
    return tokens, stopped
