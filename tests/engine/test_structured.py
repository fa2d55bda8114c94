"""Texts of a form, drawn by a model that knows nothing: whatever is finished has the form."""

import json
import random
import re

import jax.numpy as jnp
import jsonschema
import llguidance
import numpy as np
import pytest

from llm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from llm_jax.engine import structured
from llm_jax.engine.structured import Grammar
from llm_jax.infer.llm import DEMO_MODEL
from llm_jax.ops.sampling import mask_logits
from llm_jax.ops.sampling_params import StructuredSpec
from tests.shared_data import shared_path

BYTES = ByteTokenizer()
DEMO = load_tokenizer(DEMO_MODEL)
REAL = ("deepseek-r1", "gpt2", "llama2", "mistral-v1", "cluecorpussmall-zh-sp")


def words(tokenizer):
    return np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)


def allowed(state, tokenizer):
    mask = words(tokenizer)
    state.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def draw(spec, tokenizer, seed, limit=600):
    """A text of random tokens under the mask: (text, whether it is finished)."""
    rng = np.random.default_rng(seed)
    state, ids = Grammar.compile(spec, tokenizer).start(), []
    for _ in range(limit):
        choices = allowed(state, tokenizer)
        assert choices.size, "nothing may follow"
        token = int(rng.choice(choices))
        assert state.accept(token)
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        if state.finished:
            break
    stream = tokenizer.stream()
    stream.push(tokenizer.encode("x"))  # a prompt, so that no space is dropped
    return stream.push(ids) + stream.flush(), state.finished


