"""What a request may ask of sampling: `SamplingParams`, checked when made. Host only, no arrays.

`ops/sampling.py` turns requests into arrays and chooses the tokens.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

# A temperature below this could only choose among logits that float32 hardly tells apart (logits of
# about 10 are 1e-6 apart), and dividing by it nears overflow: such a request is greedy.
MIN_TEMPERATURE = 1e-6

MAX_STOPS = 16  # ids that end a row, in a table for rows yet unknown; see sampling.new_rows

_FLOAT32 = np.finfo(np.float32)
_INT32_MAX = np.iinfo(np.int32).max

StructuredKind = Literal["json", "regex", "choice", "ebnf"]


@dataclasses.dataclass(frozen=True)
class StructuredSpec:
    """The form that a text must have. `engine/structured.py` compiles it and says what is malformed.

    Attributes:
        kind: what `text` is: "json" (a JSON Schema; {} is any JSON), "regex" (of the whole, in Rust's
            syntax), "choice" (a JSON list of strings), "ebnf" (a grammar as Lark or llama.cpp has it).
        text: the schema, expression, list or grammar.
    """

    kind: StructuredKind
    text: str

    def __post_init__(self):
        kinds = get_args(StructuredKind)
        if self.kind not in kinds:
            raise ValueError(f"StructuredSpec.kind is {self.kind!r}: expected one of {', '.join(kinds)}")
        if not isinstance(self.text, str) or not self.text:
            raise ValueError(f"StructuredSpec.text is {self.text!r}: expected a non-empty string")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens chosen. Host only; validated when made.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        min_new_tokens: stop ids are forbidden until this many tokens were generated.
        temperature: divides the logits; 0 (or less than `MIN_TEMPERATURE`) is greedy.
        top_k: keep the k likeliest tokens; 0 is off.
        top_p: keep the smallest set of likeliest tokens that holds this mass; 1 is off.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 is off.
        typical_p: keep the smallest set of tokens whose surprisal is nearest to the entropy that holds
            this mass (locally typical sampling, arXiv:2202.00666); 1 is off.
        repetition_penalty: CTRL's penalty (arXiv:1909.05858) on every token of the prompt and of
            the text so far: positive logits are divided by it, negative ones multiplied; 1 is off.
        presence_penalty: subtracted once from the logit of each token generated so far.
        frequency_penalty: subtracted once per time the token was generated so far.
        logit_bias: (id, value) pairs, or a mapping, added to the logits; -inf bans a token.
        banned_ids: token ids that are never emitted, end ids included.
        allowed_ids: the only token ids that may be emitted, so an end id must be among them for the
            text to end before its limit; None is all.
        seed: same seed, same tokens, whatever the batch; None takes the batch's default seed.
        stop_ids: token ids that end the text, beside the model's own.
        stop: strings that end the text.
        ignore_eos: do not end at the model's own end-of-text ids.
        n: number of independent samples of the prompt.
        best_of: draw this many samples, return the n whose tokens have the highest sum of log
            probabilities under the model, best first; None draws n.
        logprobs: None for none, 0 for the chosen token's, k for the k likeliest as well.
        prompt_logprobs: likewise, of the prompt's own tokens.
        structured: the form that the text must have; None is any.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    banned_ids: tuple[int, ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredSpec | None = None

    def __post_init__(self):
        _check_int("max_new_tokens", self.max_new_tokens, 1, _INT32_MAX)
        _check_int("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        _check_real("temperature", self.temperature, 0, remedy="use 0 for greedy")
        _check_int("top_k", self.top_k, 0, _INT32_MAX, remedy="use 0 to switch it off")
        _check_real("top_p", self.top_p, 0, 1, remedy="use 1 to switch it off")
        _check_real("min_p", self.min_p, 0, 1, remedy="use 0 to switch it off")
        _check_real("typical_p", self.typical_p, 0, 1, remedy="use 1 to switch it off")
        _check_real("repetition_penalty", self.repetition_penalty, remedy="use 1 to switch it off")
        if self.repetition_penalty < _FLOAT32.tiny:
            raise _refusal("repetition_penalty", self.repetition_penalty, "more than 0", "1 is off")
        _check_real("presence_penalty", self.presence_penalty, remedy="use 0 to switch it off")
        _check_real("frequency_penalty", self.frequency_penalty, remedy="use 0 to switch it off")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        if self.seed is not None:
            _check_int("seed", self.seed, 0, remedy="use None for the default")
        self._check_ids()
        object.__setattr__(self, "stop", _tuple_of("stop", self.stop))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise _refusal("stop", text, "non-empty strings", "pass ids in stop_ids")
        if not isinstance(self.ignore_eos, bool):
            raise _refusal("ignore_eos", self.ignore_eos, "True or False", "")
        _check_int("n", self.n, 1)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, self.n, remedy="use None to draw n samples")
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                _check_int(field, getattr(self, field), 0, remedy="use None for none")
        if self.structured is not None and not isinstance(self.structured, StructuredSpec):
            raise _refusal("structured", self.structured, "a StructuredSpec or None", "")

    def _check_ids(self):
        for field in ("stop_ids", "banned_ids", "allowed_ids"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, _tuple_of(field, getattr(self, field)))
                for token in getattr(self, field):
                    _check_int(field, token, 0)
        if self.allowed_ids is not None and not set(self.allowed_ids) - set(self.banned_ids):
            raise _refusal("allowed_ids", self.allowed_ids, "an id outside banned_ids", "None is all")

    @property
    def greedy(self) -> bool:
        """Whether every token is the argmax of the processed logits."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def penalized(self) -> bool:
        """Whether any penalty on earlier tokens is in force."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties)

    @property
    def filtered(self) -> bool:
        """Whether the draw is restricted to some of the tokens."""
        filters = (self.top_k > 0, self.top_p < 1, self.min_p > 0, self.typical_p < 1)
        return not self.greedy and any(filters)

    @property
    def masked(self) -> bool:
        """Whether some tokens may never, or not now, be emitted."""
        return bool(self.banned_ids) or self.allowed_ids is not None or self.structured is not None

    def candidates(self) -> "SamplingParams":
        """The request that draws what `best_of` chooses from: so many samples, with logprobs."""
        if self.best_of is None:
            return self
        return dataclasses.replace(self, n=self.best_of, best_of=None, logprobs=self.logprobs or 0)


def _refusal(field: str, value: object, expected: str, remedy: str) -> ValueError:
    advice = f"; {remedy}" if remedy else ""
    return ValueError(f"SamplingParams.{field} is {value!r}: expected {expected}{advice}")


def _range_text(low: float | None, high: float | None) -> str:
    at_least = "" if low is None else f" of at least {low}"
    at_most = "" if high is None else f" and at most {high}"
    return at_least + at_most


def _check_int(field: str, value: Any, low: int, high: int | None = None, remedy: str = ""):
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or value < low or (high is not None and value > high):
        raise _refusal(field, value, "an integer" + _range_text(low, high), remedy)


def _check_real(
    field: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    remedy: str = "",
):
    is_real = isinstance(value, int | float | np.integer | np.floating)
    is_finite = is_real and abs(value) <= float(_FLOAT32.max)  # false for NaN too
    is_finite = is_finite and not isinstance(value, bool)
    if not is_finite or (low is not None and value < low) or (high is not None and value > high):
        raise _refusal(field, value, "a finite number" + _range_text(low, high), remedy)


def _tuple_of(field: str, value: object) -> tuple:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _refusal(field, value, "a sequence", "put a single one in a tuple")
    return tuple(value)


def _bias_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    """A mapping or a sequence of pairs as a tuple of (id, value) pairs, checked."""
    pairs = tuple(bias.items()) if isinstance(bias, Mapping) else _tuple_of("logit_bias", bias)
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise _refusal("logit_bias", pair, "(id, value) pairs", "")
        token, value = pair
        _check_int("logit_bias", token, 0)
        if value != -math.inf:
            _check_real("logit_bias", value, remedy="use -inf to ban a token")
    ids = [token for token, _ in pairs]
    if len(set(ids)) < len(ids):
        raise _refusal("logit_bias", pairs, "each id once", "add up the values of a repeated id")
    return tuple((int(token), float(value)) for token, value in pairs)
