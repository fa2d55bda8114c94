"""Masked-language-model training of an encoder: a small one from scratch, or any BERT gone on with.

    python scripts/train.py --config=configs/masked_lm.py --workdir=runs/encoder --config.data=mine.txt
    python scripts/convert.py --workdir=runs/encoder --output=encoder

`data` names texts, separated by commas: FILE (a text a line, or a table with the column `text_field`) or
FILE#COLUMN; or it is a token store. The result, runs/encoder or encoder, is an `init_from` for
configs/sentiment_finetune.py, configs/question_answering.py:finetune and this config. To go on from a
trained encoder, on texts of the kind that it will read (Gururangan et al. 2020):

    python scripts/train.py --config=configs/masked_lm.py:adapt --workdir=runs/adapted \
        --config.init_from=DIR --config.data=mine.txt

The defaults take the bundled reviews, which are few: enough to see every step of the way.

More: docs/encoders.md.
"""

from pathlib import Path

from llm_jax.config import (
    MaskedLanguageModelConfig,
    ModelConfig,
    OptimConfig,
    nearest,
    to_config_dict,
)

DATA = Path(__file__).resolve().parent / "data" / "sentiment_zh" / "train.tsv"


def get_config(name="scratch"):
    """The settings of one of the two ways to begin."""
    if name not in SETTINGS:
        raise ValueError(
            f"masked_lm.py:{name}: expected one of {tuple(SETTINGS)}{nearest(name, SETTINGS)}"
        )
    return to_config_dict(MaskedLanguageModelConfig(data=str(DATA), **SETTINGS[name]))


def encoder():
    """A BERT of 4 layers and 256 features."""
    return ModelConfig(
        family="bert",
        head="masked_lm",
        causal=False,
        tie_embeddings=True,
        vocab_size=8000,
        num_layers=4,
        embed_dim=256,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=1024,
        max_positions=512,
        positions="learned",
        norm="layer",
        norm_eps=1e-12,
        norm_position="post",
        embed_norm=True,
        token_types=2,
        activation="gelu",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        dropout=0.1,
    )


def adamw(learning_rate):
    """AdamW as BERT was trained."""
    return OptimConfig(
        learning_rate=learning_rate,
        schedule="linear",
        warmup_fraction=0.1,
        weight_decay=0.01,
        b2=0.98,
    )


SETTINGS = {
    "scratch": {
        "model": encoder(),
        "row_tokens": 128,
        "optim": adamw(5e-4),
        "batch_size": 32,
        "epochs": 20.0,
        "log_every": 10,
    },
    "adapt": {
        "init_from": "bert-base-chinese",
        "row_tokens": 256,
        "optim": adamw(5e-5),
        "batch_size": 32,
        "epochs": 3.0,
        "log_every": 10,
    },
}
