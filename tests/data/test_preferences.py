"""Preferences as training data: every form of a record, what is refused, the rows that pairs lie in."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import llm_jax
from llm_jax.data.conversations import encode_conversation
from llm_jax.data.packing import NO_TARGET
from llm_jax.data.preferences import Preference, encode_preference, pack_pairs, read_preferences
from llm_jax.data.tokenizer import load_tokenizer

DEMO = Path(llm_jax.__file__).parent / "assets" / "demo_lm"

TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns):
    return [{"from": speaker, "value": said} for speaker, said in turns]


PROMPT = chat(("user", "Hi!"), ("assistant", "Hello."), ("user", "你是谁？"))
GOOD, BAD = chat(("assistant", "我是一个程序。")), chat(("assistant", "别烦我。"))
WANT = (PROMPT, GOOD, BAD)
HUMAN = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: 你是谁？\n\nAssistant:"
FORMS = {
    "prompt and answers as messages": {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
    "prompt as messages, answers as texts": {
        "prompt": PROMPT,
        "chosen": "我是一个程序。",
        "rejected": "别烦我。",
    },
    "whole chats": {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
    "whole chats that repeat the prompt": {
        "prompt": PROMPT[:1],
        "chosen": PROMPT + GOOD,
        "rejected": PROMPT + BAD,
    },
    "transcripts": {"chosen": f"{HUMAN} 我是一个程序。", "rejected": f"{HUMAN} 别烦我。"},
    "a transcript and its ends": {
        "prompt": HUMAN,
        "chosen": "我是一个程序。",
        "rejected": "别烦我。",
    },
    "turns of ShareGPT": {
        "prompt": sharegpt(("human", "Hi!"), ("gpt", "Hello."), ("human", "你是谁？")),
        "chosen": sharegpt(("gpt", "我是一个程序。")),
        "rejected": sharegpt(("gpt", "别烦我。")),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(tmp_path, form):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + json.dumps(FORMS[form]))
    assert read_preferences(path) == [Preference(*WANT, f"{path}:2")]


def test_a_text_is_the_users_and_its_answers_the_assistants(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    (found,) = read_preferences(path)
    assert found.prompt == chat(("user", "a"))
    assert (found.chosen, found.rejected) == (chat(("assistant", "b")), chat(("assistant", "c")))
    # Answers may go on for several turns; the prompt ends where the chats part.
    rest = chat(("assistant", "b"), ("user", "d"), ("assistant", "e"))
    path.write_text(json.dumps({"prompt": "a", "chosen": rest, "rejected": "c"}))
    assert read_preferences(path)[0].chosen == rest


USER, OTHER = chat(("user", "a")), chat(("assistant", "c"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "field 'rejected': no such field"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "did you mean choosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen': has nothing after the 2 messages"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected': message 0 has the content ' '"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "field 'prompt': expected a list"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "'prompt': message 0 has the content ''"),
        ({"prompt": "a", "chosen": 1, "rejected": "c"}, "field 'chosen': expected a list"),
        ({"promt": "a", "chosen": "b", "rejected": "c"}, "expected a field 'prompt', or whole chats"),
        ({"chosen": "b", "rejected": "c"}, "expected a field 'prompt', or whole chats"),
        ({"chosen": USER + OTHER, "rejected": chat(("user", "b")) + OTHER}, "begin with the same"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "'rejected': has nothing after the 1 messages"),
        ({"prompt": "a", "chosen": USER, "rejected": "c"}, "'chosen': has nothing after the 1 messages"),
        (
            {"prompt": "a", "chosen": "b", "rejected": chat(("user", "d"))},
            "'rejected': has a message of the user after",
        ),
        ({"prompt": "a", "chosen": chat(("bot", "b")), "rejected": "c"}, "has the role 'bot'"),
        ({"prompt": "a", "chosen": [{"value": "b"}], "rejected": "c"}, "has the role None"),
        ({"chosen": f"{HUMAN} b", "rejected": HUMAN}, "'rejected': has nothing after the 3"),
        ([1], "expected a JSON object"),
    ],
)
def test_what_is_no_preference_is_refused_with_its_line(tmp_path, record, message):
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{good}\n\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=f"pairs.jsonl:3: .*{re.escape(message)}"):
        read_preferences(path)
    path.write_text("")
    with pytest.raises(ValueError, match="pairs.jsonl:1: the file holds no preferences"):
        read_preferences(path)


@pytest.fixture(scope="module")
def tokenizer():
    from_package = load_tokenizer(DEMO)
    from_package.chat_template = TEMPLATE
    return from_package


def test_only_the_answers_tokens_are_trained(tokenizer):
    pair = encode_preference(tokenizer, Preference(*WANT, "file:1"))
    for found, answer in ((pair.chosen, GOOD), (pair.rejected, BAD)):
        whole = encode_conversation(tokenizer, [*PROMPT, *answer])
        np.testing.assert_array_equal(found.tokens, whole.tokens)
        first = np.flatnonzero(whole.trained)[0]
        assert whole.trained[first] and not found.trained[first], "an earlier turn is part of the prompt"
        words = tokenizer.decode(found.tokens[found.trained])
        assert words.strip() == answer[0]["content"]
    assert pair.longest == max(len(pair.chosen.tokens), len(pair.rejected.tokens))


def test_what_the_template_spoils_is_refused_with_its_line(tokenizer):
    silent = TEMPLATE.replace("{{ message.content }}", "")
    try:
        tokenizer.chat_template = silent
        with pytest.raises(ValueError, match="file:7: the chat template renders chosen and rejected al"):
            encode_preference(tokenizer, Preference(*WANT, "file:7"))
        tokenizer.chat_template = TEMPLATE.replace("message.content", "messages | length")
        with pytest.raises(ValueError, match="file:7: the chat template renders message 3 otherwise"):
            longer = [*GOOD, *chat(("user", "a"), ("assistant", "b"))]
            encode_preference(tokenizer, Preference(PROMPT, longer, BAD, "file:7"))
    finally:
        tokenizer.chat_template = TEMPLATE


def test_rows_hold_whole_pairs_each_chat_by_itself(tokenizer):
    rng = np.random.default_rng(0)
    words = [f"{n} and {n * n}" for n in range(40)]
    preferences = [
        Preference(
            chat(("user", word)),
            chat(("assistant", " ".join(rng.permutation(words[:size])))),
            chat(("assistant", word * 2)),
            f"file:{number}",
        )
        for number, (word, size) in enumerate(zip(words, rng.integers(1, 6, 40), strict=True), 1)
    ]
    pairs = [encode_preference(tokenizer, preference) for preference in preferences]
    rows = pack_pairs(pairs, 256)
    assert {x.dtype for x in rows.values()} == {np.dtype(np.int32)}
    found = []
    for tokens, targets, segments, positions in zip(*rows.values(), strict=True):
        chats = []
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
            trained = np.append(False, targets[inside][:-1] != NO_TARGET)
            np.testing.assert_array_equal(tokens[inside][trained], targets[inside][:-1][trained[1:]])
            assert targets[inside][-1] == NO_TARGET
            chats.append((tuple(tokens[inside]), tuple(trained)))
        found += list(zip(chats[::2], chats[1::2], strict=True))
    wanted = [tuple((tuple(c.tokens), tuple(c.trained)) for c in (p.chosen, p.rejected)) for p in pairs]
    assert sorted(found) == sorted(wanted) and len(rows["tokens"]) < len(pairs) / 2

    longest = max(pairs, key=lambda p: len(p.chosen.tokens) + len(p.rejected.tokens))
    size = len(longest.chosen.tokens) + len(longest.rejected.tokens)
    assert len(pack_pairs([longest], size)["tokens"]) == 1
    with pytest.raises(
        ValueError, match=rf"{longest.where}: both chats have {size} .*row_tokens={size - 1}"
    ):
        pack_pairs([longest], size - 1)
