"""A draft head for the bundled demo model; runs/draft_head/draft_head is what comes out.

    python scripts/train.py --config=configs/draft_head.py --workdir=runs/draft_head

It learns from the texts of configs/data, offline, in about 5 minutes of CPU time. Expected on held-out
texts: eval/agreement_1 to _4 of 0.39, 0.38, 0.37, 0.37, from 0.08, 0.06, 0.04, 0.05 untrained. For
a model of your own, --config.base=DIR --config.data="(('mine.txt','',1.0),)"; see docs/training.md.
"""

from pathlib import Path

import llm_jax
from llm_jax.config import DraftHeadConfig, OptimConfig, to_config_dict

DATA = Path(__file__).resolve().parent / "data"
BASE = str(Path(llm_jax.__file__).parent / "assets" / "demo_lm")


def get_config():
    """The settings."""
    return to_config_dict(
        DraftHeadConfig(
            base=BASE,
            data=(
                (str(DATA / "demo_lm" / "own_zh.txt"), "", 1.0),
                (str(DATA / "demo_lm" / "own_en.txt"), "", 1.0),
                (str(DATA / "sentiment_zh" / "train.tsv"), "text", 1.0),
            ),
            eval_fraction=0.02,  # as in configs/demo_lm.py: so it is new to the model too
            draft_steps=4,
            row_tokens=128,
            optim=OptimConfig(
                learning_rate=3e-3,
                warmup_fraction=0.05,
                final_fraction=0.02,
                b2=0.98,
                weight_decay=0.1,
                ema_decay=0.99,
            ),
            batch_size=8,
            steps=600,
            log_every=50,
            eval_every=100,
        )
    )
