"""A peer of a benchmark has the same weights: it writes what transformers does."""

import sys

import numpy as np
import pytest
import torch
import transformers

from llm_jax import SamplingParams
from llm_jax.bench import generation_cases, runtimes
from llm_jax.bench.peers import generator, same_weights
from llm_jax.bench.setup import Setup, cores
from tests.tiny import DECODERS

ROWS, PROMPT, NEW = 3, 7, 12
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
    return Setup(torch, transformers, same_weights(peer), peer, "tiny", list(peers), **sizes)


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
