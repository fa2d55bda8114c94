"""One log probability: of the engine, of the forward of training, of transformers."""

import dataclasses

import numpy as np
import pytest
import torch

from llm_jax import LLM, SamplingParams
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.config import EngineConfig
from llm_jax.engine.engine import Engine
from llm_jax.infer import paged_steps
from llm_jax.models import describe
from llm_jax.sharding import make_mesh
from tests.tiny import DECODERS

ULP = np.spacing(np.float32(1))
BOUND = 64 * ULP  # of log probabilities in float32; stated in docs/engine.md
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(5, 97, n).tolist() for n in (3, 40, 1, 25)]
ASKED = SamplingParams(
    max_new_tokens=12, temperature=0.9, seed=1, logprobs=0, prompt_logprobs=0, ignore_eos=True
)
SIZES = {"max_rows": 4, "token_budget": 24, "max_length": 60, "compile_ahead": False}


def load(folder, name, mesh=""):
    """A tiny model of transformers, and the same one here."""
    theirs = DECODERS[name].save(folder)
    config = dataclasses.replace(load_config(folder), cache_dtype="float32")
    model, mesh = describe(config), make_mesh(mesh)
    return theirs, LLM.from_params(model, load_hf(folder, model, mesh), None, mesh=mesh)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_scores_are_those_of_transformers(tmp_path, name):
    theirs, llm = load(tmp_path, name)
    for text, found in zip(TEXTS, llm.score(TEXTS), strict=True):
        with torch.no_grad():
            logprobs = theirs(torch.tensor([text])).logits[0].double().log_softmax(-1)
        expected = [logprobs[t, token].item() for t, token in enumerate(text[1:])]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def served(llm, page_size, **changes):
    """Whole texts of an engine, and what it says of their tokens."""
    settings = SIZES | {"prompt_logprobs": True, "page_size": page_size} | changes
    outputs = Engine(llm, EngineConfig(**settings)).generate(TEXTS, ASKED)
    texts = [output.prompt_ids + output.token_ids for output in outputs]
    return texts, [[*output.prompt_logprobs[1:], *output.logprobs] for output in outputs]


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_the_engine_is_near_the_forward_of_training(tmp_path, name):
    _, llm = load(tmp_path, name)
    texts, found = served(llm, 8)
    for ours, expected in zip(found, llm.score(texts), strict=True):
        assert np.abs(np.subtract(ours, expected)).max() <= BOUND


@pytest.mark.parametrize(
    ("name", "mesh", "changes"),
    [
        ("llama", "", {}),
        pytest.param("gemma3", "", {"prefix_cache": False}, marks=pytest.mark.slow),
        pytest.param("gpt2", "", {"speculation": "prompt_lookup"}, marks=pytest.mark.slow),
        pytest.param("llama", "data:2", {}, marks=pytest.mark.slow),
    ],
)
def test_strictly_they_are_the_same_in_every_bit(tmp_path, monkeypatch, name, mesh, changes):
    """Of the prompt's tokens and of those that were drawn, however the engine came by them."""
    monkeypatch.setattr(paged_steps, "ALONE_AT_ONCE", 16)  # several pieces, and padding in the last
    _, llm = load(tmp_path, name, mesh)
    texts, found = served(llm, 8, strict_numerics=True, **changes)
    assert found == llm.score(texts, strict=True, page_size=8)


def test_what_is_refused(tmp_path):
    _, llm = load(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="page_size=8: only strict scores have pages"):
        llm.score(TEXTS, page_size=8)
    with pytest.raises(ValueError, match="page_size=0: expected at least 1"):
        llm.score(TEXTS, strict=True, page_size=0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        llm.score([[5], []])
