"""The other side of a comparison: a transformers model with random weights, and how it generates.

The caller hands in the modules `torch` and `transformers`, which llm_jax itself does without.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.compress.quantize import read_weights
from llm_jax.infer.llm import LLM
from llm_jax.models import describe
from llm_jax.sharding import make_mesh

Generate = Callable[[np.ndarray, int], np.ndarray]  # prompts [B, T], N more tokens -> [B, N]
SHAPES = ("gpt2", "llama160m")  # 124M and 160M parameters


def random_model(transformers: ModuleType, shape: str) -> Any:
    """A transformers model of one of `SHAPES`, with random float32 weights, in evaluation mode."""
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: expected one of {SHAPES}")
    if shape == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    width = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = transformers.LlamaConfig(vocab_size=32000, num_hidden_layers=12, **width)
    return transformers.LlamaForCausalLM(config).eval()


def same_weights(peer: Any, weights: str = "") -> LLM:
    """An LLM with the weights of a transformers model, by way of a directory; without a tokenizer.

    In float32; weights: as `LLM` has them.
    """
    param_dtype, scheme = read_weights(weights, "float32")
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        config = dataclasses.replace(load_config(directory), param_dtype=param_dtype)
        model, mesh = describe(dataclasses.replace(config, compute_dtype="float32")), make_mesh("")
        return LLM.from_params(model, load_hf(directory, model, mesh, scheme=scheme), None, mesh=mesh)


def generator(torch: ModuleType, peer: Any) -> Generate:
    """Greedy `generate` of transformers, which ends no text early."""

    def generate(ids: np.ndarray, new_tokens: int) -> np.ndarray:
        with torch.no_grad():
            found = peer.generate(
                torch.tensor(ids),
                attention_mask=torch.ones(ids.shape, dtype=torch.long),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return found[:, ids.shape[1] :].numpy()

    return generate
