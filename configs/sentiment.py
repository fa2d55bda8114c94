"""Sentiment of Chinese texts: a small transformer encoder from scratch.

    python scripts/train.py --config=configs/sentiment.py --workdir=runs/sentiment
    python scripts/classify.py --checkpoint=runs/sentiment --text="我是一个热爱编程的程序员。"

Any TSV, CSV or JSONL with the columns `text` and `label`, in any number of classes, a tenth of which
is held out; or a folder with a train.tsv and a dev.tsv:

    python scripts/train.py --config=configs/sentiment.py --workdir=runs/mine --config.data=mine.tsv

Settings for larger sets, which are not part of this repository: they are looked for in data/ of the
folder that the environment variable LLM_JAX_SHARED names, ../shared if unset.

    --config=configs/sentiment.py:weibo          posts in three classes (SMP2020-EWECT)
    --config=configs/sentiment.py:chnsenticorp   reviews in two classes (ChnSentiCorp)
    --config=configs/sentiment.py:airline        English tweets in three classes (Twitter US Airline)
    --config=configs/sentiment.py:thucnews       titles of news in ten topics (THUCNews)

Figures: docs/results.md.
"""

import os
from pathlib import Path

from llm_jax.config import (
    ClassificationConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    nearest,
    to_config_dict,
)

OWN = Path(__file__).resolve().parent / "data"
SHARED = Path(os.environ.get("LLM_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"


def get_config(name="bundled"):
    """The settings for a data set; the labels and the true vocabulary size come from the data."""
    if name not in SETTINGS:
        raise ValueError(
            f"sentiment.py:{name}: expected one of {tuple(SETTINGS)}{nearest(name, SETTINGS)}"
        )
    folder, settings = SETTINGS[name]
    return to_config_dict(
        ClassificationConfig(
            **{"data": str(folder), "label_smoothing": 0.1, "subword_alpha": 0.2}
            | {"pretrain": pretraining(epochs=0.0)}
            | settings
        )
    )


def encoder(vocab_size, num_layers, embed_dim, max_positions=128, dropout=0.3, ngram_orders=(1, 2)):
    """A BERT-type classifier over the mean of its hidden states, and over n-grams of characters."""
    heads = embed_dim // 32
    return ModelConfig(
        family="bert",
        head="classifier",
        pooling="mean",
        causal=False,
        num_classes=3,
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=32,
        mlp_dim=2 * embed_dim,
        max_positions=max_positions,
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
        dropout=dropout,
        ngram_orders=ngram_orders,
        ngram_buckets=2**18,
        ngram_dropout=0.2,
    )


def adamw(learning_rate, ema_decay, weight_decay=0.05):
    """AdamW, and the moving average of the parameters that is evaluated and kept."""
    return OptimConfig(
        learning_rate=learning_rate,
        warmup_fraction=0.1,
        weight_decay=weight_decay,
        b2=0.98,
        ema_decay=ema_decay,
    )


def pretraining(epochs):
    """Masked-LM training on the same texts first, in rows of `max_tokens`; 0 epochs = none."""
    return PretrainConfig(
        dropout=0.1,
        optim=adamw(learning_rate=1e-3, ema_decay=0.998, weight_decay=0.01),
        batch_size=32,
        epochs=epochs,
        log_every=100,
        eval_every=500,
    )


# What posts are full of, each of another one: links, authors of forwarded posts, users
POSTS = (
    (r"https?://[\w./?=&%#~-]+", "<link>"),
    (r"//@[^:：\s]{1,30}[:：]", "<from>"),
    (r"@[\w-]{1,30}", "<user>"),
)
TWEETS = ((r"https?://\S+", "<link>"), (r"@\w+", "<user>"))

SETTINGS = {  # name: (folder, settings)
    "bundled": (
        OWN / "sentiment_zh",
        {
            "token_dropout": 0.15,
            "model": encoder(vocab_size=3000, num_layers=2, embed_dim=128),
            "optim": adamw(learning_rate=1e-3, ema_decay=0.98),
            "batch_size": 32,
            "epochs": 12.0,
            "log_every": 20,
            "eval_every": 72,
        },
    ),
    "weibo": (
        SHARED / "sentiment3_zh_weibo",
        {
            "label_field": "label_zh",
            "fine_label_field": "emotion",  # anger, sadness and fear are all negative
            "balance_classes": True,  # half of the posts are negative; macro-F1 counts classes
            "balance_field": "domain",  # a fifth of the posts, and half of dev, is about the epidemic
            "replacements": POSTS,
            "symbols": r"\[[^\[\]\s]{1,8}\]",  # [心]
            "r_drop": 1.0,
            "token_dropout": 0.15,
            "label_smoothing": 0.2,
            "embed_start": "cooccurrence",
            "pretrain": pretraining(epochs=8.0),
            "model": encoder(vocab_size=8000, num_layers=1, embed_dim=128),
            "optim": adamw(learning_rate=1e-3, ema_decay=0.998, weight_decay=0.2),
            "batch_size": 128,
            "epochs": 4.0,
            "log_every": 50,
            "eval_every": 247,
        },
    ),
    "chnsenticorp": (
        SHARED / "sentiment2_zh_chnsenticorp",
        {
            "max_tokens": 192,
            "token_dropout": 0.15,
            "model": encoder(vocab_size=8000, num_layers=1, embed_dim=96, max_positions=256),
            "optim": adamw(learning_rate=1.5e-3, ema_decay=0.99),
            "batch_size": 64,
            "epochs": 8.0,
            "log_every": 50,
            "eval_every": 118,
        },
    ),
    "airline": (
        SHARED / "sentiment3_en_airline" / "train.tsv",
        {
            "label_field": "label_en",
            "balance_classes": True,
            "weight_field": "confidence",  # of the annotators
            "normalization": "nmt_nfkc_cf",  # case folded, among others
            "replacements": TWEETS,
            "r_drop": 1.0,
            "token_dropout": 0.15,
            "model": encoder(vocab_size=6000, num_layers=1, embed_dim=128, ngram_orders=(2, 3, 4, 5)),
            "pretrain": pretraining(epochs=30.0),
            "optim": adamw(learning_rate=1e-3, ema_decay=0.99),
            "batch_size": 64,
            "epochs": 3.0,
            "log_every": 50,
            "eval_every": 171,
        },
    ),
    "thucnews": (
        SHARED / "topic10_zh_thucnews" / "train.tsv",
        {
            "label_field": "label_name",
            "r_drop": 1.0,
            "token_dropout": 0.15,
            "model": encoder(vocab_size=8000, num_layers=1, embed_dim=128),
            "optim": adamw(learning_rate=1e-3, ema_decay=0.99),
            "batch_size": 64,
            "epochs": 6.0,
            "log_every": 50,
            "eval_every": 140,
        },
    ),
}
