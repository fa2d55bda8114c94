"""Make a token store of a text corpus: cleaned, without duplicates, split, tokenized.

    python scripts/prepare_data.py --input=corpus.jsonl.gz --tokenizer=DIR --output=store \
        --clean=nfc,control,spaces,min_characters=20 --dedup=near --eval_fraction=0.01 --workers=8
    python scripts/train.py --config=configs/demo_lm.py:store --config.data=store --workdir=runs/lm

Inputs are files, folders, patterns or URLs of .txt, .jsonl, .tsv, .csv or .parquet, also compressed.
docs/data.md describes the steps of cleaning and the store. With --json, standard output holds the report
as one JSON object.
"""

import json
import time

from absl import app, flags

from llm_jax import cli
from llm_jax.data.prepare import DEDUP, Plan, prepare
from llm_jax.data.sources import iter_texts

_INPUT = flags.DEFINE_list("input", None, "Files, folders, patterns or URLs.", required=True)
_FIELD = flags.DEFINE_string("field", "text", "Column or key that holds the text (not for .txt).")
_SPLIT = flags.DEFINE_enum(
    "split",
    "line",
    ["line", "blank", "file"],
    "What a document of a .txt is; blank: between blank lines.",
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Directory of a tokenizer.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.", required=True)
_CLEAN = flags.DEFINE_list("clean", [], "Steps in order, such as nfc,spaces,min_characters=20.")
_DEDUP = flags.DEFINE_enum("dedup", "none", DEDUP, "Which duplicates to drop.")
_NEAR = flags.DEFINE_float("near_threshold", 0.8, "Similarity (0 to 1) from which texts are near.")
_EVAL = flags.DEFINE_float("eval_fraction", 0.0, "Share of the texts to hold out.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is held out.", lower_bound=0)
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes besides this one.", lower_bound=0)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    plan = Plan(tuple(_CLEAN.value), _DEDUP.value, _NEAR.value, _EVAL.value, _SEED.value)
    start = time.monotonic()
    texts = iter_texts(_INPUT.value, field=_FIELD.value, split=_SPLIT.value, allow_blank=True)
    store, report = prepare(texts, _TOKENIZER.value, _OUTPUT.value, plan, workers=_WORKERS.value)
    seconds = time.monotonic() - start
    tokens = {name: split.tokens for name, split in store.splits.items()}
    report |= {"tokens": tokens, "output": _OUTPUT.value, "seconds": round(seconds, 2)}
    if _JSON.value:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print("\n".join(f"{name}: {value}" for name, value in report.items()))


if __name__ == "__main__":
    cli.run(main)
