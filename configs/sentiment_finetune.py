"""Sentiment of Chinese texts by fine-tuning a trained encoder: bert-base-chinese, or any other model.

    python scripts/train.py --config=configs/sentiment_finetune.py --workdir=runs/sentiment_bert
    python scripts/classify.py --checkpoint=runs/sentiment_bert --text="我是一个热爱编程的程序员。"

`init_from` is a Hugging Face directory or hub id of an encoder (BERT, RoBERTa) or of a decoder (GPT-2,
Llama, Qwen, ...), or a workdir of ours; `data` any TSV, CSV or JSONL with columns `text` and `label`:

    python scripts/train.py --config=configs/sentiment_finetune.py --workdir=runs/mine \
        --config.init_from=DIR --config.data=mine.tsv --config.max_tokens=256

With :lora only adapters and the head are trained, and WORKDIR/adapter has them as PEFT reads them. GPT-2
keeps query, key and value in one matrix, for which PEFT has another form of adapter; take
--config.lora.targets="('attn/wo$','mlp/(up|down)$')" there.

More: docs/encoders.md.
"""

from pathlib import Path

from llm_jax.config import ClassificationConfig, LoraConfig, OptimConfig, nearest, to_config_dict

DATA = Path(__file__).resolve().parent / "data" / "sentiment_zh"
LEARNING_RATE = {"full": 2e-5, "lora": 3e-4}  # adapters start from zero and are few


def get_config(name="full"):
    """The settings of BERT's authors (Devlin et al. 2019, A.3), for all parameters or for adapters."""
    if name not in LEARNING_RATE:
        raise ValueError(
            f"sentiment_finetune.py:{name}: expected one of {tuple(LEARNING_RATE)}"
            f"{nearest(name, LEARNING_RATE)}"
        )
    lora = LoraConfig(rank=8, alpha=16.0, targets=("attn/w[qv]$",), whole=("^(classifier|pooler)/",))
    return to_config_dict(
        ClassificationConfig(
            data=str(DATA),
            init_from="bert-base-chinese",
            max_tokens=128,
            lora=lora if name == "lora" else None,
            optim=OptimConfig(
                learning_rate=LEARNING_RATE[name],
                schedule="linear",
                warmup_fraction=0.1,
                weight_decay=0.01,
                b2=0.999,
            ),
            batch_size=32,
            epochs=3.0,
            log_every=20,
        )
    )
