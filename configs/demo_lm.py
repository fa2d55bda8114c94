"""A small Llama-type language model of Chinese and English, the one that is bundled with llm_jax.

    python scripts/train.py --config=configs/demo_lm.py --workdir=runs/demo_lm
    python scripts/convert.py --workdir=runs/demo_lm --output=demo_lm --dtype=bfloat16

`data` is a mixture of (path, field, weight) or (path, field, weight, join): a text file with one text a
line (field ""), or a column of a TSV, CSV or JSONL; the weight says how often a text comes in one epoch;
2 to `join` related texts make one document, where without it each text is one. Only the texts under
configs/data are part of this repository: set LLM_JAX_SHARED to the folder that holds data/ of the
other corpora, or name your own: --config.data=mine.txt. The same model on a token store (docs/data.md),
which was split and cut when it was made:

    python scripts/train.py --config=configs/demo_lm.py:store --config.data=stores/web --workdir=runs/web
"""

import os
from pathlib import Path

from llm_jax.config import (
    LanguageModelConfig,
    ModelConfig,
    OptimConfig,
    nearest,
    to_config_dict,
)

OWN = Path(__file__).resolve().parent / "data"
SHARED = Path(os.environ.get("LLM_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
TATOEBA = str(SHARED / "parallel_zh_en_tatoeba" / "train.tsv")

DATA = {  # name: what is learned from, and how it is split and cut
    "texts": {
        "data": (
            (str(OWN / "demo_lm" / "own_zh.txt"), "", 8.0),
            (str(OWN / "demo_lm" / "own_en.txt"), "", 8.0),
            (str(OWN / "sentiment_zh" / "train.tsv"), "text", 1.0, 2),
            (TATOEBA, "zh", 1.0, 3),
            (TATOEBA, "en", 1.0, 3),
        ),
        "eval_fraction": 0.02,
        "tokenizer_kind": "unigram",
        "character_coverage": 0.999,
    },
    "store": {"data": ("stores/web",)},
}


def get_config(name="texts"):
    """The settings; the true vocabulary size comes from the tokenizer."""
    if name not in DATA:
        raise ValueError(f"demo_lm.py:{name}: expected one of {tuple(DATA)}{nearest(name, DATA)}")
    return to_config_dict(
        LanguageModelConfig(
            **DATA[name],
            row_tokens=128,
            model=ModelConfig(
                family="llama",
                vocab_size=4800,
                num_layers=4,
                embed_dim=128,
                num_heads=4,
                num_kv_heads=4,
                head_dim=32,
                mlp_dim=384,
                max_positions=512,
                norm_eps=1e-5,
                tie_embeddings=True,
            ),
            optim=OptimConfig(
                learning_rate=3e-3,
                warmup_fraction=0.03,
                final_fraction=0.02,
                b2=0.98,
                weight_decay=0.1,
                ema_decay=0.995,
            ),
            batch_size=4,
            steps=7000,
            log_every=100,
            eval_every=1000,
            checkpoint_every=500,
        )
    )
