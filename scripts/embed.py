"""Embeddings of words and texts, and their nearest neighbours by cosine.

    python scripts/embed.py --vectors=runs/words_zh --text=北京 --text=开心 --neighbors=5
    python scripts/embed.py --checkpoint=runs/sentiment --text=北京          # its embedding table
    python scripts/embed.py --vectors=runs/words_zh --pairs=configs/data/word_pairs/zh.tsv
    python scripts/embed.py --model=DIR --sentences --text=今天很开心 --input=posts.txt --json

The vectors come from one of: --vectors, a run of configs/word_vectors.py; --checkpoint, any other run of
scripts/train.py; --model, a Hugging Face directory. The last two give the rows of their embedding table
(mean of the tokens, for a text), or with --sentences the pooled hidden states of whole texts, whose
neighbours are the other texts given. --pairs says how much nearer related words are than others (AUC).
"""

import dataclasses
import json

import numpy as np
from absl import app, flags

from llm_jax import cli
from llm_jax.data.sources import read_records, read_texts
from llm_jax.eval.word_similarity import score_pairs
from llm_jax.infer.classify import TextClassifier
from llm_jax.infer.word_vectors import load_word_vectors, nearest, transformer_words
from llm_jax.sharding import make_mesh

FLAGS = flags.FLAGS
flags.DEFINE_string("vectors", None, "Workdir of the task word_vectors.")
flags.DEFINE_string("checkpoint", None, "Workdir of a transformer, or its checkpoints/<step>.")
flags.DEFINE_string("model", None, "Hugging Face directory or hub id.")
flags.DEFINE_multi_string("text", [], "A word or a text; may be repeated.")
flags.DEFINE_bool("sentences", False, "Vectors of whole texts by a transformer.")
flags.DEFINE_string("input", None, "With --sentences: a .txt, .tsv, .csv or .jsonl file of more texts.")
flags.DEFINE_string("field", "text", "Column or key of --input that holds the text.")
flags.DEFINE_integer("neighbors", 5, "Nearest neighbours of each --text.", lower_bound=0)
flags.DEFINE_string("pairs", None, "Instead of --text: a table of related words, first and second.")
flags.DEFINE_bool("json", False, "One JSON object a text, with its vector, and nothing else.")
flags.mark_flags_as_mutual_exclusive(["vectors", "checkpoint", "model"], required=True)


def load(mesh):
    """(word vectors, the transformer that they are of or None)."""
    if FLAGS.vectors:
        return load_word_vectors(FLAGS.vectors, mesh), None
    encoder = TextClassifier.load(FLAGS.checkpoint or FLAGS.model, mesh)
    return transformer_words(encoder), encoder


def sentence_answers(encoder, texts, others):
    """(vector of a text, its neighbours among all the texts), one for each of `texts`."""
    names = [*texts, *others]
    table = encoder.embed(names)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    for i, row in enumerate(table[: len(texts)]):
        rest = [j for j in range(len(names)) if j != i]
        yield row, nearest(row, [names[j] for j in rest], table[rest], FLAGS.neighbors)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; texts are given as --text=TEXT")
    if FLAGS.sentences and FLAGS.vectors:
        raise app.UsageError("--sentences needs a transformer: --checkpoint or --model")
    if FLAGS.input and not FLAGS.sentences:
        raise app.UsageError("--input needs --sentences: the neighbours of a word are words")
    if bool(FLAGS.text) == bool(FLAGS.pairs):
        raise app.UsageError("expected either --text=TEXT or --pairs=FILE")
    others = read_texts(FLAGS.input, field=FLAGS.field) if FLAGS.input else []
    words, encoder = load(make_mesh())
    if FLAGS.pairs:
        pairs = [(record["first"], record["second"]) for _, record in read_records(FLAGS.pairs)]
        print(json.dumps(dataclasses.asdict(score_pairs(words, pairs))))
    elif FLAGS.sentences:
        show(FLAGS.text, sentence_answers(encoder, FLAGS.text, others))
    else:
        show(FLAGS.text, ((words.vector(t), words.neighbors(t, FLAGS.neighbors)) for t in FLAGS.text))


def show(texts, answers):
    """A line for each text."""
    for text, (vector, near) in zip(texts, answers, strict=True):
        record = {"text": text, "vector": vector.tolist(), "neighbors": near}
        readable = f"{text}: " + "  ".join(f"{name} {cosine:.3f}" for name, cosine in near)
        print(json.dumps(record, ensure_ascii=False) if FLAGS.json else readable)


if __name__ == "__main__":
    cli.run(main)
