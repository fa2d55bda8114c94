"""Beam search against transformers' own: the same token ids and scores, for every rule of the search."""

import functools
import itertools
import tempfile

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llm_jax import LLM, SamplingParams  # noqa: E402
from llm_jax.cache import init_cache  # noqa: E402
from llm_jax.checkpoint.hf import load_config, load_generation_config, load_hf  # noqa: E402
from llm_jax.data.tokenizer import ByteTokenizer  # noqa: E402
from llm_jax.models import describe  # noqa: E402
from llm_jax.sharding import make_mesh  # noqa: E402
from tests import tiny  # noqa: E402

NEW = 12  # tokens
PROMPTS = [[5, 60, 33, 7, 18], [41], [9, 9, 70, 3, 77, 12, 50, 21, 64]]
END = (57, 25, 84, 49, 11, 37)  # ids that these models choose now and then; see test_ends_are_met
PENALTIES = (1.0, 0.0, 2.5, -1.0)
SCORE_TOLERANCE = 1e-4  # from the issue; measured differences are near 1e-6


@pytest.fixture(scope="module", autouse=True)
def small_programs():
    """Compile fast, and keep torch from waiting for threads that tiny products do not need."""
    threads, optimize = torch.get_num_threads(), jax.config.read("jax_disable_most_optimizations")
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", optimize)
    torch.set_num_threads(threads)


@functools.cache
def models(name: str, mesh: str = "data:1"):
    """The same weights as (an LLM without tokenizer, a transformers model)."""
    with tempfile.TemporaryDirectory() as directory:
        theirs = tiny.DECODERS[name].save(directory)
        model, made = describe(load_config(directory)), make_mesh(mesh)
        return LLM.from_params(model, load_hf(directory, model, made), None, mesh=made), theirs


def reference(model, prompts, *, num_beams, num_return, stop_ids, **options):
    """(ids, score) of each hypothesis from transformers, which is told every setting."""
    options = {"max_new_tokens": NEW} | options
    options |= {"do_sample": False, "num_beams": num_beams, "num_return_sequences": num_return}
    options |= {"eos_token_id": list(stop_ids) or None, "pad_token_id": 0}
    return search(model, prompts, stop_ids, **options)


