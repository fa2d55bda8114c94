"""Repeat a trace of the scheduler, or ask what other settings would have made of its requests.

    python scripts/replay.py --trace=F                                # are the decisions the same?
    python scripts/replay.py --trace=F --whatif='{"token_budget": 512}' [--json]

docs/scheduler.md tells what is compared and how a what-if comes by its times.
"""

import dataclasses
import json

from absl import app, flags

from llm_jax import cli
from llm_jax.engine.trace import changed_config, read_trace, replay
from llm_jax.engine.whatif import fit_step_time, measured, whatif

TRACE = flags.DEFINE_string(
    "trace", None, "File that an engine wrote, see EngineConfig.trace.", required=True
)
WHATIF = flags.DEFINE_string("whatif", None, "Settings of SchedulerConfig to change, as JSON.")
JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def settings(text: str) -> dict:
    """Settings from JSON."""
    try:
        changes = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--whatif={text!r}: {error}") from error
    if not isinstance(changes, dict):
        raise ValueError(
            f"--whatif={text!r}: expected an object, such as {{'token_budget': 512}} in JSON"
        )
    return changes


def flat(report: dict) -> dict[str, str]:
    """A report's numbers as text, percentiles by name."""
    lines = {}
    for name, value in report.items():
        parts = (
            {f"{name} {p}": x for p, x in value.items()} if isinstance(value, dict) else {name: value}
        )
        lines.update({key: f"{x:.6g}" for key, x in parts.items()})
    return lines


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    trace = read_trace(TRACE.value)
    if WHATIF.value is None:
        difference = replay(trace)
        if difference:
            raise ValueError(f"{TRACE.value}, {difference}")
        print(json.dumps({"same": True}) if JSON.value else f"{len(trace.records)} calls: all the same")
        return
    config, model = changed_config(trace.config, settings(WHATIF.value)), fit_step_time(trace)
    reports = {
        "measured": measured(trace),
        "as it was": whatif(trace, trace.config, model),
        "what if": whatif(trace, config, model),
    }
    if JSON.value:
        print(json.dumps({**reports, "step_time": dataclasses.asdict(model)}))
        return
    columns = {name: flat(report) for name, report in reports.items()}
    print(f"{'':24}" + "".join(f"{name:>16}" for name in columns))
    for line in columns["what if"]:
        print(f"{line:24}" + "".join(f"{column.get(line, '-'):>16}" for column in columns.values()))


if __name__ == "__main__":
    cli.run(main)
