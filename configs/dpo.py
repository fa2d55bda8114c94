"""Preference optimization: the bundled demo model learns which of two answers is better.

    python scripts/train.py --config=configs/dpo.py --workdir=runs/dpo
    python scripts/train.py --config=configs/dpo.py:lora --workdir=runs/dpo_lora

48 short pairs of our own (configs/data/preferences): enough to see every step of the way, in a minute on
a laptop. The method is meant for a model that answers already: take the workdir of configs/sft.py,

    python scripts/train.py --config=configs/dpo.py --workdir=runs/chat_dpo --config.init_from=runs/sft

and for one of your own, with the chat template of its tokenizer:

    python scripts/train.py --config=configs/dpo.py:lora --workdir=runs/mine \
        --config.init_from=DIR --config.data=preferences.jsonl --config.chat_template="" \
        --config.row_tokens=4096

Figures: docs/finetuning.md.
"""

import runpy
from pathlib import Path

from llm_jax.config import LoraConfig, OptimConfig, PreferenceConfig, nearest, to_config_dict

HERE = Path(__file__).resolve().parent
SFT = runpy.run_path(str(HERE / "sft.py"))


def get_config(name="full"):
    """The settings; "lora" trains adapters of rank 16 on every product of the layers."""
    if name not in ("full", "lora"):
        raise ValueError(f"dpo.py:{name}: expected full or lora{nearest(name, ('full', 'lora'))}")
    lora = LoraConfig(rank=16, alpha=32.0, targets=("attn/w[qkvo]$", "mlp/(gate|up|down)$"))
    return to_config_dict(
        PreferenceConfig(
            data=str(HERE / "data" / "preferences" / "train.jsonl"),
            eval_fraction=0.25,
            init_from=str(SFT["DEMO"]),
            chat_template=SFT["TEMPLATE"],
            row_tokens=192,
            beta=0.1,
            lora=lora if name == "lora" else None,
            optim=OptimConfig(
                learning_rate=5e-4 if name == "lora" else 1e-4, warmup_fraction=0.1, b2=0.98
            ),
            batch_size=4,
            epochs=20.0,
            log_every=5,
            eval_every=10,
        )
    )
