"""Every field of SamplingParams changes what `LLM.generate` gives, or is refused there by name."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from llm_jax import LLM, SamplingParams
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.config import ModelConfig
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.models import describe, init_params
from llm_jax.ops.sampling_params import StructuredSpec
from llm_jax.sharding import make_mesh
from tests.tiny import DECODERS

PROMPTS = ["你好", [7, 8, 9, 10]]
SHORT = {"max_new_tokens": 6}
GREEDY = SHORT | {"temperature": 0}
SEEDED = SHORT | {"seed": 1}


@functools.cache
def llm():
    tokenizer = ByteTokenizer()
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_dim": 24, "max_positions": 64}
    model, mesh = describe(ModelConfig("llama", tokenizer.vocab_size, 1, 16, **sizes)), make_mesh("")
    return LLM.from_params(model, init_params(model, mesh, jax.random.key(3)), tokenizer, mesh=mesh)


def generate(**request):
    return llm().generate(PROMPTS, SamplingParams(**request))


@functools.cache
def greedy():
    """The greedy continuation of the first prompt."""
    return generate(**GREEDY)[0]


# Field: a request, and another value of the field. Functions, for what depends on the model's text.
CASES = {
    "max_new_tokens": lambda: (GREEDY, 3),
    "min_new_tokens": lambda: (GREEDY | {"stop_ids": greedy().token_ids[:1]}, 3),
    "temperature": lambda: (SEEDED, 0.0),
    "top_k": lambda: (SEEDED, 1),
    "top_p": lambda: (SEEDED, 0.01),
    "min_p": lambda: (SEEDED, 0.99),
    "typical_p": lambda: (SEEDED, 0.01),
    "repetition_penalty": lambda: (SEEDED, 1e-3),
    "presence_penalty": lambda: (SEEDED, -50.0),
    "frequency_penalty": lambda: (SEEDED, -50.0),
    "logit_bias": lambda: (GREEDY, {7: 100.0}),
    "banned_ids": lambda: (GREEDY, greedy().token_ids[:1]),
    "allowed_ids": lambda: (GREEDY, (7, 8)),
    "seed": lambda: (SEEDED, 2),
    "stop_ids": lambda: (GREEDY, greedy().token_ids[:1]),
    "stop": lambda: (GREEDY, (greedy().text[:1],)),
    "ignore_eos": lambda: (GREEDY | {"logit_bias": {llm().end_ids[0]: 100.0}}, True),
    "n": lambda: (SEEDED, 2),
    "best_of": lambda: (SEEDED, 8),
    "logprobs": lambda: (GREEDY, 0),
    "prompt_logprobs": lambda: (GREEDY, 0),
}
REFUSED = {"structured": StructuredSpec("regex", "a+")}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(SamplingParams)])
def test_every_field_counts(field):
    assert (field in CASES) != (field in REFUSED), f"SamplingParams.{field}: give it a case"
    if field in REFUSED:
        with pytest.raises(ValueError, match=f"SamplingParams.{field}"):
            generate(**GREEDY, **{field: REFUSED[field]})
        with pytest.raises(ValueError, match=f"SamplingParams.{field}"):
            llm().beam_search(PROMPTS, SamplingParams(**GREEDY, **{field: REFUSED[field]}), num_beams=2)
        return
    request, value = CASES[field]()
    assert generate(**request | {field: value}) != generate(**request)


def test_banned_ids_never_and_allowed_ids_alone_are_emitted():
    for request in (GREEDY, SEEDED):
        for output in generate(**request, banned_ids=range(4, 200), ignore_eos=True):
            assert not set(output.token_ids) & set(range(4, 200))
        for output in generate(**request, allowed_ids=(50, 60, 70), banned_ids=(60,)):
            assert set(output.token_ids) <= {50, 70} and output.finish_reason == "length"


@pytest.mark.slow
def test_a_beam_search_keeps_to_allowed_ids():
    (output,) = llm().beam_search(
        PROMPTS[:1], SamplingParams(**GREEDY, allowed_ids=(50, 60)), num_beams=3
    )
    assert set(output.token_ids) <= {50, 60}


def test_best_of_returns_the_likeliest_samples():
    request = SEEDED | {"logprobs": 1}
    drawn = generate(**request, n=6)
    best = generate(**request, n=2, best_of=6)
    assert [o.sample for o in best] == [0, 1, 0, 1]
    for prompt in range(2):
        expected = sorted(drawn[6 * prompt : 6 * prompt + 6], key=lambda o: -sum(o.logprobs))[:2]
        got = best[2 * prompt : 2 * prompt + 2]
        assert [o.token_ids for o in got] == [o.token_ids for o in expected]
        assert [o.top_logprobs for o in got] == [o.top_logprobs for o in expected]
    one, *rest = llm().generate(
        PROMPTS, [SamplingParams(**SEEDED, best_of=6), SamplingParams(**request, n=6)]
    )
    assert one.token_ids == best[0].token_ids and one.logprobs is None and rest == drawn[6:]


def test_best_of_does_not_stream():
    request = SamplingParams(**SEEDED, best_of=3)
    with pytest.raises(ValueError, match="SamplingParams.best_of is 3: .* cannot stream"):
        next(llm().stream("a", request))
    with pytest.raises(ValueError, match="SamplingParams.best_of"):
        llm().generate(["a"], request, on_text=lambda i, text: None)


@pytest.mark.parametrize("mesh", ["", "data:2,tensor:4"])
def test_prompt_logprobs_are_those_of_the_forward_pass(mesh, tmp_path):
    """Of prompts of many lengths, one of them a single token, beside requests without."""
    peer = DECODERS["gemma3"].save(tmp_path)
    mesh = make_mesh(mesh)
    described = describe(load_config(tmp_path))
    model = LLM.from_params(described, load_hf(tmp_path, described, mesh), None, mesh=mesh)
    prompts = [list(range(3, 3 + length)) for length in (1, 2, 9, 17)]
    asked = [2, 0, 3, None]
    requests = [SamplingParams(max_new_tokens=1, temperature=0, prompt_logprobs=k, n=2) for k in asked]
    outputs = model.generate(prompts, requests)
    for i, (prompt, k) in enumerate(zip(prompts, asked, strict=True)):
        first, second = outputs[2 * i : 2 * i + 2]
        assert first.prompt_logprobs == second.prompt_logprobs
        if k is None:
            assert first.prompt_logprobs is None and first.prompt_top_logprobs is None
            continue
        with torch.no_grad():
            ids = torch.tensor([prompt])
            expected = torch.log_softmax(peer(ids).logits[0].double(), -1)[:-1]
        assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == len(prompt)
        chosen = expected.gather(1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(first.prompt_logprobs[1:], chosen, atol=1e-4)
        if not k:
            assert first.prompt_top_logprobs is None
            continue
        best = torch.topk(expected, k)
        assert first.prompt_top_logprobs[0] is None
        for ours, values, names in zip(
            first.prompt_top_logprobs[1:], best.values, best.indices, strict=True
        ):
            assert list(ours) == names.tolist()
            np.testing.assert_allclose(list(ours.values()), values, atol=1e-4)
