"""Word vectors of Chinese (default) or English by skip-gram with negative sampling.

    python scripts/train.py --config=configs/word_vectors.py --workdir=runs/words_zh
    python scripts/embed.py --vectors=runs/words_zh --text=北京 --text=开心 --neighbors=8
    python scripts/train.py --config=configs/word_vectors.py:en --workdir=runs/words_en

`data` names files of texts, separated by commas: FILE (a text a line, or a table with the column
`text_field`) or FILE#COLUMN. The corpora of the default are not part of this repository; they are looked
for in data/ of the folder that the environment variable LLM_JAX_SHARED names, ../shared if unset. Your
own:

    python scripts/train.py --config=configs/word_vectors.py --workdir=runs/mine --config.data=mine.txt

Hardware, time and figures: docs/word_vectors.md.
"""

import os
from pathlib import Path

from llm_jax.config import OptimConfig, WordVectorConfig, nearest, to_config_dict

SHARED = Path(os.environ.get("LLM_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
CORPORA = {
    "zh": (
        "lm_zh_web/train.txt",
        "lm_zh_wiki/train.txt",
        "parallel_zh_en_tatoeba/train.tsv#zh",
        "sentiment2_zh_chnsenticorp/train.tsv",
        "sentiment2_zh_hotel/train.tsv",
        "sentiment2_zh_waimai/train.tsv",
        "sentiment3_zh_weibo/train.tsv",
        "topic10_zh_thucnews/train.tsv",
    ),
    "en": (
        "lm_en_shakespeare/train.txt",
        "parallel_zh_en_tatoeba/train.tsv#en",
        "sentiment3_en_airline/train.tsv",
    ),
}


def get_config(language="zh"):
    """The settings for a language."""
    if language not in CORPORA:
        raise ValueError(
            f"word_vectors.py:{language}: expected one of {tuple(CORPORA)}{nearest(language, CORPORA)}"
        )
    return to_config_dict(
        WordVectorConfig(
            data=",".join(str(SHARED / name) for name in CORPORA[language]),
            vocab_size={"zh": 16_000, "en": 8_000}[language],
            embed_dim=128,
            window=5,
            negatives=5,
            noise_pool=64,
            subsample=1e-3,
            row_tokens=64,
            optim=OptimConfig(
                learning_rate=3e-3, schedule="linear", warmup_fraction=0.02, b2=0.99, clip_norm=0.0
            ),
            batch_size=128,
            epochs={"zh": 8.0, "en": 30.0}[language],
            log_every=50,
            eval_every=500,
            checkpoint_every=1000,
        )
    )
