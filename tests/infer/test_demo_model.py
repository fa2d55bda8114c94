"""The bundled demo model: small enough, readable by transformers, able to go on in both languages."""

import math

import numpy as np
import pytest

from llm_jax import LLM, SamplingParams
from llm_jax.infer.llm import DEMO_MODEL

MAX_BYTES = 8_000_000
PROMPTS = ("我喜欢编程。", "今天天气很好，", "妈妈", "I like", "The weather is")
# Of configs/data/demo_lm, so that it has trained on them: what is tested is that it learnt.
KNOWN = (
    "我喜欢编程。写代码的时候，时间过得很快。",
    "冰箱里还有半个蛋糕，是留给弟弟的。",
    "I like coffee, but I do not drink it at night.",
    "We waited a long time, and at last the bus came.",
)


@pytest.fixture(scope="module")
def llm():
    return LLM()


def is_chinese(character):
    return "\u4e00" <= character <= "\u9fff"


def test_size_and_files():
    files = {path.name: path.stat().st_size for path in DEMO_MODEL.rglob("*") if path.is_file()}
    assert sum(files.values()) <= MAX_BYTES
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert "README.md" in files


def test_it_continues_the_documents_sentence(llm):
    sampling = SamplingParams(max_new_tokens=40, temperature=0)
    (output,) = llm.generate(["我喜欢编程。"], sampling)
    assert "\ufffd" not in output.text
    visible = [c for c in output.text if not c.isspace()]
    assert len(visible) >= 4
    assert sum(map(is_chinese, visible)) > len(visible) / 2


@pytest.mark.parametrize("prompt", PROMPTS)
def test_sampled_text_has_no_broken_characters(llm, prompt):
    sampling = SamplingParams(max_new_tokens=24, temperature=0.8, n=4, seed=0)
    outputs = llm.generate([prompt], sampling)
    assert sum("\ufffd" in output.text for output in outputs) <= 1
    assert any(output.text.strip() for output in outputs)


def test_known_sentences_are_far_likelier_than_chance(llm):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    losses = []
    for sentence in KNOWN:
        ids = torch.tensor([[*llm.tokenizer.encode(sentence), llm.tokenizer.eos_id]])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    assert np.mean(losses) < 0.6 * math.log(llm.model.config.vocab_size)


def test_tokenizer_is_the_one_transformers_reads(llm):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    for text in (*PROMPTS, *KNOWN, "𠮷野家 😀 naïve 123"):
        assert llm.tokenizer.encode(text) == theirs(text).input_ids
        assert llm.tokenizer.decode(llm.tokenizer.encode(text)) == text
    assert llm.tokenizer.encode("我")[0] == llm.tokenizer.bos_id  # as every training document began


def test_greedy_tokens_equal_transformers(llm):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    ours = llm.generate(list(PROMPTS), SamplingParams(max_new_tokens=24, temperature=0))
    for prompt, output in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([llm.tokenizer.encode(prompt)])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            theirs = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
        assert theirs[0, ids.shape[1] :].tolist() == output.token_ids, prompt
