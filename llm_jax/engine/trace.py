"""What a scheduler was told and what it decided, line by line, and the same calls made again.

`TraceWriter` is a scheduler that also writes every call. `replay` makes the same calls again and
compares each decision; a scheduler reads nothing but its calls and its clock, so any difference is a
change of the code. whatif.py asks what other settings would have made of the requests.

A trace is JSON lines: a header {"version", "config"}, then one record a call, "t" in seconds. It holds
the prompts and the replies as token ids.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TextIO

from llm_jax.engine.pages import PoolSpec
from llm_jax.engine.plan import Event, SchedulerConfig, StepPlan
from llm_jax.engine.request import Reason, Request, Sequence
from llm_jax.engine.scheduler import QueueFull, Scheduler

VERSION = 2


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

    def extend(self, beams: list[tuple[Sequence, int]]) -> list[Sequence]:
        self._tick()
        extended = super().extend(beams)
        grown = [(parent.sample, token) for parent, token in beams]
        samples = [sequence.sample for sequence in extended]
        self._record("extend", id=extended[0].request.id, beams=grown, samples=samples)
        return extended

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
        return {"error": refusal(scheduler, request_of(record["request"]))}
    if call == "cancel":
        scheduler.cancel(record["id"], Reason(record["reason"]))
    elif call == "extend":
        beams = [(_find(scheduler, (record["id"], sample)), token) for sample, token in record["beams"]]
        return {"samples": [sequence.sample for sequence in scheduler.extend(beams)]}
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


def _request_fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Request) if field.name != "params"]


def request_of(fields: dict) -> Request:
    """The recorded request."""
    return Request(**{**fields, "prompt": tuple(fields["prompt"])})


def refusal(scheduler: Scheduler, request: Request) -> str | None:
    """Add a request; the name of the error, if one is raised."""
    try:
        scheduler.add(request)
    except (QueueFull, ValueError) as error:
        return type(error).__name__
    return None


def _told(events: list[Event]) -> list:
    return [(*event.sequence.key, event.tokens, event.reason) for event in events]
