"""Train a sentencepiece tokenizer from text files.

    python scripts/train_tokenizer.py --input=corpus.txt --output=tokenizer --vocab_size=8000
    python scripts/train_tokenizer.py --input=train.tsv,more.jsonl --field=text --output=tokenizer
    python scripts/train_tokenizer.py --input=posts.txt --output=tokenizer --replace='@\\w+=><user>'

Writes OUTPUT/tokenizer.model, tokenizer_config.json and, where it is exact, tokenizer.json (which
`transformers` reads). Prints what it made; with --json one JSON object on standard output.
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from llm_jax import cli
from llm_jax.data.sources import read_texts
from llm_jax.data.train_tokenizer import MODEL_TYPES, NORMALIZATIONS, train_sentencepiece

_INPUT = flags.DEFINE_list(
    "input", None, "Files: .txt (lines), .tsv, .csv, .jsonl, .parquet.", required=True
)
_FIELD = flags.DEFINE_string("field", "text", "Column or key that holds the text (not for .txt).")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.", required=True)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8000, "Pieces wanted.", lower_bound=5)
_MODEL_TYPE = flags.DEFINE_enum("model_type", "unigram", MODEL_TYPES, "Kind of model.")
_COVERAGE = flags.DEFINE_float("character_coverage", 0.9995, "Share of characters learnt.")
_FALLBACK = flags.DEFINE_bool("byte_fallback", True, "Write unknown characters as bytes.")
_NORMALIZATION = flags.DEFINE_enum("normalization", "identity", NORMALIZATIONS, "Unicode rule.")
_SYMBOLS = flags.DEFINE_list("user_defined_symbols", [], "Texts that are always one token.")
_CONTROL = flags.DEFINE_list("control_symbols", [], "Further special tokens.")
_REPLACE = flags.DEFINE_multi_string(
    "replace", [], "REGEX=>TEXT, applied to every text, here and in use; TEXT is always one token."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    report = train()
    if _JSON.value:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print("\n".join(f"{name}: {value}" for name, value in report.items()), file=sys.stderr)


def train() -> dict[str, str | int | float | bool]:
    """Train as the flags say; what there is to report."""
    texts = read_texts(_INPUT.value, field=_FIELD.value)
    tokenizer = train_sentencepiece(
        texts,
        _OUTPUT.value,
        vocab_size=_VOCAB_SIZE.value,
        model_type=_MODEL_TYPE.value,
        character_coverage=_COVERAGE.value,
        byte_fallback=_FALLBACK.value,
        normalization=_NORMALIZATION.value,
        user_defined_symbols=_SYMBOLS.value,
        control_symbols=_CONTROL.value,
        replacements=[tuple(rule.rsplit("=>", 1)) for rule in _REPLACE.value],
    )
    sample = texts[:: max(1, len(texts) // 10_000)]
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in sample)
    return {
        "output": _OUTPUT.value,
        "texts": len(texts),
        "vocab_size": tokenizer.vocab_size,
        "characters_per_token": round(sum(map(len, sample)) / max(tokens, 1), 3),
        "tokenizer_json": (Path(_OUTPUT.value) / "tokenizer.json").exists(),
    }


if __name__ == "__main__":
    cli.run(main)
