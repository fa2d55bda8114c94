"""A trace repeats bit for bit, tells of a change, and answers what if."""

import collections
import dataclasses
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_jax.engine import whatif as whatif_module
from llm_jax.engine.beams import BeamRules, Candidates, Search
from llm_jax.engine.pages import PoolSpec
from llm_jax.engine.plan import SchedulerConfig
from llm_jax.engine.request import Reason, Request
from llm_jax.engine.scheduler import QueueFull
from llm_jax.engine.trace import Trace, TraceWriter, changed_config, read_trace, replay
from llm_jax.engine.whatif import StepTime, fit_step_time, measured, whatif
from llm_jax.infer.beam_options import BeamOptions

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "replay.py"
CONFIG = SchedulerConfig(
    max_rows=8,
    token_budget=64,
    page_size=4,
    pools=(PoolSpec(60), PoolSpec(60, window=8)),
    max_length=128,
    alignment=4,
    max_queue=10,
    preemption="offload",
    host_pages=50,
    prefix_host_pages=30,
)
TRUTH = StepTime(step=5e-3, token=1e-4, decode=2e-4, context=1e-6)


def record(folder, config=CONFIG, requests=60, every=4, extras=True):
    """Run random requests, with steps that last as TRUTH says; returns the file of the trace."""
    choose, now, file = random.Random(0), 100.0, io.StringIO()
    scheduler, searches = TraceWriter(config, lambda: now, file), {}
    added = step = 0
    while added < requests or not scheduler.idle:
        step += 1
        if added < requests and step % every == 0:
            added += 1
            options = {"n": choose.choice([1, 2]), "priority": choose.choice([0, 1])} if extras else {}
            prompt = (choose.randrange(3),) * choose.choice([5, 20, 40])
            new = choose.choice([3, 12, 40])
            if added % 5 == 0:
                new, options = choose.choice([1, 4, 12]), {"n": choose.choice([1, 2, 4]), "search": True}
                beams = BeamOptions(options["n"], early_stopping=True)
                searches[f"{added}"] = Search(BeamRules(beams, new, [0]))
            try:
                scheduler.add(Request(f"{added}", prompt, new, **options))
            except QueueFull:
                pass
        if extras:
            meddle(scheduler, choose, added)
        plan = scheduler.plan()
        now += TRUTH(plan) if plan else 0.01
        if plan:
            sampling = [i for i, row in enumerate(plan.rows) if row.samples]
            tokens = {i: [choose.randrange(1, 9)] for i in sampling}
            tokens = {i: x for i, x in tokens.items() if not plan.rows[i].sequence.request.search}
            stopped = {i for i in tokens if choose.random() < 0.02}
            scheduler.commit(plan, tokens, stopped)
            advance(scheduler, plan, searches)
    path = folder / "trace.jsonl"
    path.write_text(file.getvalue())
    return path


def advance(scheduler, plan, searches):
    """What an engine does with its searches; the candidates follow from the tokens."""
    for row in plan.rows:
        if row.samples and row.sequence.request.search:
            draw = np.random.default_rng([row.sequence.request.n, *row.sequence.tokens])
            logprobs = np.log(-np.sort(-draw.dirichlet(np.ones(9)))).astype(np.float32)
            found = Candidates(draw.permutation(9).astype(np.int32), logprobs, logprobs)
            searches[row.sequence.request.id].take(row.sequence, found)
    for id in dict.fromkeys(row.sequence.request.id for row in plan.rows if row.sequence.request.search):
        live = any(s.request.id == id for s in scheduler.running + scheduler.waiting)
        if live and not searches[id].advance(scheduler):
            scheduler.cancel(id, Reason.STOP)
            scheduler.poll()


def meddle(scheduler, choose, added):
    """Cancellations and drafts."""
    if choose.random() < 0.05:
        scheduler.cancel(f"{max(1, added - choose.randrange(5))}")
    for sequence in scheduler.running:
        if choose.random() < 0.1 and not sequence.request.search:
            sequence.draft = [1, 2, 3]
    if choose.random() < 0.2:
        scheduler.poll()


