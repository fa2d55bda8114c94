"""Weibo posts in three classes (SMP2020-EWECT: 0 消极, 1 中性, 2 积极), from scratch.

    python scripts/train.py --config=configs/sentiment_weibo.py --workdir=runs/sentiment_weibo

The data are not part of this repository: the folder sentiment3_zh_weibo (train.tsv, dev.tsv) is looked
for in data/ of the folder that the environment variable LLM_JAX_SHARED names, ../shared if unset. The
model is that of configs/sentiment.py. Figures: docs/results.md.
"""

import os
import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("LLM_JAX_SHARED", HERE.parent.parent / "shared"))
DATA = SHARED / "data" / "sentiment3_zh_weibo"


def get_config():
    """configs/sentiment.py on more data: a larger vocabulary, fewer epochs, larger batches."""
    config = runpy.run_path(str(HERE / "sentiment.py"))["get_config"]()
    config.data = str(DATA / "train.tsv")
    config.eval_data = str(DATA / "dev.tsv")
    config.balance_classes = True  # half of the training posts are negative; macro-F1 counts classes
    config.token_dropout = 0.15
    config.model.vocab_size = 8000
    config.model.num_layers = 1
    config.model.embed_dim = 96
    config.model.num_heads = config.model.num_kv_heads = 3
    config.model.mlp_dim = 192
    config.optim.learning_rate = 2e-3
    config.optim.ema_decay = 0.995
    config.train.batch_size = 128
    config.train.epochs = 5.0
    config.train.eval_every = 247  # an epoch
    config.train.log_every = 50
    return config
