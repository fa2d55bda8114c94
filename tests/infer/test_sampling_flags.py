"""Flags over generation_config.json: what is given decides, and is told what was expected of it."""

import dataclasses

import pytest
from absl import flags

from llm_jax import LLM, SamplingParams
from llm_jax.infer import sampling_flags
from llm_jax.infer.beam import BeamOptions
from llm_jax.ops.sampling_params import StructuredSpec

BEAMS = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True, "num_return_sequences": 2}
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}


def requested(config, *arguments, **options):
    """What a model with this generation_config.json, and no weights, is asked for."""
    values = flags.FlagValues()
    sampling_flags.define(values)
    values(["generate.py", *arguments])
    llm = LLM.__new__(LLM)
    llm.generation_config = config
    return sampling_flags.requested(llm, values, **options)


def test_every_field_has_a_flag():
    values = flags.FlagValues()
    sampling_flags.define(values)
    fields = {f.name for cls in (SamplingParams, BeamOptions) for f in dataclasses.fields(cls)}
    assert fields - set(values) == {"n", "num_return"}  # --num_return_sequences is both


def test_every_flag_reaches_its_field():
    arguments = """
        --temperature=0.5 --top_k=7 --top_p=0.8 --min_p=0.1 --logit_bias=42:-1.5,7:-inf --seed=3
        --repetition_penalty=1.1 --presence_penalty=0.2 --frequency_penalty=0.3
        --stop_ids=5,6 --stop=a,b --stop=c --ignore_eos
        --max_new_tokens=9 --min_new_tokens=2 --num_return_sequences=2 --logprobs=4
        --typical_p=0.7 --banned_ids=1,2 --allowed_ids=3,4 --best_of=5 --prompt_logprobs=6
        --structured=regex:a:b
    """
    request, search = requested(SAMPLED | {"max_new_tokens": 5}, *arguments.split())
    bias = ((42, -1.5), (7, -float("inf")))
    choice = {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "logit_bias": bias, "seed": 3}
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    ends = {"stop_ids": (5, 6), "stop": ("a,b", "c"), "ignore_eos": True}
    limits = {"max_new_tokens": 9, "min_new_tokens": 2, "n": 2, "logprobs": 4}
    choice |= {"typical_p": 0.7, "banned_ids": (1, 2), "allowed_ids": (3, 4)}
    limits |= {"best_of": 5, "prompt_logprobs": 6, "structured": StructuredSpec("regex", "a:b")}
    assert request == SamplingParams(**choice, **penalties, **ends, **limits)
    assert search is None


@pytest.mark.parametrize(
    "config, arguments, expected",
    [
        ({}, [], {"temperature": 0.0}),
        (SAMPLED, [], {"temperature": 0.6, "top_k": 20, "top_p": 0.9}),
        (
            SAMPLED | {"typical_p": 0.5},
            [],
            {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "typical_p": 0.5},
        ),
        (SAMPLED, ["--top_k=0"], {"temperature": 0.6, "top_p": 0.9}),
        (SAMPLED, ["--temperature=0"], {"temperature": 0.0}),
        (SAMPLED | {"num_return_sequences": 3}, [], {**SAMPLED, "n": 3}),
        ({"top_p": 0.9, "max_new_tokens": 7}, [], {"temperature": 0.0, "max_new_tokens": 7}),
        (BEAMS, ["--num_beams=1"], {"temperature": 0.0}),
        (BEAMS | SAMPLED, ["--num_beams=1", "--num_return_sequences=1"], SAMPLED),
    ],
)
def test_sampling(config, arguments, expected):
    expected = {name: value for name, value in expected.items() if name != "do_sample"}
    assert requested(config, *arguments) == (SamplingParams(**expected, seed=0), None)


@pytest.mark.parametrize(
    "config, arguments, expected",
    [
        (BEAMS, [], BeamOptions(4, 2, 0.5, True)),
        (BEAMS, ["--num_beams=3", "--early_stopping=never"], BeamOptions(3, 2, 0.5, "never")),
        (BEAMS, ["--early_stopping=False", "--num_return_sequences=1"], BeamOptions(4, 1, 0.5, False)),
        ({}, ["--num_beams=2", "--length_penalty=0"], BeamOptions(2, 1, 0.0)),
        (SAMPLED, ["--num_beams=2", "--temperature=0"], BeamOptions(2)),
    ],
)
def test_search(config, arguments, expected):
    assert requested(config, *arguments) == (SamplingParams(temperature=0, seed=0), expected)


def test_beams_are_not_sampled():
    with pytest.raises(
        ValueError, match=r"num_beams=4 and do_sample=true.*is not supported; set num_beams"
    ):
        requested(BEAMS | SAMPLED)


def test_log_probabilities_where_none_are_asked_for():
    assert requested({}, logprobs=0)[0].logprobs == 0
    assert requested({}, "--logprobs=2", logprobs=0)[0].logprobs == 2


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--logit_bias=5", "ID:VALUE pairs"),
        ("--logit_bias=1:2:3", "ID:VALUE pairs"),
        ("--logit_bias=a:1", "ID:VALUE pairs"),
        ("--stop_ids=3,x", "token ids, as in 2,57"),
        ("--early_stopping=maybe", "true, false or never"),
        ("--structured=json", "KIND:TEXT"),
        ("--structured=xml:<a/>", "KIND:TEXT"),
    ],
)
def test_malformed_flags_say_what_was_expected(argument, expected):
    with pytest.raises(flags.IllegalFlagValueError, match=f"^flag {argument}: expected {expected}"):
        requested({}, argument)
