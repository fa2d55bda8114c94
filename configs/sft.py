"""Fine-tuning on chats: the bundled demo model learns to answer, by LoRA or as a whole.

    python scripts/train.py --config=configs/sft.py --workdir=runs/sft
    python scripts/train.py --config=configs/sft.py:lora --workdir=runs/sft_lora
    python scripts/convert.py --workdir=runs/sft_lora --output=runs/chat_model
    python scripts/generate.py --model=runs/chat_model --chat --prompt="你好！" --temperature=0

46 short chats of our own (configs/data/chats): enough to see every step of the way, in a minute on a
laptop, not to make a chat model. For one of your own, with the chat template of its tokenizer:

    python scripts/train.py --config=configs/sft.py:lora --workdir=runs/mine \
        --config.init_from=DIR --config.data=chats.jsonl --config.chat_template="" \
        --config.row_tokens=2048

Figures: docs/finetuning.md.
"""

from pathlib import Path

import llm_jax
from llm_jax.config import FinetuneConfig, LoraConfig, OptimConfig, nearest, to_config_dict

DATA = Path(__file__).resolve().parent / "data" / "chats" / "train.jsonl"
DEMO = Path(llm_jax.__file__).parent / "assets" / "demo_lm"
# The demo model has no chat template of its own.
TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}答：\
{{ message.content }}{{ eos_token }}
{% else %}问：{{ message.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}答：{% endif %}"""


def get_config(name="full"):
    """The settings; "lora" trains adapters of rank 16 on every product of the layers."""
    if name not in ("full", "lora"):
        raise ValueError(f"sft.py:{name}: expected full or lora{nearest(name, ('full', 'lora'))}")
    lora = LoraConfig(rank=16, alpha=32.0, targets=("attn/w[qkvo]$", "mlp/(gate|up|down)$"))
    return to_config_dict(
        FinetuneConfig(
            data=str(DATA),
            init_from=str(DEMO),
            chat_template=TEMPLATE,
            row_tokens=128,
            lora=lora if name == "lora" else None,
            optim=OptimConfig(
                learning_rate=3e-3 if name == "lora" else 1e-3, warmup_fraction=0.1, b2=0.98
            ),
            batch_size=4,
            epochs=25.0,
            log_every=10,
            eval_every=30,
        )
    )
