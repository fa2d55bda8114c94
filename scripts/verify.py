"""Compare a checkpoint in llm_jax with the same checkpoint in transformers, in float32.

    python scripts/verify.py --model=DIR
    python scripts/verify.py --model=DIR --prompt="我喜欢编程。" --prompt="Hello" --mesh=data:1,tensor:2
    python scripts/verify.py --model=DIR --weights=int8 --prompt_file=texts.txt

Texts run one by one in transformers and together, padded, in llm_jax. Compared are hidden states and
what the model is for: vocabulary logits and 32 greedy tokens, class logits, or sentence vectors.
Needs torch and transformers (pip install "llm_jax[test]"). Exits with 1 when an error exceeds 2e-4 of
the largest value or a token differs, with 2 when the comparison cannot be made.

With --weights the model with such weights is compared with itself in float32 instead: how much of their
answers agrees, on texts of yours. That has no limit that could be exceeded.
"""

import dataclasses
import json
import sys
from pathlib import Path

from absl import app, flags

from llm_jax import cli
from llm_jax.checkpoint.hf import resolve
from llm_jax.eval.parity import Comparison, compare_checkpoint
from llm_jax.eval.weights import agreement
from llm_jax.sharding import make_mesh

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory or hub id.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text; may be repeated. Default: a few of our own.")
_FILE = flags.DEFINE_string("prompt_file", None, "A file with one text per line.")
_WEIGHTS = flags.DEFINE_string("weights", "", "Of the parameters: a dtype, int8 or w8a8.")
_MESH = flags.DEFINE_string("mesh", "", "Mesh axes, e.g. data:2,tensor:4 (one may be -1).")
_JSON = flags.DEFINE_bool("json", False, "One JSON object a comparison on stdout, nothing else.")


def show(result: Comparison) -> None:
    """One line of the result."""
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(result)), flush=True)
        return
    print(
        f"{result.quantity:40} max error {result.max_abs_error:.2e}  "
        f"relative {result.relative_error:.2e}  {'ok' if result.ok else 'DIFFERS'}",
        flush=True,
    )


def prompts() -> list[str]:
    """The texts of --prompt and --prompt_file."""
    lines = Path(_FILE.value).read_text(encoding="utf-8").splitlines() if _FILE.value else []
    return [*_PROMPT.value, *(line for line in lines if line.strip())]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; texts are given as --prompt=TEXT")
    if _WEIGHTS.value:
        found = agreement(resolve(_MODEL.value), prompts(), make_mesh(_MESH.value), _WEIGHTS.value)
        return cli.show(dataclasses.asdict(found), as_json=_JSON.value)
    try:  # here, so that --help needs neither
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f'{error}; pip install "llm_jax[test]" (torch, transformers)') from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    directory, mesh, failed = resolve(_MODEL.value), make_mesh(_MESH.value), False
    modules = {"torch": torch, "transformers": transformers}
    for result in compare_checkpoint(directory, prompts(), mesh, **modules):
        failed |= not result.ok
        show(result)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    cli.run(main)
