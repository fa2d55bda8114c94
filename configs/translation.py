"""Chinese to English on the Tatoeba pairs: a small Llama-type decoder from scratch.

    python scripts/train.py --config=configs/translation.py --workdir=runs/zh_en
    python scripts/translate.py --checkpoint=runs/zh_en --text=我喜欢编程。
    python scripts/translate.py --checkpoint=runs/zh_en --pairs=runs/zh_en/held_out.tsv --num_beams=4

`data` is a TSV, CSV or JSONL with a column for each language. The pairs of the default are not part of
this repository; they are looked for in data/ of the folder that the environment variable LLM_JAX_SHARED
names, ../shared if unset. Your own:

    python scripts/train.py --config=configs/translation.py --workdir=runs/mine --config.data=mine.tsv \
        --config.source_field=de --config.target_field=fr

Hardware, time and figures: docs/translation.md.
"""

import os
from pathlib import Path

from llm_jax.config import ModelConfig, OptimConfig, TranslationConfig, to_config_dict

SHARED = Path(os.environ.get("LLM_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"


def get_config():
    """The settings; the true vocabulary size comes from the tokenizer."""
    return to_config_dict(
        TranslationConfig(
            data=str(SHARED / "parallel_zh_en_tatoeba" / "train.tsv"),
            source_field="zh",
            target_field="en",
            model=ModelConfig(
                family="llama",
                vocab_size=5000,
                num_layers=3,
                embed_dim=128,
                num_heads=4,
                num_kv_heads=4,
                head_dim=32,
                mlp_dim=384,
                max_positions=128,
                norm_eps=1e-5,
                tie_embeddings=True,
                dropout=0.1,
            ),
            row_tokens=128,
            optim=OptimConfig(
                learning_rate=3e-3,
                warmup_fraction=0.05,
                final_fraction=0.02,
                b2=0.98,
                weight_decay=0.1,
                ema_decay=0.995,
            ),
            batch_size=16,
            epochs=12.0,
            log_every=50,
            eval_every=500,
            checkpoint_every=500,
        )
    )
