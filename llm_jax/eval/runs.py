"""What a config can ask for, by the name of its task: settings in; results and pictures out."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import (
    ClassificationConfig,
    DraftHeadConfig,
    FinetuneConfig,
    LanguageModelConfig,
    MaskedLanguageModelConfig,
    PreferenceConfig,
    QuestionAnsweringConfig,
    TranslationConfig,
    WordVectorConfig,
    from_dict,
)
from llm_jax.distributed import is_main
from llm_jax.eval.metrics import calibration_error, classification_report
from llm_jax.eval.plots import plot_confusion, plot_loss
from llm_jax.train import (
    classification,
    documents_mlp,
    draft_head,
    finetune,
    language_model,
    masked_lm,
    preference,
    question_answering,
    translation,
    word_vectors,
)
from llm_jax.train.metrics_log import Record

Echo = Callable[[Record], None] | None  # called with every record of metrics.jsonl
Run = Callable[[dict[str, Any], Path, Mesh, Echo], dict[str, Any]]  # results are ready for JSON


def classify(settings: dict[str, Any], workdir: Path, mesh: Mesh, echo: Echo) -> dict[str, Any]:
    """Train a classifier; accuracy and F1 on the held-out texts."""
    config = from_dict(ClassificationConfig, settings)
    result = classification.run(config, workdir, mesh, echo=echo)
    report = classification_report(result.gold, result.predicted, result.labels)
    report["calibration_error"] = calibration_error(result.gold, result.probs)
    if is_main():
        matrix = np.asarray(report["confusion"])
        plot_confusion(matrix, result.labels, workdir / "plots" / "confusion.png")
        plot_loss(workdir / "metrics.jsonl", workdir / "plots" / "loss.png")
    return report


def plain(kind: type, task: Any) -> Run:
    """A task whose result is a few numbers: `task.run` with the settings as a `kind`."""

    def train(settings, workdir, mesh, echo):
        result = task.run(from_dict(kind, settings), workdir, mesh, echo=echo)
        if is_main():
            plot_loss(workdir / "metrics.jsonl", workdir / "plots" / "loss.png")
        return dataclasses.asdict(result)

    return train


def documents(settings: dict[str, Any], workdir: Path, mesh: Mesh, echo: Echo) -> dict[str, Any]:
    """The documents' own example, over many seeds."""
    if jax.process_count() > 1:
        raise ValueError(
            "task='documents_mlp' runs in one process; expected another task, or one process"
        )
    values = {name: value for name, value in settings.items() if name != "task"}
    config = from_dict(documents_mlp.DocumentsMLPConfig, values)
    begin_run(workdir, config, None)
    report = (lambda line: print(line, file=sys.stderr)) if echo else print
    result = documents_mlp.run(config, workdir, out=report)
    return dataclasses.asdict(result)


TASKS: dict[str, Run] = {
    "classification": classify,
    "lm": plain(LanguageModelConfig, language_model),
    "masked_lm": plain(MaskedLanguageModelConfig, masked_lm),
    "sft": plain(FinetuneConfig, finetune),
    "draft_head": plain(DraftHeadConfig, draft_head),
    "dpo": plain(PreferenceConfig, preference),
    "word_vectors": plain(WordVectorConfig, word_vectors),
    "question_answering": plain(QuestionAnsweringConfig, question_answering),
    "translation": plain(TranslationConfig, translation),
    "documents_mlp": documents,
}
