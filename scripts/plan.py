"""What a model needs and how fast it runs on a TPU slice, without a TPU; libtpu is needed.

    python scripts/plan.py --model=llama3.1-8b --topology=v5e:2x4 --mesh=tensor:8 --batch=32
    python scripts/plan.py --model=llama3.1-70b --topology=v5p:2x2x2 --batch=64       # ranks all meshes
    python scripts/plan.py --model=qwen3-32b --topology=v6e:2x4 --mesh=tensor:8 --sweep=runs/qwen3
    python scripts/plan.py --model=llama3.1-8b --topology=v5p:2x2x2 --steps=train --mesh=fsdp:8
    python scripts/plan.py --model=qwen3-8b --topology=v5e:2x4 --mesh=tensor:8 --export_cache=DIR

Compiles the engine's prefill and decode steps (with --steps=train the train step) for the slice. Says
whether they fit, by category of memory, how long they take by a roofline model of the compiled program,
and what that costs. --model is a preset of configs/models or a directory. docs/plan.md explains it.
"""

import dataclasses
import json
import sys
from pathlib import Path

from absl import app, flags

from llm_jax import cli
from llm_jax.plan import report
from llm_jax.plan.export import export_cache
from llm_jax.plan.quote import quote
from llm_jax.plan.search import candidates, search, sweep
from llm_jax.plan.workload import CACHES, STEPS, WEIGHTS, Workload, presets

MODEL = flags.DEFINE_string("model", None, "A preset (--list shows them) or a directory.")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "A slice: v4, v5e, v5p, v6e, tpu7x and a shape.")
MESH = flags.DEFINE_string("mesh", None, "Such as data:2,tensor:4. Default: all are tried and ranked.")
BATCH = flags.DEFINE_integer("batch", 8, "Sequences at once, on all devices together.", lower_bound=1)
CONTEXT = flags.DEFINE_integer("context", 2048, "Tokens of each.", lower_bound=1)
flags.DEFINE_enum("weights", "bf16", list(WEIGHTS), "Precision of the weights that serve.")
flags.DEFINE_enum("cache", "bf16", list(CACHES), "Precision of keys and values.")
flags.DEFINE_integer("page_size", 32, "Tokens of a page of the cache.", lower_bound=1)
flags.DEFINE_integer("prefill_tokens", 2048, "Of prompts, in one step on a data shard.", lower_bound=1)
flags.DEFINE_string("remat", "full", "What a layer keeps for its backward pass (ModelConfig.remat).")
flags.DEFINE_string("optimizer", "adamw", "Of the train step.")
STEPS_ = flags.DEFINE_list("steps", ["prefill", "decode"], f"Of {', '.join(STEPS)}.")
SWEEP = flags.DEFINE_string("sweep", None, "Quote many batches; draws PATH.png and writes PATH.csv.")
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64", "256"], "Of --sweep.")
JSON = flags.DEFINE_bool("json", False, "One JSON object a quote on stdout, nothing else.")
EXPORT = flags.DEFINE_string("export_cache", None, "Fill a compilation cache for an engine on --mesh.")
LIST = flags.DEFINE_bool("list", False, "Name the presets, and stop.")


def workload() -> Workload:
    names = ("weights", "cache", "page_size", "prefill_tokens", "remat", "optimizer")
    return Workload(
        MODEL.value,
        batch=BATCH.value,
        context=CONTEXT.value,
        **{name: flags.FLAGS[name].value for name in names},
    )


def refuse_unread() -> None:
    """ValueError for a flag that what is asked for does not read."""
    if EXPORT.value and (SWEEP.value or not MESH.value):
        raise ValueError("--export_cache takes --mesh and no --sweep: it compiles for one mesh")
    other = bool(EXPORT.value or SWEEP.value)
    unread = ["remat", "optimizer"] if other or "train" not in STEPS_.value else []
    unread += ["steps"] * other + ["batches"] * (not SWEEP.value)
    if given := [f"--{name}" for name in unread if not flags.FLAGS[name].using_default_value]:
        raise ValueError(f"{', '.join(given)}: what is asked for does not read it; leave it out")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if LIST.value:
        return print("\n".join(presets()))
    if not MODEL.value:
        raise ValueError("--model=: expected a preset or a directory; --list names the presets")
    if wrong := [step for step in STEPS_.value if step not in STEPS]:
        raise ValueError(f"--steps={','.join(STEPS_.value)}: {wrong[0]!r} is none of {', '.join(STEPS)}")
    work, topology, refused = workload(), TOPOLOGY.value, []
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    refuse_unread()
    if EXPORT.value:
        made = export_cache(work, topology, MESH.value, Path(EXPORT.value))
        return print(json.dumps(dataclasses.asdict(made)) if JSON.value else report.exported(made))
    if SWEEP.value:
        meshes = [MESH.value] if MESH.value else candidates(work, topology, ("decode",))[0]
        sizes = [int(n) for n in BATCHES.value]
        quotes = [q for mesh in meshes for q in sweep(work, topology, mesh, sizes, say)]
        report.write_sweep(quotes, Path(SWEEP.value))
    elif MESH.value:
        quotes = [quote(work, topology, MESH.value, STEPS_.value)]
    else:
        quotes, refused = search(work, topology, STEPS_.value, say)
    if JSON.value:
        return print("\n".join(json.dumps(found.record()) for found in quotes))
    one = MESH.value and not SWEEP.value
    return print(report.text(quotes[0]) if one else report.table(quotes, refused))


if __name__ == "__main__":
    cli.run(main)
