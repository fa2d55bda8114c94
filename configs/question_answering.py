"""Extractive question answering on CMRC 2018: from scratch (default), or from any BERT-type encoder.

    python scripts/train.py --config=configs/question_answering.py --workdir=runs/qa
    python scripts/answer.py --checkpoint=runs/qa --context_file=article.txt --question=谁写的?
    python scripts/train.py --config=configs/question_answering.py:finetune --workdir=runs/qa_bert \
        --config.init_from=bert-base-chinese --config.data=cmrc2018_train.json \
        --config.eval_data=cmrc2018_dev.json

The data and the vocabulary of the default are not part of this repository; they are looked for in data/
of the folder that the environment variable LLM_JAX_SHARED names, ../shared if unset.

Hardware, time and figures: docs/question_answering.md.
"""

import os
from pathlib import Path

from llm_jax.config import (
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    QuestionAnsweringConfig,
    nearest,
    to_config_dict,
)

SHARED = Path(os.environ.get("LLM_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
DATA = str(SHARED / "qa_zh_cmrc2018" / "trial.jsonl")


def get_config(name="scratch"):
    """The settings of one of the two ways to begin."""
    if name not in SETTINGS:
        raise ValueError(
            f"question_answering.py:{name}: expected one of {tuple(SETTINGS)}{nearest(name, SETTINGS)}"
        )
    return to_config_dict(QuestionAnsweringConfig(data=DATA, **SETTINGS[name]))


def encoder():
    """A small encoder: near tokens first, then the sentence, then the whole window.

    Its token types say what of the text stands in the question. Rotary positions and windows, which BERT
    does not have, spare it from learning what is near from a thousand questions.
    """
    return ModelConfig(
        family="bert",
        head="span",
        causal=False,
        vocab_size=6000,
        num_layers=3,
        embed_dim=96,
        num_heads=2,
        num_kv_heads=2,
        head_dim=48,
        mlp_dim=192,
        max_positions=320,
        windows=(8, 48, 0),
        norm="layer",
        norm_eps=1e-5,
        token_types=4,
        activation="gelu",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        dropout=0.2,
    )


def adamw(learning_rate, **settings):
    """AdamW with a linear schedule, as BERT is fine-tuned."""
    return OptimConfig(
        learning_rate=learning_rate,
        schedule="linear",
        warmup_fraction=0.1,
        weight_decay=0.01,
        b2=0.99,
        **settings,
    )


SETTINGS = {
    "scratch": {
        "model": encoder(),
        "tokenizer": str(SHARED / "tokenizers" / "bert-base-chinese"),
        "max_tokens": 320,
        "question_tokens": 48,
        "overlap": 96,
        "answer_tokens": 128,
        "mark_matches": True,
        # Masked-LM training on the texts first, which --config.pretrain.epochs=N turns on
        "pretrain": PretrainConfig(optim=adamw(1e-3), batch_size=16, epochs=0.0, log_every=50),
        "optim": adamw(1e-3, ema_decay=0.99),
        "batch_size": 16,
        "epochs": 3.0,
        "log_every": 50,
        "eval_every": 120,
    },
    "finetune": {
        "init_from": "bert-base-chinese",
        "optim": adamw(3e-5),
        "batch_size": 16,
        "epochs": 2.0,
        "log_every": 50,
        "eval_every": 1000,
        "checkpoint_every": 1000,
    },
}
