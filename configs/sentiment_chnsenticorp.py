"""Chinese reviews in two classes (ChnSentiCorp: 0 negative, 1 positive), from scratch.

    python scripts/train.py --config=configs/sentiment_chnsenticorp.py --workdir=runs/chnsenticorp

The data are not part of this repository: the folder sentiment2_zh_chnsenticorp (train.tsv, dev.tsv) is
looked for in data/ of the folder that the environment variable LLM_JAX_SHARED names, ../shared if unset.
The model is that of configs/sentiment.py. Figures: docs/results.md.
"""

import os
import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("LLM_JAX_SHARED", HERE.parent.parent / "shared"))
DATA = SHARED / "data" / "sentiment2_zh_chnsenticorp"


def get_config():
    """configs/sentiment.py on longer texts: a larger vocabulary, more tokens."""
    config = runpy.run_path(str(HERE / "sentiment.py"))["get_config"]()
    config.data = str(DATA / "train.tsv")
    config.eval_data = str(DATA / "dev.tsv")
    config.token_dropout = 0.15
    config.model.vocab_size = 8000
    config.model.num_layers = 1
    config.model.embed_dim = 96
    config.model.num_heads = config.model.num_kv_heads = 3
    config.model.mlp_dim = 192
    config.optim.learning_rate = 1.5e-3
    config.optim.ema_decay = 0.99
    config.train.batch_size = 64
    config.train.epochs = 8.0
    config.train.eval_every = 118  # an epoch
    config.train.log_every = 50
    return config
