"""Texts of a given form: which tokens may come next, by the library llguidance.

    grammar = Grammar.compile(spec, tokenizer, end_ids)      # once for each form and tokenizer
    state = grammar.start()                                  # one for each continuation
    state.fill(mask[row]); ...; state.accept(token)          # before and after each step

Everything here is on the host. A mask is a row of uint32 words in which bit t % 32 of word t // 32
allows token t, as `ops.sampling.mask_logits` reads it.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.ops.sampling_params import StructuredSpec

try:
    import llguidance
except ImportError:  # the extra `structured`; `Grammar.compile` says so
    llguidance: Any = None

# Between the parts of a JSON text. Without an end, a model could go on with spaces for ever.
_JSON_SPACE = r"[ \n\r\t]{1,80}"
# Where a JSON Schema holds others: directly, by names of the user's choice, in lists.
_SCHEMAS = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTED_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A form, compiled for the tokens of one tokenizer."""

    end_ids: frozenset[int]
    words: int  # that hold the tokenizer's vocabulary
    _matcher: Any  # llguidance.LLMatcher, at the start of the text

    @classmethod
    def compile(
        cls, spec: StructuredSpec, tokenizer: Tokenizer, end_ids: Sequence[int] | None = None
    ) -> "Grammar":
        """The grammar of a form; the last few hundred are kept.

        end_ids: tokens that may end a text that is complete; None takes the tokenizer's own.

        Raises:
            ImportError: llguidance is not installed.
            ValueError: the form is malformed or asks for what is not supported (it says where), or
                there is no token that could end the text.
        """
        if llguidance is None:
            raise ImportError("structured output needs llguidance; pip install 'llm_jax[structured]'")
        if end_ids is None:
            end_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        if not end_ids:
            raise ValueError("structured output needs a token that ends the text; give end_ids")
        if not 0 <= min(end_ids) <= max(end_ids) < tokenizer.vocab_size:
            raise ValueError(f"end_ids={list(end_ids)}: the tokenizer has {tokenizer.vocab_size} ids")
        return _compile(spec, tokenizer, tuple(end_ids))

    def start(self) -> "GrammarState":
        """A text that has not begun."""
        return GrammarState(self, self._matcher.deep_copy())


class GrammarState:
    """How far one text of a grammar has come."""

    def __init__(self, grammar: Grammar, matcher: Any, ended: bool = False):
        self._grammar, self._matcher = grammar, matcher
        self._ended = ended  # by an end id, of which the matcher is not told

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but an end id could follow."""
        return self._ended or self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    def fill(self, mask: np.ndarray) -> None:
        """Writes which tokens may come next into a row of uint32 words, at least as many as hold the
        tokenizer's vocabulary. When finished these are the end ids.

        Raises:
            ValueError: the grammar needs more work for one token than llguidance allows.
        """
        mask[:] = 0
        if self.finished:
            for token in self._grammar.end_ids:
                mask[token // 32] |= np.uint32(1 << token % 32)
        else:
            words, size = self._matcher.compute_bitmask(), self._grammar.words
            mask[:size] = np.frombuffer(words, np.uint32)[:size]  # which may have a word of no token
        if self._matcher.is_error():
            raise ValueError(f"SamplingParams.structured: {_first_line(self._matcher.get_error())}")

    def accept(self, token: int) -> bool:
        """Goes on by a token, if it is allowed; whether it was."""
        return self.accept_prefix([token]) == 1

    def accept_prefix(self, tokens: Sequence[int]) -> int:
        """Goes on by the longest prefix of the tokens that is allowed; its length."""
        if self._ended:
            return 0
        end = next((i for i, t in enumerate(tokens) if t in self._grammar.end_ids), len(tokens))
        taken = self._matcher.try_consume_tokens(list(tokens[:end]))
        if taken == end < len(tokens) and self._matcher.is_accepting():
            self._ended, taken = True, taken + 1
        return taken

    def rollback(self, count: int) -> None:
        """Goes back to before the last `count` accepted tokens."""
        if self._ended and count:
            self._ended, count = False, count - 1
        if not self._matcher.rollback(count):
            raise ValueError(f"cannot go back by {count} tokens; so many were not accepted")

    def fill_draft(self, masks: np.ndarray, draft: Sequence[int]) -> int:
        """Writes the masks [P, words] of the places of a draft of P - 1 tokens; the state stays.

        Returns the length of the draft's longest allowed prefix. Masks after it are not written: the
        draft must be cut there.
        """
        self.fill(masks[0])
        for place, token in enumerate(draft):
            if not self.accept(token):
                self.rollback(place)
                return place
            self.fill(masks[place + 1])
        self.rollback(len(draft))
        return len(draft)

    def copy(self) -> "GrammarState":
        """The same state, to go on from apart."""
        return GrammarState(self._grammar, self._matcher.deep_copy(), self._ended)


@functools.lru_cache(maxsize=256)
def _compile(spec: StructuredSpec, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> Grammar:
    vocabulary = _vocabulary(tokenizer, end_ids)
    field = f"SamplingParams.structured, {spec.kind}"
    try:
        grammar, where = _READERS[spec.kind](spec.text), ""
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    if problem := _problem(grammar):
        if spec.kind == "json":
            where = f" at {_place(json.loads(spec.text), problem)}"
        raise ValueError(f"{field}{where}: {problem}")
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    if matcher.is_error():  # too large, or it names a token that there is not
        raise ValueError(f"{field}: {_first_line(matcher.get_error())}")
    return Grammar(frozenset(end_ids), -(-tokenizer.vocab_size // 32), matcher)


def _read_json(text: str) -> str:
    schema = json.loads(text)  # its error says where the text is no JSON
    if not isinstance(schema, dict):
        raise ValueError(f"expected a JSON Schema, an object: {text}")
    return _json_grammar(schema)


def _json_grammar(schema: dict) -> str:
    """With bounded spaces, unless the schema itself has settings for llguidance."""
    spaces = None if "x-guidance" in schema else {"whitespace_pattern": _JSON_SPACE}
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=spaces)


def _read_choice(text: str) -> str:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"expected a JSON list of strings, at least one: {text}")
    return llguidance.LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, choices))}")


_READERS: dict[str, Callable[[str], str]] = {
    "json": _read_json,
    "regex": lambda text: llguidance.LLMatcher.grammar_from_regex(text),
    "choice": _read_choice,
    "ebnf": lambda text: llguidance.grammar_from("ebnf", text),
}


def _problem(grammar: str) -> str:
    """What is wrong with a grammar, in llguidance's words; empty when nothing is."""
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    return messages[0].strip() if is_error else ""