def extensions(trace):
    """(id, line, beams) of each recorded extension."""
    records = enumerate(trace.records)
    return [(r["id"], line, r["beams"]) for line, r in records if r["call"] == "extend"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return record(tmp_path_factory.mktemp("all"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A trace in which everything is what a what-if does too."""
    return record(tmp_path_factory.mktemp("plain"), extras=False)


def test_replay_is_the_same(trace):
    read = read_trace(trace)
    assert read.config == CONFIG
    calls = {record["call"] for record in read.records}
    assert calls == {"add", "cancel", "extend", "poll", "plan", "commit"}
    plans = [record["decision"] for record in read.records if record.get("decision")]
    assert any(plan["offloads"] for plan in plans) and any(plan["restores"] for plan in plans)
    parts = [{sample for sample, _ in beams} for _, _, beams in extensions(read)]
    assert any(len(parents) > 1 for parents in parts), "beams of several parents"
    assert any(plan["copies"] for plan in plans)
    assert replay(read) is None


@pytest.mark.parametrize(
    "change", [{"token_budget": 32}, {"pools": [{"pages": 40}, {"pages": 60, "window": 8}]}]
)
def test_replay_tells_of_a_change(trace, change):
    read = read_trace(trace)
    different = dataclasses.replace(read, config=changed_config(CONFIG, change))
    assert "line" in replay(different)


def test_bad_files(tmp_path):
    path = tmp_path / "x"
    for text, says in (
        ("", "no trace"),
        ("[]\n", "no trace"),
        ('{"version": 9, "config": {}}\n', "version 9"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_trace(path)
    with pytest.raises(ValueError, match="budget"):
        changed_config(CONFIG, {"budget": 3})
    with pytest.raises(ValueError, match="no committed step"):
        path.write_text(json.dumps({"version": 2, "config": dataclasses.asdict(CONFIG)}) + "\n")
        fit_step_time(read_trace(path))


def test_step_time_is_found(plain):
    fit = dataclasses.asdict(fit_step_time(read_trace(plain)))
    assert fit == pytest.approx(dataclasses.asdict(TRUTH), rel=1e-3, abs=1e-9)


def test_step_time_ignores_a_compilation(plain):
    read = read_trace(plain)
    later, records = 0.0, []
    for record in read.records:
        if record["call"] == "commit" and record["number"] == 3:
            later = 20.0
        records.append({**record, "t": record["t"] + later})
    fit = fit_step_time(dataclasses.replace(read, records=records))
    assert dataclasses.asdict(fit) == pytest.approx(dataclasses.asdict(TRUTH), rel=1e-3, abs=1e-9)


def test_whatif_of_nothing_is_what_was(plain):
    read = read_trace(plain)
    was, now = measured(read), whatif(read, CONFIG, TRUTH)
    assert now["tokens"] == was["tokens"] and now["requests"] == was["requests"]
    assert now["tokens_per_s"] == pytest.approx(was["tokens_per_s"], rel=0.05)
    assert now["ttft_s"]["p50"] == pytest.approx(was["ttft_s"]["p50"], rel=0.1)
    assert now["tpot_s"]["p50"] == pytest.approx(was["tpot_s"]["p50"], rel=0.1)


def test_whatif_of_fewer_rows_waits_longer(plain):
    read = read_trace(plain)
    few = whatif(read, changed_config(CONFIG, {"max_rows": 1, "max_queue": 100}), TRUTH)
    assert few["ttft_s"]["p90"] > 2 * measured(read)["ttft_s"]["p90"] and few["refused"] == 0


@pytest.mark.parametrize(
    "change", [{}, {"max_rows": 4, "max_queue": 100}, {"pools": [{"pages": 36}], "token_budget": 16}]
)
def test_searches_go_the_same_way_in_a_whatif(plain, change, monkeypatch):
    """Their beams have the recorded tokens in the recorded order, whatever waits and is preempted."""
    file, read = io.StringIO(), read_trace(plain)
    monkeypatch.setattr(
        whatif_module, "Scheduler", lambda config, clock: TraceWriter(config, clock, file)
    )
    report = whatif(read, changed_config(CONFIG, change), TRUTH)
    again = dataclasses.replace(read, records=list(map(json.loads, file.getvalue().splitlines()[1:])))
    ways = [collections.defaultdict(list) for _ in range(2)]
    for way, run in zip(ways, (read, again), strict=True):
        for id, _, beams in extensions(run):
            way[id].append(beams)
    lengths = {len(way) for way in ways[0].values()}
    assert ways[0] == ways[1] and 3 in lengths and lengths - {3, 11}, "some stop early"
    assert report["preemptions"] > 0 or "pools" not in change
    assert report["tokens"] == measured(read)["tokens"] == measured(again)["tokens"]
    assert replay(dataclasses.replace(again, config=changed_config(CONFIG, change))) is None


def cut_short(ids=("a",)):
    """A trace of searches of 2 beams and 5 tokens, each cancelled after one extension at 1 s."""
    now, file = [0.0], io.StringIO()
    scheduler = TraceWriter(dataclasses.replace(CONFIG, max_queue=1), lambda: now[0], file)
    for id in ids:
        scheduler.add(Request(id, (1, 2, 3), 5, n=2, search=True))
        with pytest.raises(QueueFull):
            scheduler.add(Request(f"refused {id}", (1, 2, 3), 5, n=2, search=True))
        scheduler.commit(scheduler.plan(), {})
        (first, _), now[0] = scheduler.running, 1.0
        scheduler.extend([(first, 4), (first, 5)])
        scheduler.cancel(id)
        scheduler.poll()
    return Trace(scheduler.config, list(map(json.loads, file.getvalue().splitlines()[1:])))


@pytest.mark.parametrize("seconds, tokens", [(1e-3, 5 + 5), (0.45, 3 + 5), (2.0, 1 + 5)])
def test_searches_that_were_cut_short_or_refused_go_on_in_a_whatif(seconds, tokens):
    """A step brings a token until a step has ended after the cancellation; the other takes all 5."""
    trace = cut_short()
    was = measured(trace)
    assert (was["tokens"], was["refused"], was["ttft_s"]["p50"]) == (1, 1, 1.0)
    now = whatif(trace, changed_config(trace.config, {"max_queue": 9}), lambda plan: seconds)
    assert (now["tokens"], now["refused"], now["finished"]) == (tokens, 0, 4)


def test_whatif_refuses_ids_that_come_twice():
    assert whatif(cut_short("ab"), CONFIG, TRUTH)["finished"] == 8
    with pytest.raises(ValueError, match="the same id, 'a'"):
        whatif(cut_short("aa"), CONFIG, TRUTH)


def test_script(plain):
    run = lambda *flags: subprocess.run(  # noqa: E731
        [sys.executable, SCRIPT, f"--trace={plain}", *flags], capture_output=True, text=True
    )
    assert "all the same" in run().stdout
    report = json.loads(run('--whatif={"token_budget": 16}', "--json").stdout)
    assert report["what if"]["tokens"] == report["measured"]["tokens"]
    table = run('--whatif={"max_rows": 2}')
    assert "ttft_s p99" in table.stdout, table.stderr
    wrong = run('--whatif={"budget": 16}')
    assert wrong.returncode == 2 and "token_budget" in wrong.stderr
