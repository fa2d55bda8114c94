"""Train what a config describes: a text classifier, a language model, or the documents' MLP.

    python scripts/train.py --config=configs/sentiment.py --workdir=runs/sentiment
    python scripts/train.py --config=configs/sentiment.py --workdir=runs/mine \
        --config.data=mine.tsv --config.optim.learning_rate=5e-4 --mesh=data:2,tensor:4

The same command resumes a run that was cut off. With --json, standard output holds one JSON object a
line (the records of metrics.jsonl, then the results) and nothing else; progress goes to standard error.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from llm_jax import cli
from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import ClassificationConfig, LanguageModelConfig, from_dict, nearest
from llm_jax.eval.metrics import classification_report
from llm_jax.eval.plots import plot_confusion, plot_loss
from llm_jax.sharding import make_mesh
from llm_jax.train import classification, documents_mlp, language_model

CONFIG = config_flags.DEFINE_config_file("config", help_string="Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "Where config, checkpoints, metrics and plots go.")
MESH = flags.DEFINE_string("mesh", "", "Device mesh, as data:2,fsdp:1,tensor:4; one size may be -1.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object per line on standard output.")
flags.mark_flags_as_required(["config", "workdir"])


def classify(settings, workdir, mesh, echo):
    """Train a classifier; accuracy and F1 on the held-out texts."""
    config = from_dict(ClassificationConfig, settings)
    result = classification.run(config, workdir, mesh, echo=echo)
    report = classification_report(result.gold, result.predicted, result.labels)
    matrix = np.asarray(report["confusion"])
    plot_confusion(matrix, result.labels, workdir / "plots" / "confusion.png")
    plot_loss(workdir / "metrics.jsonl", workdir / "plots" / "loss.png")
    return report


def language(settings, workdir, mesh, echo):
    """Train a language model; perplexity on the held-out documents."""
    config = from_dict(LanguageModelConfig, settings)
    result = language_model.run(config, workdir, mesh, echo=echo)
    plot_loss(workdir / "metrics.jsonl", workdir / "plots" / "loss.png")
    return dataclasses.asdict(result)


def documents(settings, workdir, mesh, echo):
    """The documents' own example, over many seeds."""
    values = {name: value for name, value in settings.items() if name != "task"}
    config = from_dict(documents_mlp.DocumentsMLPConfig, values)
    begin_run(workdir, config, None)
    report = (lambda line: print(line, file=sys.stderr)) if echo else print
    result = documents_mlp.run(config, workdir, out=report)
    return dataclasses.asdict(result)


TASKS = {"classification": classify, "lm": language, "documents_mlp": documents}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are --config.name=value")
    settings = CONFIG.value.to_dict()
    task = settings.get("task")
    if task not in TASKS:
        raise ValueError(f"config.task={task!r}: expected one of {tuple(TASKS)}{nearest(task, TASKS)}")
    workdir = Path(WORKDIR.value)
    results = TASKS[task](settings, workdir, make_mesh(MESH.value), show if JSON.value else None)
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
    cli.run(main)
