"""Models with int8 weights: what they compute is what transformers does with weights rounded alike."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from llm_jax import LLM, SamplingParams
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.compress.quantize import quantize
from llm_jax.config import EngineConfig, LoraConfig
from llm_jax.engine.engine import Engine
from llm_jax.eval.parity import our_outputs
from llm_jax.eval.weights import agreement
from llm_jax.infer.classify import TextClassifier
from llm_jax.infer.llm import demo_model
from llm_jax.models import describe, init_params
from llm_jax.models.lora import LoraModel
from llm_jax.sharding import make_mesh
from llm_jax.tree import flatten, num_bytes, unflatten
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
# What is not rounded: tables that are looked up, small heads, and what is tied to a table.
WHOLE = (
    "embed",
    "wte",
    "wpe",
    "score",
    "classifier",
    "qa_outputs",
    "pooler",
    "predictions.transform",
    "lm_head.dense",
)
PROMPTS = [[5, 6, 7], [60, 50, 40, 30, 20] * 4, [9]]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 96, "page_size": 16, "compile_ahead": False}
MODEL = describe(dataclasses.replace(load_config(demo_model()), num_layers=2, vocab_size=97))


def round_in_place(model):
    """Round the matrices of a transformers model as int8 does, then make it float64."""
    tied = model.config.tie_word_embeddings
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or any(word in name for word in WHOLE):
            continue
        if name.endswith(("lm_head", "decoder")) and tied:
            continue
        axis = 0 if type(module).__name__ == "Conv1D" else 1  # [in, out]
        steps = weight.data.abs().amax(dim=axis, keepdim=True) * np.float32(1 / 127)
        values = torch.round(weight.data / steps).double()
        weight.data = values * steps.double()
    return model.double()


def texts(count=3):
    rng = np.random.default_rng(0)
    return [rng.integers(3, tiny.VOCAB, n).tolist() for n in (tiny.LENGTH, 9, 5)[:count]]


def outputs(directory, mesh="data:1", scheme="int8"):
    """{name: array of each text} of a directory by ours."""
    config = load_config(directory)
    model, mesh = describe(config), make_mesh(mesh)
    return our_outputs(model, load_hf(directory, model, mesh, scheme=scheme), mesh, texts(), "right")


def relative(got, want):
    return max(np.abs(g - w).max() for g, w in zip(got, want, strict=True)) / max(
        np.abs(w).max() for w in want
    )


QUICK = {"gpt2", "gemma3", "bert classifier"}
MIXTURES = ("mixtral", "qwen3_moe")  # are refused
NAMES = [n for n in tiny.ALL if n not in tiny.SPANS and not n.startswith(MIXTURES)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES]
)
def test_families_compute_what_transformers_does_with_rounded_weights(name, tmp_path):
    model = tiny.ALL[name].save(tmp_path)
    floats, got = outputs(tmp_path, scheme=""), outputs(tmp_path)
    round_in_place(model)
    with torch.no_grad():
        found = [model(torch.tensor([t]), output_hidden_states=True) for t in texts()]
    hidden = [out.hidden_states[-1][0].numpy() for out in found]
    assert relative(got["hidden states"], hidden) < 2e-5
    if "logits" in found[0]:
        key = "class logits" if found[0].logits.ndim == 2 else "logits"
        assert relative(got[key], [out.logits[0].numpy() for out in found]) < 2e-5
    errors = {key: relative(got[key], floats[key]) for key in got}
    print(f"{name:32}", *(f"{key} {error:.4f}" for key, error in errors.items()))
    assert 1e-4 < max(errors.values()) < 0.08, "rounded, but not by much"


@pytest.fixture(scope="module")
def params():
    """Of a small random model."""
    return init_params(MODEL, make_mesh("data:1"), jax.random.key(0))


@pytest.fixture(scope="module")
def wanted(params):
    """{scheme: (logits of each prompt)} on one device."""
    found = {}
    for scheme in ("int8", "w8a8"):
        rounded = quantize(params, MODEL, make_mesh("data:1"), scheme)
        found[scheme] = our_outputs(MODEL, rounded, make_mesh("data:1"), PROMPTS, "right")["logits"]
    return found


@pytest.mark.parametrize(
    "mesh", ["tensor:2", "tensor:4", "tensor:8", "fsdp:2", "data:2,fsdp:2,tensor:2"]
)
def test_meshes_agree(mesh, params, wanted):
    """Of w8a8 each device rounds its own part of what it sums over, so results move by such a step."""
    mesh = make_mesh(mesh)
    placed = jax.tree.map(jax.device_put, params, MODEL.shardings(mesh))
    for scheme, bound in (("int8", 1e-5), ("w8a8", 0.05)):
        got = our_outputs(MODEL, quantize(placed, MODEL, mesh, scheme), mesh, PROMPTS, "right")["logits"]
        assert relative(got, wanted[scheme]) < bound


@pytest.mark.parametrize(
    ("mesh", "scheme"),
    [
        ("", "int8"),
        pytest.param("", "w8a8", marks=pytest.mark.slow),
        pytest.param("data:2,tensor:2", "int8", marks=pytest.mark.slow),
    ],
)
def test_llm_and_engine_say_the_same(mesh, scheme, params):
    """With w8a8 a number may be rounded otherwise, by the last bit of what came before."""
    mesh = make_mesh(mesh)
    placed = jax.tree.map(jax.device_put, params, MODEL.shardings(mesh))
    llm = LLM.from_params(MODEL, quantize(placed, MODEL, mesh, scheme), None, mesh=mesh)
    asked, bound = dataclasses.replace(GREEDY, logprobs=0), {"int8": 1e-4, "w8a8": 0.05}[scheme]
    served = Engine(llm, EngineConfig(**SIZES)).generate(PROMPTS, asked)
    scores = llm.score([[*output.prompt_ids, *output.token_ids] for output in served])
    for ours, wanted in zip(served, scores, strict=True):
        np.testing.assert_allclose(ours.logprobs, wanted[-len(ours.token_ids) :], atol=bound)
    if scheme == "int8":
        assert [o.token_ids for o in llm.generate(PROMPTS, asked)] == [o.token_ids for o in served]


@pytest.mark.slow
def test_adapters_over_rounded_weights(params):
    """An engine's adapter changes the rounded model by what it changes the whole one by."""
    lora = LoraModel(MODEL, LoraConfig(rank=4, alpha=8.0, targets=("attn/", "mlp/")))
    adapters = flatten(lora.init(params, make_mesh(""), jax.random.key(1)))
    rng = np.random.default_rng(0)
    drawn = {p: rng.normal(0, 0.3, x.shape).astype(np.float32) for p, x in adapters.items()}
    adapters = unflatten(drawn)
    rounded = quantize(params, MODEL, make_mesh(""))
    with pytest.raises(ValueError, match="params have layers/attn/wk.* in int8: merge, then quantize"):
        lora.merge(adapters, rounded)

    # By hand: the weights that the rounded ones stand for, in float32, with the adapter merged.
    flat = flatten(params)
    for path, leaf in flatten(rounded, is_leaf=lambda x: not isinstance(x, dict)).items():
        if hasattr(leaf, "q"):
            flat[path] = (leaf.q.astype(np.float32) * leaf.scale[..., None]).reshape(flat[path].shape)
    merged = LLM.from_params(MODEL, lora.merge(adapters, unflatten(flat)), None)
    engine = Engine(
        LLM.from_params(MODEL, rounded, None), EngineConfig(**SIZES, adapters=2, adapter_rank=4)
    )
    engine.load_adapter("poet", lora.change(adapters))
    asked = dataclasses.replace(GREEDY, logprobs=0)
    for prompt, theirs in zip(PROMPTS, merged.generate(PROMPTS, asked), strict=True):
        (ours,) = engine.generate([prompt], asked, adapter="poet")
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def demo():
    return LLM(weights="int8")


