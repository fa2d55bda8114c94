"""A trace repeats bit for bit, tells of a change, and answers what if."""

import dataclasses
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.engine.pages import PoolSpec
from llm_jax.engine.plan import SchedulerConfig
from llm_jax.engine.request import Request
from llm_jax.engine.scheduler import QueueFull
from llm_jax.engine.trace import (
    StepTime,
    TraceWriter,
    changed_config,
    fit_step_time,
    measured,
    read_trace,
    replay,
    whatif,
)

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
    scheduler = TraceWriter(config, lambda: now, file)
    added = step = 0
    while added < requests or not scheduler.idle:
        step += 1
        if added < requests and step % every == 0:
            added += 1
            options = {"n": choose.choice([1, 2]), "priority": choose.choice([0, 1])} if extras else {}
            prompt = (choose.randrange(3),) * choose.choice([5, 20, 40])
            try:
                scheduler.add(Request(f"{added}", prompt, choose.choice([3, 12, 40]), **options))
            except QueueFull:
                pass
        if extras:
            meddle(scheduler, choose, added)
        plan = scheduler.plan()
        now += TRUTH(plan) if plan else 0.01
        if plan:
            tokens = {i: [choose.randrange(1, 9)] for i, row in enumerate(plan.rows) if row.samples}
            stopped = {i for i in tokens if choose.random() < 0.02}
            scheduler.commit(plan, tokens, stopped)
    path = folder / "trace.jsonl"
    path.write_text(file.getvalue())
    return path


def meddle(scheduler, choose, added):
    """Cancellations, drafts, forks, ends."""
    if choose.random() < 0.05:
        scheduler.cancel(f"{max(1, added - choose.randrange(5))}")
    for sequence in scheduler.running:
        if choose.random() < 0.1:
            sequence.draft = [1, 2, 3]
    running = scheduler.running
    if running and choose.random() < 0.05:
        scheduler.end(choose.choice(running))
    elif running and scheduler.load().running < scheduler.config.max_rows and choose.random() < 0.1:
        scheduler.fork(choose.choice(running), 5)
    if choose.random() < 0.2:
        scheduler.poll()


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
    assert calls == {"add", "cancel", "end", "fork", "poll", "plan", "commit"}
    plans = [record["decision"] for record in read.records if record.get("decision")]
    assert any(plan["offloads"] for plan in plans) and any(plan["restores"] for plan in plans)
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
        path.write_text(json.dumps({"version": 1, "config": dataclasses.asdict(CONFIG)}) + "\n")
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
