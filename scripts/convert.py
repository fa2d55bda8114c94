"""Write the model that a run has trained as a Hugging Face directory, which transformers reads too.

    python scripts/convert.py --workdir=runs/demo_lm --output=demo_lm --dtype=bfloat16

The workdir may also be WORKDIR/checkpoints/<step>, for another step than the newest. The moving average
of the parameters is taken where the run kept one.
"""

import sys

from absl import app, flags

from llm_jax import cli
from llm_jax.checkpoint.hf import export_hf
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.sharding import make_mesh

WORKDIR = flags.DEFINE_string("workdir", None, "A run of scripts/train.py, or one of its checkpoints.")
OUTPUT = flags.DEFINE_string("output", None, "Directory to write; it must be new or empty.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of the parameters.")
flags.mark_flags_as_required(["workdir", "output"])


def generation_config(tokenizer: Tokenizer) -> dict[str, int | bool]:
    """generation_config.json of a decoder: its special tokens, and greedy by default.

    They go to config.json too, where a classifier finds what is padding.
    """
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: id_ for name, id_ in ids.items() if id_ is not None} | {"do_sample": False}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; see --help")
    trained = load_trained(WORKDIR.value, make_mesh(""), param_dtype=DTYPE.value)
    tokenizer = load_tokenizer(trained.tokenizer)
    written = export_hf(
        OUTPUT.value,
        trained.model,
        trained.params,
        tokenizer=tokenizer,
        generation_config=generation_config(tokenizer) if trained.model.config.causal else None,
    )
    print(f"step {trained.step} is in {written}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
