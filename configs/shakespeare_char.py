"""A GPT-2-type model of single characters, Shakespeare's by default: nanoGPT's recipe for a CPU.

    python scripts/train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare
    python scripts/convert.py --workdir=runs/shakespeare --output=shakespeare
    python scripts/generate.py --model=shakespeare --prompt=ROMEO: --max_new_tokens=58 --temperature=0.8

4 layers of width 128 see 64 characters at a time, 12 such windows a step, for 2,000 steps. The
settings are those of nanoGPT's README (github.com/karpathy/nanoGPT), which gives a validation loss of
1.88 for them, but for the biases of GPT-2, which nanoGPT leaves out and transformers expects. Text and
windows are treated as there: the file is one stream, its last tenth is the validation part, the loss is
the mean over all of its characters. docs/language_models.md explains the steps and gives the figures.

The text is looked for in data/ of the folder that the environment variable LLM_JAX_SHARED names,
../shared if unset. Any other text file will do: --config.data=mine.txt
"""

import os
from pathlib import Path

from llm_jax.config import (
    LanguageModelConfig,
    ModelConfig,
    OptimConfig,
    to_config_dict,
)

SHARED = Path(os.environ.get("LLM_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"


def get_config():
    """The settings; the true vocabulary size comes from the text."""
    return to_config_dict(
        LanguageModelConfig(
            data=((str(SHARED / "lm_en_shakespeare" / "train.txt"), "", 1.0),),
            document="file",
            eval_fraction=0.1,
            eval_split="tail",
            tokenizer_kind="char",
            character_coverage=1.0,
            row_tokens=64,
            model=ModelConfig(
                family="gpt2",
                vocab_size=10_000,
                num_layers=4,
                embed_dim=128,
                num_heads=4,
                num_kv_heads=4,
                head_dim=32,
                mlp_dim=512,
                max_positions=64,
                positions="learned",
                norm="layer",
                norm_eps=1e-5,
                activation="gelu",
                gated_mlp=False,
                qkv_bias=True,
                out_bias=True,
                mlp_bias=True,
                tie_embeddings=True,
            ),
            optim=OptimConfig(
                learning_rate=1e-3,
                warmup_fraction=0.05,
                final_fraction=0.1,
                b2=0.99,
                weight_decay=0.1,
                clip_norm=1.0,
            ),
            batch_size=12,
            steps=2000,
            log_every=100,
            eval_every=500,
        )
    )
