"""Chinese sentences in three classes (积极, 消极, 中性): a small transformer encoder from scratch.

    python scripts/train.py --config=configs/sentiment.py --workdir=runs/sentiment
    python scripts/classify.py --checkpoint=runs/sentiment --text="我是一个热爱编程的程序员。"

Any TSV, CSV or JSONL with the columns `text` and `label`, in any number of classes:

    python scripts/train.py --config=configs/sentiment.py --workdir=runs/mine --config.data=mine.tsv

The bundled data (configs/data/sentiment_zh) make 286 steps. Figures: docs/results.md.
"""

from pathlib import Path

from llm_jax.config import (
    ClassificationConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    to_config_dict,
)

DATA = Path(__file__).parent / "data" / "sentiment_zh"


def get_config():
    """The settings; the labels and the true vocabulary size come from the data."""
    return to_config_dict(
        ClassificationConfig(
            data=str(DATA / "train.tsv"),
            eval_data=str(DATA / "dev.tsv"),
            max_tokens=128,
            label_smoothing=0.1,
            subword_alpha=0.2,
            model=ModelConfig(
                family="bert",
                head="classifier",
                pooling="mean",
                causal=False,
                num_classes=3,
                vocab_size=3000,
                num_layers=2,
                embed_dim=128,
                num_heads=4,
                num_kv_heads=4,
                head_dim=32,
                mlp_dim=256,
                max_positions=128,
                positions="learned",
                norm="layer",
                norm_eps=1e-5,
                norm_position="post",
                embed_norm=True,
                token_types=2,
                activation="gelu",
                gated_mlp=False,
                qkv_bias=True,
                out_bias=True,
                mlp_bias=True,
                dropout=0.3,
            ),
            optim=OptimConfig(
                learning_rate=1e-3,
                warmup_fraction=0.1,
                weight_decay=0.05,
                b2=0.98,
                ema_decay=0.98,
            ),
            train=TrainConfig(batch_size=32, epochs=8.0, log_every=20, eval_every=72),
        )
    )
