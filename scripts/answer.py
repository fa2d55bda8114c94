"""Answer questions on a text with a trained model: a workdir of scripts/train.py or a Hugging Face one.

    python scripts/answer.py --checkpoint=runs/qa --context_file=article.txt --question=谁写的?
    python scripts/answer.py --checkpoint=runs/qa --context=… --question=… --question=… --best=3 --json
    python scripts/answer.py --checkpoint=runs/qa --questions=dev.jsonl

An answer is a stretch of the text, as it stands there. --questions takes a file in the form of CMRC 2018
or SQuAD, answers all of it and prints exact match and F1, as CMRC 2018 counts them, beside those of a
baseline: the sentence that has most in common with the question.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from absl import app, flags

from llm_jax import cli
from llm_jax.data.question_answering import best_sentence, exact_match, f1, read_questions
from llm_jax.infer.question_answering import Reader
from llm_jax.sharding import make_mesh

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Workdir, its checkpoints/<step>, or a Hugging Face model.")
flags.DEFINE_multi_string("question", [], "A question; may be repeated.")
flags.DEFINE_string("context", None, "The text to find the answer in.")
flags.DEFINE_string("context_file", None, "A UTF-8 file with that text.")
flags.DEFINE_string("questions", None, "Instead: a file of texts, questions and their answers.")
flags.DEFINE_integer("best", 1, "Answers to each question, best first.", lower_bound=1)
flags.DEFINE_string("mesh", "", "Mesh axes, e.g. data:2,tensor:4 (one may be -1).")
flags.DEFINE_bool("json", False, "One JSON object a question on stdout, nothing else.")
flags.mark_flag_as_required("checkpoint")
flags.mark_flags_as_mutual_exclusive(["context", "context_file", "questions"], required=True)


def judge(reader):
    """Exact match and F1 of the model and of the baseline on the questions of a file."""
    questions = read_questions(FLAGS.questions)
    found = [spans[0].text if spans else "" for spans in reader.answers(questions)]
    scores = {"questions": len(questions)}
    for name, texts in (("", found), ("baseline_", [best_sentence(q) for q in questions])):
        pairs = [(text, q.answers) for text, q in zip(texts, questions, strict=True)]
        scores[f"{name}exact_match"] = float(np.mean([exact_match(*pair) for pair in pairs]))
        scores[f"{name}f1"] = float(np.mean([f1(*pair) for pair in pairs]))
    print(json.dumps(scores))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; a question is given as --question=TEXT")
    if bool(FLAGS.question) == bool(FLAGS.questions):
        raise app.UsageError("expected either --question=TEXT with a text, or --questions=FILE")
    reader = Reader.load(FLAGS.checkpoint, make_mesh(FLAGS.mesh))
    if FLAGS.questions:
        judge(reader)
        return
    context = FLAGS.context or Path(FLAGS.context_file).read_text(encoding="utf-8")
    for question in FLAGS.question:
        spans = reader.answer(question, context, count=FLAGS.best)
        if FLAGS.json:
            answers = [dataclasses.asdict(span) for span in spans]
            print(json.dumps({"question": question, "answers": answers}, ensure_ascii=False))
        else:
            print(
                question, *(f"  {s.score:8.2f}  [{s.start}:{s.end}]  {s.text}" for s in spans), sep="\n"
            )


if __name__ == "__main__":
    cli.run(main)
