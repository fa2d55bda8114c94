"""Translate with a trained model: a workdir of configs/translation.py, or what convert.py made of it.

    python scripts/translate.py --checkpoint=runs/zh_en --text=我喜欢编程。
    python scripts/translate.py --checkpoint=runs/zh_en --pairs=runs/zh_en/held_out.tsv --num_beams=4

--pairs takes a table with a source and a target in each row, translates the sources and prints BLEU and
chrF. With --known=TABLE it also scores a baseline: the translation of the known source most like it.
"""

import dataclasses
import json

from absl import app, flags

from llm_jax import cli
from llm_jax.data.parallel import SentencePair, read_pairs
from llm_jax.eval.translation import load_translator, nearest_translations, score, translate
from llm_jax.sharding import make_mesh

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Workdir, its checkpoints/<step>, or a Hugging Face directory.")
flags.DEFINE_multi_string("text", [], "A text to translate; may be repeated.")
flags.DEFINE_string("pairs", None, "Instead: a table of texts and their translations to be judged by.")
flags.DEFINE_string("known", None, "With --pairs: a table of known translations, for the baseline.")
flags.DEFINE_string("source_field", "zh", "Column of the texts.")
flags.DEFINE_string("target_field", "en", "Column of the translations.")
flags.DEFINE_integer("num_beams", 1, "Width of the search; 1 is greedy.", lower_bound=1)
flags.DEFINE_integer("max_new_tokens", 64, "Longest translation, in tokens.", lower_bound=1)
flags.DEFINE_string("mesh", "", "Mesh axes, e.g. data:2,tensor:4 (one may be -1).")
flags.DEFINE_bool("json", False, "One JSON object a text on stdout, nothing else.")
flags.mark_flag_as_required("checkpoint")


def read(path: str) -> list[SentencePair]:
    """The pairs of a table."""
    return read_pairs(path, FLAGS.source_field, FLAGS.target_field)


def baseline(pairs: list[SentencePair]) -> list[str]:
    """For each pair the translation of the nearest known source that is not the pair's own text."""
    own = {pair.source for pair in pairs} | {pair.target for pair in pairs}
    known = [pair for pair in read(FLAGS.known) if pair.source not in own and pair.target not in own]
    return nearest_translations([pair.source for pair in pairs], known)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; a text is given as --text=TEXT")
    if bool(FLAGS.text) == bool(FLAGS.pairs):
        raise app.UsageError("expected either --text=TEXT or --pairs=FILE")
    if FLAGS.known and not FLAGS.pairs:
        raise app.UsageError("--known needs --pairs, the texts to translate")
    llm = load_translator(FLAGS.checkpoint, make_mesh(FLAGS.mesh))
    pairs = read(FLAGS.pairs) if FLAGS.pairs else []
    sources = FLAGS.text or [pair.source for pair in pairs]
    options = {"num_beams": FLAGS.num_beams, "max_new_tokens": FLAGS.max_new_tokens}
    translations = translate(llm, sources, **options)
    if not pairs:
        for source, text in zip(sources, translations, strict=True):
            record = {"source": source, "translation": text}
            print(json.dumps(record, ensure_ascii=False) if FLAGS.json else f"{source}\t{text}")
        return
    references = [pair.target for pair in pairs]
    scores = {"pairs": len(pairs)} | dataclasses.asdict(score(translations, references))
    if FLAGS.known:
        scores["baseline"] = dataclasses.asdict(score(baseline(pairs), references))
    print(json.dumps(scores))


if __name__ == "__main__":
    cli.run(main)
