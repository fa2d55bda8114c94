"""Use an engine in every way that callers do, for long, and see that nothing is lost.

    python scripts/soak_engine.py --seconds=3600
    python scripts/soak_engine.py --model=DIR --seconds=300 --settings='{"max_rows": 16}' --json

Requests come ten times faster than they are served, a part is cancelled at random moments, some raise
in their callbacks, some ask for what cannot be. The exit status is 1 when a request that ended by itself
has other tokens than it has alone, a page is left in use, anything was compiled on the way, or, of runs
of a minute and more, memory grew by more than 1% after the first fifth of the time.
"""

import json
import logging
import sys

from absl import app, flags

from llm_jax import LLM, Engine, EngineConfig, cli
from llm_jax.bench.soaking import soak

MODEL = flags.DEFINE_string("model", None, "Hugging Face directory or hub id; default: the demo model.")
SECONDS = flags.DEFINE_float("seconds", 300, "How long.", lower_bound=1)
SETTINGS = flags.DEFINE_string(
    "settings",
    '{"max_rows": 8, "token_budget": 64, "max_length": 128, "page_size": 16, "pages": [40]}',
    "EngineConfig's, as JSON; few pages, so that they run out.",
)
SEED = flags.DEFINE_integer("seed", 0, "Of the requests.")
JSON = flags.DEFINE_bool("json", False, "One JSON object a line on stdout, nothing else.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    settings = json.loads(SETTINGS.value)
    settings = {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}
    llm = LLM(MODEL.value)
    engine = Engine(llm, EngineConfig(**settings))
    logging.getLogger("llm_jax.engine.engine").setLevel(logging.CRITICAL)  # callbacks raise on purpose
    found = []
    for record in soak(llm, engine, SECONDS.value, SEED.value):
        found.append(record)
        line = "  ".join(f"{key} {value}" for key, value in record.items())
        print(json.dumps(record) if JSON.value else line, flush=True)
    last, warm = found[-1], found[min(1, len(found) - 1)]
    bad = [name for name in ("wrong", "unrefused", "leaked", "compiled") if last[name]]
    grown = last["rss_mib"] / warm["rss_mib"] - 1
    bad += [f"memory grew by {grown:.1%}"] if grown > 0.01 and SECONDS.value >= 60 else []
    if bad:
        print("not as it should be:", *bad, file=sys.stderr)
    sys.exit(bool(bad))


if __name__ == "__main__":
    cli.run(main)
