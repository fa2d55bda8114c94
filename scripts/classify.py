"""Classify texts with a trained model: a workdir of scripts/train.py or a Hugging Face classifier.

    python scripts/classify.py --checkpoint=runs/sentiment --text="我是一个热爱编程的程序员。"
    python scripts/classify.py --checkpoint=runs/sentiment --input=posts.tsv --output=out.jsonl

--input takes .txt (a text a line), .tsv, .csv or .jsonl; the output of a file is JSONL, one object a
text: text, label, probs. With --json the answers to --text are JSONL as well.
"""

import dataclasses
import json
import sys
from pathlib import Path

from absl import app, flags

from llm_jax import cli
from llm_jax.data.sources import read_texts
from llm_jax.infer.classify import Classified, TextClassifier
from llm_jax.sharding import make_mesh

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir, its checkpoints/<step>, or HF model.")
_TEXT = flags.DEFINE_multi_string("text", [], "A text; may be repeated.")
_INPUT = flags.DEFINE_string("input", None, "A .txt, .tsv, .csv or .jsonl file of texts.")
_FIELD = flags.DEFINE_string("field", "text", "Column or key of --input that holds the text.")
_OUTPUT = flags.DEFINE_string("output", None, "Write JSONL here; default: standard output.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Texts at once.", lower_bound=1)
_WEIGHTS = flags.DEFINE_string("weights", "", "A dtype, int8 or w8a8; default by backend.")
_MESH = flags.DEFINE_string("mesh", "", "Mesh axes, e.g. data:2,tensor:4 (one may be -1).")
_JSON = flags.DEFINE_bool("json", False, "One JSON object a text on stdout, nothing else.")
flags.mark_flag_as_required("checkpoint")


def texts() -> list[str]:
    """Those of --text, then those of --input."""
    for text in _TEXT.value:
        if not text.strip():
            raise app.UsageError("--text is blank; expected a text to classify")
    found = list(_TEXT.value)
    if _INPUT.value:
        found += read_texts(_INPUT.value, field=_FIELD.value)
    if not found:
        raise app.UsageError("there is nothing to classify; give --text=TEXT or --input=FILE")
    return found


def readable(result: Classified) -> str:
    """One answer for people: the label, every probability, the text."""
    probs = "  ".join(f"{label} {p:.3f}" for label, p in result.probs.items())
    return f"{result.label}  ({probs})  {result.text}"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; texts are given as --text=TEXT")
    asked, mesh = texts(), make_mesh(_MESH.value)
    sizes = {"batch_size": _BATCH.value, "weights": _WEIGHTS.value}
    classifier = TextClassifier.load(_CHECKPOINT.value, mesh, **sizes)
    results = classifier.classify(asked)
    as_json = bool(_JSON.value or _INPUT.value or _OUTPUT.value)
    lines = [json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in results]
    out = "\n".join(lines if as_json else map(readable, results)) + "\n"
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(out, encoding="utf-8")
        print(f"{len(results)} answers are in {_OUTPUT.value}", file=sys.stderr)
    else:
        print(out, end="")


if __name__ == "__main__":
    cli.run(main)