# --- JSON ---


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    """A schema of every kind that llguidance knows, nested up to three deep."""
    kinds = ["integer", "number", "string", "pattern", "boolean", "null", "enum", "const"]
    kinds += ["object", "object", "array", "anyOf"] if depth < 3 else []
    low = rng.randint(-50, 50)
    match rng.choice(["object", "array", "anyOf"] if depth == 0 else kinds):
        case "integer":
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)}
        case "number":
            return {"type": "number", "exclusiveMinimum": low / 4, "maximum": low / 4 + 2.5}
        case "string":
            least = rng.randint(0, 2)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
        case "pattern":
            return {
                "type": "string",
                "pattern": rng.choice(["^[a-c]{1,4}$", r"^\d{4}-\d{2}$", "^(ab|é)$"]),
            }
        case "enum":
            values = ["red", "绿", 'a"b\\c', 3, -1.5, None, True, [1, "x"], {"k": 2}]
            return {"enum": rng.sample(values, rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(["fixed", 7, False])}
        case "object":
            names = rng.sample(["name", "age", "tags", "ключ", "a b", "x"], rng.randint(0, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": [name for name in names if rng.random() < 0.5],
                "additionalProperties": False,
            }
        case "array":
            least = rng.randint(0, 2)
            sizes = {"minItems": least, "maxItems": least + rng.randint(0, 2)}
            return {"type": "array", "items": random_schema(rng, depth + 1)} | sizes
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
        case kind:
            return {"type": kind}


def check_schemas(seeds):
    done = 0
    for seed in seeds:
        schema = random_schema(random.Random(seed))
        spec = StructuredSpec("json", json.dumps(schema))
        text, finished = draw(spec, DEMO if seed % 2 else BYTES, seed)
        if finished:
            jsonschema.validate(json.loads(text), schema)
            done += 1
    assert done >= 0.95 * len(seeds)  # the others had more spaces and digits than the limit


def test_json_of_40_random_schemas_validates():
    check_schemas(range(40))


@pytest.mark.slow
def test_json_of_500_random_schemas_validates():
    check_schemas(range(1000, 1500))


def test_any_json_parses():
    finished = [draw(StructuredSpec("json", "{}"), BYTES, seed, 200) for seed in range(10)]
    texts = [text for text, done in finished if done]
    assert texts and all(json.loads(text) is not ... for text in texts)


# --- Other forms ---


@pytest.mark.parametrize("tokenizer", [BYTES, DEMO], ids=["bytes", "demo"])
@pytest.mark.parametrize(
    "regex", [r"[0-9]{3}-[0-9]{4}", "(cat|dog|鸟){1,3}", r"[a-f]+/[^x\n]?", r'"(\\"|[a-z]){0,4}"', "a?"]
)
def test_a_regex_matches_the_whole_text(regex, tokenizer):
    for seed in range(5):
        text, finished = draw(StructuredSpec("regex", regex), tokenizer, seed)
        assert finished and re.fullmatch(regex, text)


def test_a_choice_is_one_of_the_list():
    choices = ["yes", "yes, but", "no", "可能", 'quo"te\\', "line\nbreak", "🙂/", ""]
    spec = StructuredSpec("choice", json.dumps(choices))
    seen = {draw(spec, BYTES, seed) for seed in range(60)}
    assert all(finished for _, finished in seen)
    assert {text for text, _ in seen} <= set(choices) and len(seen) > 4


GBNF = """
root ::= term (("+" | "-") term)*
term ::= [0-9]{1,3} | "(" root ")"
"""
LARK = """
start: term (("+" | "-") term)*
term: /[0-9]{1,3}/ | "(" start ")"
"""


@pytest.mark.parametrize("grammar", [GBNF, LARK])
def test_a_grammar_is_followed(grammar):
    done = 0
    for seed in range(10):
        text, finished = draw(StructuredSpec("ebnf", grammar), BYTES, seed, 200)
        done += finished
        if finished:  # valid arithmetic, but for zeros in front
            eval(re.sub(r"\b0+(?=\d)", "", text), {"__builtins__": {}})
            assert re.fullmatch(r"[0-9+\-()]+", text)
    assert done >= 3


# --- Tokenizers ---


def test_masks_are_those_of_llguidances_own_reading_of_tokenizer_json():
    theirs = llguidance.LLTokenizer(str(DEMO_MODEL / "tokenizer.json"), eos_token=DEMO.eos_id)
    schema = '{"type":"object","properties":{"a":{"type":"string","maxLength":9},"b":{"enum":["é",4]}}}'
    for kind, text in (("json", schema), ("regex", r"[ -~]{1,30}\n?")):
        grammar = structured._READERS[kind](text)
        peer = llguidance.LLMatcher(theirs, grammar)
        state = Grammar.compile(StructuredSpec(kind, text), DEMO).start()
        rng = np.random.default_rng(0)
        while not state.finished:
            ours = allowed(state, DEMO)
            bits = np.unpackbits(np.frombuffer(peer.compute_bitmask(), np.uint8), bitorder="little")
            np.testing.assert_array_equal(ours, np.flatnonzero(bits))
            token = int(rng.choice(ours))
            assert state.accept(token)
            if token != DEMO.eos_id:
                assert peer.consume_token(token)


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name):
    """The text that the decoder shows has the form; special tokens stay out of it."""
    tokenizer = load_tokenizer(shared_path(f"tokenizers/{name}"))
    end = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.vocab_size - 1
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "n": {"type": "integer", "minimum": 0, "maximum": 999},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    grammar = Grammar.compile(StructuredSpec("json", json.dumps(schema)), tokenizer, [end])
    for seed in range(3):
        rng, state, ids = np.random.default_rng(seed), grammar.start(), []
        while not state.finished and len(ids) < 300:
            choices = allowed(state, tokenizer)
            assert not set(choices.tolist()) & set(tokenizer.special_tokens.values()) - {end}
            ids.append(int(rng.choice(choices)))
            assert state.accept(ids[-1])
        stream = tokenizer.stream()
        stream.push(tokenizer.encode("x"))
        assert state.finished
        jsonschema.validate(json.loads(stream.push(ids) + stream.flush()), schema)


@pytest.mark.parametrize("name", REAL)
def test_what_is_forced_is_written_with_exact_tokens(name):
    tokenizer = load_tokenizer(shared_path(f"tokenizers/{name}"))
    bridge = structured._Bridge(tokenizer, (tokenizer.eos_id or 0,))
    for text in ('{"name":', "name", " a b", "é绿", "</s>", "  x"):
        ids = bridge(text.encode())
        assert b"".join(bridge.tokens[i] for i in ids) == text.encode()
        assert not set(ids) & set(bridge.special_token_ids)


# --- The state ---


def test_masks_go_to_logits():
    """A vocabulary of the model larger than the tokenizer's: what is beyond is never allowed."""
    state = Grammar.compile(StructuredSpec("regex", "[ab]"), BYTES).start()
    mask = np.full((1, 10), 0xFFFFFFFF, np.uint32)
    state.fill(mask[0])
    kept = np.flatnonzero(np.isfinite(mask_logits(jnp.zeros((1, 310)), mask)[0]))
    assert kept.tolist() == BYTES.encode("ab", add_special_tokens=False)


def test_end_ids_end_what_is_complete():
    ends = [BYTES.eos_id, BYTES.pad_id]
    state = Grammar.compile(StructuredSpec("regex", "ab?"), BYTES, ends).start()
    a, b = BYTES.encode("ab", add_special_tokens=False)
    assert allowed(state, BYTES).tolist() == [a] and not state.complete
    assert not any(state.accept(end) for end in ends) and state.accept(a)
    assert allowed(state, BYTES).tolist() == sorted([*ends, b]) and state.complete and not state.finished
    fork = state.copy()
    assert state.accept(BYTES.pad_id) and state.finished and not state.accept(b)
    assert allowed(state, BYTES).tolist() == sorted(ends)
    assert fork.accept(b) and fork.finished and fork.accept(BYTES.eos_id)
    assert not fork.accept(BYTES.eos_id)


def test_drafts_are_cut_where_they_leave_the_form_and_taken_back():
    spec = StructuredSpec("regex", r"\d\d?[.]x*")
    one, dot, x, end = *BYTES.encode("1.x", add_special_tokens=False), BYTES.eos_id
    state = Grammar.compile(spec, BYTES).start()
    for draft, length in [
        ([one, one, dot, x, end], 5),
        ([one, dot, end, x], 3),
        ([one, one, one], 2),
        ([one, end], 1),
        ([x], 0),
        ([], 0),
    ]:
        masks = np.zeros((len(draft) + 1, len(words(BYTES))), np.uint32)
        assert state.fill_draft(masks, draft) == length
        other = state.copy()
        for place in range(length + 1):
            mask = words(BYTES)
            other.fill(mask)
            np.testing.assert_array_equal(masks[place], mask)
            assert other.accept_prefix(draft[place : place + 1]) == (place < length)
        assert state.copy().accept_prefix(draft) == length
        start = Grammar.compile(spec, BYTES).start()
        np.testing.assert_array_equal(allowed(state, BYTES), allowed(start, BYTES))


def test_rollback_goes_back_by_tokens():
    state = Grammar.compile(StructuredSpec("regex", "abc?"), BYTES).start()
    ids = [*BYTES.encode("ab", add_special_tokens=False), BYTES.eos_id]
    assert state.accept_prefix(ids) == 3 and state.finished
    state.rollback(1)
    assert state.complete and not state.finished
    state.rollback(2)
    assert allowed(state, BYTES).tolist() == ids[:1]
    assert state.accept_prefix(ids) == 3
    state.rollback(0)
    assert state.finished
    with pytest.raises(ValueError, match="cannot go back by 3 tokens"):
        state.rollback(4)


def test_grammars_are_kept():
    spec = StructuredSpec("json", '{"type": "string"}')
    assert Grammar.compile(spec, BYTES) is Grammar.compile(StructuredSpec("json", spec.text), BYTES)
    assert Grammar.compile(spec, BYTES) is not Grammar.compile(spec, DEMO)


# --- Refusals ---


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json", '{"type": ', "json: Expecting value: line 1 column 10"),
        ("json", "3", "json: expected a JSON Schema, an object: 3"),
        ("json", '{"type": "objec"}', "json at #: Invalid type: objec"),
        (
            "json",
            '{"properties": {"a": {"items": {"type": "integer", "minimum": "x"}}, "b": false}}',
            "json at #/properties/a/items: Expected f64 for 'minimum'",
        ),
        (
            "json",
            '{"$defs": {"q": {"type": "nope"}}, "anyOf": [{"type": "null"}, {"$ref": "#/$defs/q"}]}',
            "json at #/(\\$defs/q|anyOf/1): Invalid type: nope",
        ),
        ("json", '{"oneOf": [{}, {"not": {}}]}', "json at #/oneOf/1: Unimplemented keys"),
        ("regex", "x(a", "regex: .*invalid regex.*\n +x\\(a\n +\\^\nerror: unclosed group"),
        ("regex", "(?=a)b", "regex: (.|\n)*look-around"),
        ("choice", '["a"', "choice: Expecting ',' delimiter: line 1 column 5"),
        ("choice", '["a", 1]', "choice: expected a JSON list of strings"),
        ("choice", "[]", "choice: expected a JSON list of strings"),
        ("ebnf", "start: a b\na: /x/", 'ebnf: at 1\\(8\\): unknown name: "b"'),
        ("ebnf", 'root ::= "a" b', "ebnf: .*Rule 'b' not found"),
        ("ebnf", "start: <|nope|>", "ebnf: .*special token"),
    ],
)
def test_malformed_forms_say_where(kind, text, message):
    with pytest.raises(ValueError, match=f"SamplingParams.structured, {message}"):
        Grammar.compile(StructuredSpec(kind, text), BYTES)


def test_what_is_missing_is_named(monkeypatch):
    spec = StructuredSpec("regex", "a")
    with pytest.raises(ValueError, match="give end_ids"):
        Grammar.compile(spec, BYTES, [])
    with pytest.raises(ValueError, match=r"end_ids=\[260\]: the tokenizer has 260 ids"):
        Grammar.compile(spec, BYTES, [260])
    monkeypatch.setattr(structured, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'llm_jax\[structured\]'"):
        Grammar.compile(spec, BYTES)