def test_the_demo_model_in_int8(demo):
    """It says nearly what it says in float32, in a quarter of the memory."""
    floats = LLM()
    assert num_bytes(demo.params["layers"]) < 0.27 * num_bytes(floats.params["layers"])
    found = agreement(
        demo_model(),
        ["我喜欢编程。", "I like coffee, but I do not drink it at night."],
        make_mesh(""),
        "int8",
    )
    assert found.perplexity and found.float_perplexity
    assert found.mean_kl < 5e-3 and found.top1_agreement > 0.9
    assert abs(found.perplexity / found.float_perplexity - 1) < 0.05


def test_weights_by_name(demo):
    assert LLM(weights="bfloat16").params["norm"]["scale"].dtype == "bfloat16"
    assert demo.params["norm"]["scale"].dtype == "float32"
    with pytest.raises(ValueError, match="weights='int4': expected one of"):
        LLM(weights="int4")


def test_a_classifier_in_int8(tmp_path):
    words = [f"w{i}" for i in range(tiny.VOCAB - 4)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]) + "\n")
    tiny.ALL["bert classifier"].save(tmp_path)
    asked = ["w3 w5 w8", "w1", "w40 w41 " * 9]
    found = {}
    for weights in ("", "int8", "w8a8"):
        classifier = TextClassifier.load(tmp_path, make_mesh(""), weights=weights)
        found[weights] = np.array([list(r.probs.values()) for r in classifier.classify(asked)])
    assert 0 < np.abs(found["int8"] - found[""]).max() < 0.02
    assert 0 < np.abs(found["w8a8"] - found[""]).max() < 0.04


@pytest.mark.slow
def test_scripts(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(script, *arguments):
        command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout

    asked = ("--prompt=我喜欢编程。", "--max_new_tokens=8", "--temperature=0")
    said = json.loads(run("generate.py", *asked, "--weights=int8", "--json"))
    llm = LLM(weights="int8")
    (wanted,) = llm.generate(["我喜欢编程。"], SamplingParams(max_new_tokens=8, temperature=0))
    assert said["token_ids"] == wanted.token_ids
    (tmp_path / "texts.txt").write_text("我喜欢编程。\n\nThe weather is fine.\n", encoding="utf-8")
    flags = (f"--model={demo_model()}", f"--prompt_file={tmp_path}/texts.txt", "--json")
    found = json.loads(run("verify.py", *flags, "--weights=w8a8"))
    assert found["weights"] == "w8a8" and found["top1_agreement"] > 0.8 and found["mean_kl"] < 0.05
    assert found["megabytes"] < found["float_megabytes"]
