"""Command-line flags for how text is chosen: two tables, read into `SamplingParams` and `BeamOptions`.

    sampling_flags.define()                          # beside a script's other flags
    request, search = sampling_flags.requested(llm)  # in its main

A flag without a default takes what the model's generation_config.json says.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from absl import flags

from llm_jax.infer.beam_options import BeamOptions
from llm_jax.infer.llm import LLM
from llm_jax.ops.sampling_params import SamplingParams, StructuredSpec

flags.disclaim_key_flags()  # they belong to the script that calls `define`, so that its --help has them


class _Converter(flags.ArgumentParser):
    """An absl parser from a function; its failure is a usage error that says what was expected."""

    def __init__(self, convert: Callable[[str], Any], expected: str):
        self.convert, self.expected = convert, expected
        self.syntactic_help = expected

    def parse(self, argument: str) -> Any:
        try:
            return self.convert(argument)
        except (KeyError, ValueError):
            raise ValueError(f"expected {self.expected}") from None


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(",")) if text else ()


def _pairs(text: str) -> tuple[tuple[int, float], ...]:
    pairs = [pair.split(":") for pair in text.split(",")] if text else []
    return tuple((int(id_), float(value)) for id_, value in pairs)


def _structured(text: str) -> StructuredSpec:
    kind, _, form = text.partition(":")
    return StructuredSpec(kind, form)  # pyright: ignore[reportArgumentType]


def _early_stopping(text: str) -> bool | str:
    return {"true": True, "false": False, "never": "never"}[text.lower()]


_IDS = _Converter(_ids, "token ids, as in 2,57")
_PAIRS = _Converter(_pairs, "ID:VALUE pairs, as in 42:-1.5,7:2")
_STRUCTURED = _Converter(_structured, "KIND:TEXT, as in regex:[0-9]+, of json, regex, choice or ebnf")
_EARLY = _Converter(_early_stopping, "true, false or never")


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One flag: its name is that of a field, but `n` and `num_return` are num_return_sequences."""

    name: str
    define: Callable
    help: str
    default: Any = None


_at_least_1 = functools.partial(flags.DEFINE_integer, lower_bound=1)
_SAMPLING = (
    _Flag("max_new_tokens", flags.DEFINE_integer, "Most tokens to add."),
    _Flag("min_new_tokens", flags.DEFINE_integer, "Fewest tokens before an end id."),
    _Flag("temperature", flags.DEFINE_float, "0 = greedy."),
    _Flag("top_k", flags.DEFINE_integer, "Keep the k likeliest tokens; 0 = all."),
    _Flag("top_p", flags.DEFINE_float, "Keep the smallest set of this probability."),
    _Flag("min_p", flags.DEFINE_float, "Keep tokens this likely, relative to the likeliest."),
    _Flag("typical_p", flags.DEFINE_float, "Keep the least surprising set of this probability."),
    _Flag("repetition_penalty", flags.DEFINE_float, "1 = none."),
    _Flag("presence_penalty", flags.DEFINE_float, "0 = none."),
    _Flag("frequency_penalty", flags.DEFINE_float, "0 = none."),
    _Flag("logit_bias", functools.partial(flags.DEFINE, _PAIRS), "Added to the logits of these ids."),
    _Flag("banned_ids", functools.partial(flags.DEFINE, _IDS), "Never emit these."),
    _Flag("allowed_ids", functools.partial(flags.DEFINE, _IDS), "Emit only these."),
    _Flag("seed", flags.DEFINE_integer, "Same seed, same tokens.", 0),
    _Flag("stop_ids", functools.partial(flags.DEFINE, _IDS), "Stop after one of these."),
    _Flag("stop", flags.DEFINE_multi_string, "Stop before this text; may be repeated."),
    _Flag("ignore_eos", flags.DEFINE_bool, "Go on after the end of text.", False),
    _Flag("num_return_sequences", _at_least_1, "Continuations of each prompt."),
    _Flag("best_of", _at_least_1, "Draw so many, return the likeliest."),
    _Flag("logprobs", flags.DEFINE_integer, "Alternatives per token to report log probabilities of."),
    _Flag("prompt_logprobs", flags.DEFINE_integer, "Likewise, of the prompt's tokens."),
    _Flag("structured", functools.partial(flags.DEFINE, _STRUCTURED), "KIND:TEXT, a form to follow."),
)
_SEARCH = (
    _Flag("num_beams", _at_least_1, "Beam search with K beams; 1 = no search."),
    _Flag("length_penalty", flags.DEFINE_float, "Beam search: exponent of the length."),
    _Flag("early_stopping", functools.partial(flags.DEFINE, _EARLY), "Beam search: end at K texts."),
)


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define a flag for each field of `SamplingParams` and `BeamOptions`."""
    for flag in (*_SAMPLING, *_SEARCH):
        flag.define(flag.name, flag.default, flag.help, flag_values=values)


def requested(
    llm: LLM, values: flags.FlagValues = flags.FLAGS, *, logprobs: int | None = None
) -> tuple[SamplingParams, BeamOptions | None]:
    """What the flags ask for, over the model's own defaults; no search where one beam is wanted.

    logprobs: where --logprobs is not given. Raises ValueError naming the field that is out of range.
    """
    sampling, search = ({f.name: values[f.name].value for f in table} for table in (_SAMPLING, _SEARCH))
    count = sampling.pop("num_return_sequences")
    if sampling["logprobs"] is None:
        sampling["logprobs"] = logprobs
    if (search["num_beams"] or llm.generation_config.get("num_beams", 1)) == 1:
        return llm.default_sampling(**sampling, n=count), None
    return llm.default_sampling(**sampling, n=1), llm.default_search(**search, num_return=count)
