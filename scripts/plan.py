"""What a model needs and how fast it runs on a TPU slice, without a TPU; libtpu is needed, or --paper.

    python scripts/plan.py --model=llama3.1-8b --topology=v5e:2x4 --mesh=tensor:8 --batch=32
    python scripts/plan.py --model=llama3.1-70b --topology=v5p:2x2x2 --batch=64       # the best meshes
    python scripts/plan.py --model=llama3.1-405b --topology=v5p:8x8x16 --steps=train --batch=1024 --paper
    python scripts/plan.py --model=qwen3-32b --topology=v6e:2x4 --mesh=tensor:8 --sweep=runs/qwen3
    python scripts/plan.py --model=qwen3-8b --topology=v5e:2x4 --mesh=tensor:8 --export_cache=DIR

Compiles the engine's prefill and decode steps (with --steps=train the train step) for the slice. Says
whether they fit, by category of memory, how long they take by a roofline model of the compiled program,
and what that costs. Without --mesh those are compiled that are the fastest by formulas; --paper gives
these and compiles nothing. --model is a preset of configs/models or a directory. See docs/plan.md.
"""

import functools
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

from absl import flags

from llm_jax import cli
from llm_jax.plan import report
from llm_jax.plan.export import export_cache
from llm_jax.plan.paper import estimate
from llm_jax.plan.quote import quote
from llm_jax.plan.search import MOST, best, ranked, search, sweep
from llm_jax.plan.workload import CACHES, STEPS, WEIGHTS, Workload, presets

MODEL = flags.DEFINE_string("model", None, "A preset (--list shows them) or a directory.")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "A slice: v4, v5e, v5p, v6e, tpu7x and a shape.")
MESH = flags.DEFINE_string("mesh", None, "Such as data:2,tensor:4. Default: those are ranked that fit.")
MOST_ = flags.DEFINE_integer("most", MOST, "Meshes that are compiled without --mesh.", lower_bound=1)
PAPER = flags.DEFINE_bool("paper", False, "By formulas alone, in seconds.")
flags.DEFINE_integer("batch", 8, "Sequences at once, on all devices together.", lower_bound=1)
flags.DEFINE_integer("context", 2048, "Tokens of each.", lower_bound=1)
flags.DEFINE_enum("weights", "bf16", list(WEIGHTS), "Precision of the weights that serve.")
flags.DEFINE_enum("cache", "bf16", list(CACHES), "Precision of keys and values.")
flags.DEFINE_integer("page_size", 32, "Tokens of a page of the cache.", lower_bound=1)
flags.DEFINE_integer("prefill_tokens", 2048, "Of prompts, in one step on a data shard.", lower_bound=1)
flags.DEFINE_string("remat", "full", "What a layer keeps for its backward pass (ModelConfig.remat).")
flags.DEFINE_string("optimizer", "adamw", "Of the train step.")
flags.DEFINE_integer("microbatches", 0, "Of training with a stage axis; 0: as many as stages.")
STEPS_ = flags.DEFINE_list("steps", ["prefill", "decode"], f"Of {', '.join(STEPS)}.")
SWEEP = flags.DEFINE_string("sweep", None, "Quote many batches; draws PATH.png and writes PATH.csv.")
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64", "256"], "Of --sweep.")
JSON = flags.DEFINE_bool("json", False, "One JSON object a quote on stdout, nothing else.")
EXPORT = flags.DEFINE_string("export_cache", None, "Fill a compilation cache for an engine on --mesh.")
LIST = flags.DEFINE_bool("list", False, "Name the presets, and stop.")


def refuse_unread() -> None:
    """ValueError for a flag that what is asked for does not read."""
    if EXPORT.value and (SWEEP.value or PAPER.value or not MESH.value):
        raise ValueError("--export_cache takes --mesh and no --sweep or --paper: it compiles for one")
    other = bool(EXPORT.value or SWEEP.value)
    unread = ["remat", "optimizer", "microbatches"] * (other or "train" not in STEPS_.value)
    unread += ["steps"] * other + ["batches"] * (not SWEEP.value)
    unread += ["most"] * bool(MESH.value or (PAPER.value and not SWEEP.value))
    if given := ", ".join(f"--{name}" for name in unread if flags.FLAGS[name].present):
        raise ValueError(f"{given}: what is asked for does not read it; leave it out")


def main(argv):
    if LIST.value:
        return print(*presets(), sep="\n")
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}")
    if not MODEL.value:
        raise ValueError("--model=: expected a preset or a directory; --list names the presets")
    if wrong := set(STEPS_.value) - set(STEPS):
        raise ValueError(f"--steps: {min(wrong)!r} is none of {', '.join(STEPS)}")
    refuse_unread()
    work = Workload(**{field.name: flags.FLAGS[field.name].value for field in fields(Workload)})
    topology, refused, ask = TOPOLOGY.value, [], estimate if PAPER.value else quote
    say = functools.partial(print, file=sys.stderr, flush=True)
    if EXPORT.value:
        made = export_cache(work, topology, MESH.value, Path(EXPORT.value))
        return print(json.dumps(asdict(made)) if JSON.value else report.exported(made))
    if SWEEP.value:
        meshes, sizes = MESH.value and [MESH.value], [int(n) for n in BATCHES.value]
        quotes = sweep(work, topology, meshes or best(work, topology, MOST_.value), sizes, say, ask=ask)
        report.write_sweep(quotes, Path(SWEEP.value))
    elif MESH.value:
        quotes = [ask(work, topology, MESH.value, STEPS_.value)]
    elif PAPER.value:
        quotes, refused = ranked(work, topology, STEPS_.value)
    else:
        quotes, refused = search(work, topology, STEPS_.value, say, MOST_.value)
    if JSON.value:
        return print("\n".join(json.dumps(found.record()) for found in quotes))
    one = MESH.value and not SWEEP.value
    return print(report.text(quotes[0]) if one else report.table(quotes, refused))


if __name__ == "__main__":
    cli.run(main)