def search(model, prompts, stop_ids, **options):
    """(ids, score) of each hypothesis from transformers: one batch, padded on the left."""
    size = max(map(len, prompts))
    tokens = torch.tensor([[0] * (size - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (size - len(p)) + [1] * len(p) for p in prompts])
    options |= {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(tokens, attention_mask=mask, **options)
    sequences = out.sequences[:, size:].tolist()
    return [until(ids, stop_ids) for ids in sequences], out.sequences_scores.tolist()


def until(ids: list[int], stop_ids) -> list[int]:
    """ids up to and including the first stop id."""
    ends = [i + 1 for i, token in enumerate(ids) if token in stop_ids]
    return ids[: min(ends, default=len(ids))]


def check(outputs, expected) -> None:
    ids, scores = expected
    assert [o.token_ids for o in outputs] == ids
    np.testing.assert_allclose([o.score for o in outputs], scores, rtol=0, atol=SCORE_TOLERANCE)


def greedy(**options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_new_tokens": NEW} | options)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_same_as_transformers(early_stopping):
    ours, theirs = models("llama")
    options = {"early_stopping": early_stopping, "num_beams": 3, "num_return": 3}
    for length_penalty in PENALTIES:
        options["length_penalty"] = length_penalty
        outputs = ours.beam_search(PROMPTS, greedy(stop_ids=END), **options)
        check(outputs, reference(theirs, PROMPTS, stop_ids=END, **options))


@pytest.mark.parametrize(
    "early_stopping, length_penalty, changes",
    [
        (True, 2.5, {}),
        ("never", -1.0, {}),
        (True, 2.5, {"early_stopping": False, "length_penalty": 0.0}),
    ],
)
def test_generation_config_decides(early_stopping, length_penalty, changes, tmp_path, monkeypatch):
    """What a saved model asks for, but for what is given."""
    ours, theirs = models("llama")
    wanted = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": NEW,
        "eos_token_id": list(END),
    }
    wanted |= {"early_stopping": early_stopping, "length_penalty": length_penalty, "pad_token_id": 0}
    theirs.config.save_pretrained(tmp_path)
    transformers.GenerationConfig(**wanted).save_pretrained(tmp_path)
    monkeypatch.setattr(ours, "generation_config", load_generation_config(tmp_path))
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    expected = search(theirs, PROMPTS, END, generation_config=settings, **changes)
    check(ours.beam_search(PROMPTS, **changes), expected)


def test_generate_says_that_it_does_not_search(monkeypatch, caplog):
    ours, _ = models("llama")
    monkeypatch.setattr(ours, "generation_config", {"num_beams": 3, "max_new_tokens": 2})
    ours.generate(PROMPTS[:1])
    assert "num_beams=3, which was not used here: call beam_search" in caplog.text
    caplog.clear()
    ours.generate(PROMPTS[:1], ours.default_sampling())
    assert not caplog.text


@pytest.mark.parametrize("num_beams, num_return, stop_ids", [(2, 1, ()), (4, 2, (49,)), (6, 6, END)])
def test_widths_and_ends(num_beams, num_return, stop_ids):
    ours, theirs = models("gpt2")
    options = {"num_beams": num_beams, "num_return": num_return}
    outputs = ours.beam_search(PROMPTS, greedy(stop_ids=stop_ids), **options)
    check(outputs, reference(theirs, PROMPTS, stop_ids=stop_ids, **options))


def test_ends_are_met():
    """The cases above prove something: texts end at several lengths, and every rule has its effect."""
    ours, _ = models("llama")
    found = {}
    for rule in itertools.product([False, True, "never"], PENALTIES):
        options = dict(zip(("early_stopping", "length_penalty"), rule, strict=True))
        outputs = ours.beam_search(PROMPTS, greedy(stop_ids=END), num_beams=3, num_return=3, **options)
        found[rule] = tuple(tuple(o.token_ids) for o in outputs)
        assert all((o.token_ids[-1] in END) == (o.finish_reason == "stop") for o in outputs)
    assert len({len(ids) for ids in found[False, 1.0]}) >= 3
    assert len({found[early, 1.0] for early in (False, True, "never")}) >= 2
    assert len({found[False, penalty] for penalty in PENALTIES}) >= 3


def test_window_layers():
    """Layers that keep a ring of keys are reordered like the others."""
    ours, theirs = models("gemma3")
    options = {"num_beams": 3, "num_return": 2}
    outputs = ours.beam_search(PROMPTS, greedy(stop_ids=END), **options)
    check(outputs, reference(theirs, PROMPTS, stop_ids=END, **options))


BIAS = {11: 1.5, 60: -2.0}
BAN = {token: -np.inf for token in range(tiny.VOCAB) if token != 8}
MIXED = {  # requests of one batch, one for each prompt
    "few tokens": greedy(max_new_tokens=4, stop_ids=END[:2]),
    "repetition": greedy(repetition_penalty=1.3, min_new_tokens=6, stop_ids=END),
    "bias": greedy(logit_bias=BIAS),
    "presence": greedy(presence_penalty=0.5, frequency_penalty=0.2, logprobs=0),
    "ban": greedy(logit_bias=BAN),
}


@functools.cache
def mixed():
    """Outputs of each of `MIXED` from one batch, and the prompt of each."""
    prompts = dict(zip(MIXED, [*PROMPTS, [8, 60], [5]], strict=True))
    options = {"num_beams": 3, "num_return": 2}
    outputs = models("llama")[0].beam_search(list(prompts.values()), list(MIXED.values()), **options)
    return {n: [o for o in outputs if o.prompt_ids == p] for n, p in prompts.items()}, prompts


@pytest.mark.parametrize(
    "name, options",
    [
        ("few tokens", {"max_new_tokens": 4, "stop_ids": END[:2]}),
        ("repetition", {"repetition_penalty": 1.3, "min_new_tokens": 6, "stop_ids": END}),
        ("bias", {"sequence_bias": {(token,): value for token, value in BIAS.items()}}),
    ],
)
def test_mixed_requests(name, options):
    """Each prompt of a batch has its own limits, penalties and bias: transformers alone agrees."""
    outputs, prompts = mixed()
    options = {"stop_ids": (), "num_beams": 3, "num_return": 2} | options
    check(outputs[name], reference(models("llama")[1], [prompts[name]], **options))


def test_presence_and_frequency_follow_their_beam():
    """Transformers has neither: the score is worked out from each token's own log-probability."""
    for output in mixed()[0]["presence"]:
        total = sum(output.logprobs)
        for i, token in enumerate(output.token_ids):
            before = output.token_ids[:i].count(token)
            total -= 0.5 * (before > 0) + 0.2 * before
        assert abs(output.score - total / len(output.token_ids)) < SCORE_TOLERANCE


def test_banned_tokens_leave_fewer_hypotheses():
    """With a single token allowed there is one continuation, however wide the search."""
    assert [o.token_ids for o in mixed()[0]["ban"]] == [[8] * NEW]


def test_text(monkeypatch):
    ours, tokenizer = models("llama")[0], ByteTokenizer()
    monkeypatch.setattr(ours, "tokenizer", tokenizer)
    request = greedy(stop_ids=END, ignore_eos=True)
    outputs = ours.beam_search(["MAP", "A", "1 + 2"], request, num_beams=3)
    assert [o.prompt for o in outputs] == ["MAP", "A", "1 + 2"]
    for o in outputs:
        shown = o.token_ids[:-1] if o.finish_reason == "stop" else o.token_ids
        assert o.text == tokenizer.decode(shown)


@pytest.mark.parametrize("early_stopping", [False, "never"])
def test_one_beam_is_greedy(early_stopping):
    ours, _ = models("llama")
    request = greedy(stop_ids=END, logprobs=0)
    expected = ours.generate(PROMPTS, request)
    outputs = ours.beam_search(PROMPTS, request, num_beams=1, early_stopping=early_stopping)
    for ours_, greedy_ in zip(outputs, expected, strict=True):
        assert ours_.token_ids == greedy_.token_ids
        assert ours_.finish_reason == greedy_.finish_reason
        np.testing.assert_allclose(ours_.logprobs, greedy_.logprobs, atol=1e-5)
        np.testing.assert_allclose(ours_.score, np.mean(greedy_.logprobs), atol=1e-5)


@pytest.mark.parametrize("mesh", ["data:2,tensor:4", "data:2,fsdp:4"])
def test_sharded(mesh):
    """More tensor shards than kv heads, and more data shards than prompts."""
    ours, theirs = models("llama", mesh)
    options = {"num_beams": 3, "num_return": 3}
    outputs = ours.beam_search(PROMPTS, greedy(stop_ids=END, repetition_penalty=1.2), **options)
    check(outputs, reference(theirs, PROMPTS, stop_ids=END, repetition_penalty=1.2, **options))


def test_reordering_stays_on_its_shard():
    ours, _ = models("llama", "data:2,fsdp:4")
    cache = init_cache(ours.model.config, 24, 64, ours.mesh)
    with jax.set_mesh(ours.mesh):
        move = jax.jit(lambda cache, parents: cache.take_within(parents))
        program = move.lower(cache, np.zeros((8, 3), np.int32)).compile()
    text = program.as_text()
    assert not [op for op in ("all-gather", "all-reduce", "all-to-all") if f"{op}(" in text]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 0}, "num_beams=0: expected an integer of at least 1"),
        ({"num_beams": "4"}, "num_beams='4': expected an integer of at least 1"),
        ({"num_return": 4}, "num_return=4: expected 1 to num_beams=3"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"early_stopping": "always"}, "early_stopping='always': expected True, False or 'never'"),
        ({"sampling": greedy(temperature=0.7)}, "temperature is 0.7: beam search does not sample"),
        ({"sampling": greedy(top_k=5)}, "top_k is 5: beam search does not sample"),
        ({"sampling": greedy(top_p=0.9)}, "top_p is 0.9: beam search does not sample"),
        ({"sampling": greedy(min_p=0.1)}, "min_p is 0.1: beam search does not sample"),
        ({"sampling": greedy(n=2)}, "n is 2: beam search does not sample; use num_return"),
        ({"sampling": greedy(stop=("x",))}, "use stop_ids"),
        ({"sampling": greedy(logprobs=2)}, "logprobs is 2"),
        ({"prompts": "text"}, "expected a list of prompts"),
        ({"prompts": [[5], []]}, "prompt 1 has no tokens"),
    ],
)
def test_refusals(options, message):
    arguments = {"prompts": PROMPTS, "sampling": greedy(), "num_beams": 3} | options
    with pytest.raises(ValueError, match=message):
        models("llama")[0].beam_search(**arguments)
