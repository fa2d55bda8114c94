"""The other side of a comparison: a transformers model with random weights, and how it generates.

The caller hands in the modules `torch` and `transformers`, which llm_jax itself does without.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np

from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.compress.quantize import read_weights
from llm_jax.infer.llm import LLM
from llm_jax.models import describe
from llm_jax.sharding import make_mesh

Generate = Callable[[np.ndarray, int], np.ndarray]  # prompts [B, T], N more tokens -> [B, N]
SHAPES = ("gpt2", "llama160m", "llama3_8b")  # 124M, 160M and 8B parameters
STATIC = "transformers_static"  # a cache of fixed size, with which transformers compiles steps on GPUs
LLAMAS: dict[str, dict[str, Any]] = {
    "llama160m": {
        "vocab_size": 32000,
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
    },
    "llama3_8b": {
        "vocab_size": 128256,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}


def torch_device(torch: ModuleType) -> str:
    """Where a peer runs: on the GPU if we do, else on the CPU. Raises ValueError where it cannot."""
    if jax.default_backend() != "gpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(
            "jax runs on a GPU, which this torch cannot use: install one that is built for CUDA, or set "
            "JAX_PLATFORMS=cpu"
        )
    return "cuda"


def random_model(torch: ModuleType, transformers: ModuleType, shape: str, dtype: str = "float32") -> Any:
    """A transformers model of one of `SHAPES`, with random weights, to generate, on `torch_device`."""
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: expected one of {SHAPES}")
    gpt2 = shape == "gpt2"
    config = transformers.GPT2Config() if gpt2 else transformers.LlamaConfig(**LLAMAS[shape])
    with torch.device(torch_device(torch)):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()


def same_weights(peer: Any, weights: str = "", dtype: str = "float32") -> LLM:
    """An LLM with the weights of a transformers model, by way of a directory; without a tokenizer.

    dtype: of weights, products and the cache; weights: of the weights alone, as `LLM` has them.
    """
    param_dtype, scheme = read_weights(weights, dtype)
    dtypes = {"param_dtype": param_dtype, "compute_dtype": dtype, "cache_dtype": dtype}
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        model = describe(dataclasses.replace(load_config(directory), **dtypes))
        mesh = make_mesh("")
        return LLM.from_params(model, load_hf(directory, model, mesh, scheme=scheme), None, mesh=mesh)


def generator(torch: ModuleType, peer: Any, static: bool = False) -> Generate:
    """Greedy `generate` of transformers, which ends no text early.

    static: with a cache of fixed size, for which it compiles its steps on GPUs.
    """
    cache = {"cache_implementation": "static"} if static else {}

    def generate(ids: np.ndarray, new_tokens: int) -> np.ndarray:
        with torch.no_grad():
            found = peer.generate(
                torch.tensor(ids, device=peer.device),
                attention_mask=torch.ones(ids.shape, dtype=torch.long, device=peer.device),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                **cache,
            )
        return found[:, ids.shape[1] :].cpu().numpy()

    return generate
