"""A peer of a benchmark has the same weights: it writes what transformers does."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from llm_jax import SamplingParams
from llm_jax.bench import generation_cases, runtimes
from llm_jax.bench import peers as peers_module
from llm_jax.bench.cases import OF_CASE, check_flags
from llm_jax.bench.cost import copy_bandwidth, prefill_flops
from llm_jax.bench.peers import STATIC, generator, random_model, same_weights, torch_device
from llm_jax.bench.setup import Setup, cores
from tests.tiny import DECODERS

ROWS, PROMPT, NEW = 3, 7, 12
TINY = {"vocab_size": 97, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
IDS = np.random.default_rng(0).integers(5, 97, (ROWS, PROMPT))


def build(name="llama"):
    """A tiny model whose text never ends: what the end is replaced by differs between runtimes."""
    peer = DECODERS[name].build()
    torch.nn.init.zeros_(peer.lm_head.weight.data[2])
    return peer


def setup(*peers, **changes):
    peer = build()
    sizes = {"repeats": 1, "requests": 8, "max_rows": 2, "rates": [1.0], "ttft_bound_s": 1.0}
    sizes |= {"plot": None, "batches": [2], "prompt_tokens": 5, "new_tokens": 4} | changes
    sizes = {"dtype": "float32", "llm": same_weights(peer), "peer": peer} | sizes
    return Setup(torch, transformers, name="tiny", peers=list(peers), **sizes)


@pytest.fixture(scope="module")
def expected():
    return generator(torch, build())(IDS, NEW)


def test_ours_has_the_weights_of_transformers(expected):
    llm = same_weights(build())
    asked = SamplingParams(max_new_tokens=NEW, temperature=0, ignore_eos=True)
    assert [each.token_ids for each in llm.generate(IDS.tolist(), asked)] == expected.tolist()


@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_a_runtime_has_the_weights_of_transformers(name, expected):
    pytest.importorskip(name.removesuffix("_int8"))
    sizes = {"rows": ROWS, "length": PROMPT + NEW, "threads": 1}
    generate = runtimes.load(name, transformers, build(), **sizes)
    for _ in range(2):  # nothing is left of the first time
        found = generate(IDS, NEW)
        if name.endswith("int8"):  # rounded weights: alike to begin with
            np.testing.assert_array_equal(found[:, 0], expected[:, 0])
        else:
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(generate(IDS[:1], 1), found[:1, :1])


def test_transformers_reads_the_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    peer = build()
    runtimes.write_gguf(tmp_path / "model.gguf", peer)
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    for (name, theirs), ours in zip(found.state_dict().items(), peer.state_dict().values(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("case", ["decode", "prefill"])
def test_a_peer_that_is_not_installed_is_skipped(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    first, found = generation_cases.CASES[case](setup("ctranslate2", "transformers"))
    assert first["case"] == f"{case}/tiny/ctranslate2"
    assert first["skipped"].startswith("ModuleNotFoundError: import of ctranslate2 halted")
    assert found["case"] == f"{case}/tiny/batch2" and found["unit"] == "tokens/s"
    assert found["our_threads"] == cores() and found["peer_threads"] == torch.get_num_threads()
    assert not list(generation_cases.CASES[case](setup("ctranslate2")))[1:], "nothing to compare with"


def test_llama_cpp_gets_llamas_alone(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="model_type='gpt2'.*--shape=llama160m"):
        runtimes.write_gguf(tmp_path / "model.gguf", DECODERS["gpt2"].build())


def test_a_cache_of_fixed_size_changes_no_token(expected):
    np.testing.assert_array_equal(generator(torch, build(), static=True)(IDS, NEW), expected)


def test_both_sides_of_a_case_have_its_dtype(monkeypatch):
    monkeypatch.setitem(peers_module.LLAMAS, "llama160m", TINY | {"num_attention_heads": 4})
    peer = random_model(torch, transformers, "llama160m", "bfloat16")
    assert {x.dtype for x in peer.parameters()} == {torch.bfloat16} and not peer.training
    llm = same_weights(peer, dtype="bfloat16")
    config = llm.model.config
    assert (config.param_dtype, config.compute_dtype, config.cache_dtype) == ("bfloat16",) * 3
    assert {x.dtype for x in jax.tree.leaves(llm.params)} == {jnp.dtype("bfloat16")}
    assert same_weights(peer, "float32", "bfloat16").model.config.param_dtype == "float32"
    with torch.no_grad():
        theirs = peer(torch.tensor(IDS)).logits[:, -1].float().log_softmax(-1).numpy()
    asked = SamplingParams(max_new_tokens=1, temperature=0, logprobs=1, ignore_eos=True)
    found = [each.logprobs[0] for each in llm.generate(IDS.tolist(), asked)]
    np.testing.assert_allclose(found, theirs.max(-1), atol=0.02)


def test_llama_3_8b_has_its_size():
    with torch.device("meta"):
        config = transformers.LlamaConfig(**peers_module.LLAMAS["llama3_8b"])
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(x.numel() for x in model.parameters()) == 8_030_261_248  # Meta's model card: 8.03B


def test_operations_of_a_prompt_are_those_of_torch():
    """But it counts every key, where a causal mask leaves half of them."""
    peer = build()
    config, tokens = peer.config, 32
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        peer(torch.ones((3, tokens), dtype=torch.long), logits_to_keep=1)
    pairs = 3 * tokens * (tokens // 2)  # of queries and keys that do not see each other
    hidden = 2 * 2 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    found = prefill_flops(same_weights(peer).model, 3, tokens)
    assert found == counter.get_total_flops() - hidden


def test_utilization_is_told_where_the_peak_is_known(monkeypatch):
    settings = {"dtype": "bfloat16", "batches": [2], "prompt_tokens": 5}
    plain, static = generation_cases.prefill(setup("transformers", STATIC, **settings))
    assert plain["case"] == "prefill/tiny/batch2" and static["case"] == f"prefill/tiny/batch2/{STATIC}"
    assert "our_mfu" not in plain, "a CPU"
    monkeypatch.setitem(generation_cases.PEAK_FLOPS, jax.devices()[0].device_kind, 1e6)
    (found,) = generation_cases.prefill(setup("transformers", **settings))
    flops = prefill_flops(setup().llm.model, 2, 5) / 10
    assert found["our_mfu"] == pytest.approx(found["ours"] * flops / 1e6, rel=1e-3)
    assert found["peer_mfu"] == pytest.approx(found["peer"] * flops / 1e6, rel=1e-3)


def test_decode_tells_what_it_must_read():
    given = setup("transformers", batches=[3])
    (found,) = generation_cases.decode(given)
    # All weights but the looked up embeddings; keys and values of 5 + 4 / 2 tokens in each row
    config, params = given.llm.model.config, sum(x.numel() for x in given.peer.parameters())
    weights = params - config.vocab_size * config.embed_dim
    cache = 3 * 7 * config.num_layers * 2 * config.num_kv_heads * config.head_dim
    expected = 4 * (weights + cache) / 3 / 1e9
    assert found["our_gb_per_s"] == pytest.approx(found["ours"] * expected, abs=0.006)
    assert found["peer_gb_per_s"] == pytest.approx(found["peer"] * expected, abs=0.006)


def test_bandwidth_is_that_of_copies_elsewhere(monkeypatch):
    (found,) = generation_cases.bandwidth(setup(prompt_tokens=5, new_tokens=4))
    assert found["peer_is"] == "reading" and found["unit"] == "GB/s"
    assert copy_bandwidth(megabytes=8, repeats=2) > 0
    monkeypatch.setattr(generation_cases.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(generation_cases, "copy_bandwidth", lambda: 5e9)
    (found,) = generation_cases.bandwidth(setup(prompt_tokens=5, new_tokens=4))
    assert (found["peer_is"], found["peer"]) == ("copying", 5.0)


def test_what_a_gpu_needs_is_said(monkeypatch):
    assert torch_device(torch) == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this torch cannot use: .*JAX_PLATFORMS=cpu"):
        torch_device(torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device(torch) == "cuda"


def test_cpu_runtimes_do_without_other_dtypes():
    first, _ = generation_cases.decode(setup("llama_cpp", "transformers", dtype="bfloat16"))
    assert first["skipped"] == "RuntimeError: llama_cpp is compared in float32 on a CPU alone"


def test_flags_of_other_cases_are_refused():
    nothing = dict.fromkeys(OF_CASE)
    check_flags("decode", ["transformers", STATIC], nothing | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="--dtype=bfloat16: only --case=decode|"):
        check_flags("train", ["torch"], nothing | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="--peer=torch: expected one of .*--case=decode"):
        check_flags("decode", ["torch"], nothing)
    with pytest.raises(ValueError, match="--peer=torch,torch_compile: "):
        check_flags("train", ["torch", "torch_compile"], nothing)
