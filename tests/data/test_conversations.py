"""Chats as training data: the assistant's tokens, against transformers; and what is refused."""

import json

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from llm_jax.data.conversations import encode_conversation, read_conversations
from llm_jax.data.packing import NO_TARGET, pack
from llm_jax.data.tokenizer import load_tokenizer

# The assistant's turn ends with <end>, which it has to learn to say.
TEMPLATE = """{% for message in messages %}<{{ message.role }}>
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<end>
{% endgeneration %}{% else %}{{ message.content }}<end>
{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>
{% endif %}"""
TURNS = [
    ("system", "Answer briefly."),
    ("user", "你好，你是谁？"),
    ("assistant", "我是一个程序。"),
    ("user", "What do you like?"),
    ("assistant", "  I like <b> programs. 😀"),
]
CHAT = [{"role": role, "content": content} for role, content in TURNS]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(ours, transformers') of one byte-level BPE trained here."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<end>", "<system>", "<user>", "<assistant>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([content for _, content in TURNS] * 3 + [">\n", "<\n"] * 9, trainer)
    bpe.save(str(path))
    ours = load_tokenizer(path)
    ours.chat_template = TEMPLATE
    return ours, PreTrainedTokenizerFast(tokenizer_file=str(path))


@pytest.mark.parametrize("turns", [3, 5])
def test_the_assistants_tokens_are_those_of_transformers(both, turns):
    ours, theirs = both
    want = theirs.apply_chat_template(
        CHAT[:turns],
        chat_template=TEMPLATE,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    found = encode_conversation(ours, CHAT[:turns])
    assert found.tokens.tolist() == want["input_ids"]
    assert found.trained.tolist() == [bool(x) for x in want["assistant_masks"]]
    words = ours.decode(found.tokens[found.trained], skip_special_tokens=False)
    said = [content for role, content in TURNS[:turns] if role == "assistant"]
    assert words == "".join(f"{content}<end>\n" for content in said)


def test_only_the_assistants_tokens_are_targets_once_packed(both):
    chats = [encode_conversation(both[0], CHAT[:n]) for n in (3, 5, 3)]
    rows = pack((c.tokens for c in chats), 200, (c.trained for c in chats))
    targets = np.sort(rows["targets"][rows["targets"] != NO_TARGET])
    said = np.sort(np.concatenate([c.tokens[c.trained] for c in chats]))
    np.testing.assert_array_equal(targets, said)
    inside = rows["targets"] != NO_TARGET
    np.testing.assert_array_equal(
        rows["targets"][:, :-1][inside[:, :-1]], rows["tokens"][:, 1:][inside[:, :-1]]
    )
    with pytest.raises(ValueError, match="one value for each token"):
        pack([[1, 2, 3]], 8, [[True, False]])


def test_a_template_that_tells_the_end_from_the_middle_otherwise_is_refused(both):
    tokenizer = both[0]
    forgetful = TEMPLATE.replace("{{ message.content }}<end>", "{{ messages | length }}<end>")
    try:
        tokenizer.chat_template = forgetful
        with pytest.raises(ValueError, match="message 2 otherwise"):
            encode_conversation(tokenizer, CHAT)
    finally:
        tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "message 0 has the role 'bot'"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "message 0 has the content ' '"),
        ('{"messages": "hello"}', "expected a list"),
        ('{"mesages": []}', "did you mean"),
        (
            '{"conversations": [{"from": "human", "value": "a"}]}',
            "'conversations': no message of the as",
        ),
        ('{"conversations": [{"from": "bot", "value": "a"}]}', "message 0 has the role 'bot'"),
        ('{"conversations": [{"from": "gpt", "text": "a"}]}', "message 0 has the content None"),
        ('{"conversations": [{"value": "a"}]}', "message 0 has the role None"),
        ('{"conversations": ["a"]}', "expected a list"),
        ("[", "not JSON"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_line(tmp_path, line, message):
    good = '{"messages": [{"role": "assistant", "content": "a"}]}'
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError, match=f"chats.jsonl:3: .*{message}"):
        read_conversations(path)
    path.write_text(good)
    assert read_conversations(path) == [[{"role": "assistant", "content": "a"}]]
    path.write_text("")
    with pytest.raises(ValueError, match="holds no chats"):
        read_conversations(path)


def test_sharegpt_turns_are_messages(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [("system", "s"), ("human", "你好"), ("gpt", "hello")]
    record = {"id": 1, "conversations": [{"from": who, "value": said} for who, said in turns]}
    path.write_text(json.dumps(record))
    roles = [("system", "s"), ("user", "你好"), ("assistant", "hello")]
    assert read_conversations(path) == [[{"role": role, "content": said} for role, said in roles]]