def _place(root: dict, problem: str) -> str:
    """The innermost part of a JSON Schema that has this problem, as a JSON pointer."""
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    pointer, schema = "#", root
    while True:
        for name, part in _parts(schema):
            if _problem(_json_grammar(definitions | part)) == problem:
                pointer, schema = f"{pointer}/{name}", part
                break
        else:
            return pointer


def _parts(schema: dict) -> Iterator[tuple[str, dict]]:
    """The schemas directly inside a schema, each with its pointer."""
    found: list[tuple[str, Any]] = []
    for key, value in schema.items():
        if key in _SCHEMAS:
            found.append((key, value))
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            found += [(f"{key}/{name}", part) for name, part in value.items()]
        if key in _LISTED_SCHEMAS and isinstance(value, list):
            found += [(f"{key}/{index}", part) for index, part in enumerate(value)]
    return ((name, part) for name, part in found if isinstance(part, dict))


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> Any:
    """llguidance's view of a tokenizer: the bytes of every id, as our own decoder renders them.

    One way for tokenizers of all kinds, and right by construction: a text is checked as the bytes that
    `decode` makes of its ids after a prompt. Special tokens and the unknown one stand for no text.
    """
    wrapped = llguidance.TokenizerWrapper(_Bridge(tokenizer, end_ids))
    return llguidance.LLTokenizer(wrapped, eos_token=[*end_ids])


class _Bridge:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, end_ids: tuple[int, ...]):
        self._tokenizer = tokenizer
        special = {*tokenizer.special_tokens.values(), tokenizer.unk_id, *end_ids} - {None}
        ids = range(tokenizer.vocab_size)
        self._texts = [b"" if id_ in special else self._bytes(id_) for id_ in ids]
        self._id_of = {text: id_ for id_, text in enumerate(self._texts) if text}
        self._longest = max(map(len, self._texts))
        self.tokens = [self._name(id_) if id_ in special else self._texts[id_] for id_ in ids]
        self.special_token_ids = sorted(special)
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, end_ids[0]

    def __call__(self, text: bytes) -> list[int]:
        """Ids of exactly these bytes, with which llguidance writes what the form leaves no choice of.

        Those of the tokenizer where it can: sentencepiece puts a space before a text, but not after a
        line break.
        """
        for prefix in ("", "\n"):
            ids = self._tokenizer.encode(
                prefix + text.decode(errors="replace"), add_special_tokens=False
            )
            for start in range(min(len(ids), 3)):
                if b"".join(self._texts[id_] for id_ in ids[start:]) == text:
                    return ids[start:]
        return self._longest_matches(text)

    def _longest_matches(self, text: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(text):
            sizes = range(min(self._longest, len(text) - start), 0, -1)
            size = next((n for n in sizes if text[start : start + n] in self._id_of), 0)
            if not size:
                break  # the vocabulary cannot write this
            ids.append(self._id_of[text[start : start + size]])
            start += size
        return ids

    def _name(self, id_: int) -> bytes:
        try:
            return self._tokenizer.id_to_piece(id_).encode()
        except ValueError:  # a gap in the vocabulary
            return b""

    def _bytes(self, id_: int) -> bytes:
        try:
            return self._tokenizer._detokenizer.render(id_, True)[0]
        except ValueError:
            return b""
