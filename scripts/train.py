"""Train what a config describes: a classifier, a language model, a chat model, the documents' MLP.

    python scripts/train.py --config=configs/sentiment.py --workdir=runs/sentiment
    python scripts/train.py --config=configs/sentiment.py --workdir=runs/mine \
        --config.data=mine.tsv --config.optim.learning_rate=5e-4 --mesh=data:2,tensor:4

The same command resumes a run that was cut off, and is the one of every process where there are several
(docs/scaling.md). With --json, standard output holds one JSON object a line (the records of
metrics.jsonl, then the results) and nothing else; progress goes to standard error.
"""

import json
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from llm_jax import cli, distributed
from llm_jax.config import nearest
from llm_jax.eval.runs import TASKS
from llm_jax.sharding import make_mesh

CONFIG = config_flags.DEFINE_config_file("config", help_string="Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "Where config, checkpoints, metrics and plots go.")
MESH = flags.DEFINE_string("mesh", "", "Device mesh, as data:2,fsdp:1,tensor:4; one size may be -1.")
PROFILE = flags.DEFINE_string("profile_steps", "", "As 10-12: traces these steps to WORKDIR/profile.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object per line on standard output.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are --config.name=value")
    settings = CONFIG.value.to_dict()
    task = settings.get("task")
    if task not in TASKS:
        raise ValueError(f"config.task={task!r}: expected one of {tuple(TASKS)}{nearest(task, TASKS)}")
    if PROFILE.value:
        settings["profile_steps"] = PROFILE.value
    distributed.agree("config", settings, "Give all of them the same config file and overrides.")
    workdir = Path(WORKDIR.value)
    results = TASKS[task](settings, workdir, make_mesh(MESH.value), show if JSON.value else None)
    if not distributed.is_main():
        return
    (workdir / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    if JSON.value:
        show(results)
    elif task != "documents_mlp":  # which has reported already
        print("\n".join(f"{name}: {value}" for name, value in results.items()))
    print(f"everything is in {workdir}", file=sys.stderr)


def show(record):
    """One JSON object on a line of standard output."""
    print(json.dumps(record, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
