"""Distillation: a student of 0.3 million parameters learns from the bundled demo model, 1.5 million.

    python scripts/train.py --config=configs/distill.py --workdir=runs/student
    python scripts/train.py --config=configs/distill.py:alone --workdir=runs/student_alone

"alone" is the same student with the same tokenizer, texts and steps, without the teacher. The texts are
those of configs/data on which the teacher was trained too; as both hold out the same 2%, those are new
to both. It runs offline, in minutes on a laptop.

Figures: docs/finetuning.md.
"""

from pathlib import Path

import llm_jax
from llm_jax.config import (
    DistillConfig,
    LanguageModelConfig,
    ModelConfig,
    OptimConfig,
    nearest,
    to_config_dict,
)

DATA = Path(__file__).resolve().parent / "data"
TEACHER = str(Path(llm_jax.__file__).parent / "assets" / "demo_lm")


def get_config(name="distilled"):
    """The settings; "alone" learns from the texts alone."""
    known = ("distilled", "alone")
    if name not in known:
        raise ValueError(f"distill.py:{name}: expected one of {known}{nearest(name, known)}")
    distill = DistillConfig(teacher=TEACHER, temperature=2.0, weight=0.7)
    return to_config_dict(
        LanguageModelConfig(
            data=(
                (str(DATA / "demo_lm" / "own_zh.txt"), "", 1.0),
                (str(DATA / "demo_lm" / "own_en.txt"), "", 1.0),
                (str(DATA / "sentiment_zh" / "train.tsv"), "text", 1.0),
            ),
            eval_fraction=0.02,  # as in configs/demo_lm.py
            distill=distill if name == "distilled" else None,
            tokenizer="" if name == "distilled" else TEACHER,
            row_tokens=128,
            model=ModelConfig(
                family="llama",
                vocab_size=4800,
                num_layers=2,
                embed_dim=48,
                num_heads=4,
                num_kv_heads=4,
                head_dim=16,
                mlp_dim=144,
                max_positions=512,
                norm_eps=1e-5,
                tie_embeddings=True,
            ),
            optim=OptimConfig(
                learning_rate=5e-3,
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
