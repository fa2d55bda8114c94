"""Generation end to end: the same tokens as transformers, and as itself in every other arrangement."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from llm_jax import LLM, SamplingParams
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.config import ModelConfig
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.infer.generate import prompt_bucket
from llm_jax.infer.timeline import PHASES, Timeline
from llm_jax.models import describe, init_params
from llm_jax.sharding import make_mesh
from tests.shared_data import shared_path
from tests.tiny import DECODERS

PROMPTS = [[5, 9, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [40, 41, 42, 43, 44]]
GREEDY = SamplingParams(max_new_tokens=32, temperature=0, ignore_eos=True)


def load(directory, mesh="", **changes):
    mesh = make_mesh(mesh)
    model = describe(dataclasses.replace(load_config(directory), **changes))
    return LLM.from_params(model, load_hf(directory, model, mesh), None, mesh=mesh)


def byte_llm(mesh="", **options):
    """A random Llama over bytes, with text in and out."""
    tokenizer = ByteTokenizer()
    config = ModelConfig(
        "llama",
        tokenizer.vocab_size,
        2,
        32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_positions=256,
    )
    model, mesh = describe(config), make_mesh(mesh)
    params = init_params(model, mesh, jax.random.key(3))
    return LLM.from_params(model, params, tokenizer, mesh=mesh, **options)


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_the_same_32_greedy_tokens_as_transformers(family, tmp_path):
    peer = DECODERS[family].save(tmp_path)
    if not hasattr(peer, "lm_head"):
        pytest.skip("not a language model")
    outputs = load(tmp_path).generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.no_grad():
            expected = peer.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                min_new_tokens=32,
                max_new_tokens=32,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert output.token_ids == expected[0, len(prompt) :].tolist()
        assert output.finish_reason == "length"


@pytest.mark.parametrize(
    "mesh",
    [
        "data:2,tensor:4",
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in ("tensor:8", "data:2,fsdp:2,tensor:2", "fsdp:8", "data:4,tensor:2", "context:8")
        ),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_sharded_equals_unsharded(family, mesh, tmp_path):
    """97 words and 4 to 6 heads do not divide by most of these axes."""
    DECODERS[family].save(tmp_path)
    request = dataclasses.replace(GREEDY, logprobs=0)
    expected = load(tmp_path).generate(PROMPTS, request)
    sharded = load(tmp_path, mesh).generate(PROMPTS, request)
    for a, b in zip(expected, sharded, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


@pytest.mark.slow
def test_arrangement_does_not_change_the_tokens():
    """Not the dispatch size, the batch, the order, nor scanned layers instead of separate ones."""
    request = SamplingParams(max_new_tokens=20, temperature=0.8, top_k=20, seed=7)
    texts = ["你好", "hello world", "a"]
    llm = byte_llm()
    expected = [o.token_ids for o in llm.generate(texts, request)]
    assert [o.token_ids for o in llm.generate(texts, request)] == expected
    alone = [byte_llm(steps_per_dispatch=3).generate([t], request)[0].token_ids for t in texts]
    assert alone == expected
    backwards = byte_llm(max_batch=2).generate(texts[::-1], request)
    assert [o.token_ids for o in backwards][::-1] == expected
    scanned = byte_llm("data:2").generate(texts, request)
    assert [o.token_ids for o in scanned] == expected


def test_samples_of_one_prompt_differ_and_are_reproducible():
    request = SamplingParams(max_new_tokens=12, temperature=1.0, seed=1, n=3)
    outputs = byte_llm().generate(["x", "y"], request)
    assert [o.sample for o in outputs] == [0, 1, 2, 0, 1, 2]
    assert len({tuple(o.token_ids) for o in outputs[:3]}) == 3
    single = byte_llm().generate(["y"], dataclasses.replace(request, n=1))
    assert single[0].token_ids == outputs[3].token_ids


def test_logprobs_are_those_of_the_forward_pass(tmp_path):
    peer = DECODERS["llama"].save(tmp_path)
    output = load(tmp_path).generate([PROMPTS[0]], dataclasses.replace(GREEDY, logprobs=3))[0]
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[0] + output.token_ids])
        logprobs = torch.log_softmax(peer(ids).logits[0].double(), -1)[len(PROMPTS[0]) - 1 : -1]
    np.testing.assert_allclose(output.logprobs, logprobs.gather(1, ids[0, 3:, None])[:, 0], atol=1e-4)
    best = torch.topk(logprobs, 3)
    for ours, values, names in zip(output.top_logprobs, best.values, best.indices, strict=True):
        assert list(ours) == names.tolist()
        np.testing.assert_allclose(list(ours.values()), values, atol=1e-4)


def test_streamed_text_is_the_text_and_stop_strings_end_it():
    llm = byte_llm()
    request = SamplingParams(max_new_tokens=40, temperature=1.0, seed=5)
    (output,) = llm.generate(["再见"], request)
    assert "".join(llm.stream("再见", request)) == output.text
    stop = output.text[10:13]
    pieces: list[str] = []
    (stopped,) = llm.generate(
        ["再见"], dataclasses.replace(request, stop=(stop,)), on_text=lambda i, text: pieces.append(text)
    )
    assert stopped.text == output.text[: output.text.index(stop)] == "".join(pieces)
    assert stopped.finish_reason == "stop"


def test_stop_ids_end_a_row_and_min_new_tokens_puts_them_off():
    llm = byte_llm()
    free = llm.generate(["abc"], SamplingParams(max_new_tokens=20, temperature=0))[0].token_ids
    stop = free[4]
    request = SamplingParams(max_new_tokens=20, temperature=0, stop_ids=(stop,))
    (output,) = llm.generate(["abc"], request)
    assert output.token_ids == free[: free.index(stop) + 1] and output.finish_reason == "stop"
    (later,) = llm.generate(["abc"], dataclasses.replace(request, min_new_tokens=10))
    assert len(later.token_ids) >= 10 and stop not in later.token_ids[:10]


def test_bad_requests_are_refused_by_name():
    llm = byte_llm()
    with pytest.raises(
        ValueError, match="prompt 1 has 250 tokens and max_new_tokens=20.*max_positions=256"
    ):
        llm.generate([[1], [1] * 250], SamplingParams(max_new_tokens=20))
    with pytest.raises(ValueError, match="prompt 0 holds id 5000"):
        llm.generate([[5000]], GREEDY)
    with pytest.raises(ValueError, match="single string"):
        llm.generate("text", GREEDY)
    with pytest.raises(ValueError, match="max_batch=0"):
        byte_llm(max_batch=0)


def test_timeline_has_every_phase_and_token(tmp_path):
    timeline = Timeline()
    (output,) = byte_llm().generate(
        ["ab"], SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True), timeline=timeline
    )
    trace, image = timeline.write(tmp_path / "trace.json")
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert {e["name"] for e in events} == set(PHASES)
    assert [e["args"]["tick"] for e in events if e["name"] == "decode"] == [1, 2, 3, 4, 5]
    assert [e["args"]["tick"] for e in events if e["name"] == "sample"] == [0, 1, 2, 3, 4, 5]
    starts = [e["ts"] for e in events]
    assert starts == sorted(starts) and all(e["dur"] >= 0 for e in events)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert len(output.token_ids) == 6


def test_prompt_buckets_are_few_and_close():
    buckets = sorted({prompt_bucket(n) for n in range(1, 4097)})
    assert len(buckets) == 17 and all(prompt_bucket(n) >= n for n in range(1, 4097))
    assert max(prompt_bucket(n) / n for n in range(17, 4097)) < 1.5


def test_the_published_story():
    """llama2.c's own check of these weights: greedy from bos alone."""
    llm = LLM(shared_path("weights/stories260K"))
    (output,) = llm.generate([""], SamplingParams(max_new_tokens=200, temperature=0))
    assert output.text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside"
    )
    assert output.text.endswith("I didn't know what to do.\"\nLily didn't want to help her mom, so she")


def test_a_word_after_the_prompt_keeps_its_space():
    llm = LLM(shared_path("weights/stories260K"))
    request = SamplingParams(max_new_tokens=3, temperature=0)
    assert llm.generate(["Once upon a"], request)[0].text.startswith(" time")
    assert "".join(llm.stream("Once upon a", request)).startswith(" time")


def test_the_sorter_sorts():
    """gpt_nano_sort: six digits in, the same six sorted out."""
    llm = load(shared_path("weights/gpt_nano_sort"))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 3, (32, 6)).tolist()
    request = SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)
    outputs = llm.generate(prompts, request)
    assert [o.token_ids for o in outputs] == [sorted(p)[:5] for p in prompts]
