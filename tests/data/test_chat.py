"""Chat templates: the same text as transformers renders, and no way out of the sandbox."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llm_jax.data.chat import encode_chat, render_chat
from llm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from tests.shared_data import shared_path

# Templates written for these tests in the manner of published model families.
LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nTools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' or 'tool_calls' in message %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
<|im_start|>{{ message.role }}
{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
QWEN = """{%- set ns = namespace(last=messages|length - 1, thinking=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ ' #' ~ ns.last ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% macro turn(role, text) %}{{ '<start_of_turn>' + role + '\\n' + text | trim }}{% endmacro %}
{% for message in messages %}
    {% set role = 'model' if message.role == 'assistant' else message.role %}
{{ turn(role, message['content']) + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "qwen": QWEN, "mistral": MISTRAL, "gemma": GEMMA}

USER = {"role": "user", "content": "  你好！<b>\"quoted\"</b> & 'more' 😀\n"}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one": [USER],
    "three": [USER, ASSISTANT, USER],
    "system": [SYSTEM, USER],
    "answered": [USER, ASSISTANT],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "天气", "parameters": {"type": "object", "required": ["city"]}},
    }
]


def reference(template, messages, add_generation_prompt=True, tools=None, **variables):
    [text], _ = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return text


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_transformers(name, conversation, generation_prompt):
    template, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    if (name, conversation) in (("mistral", "system"), ("gemma", "system")):
        with pytest.raises(ValueError, match="roles must alternate|System role not supported"):
            render_chat(template, messages, **tokens)
        return
    ours = render_chat(template, messages, add_generation_prompt=generation_prompt, **tokens)
    assert ours == reference(template, messages, generation_prompt, **tokens)


def test_tools_and_variables():
    messages = [USER, {"role": "tool", "content": {"温度": 20}}]
    ours = render_chat(LLAMA3, messages, tools=TOOLS, bos_token="<s>")
    assert ours == reference(LLAMA3, messages, tools=TOOLS, bos_token="<s>")
    assert "天气" in ours and '{"温度": 20}' in ours
    for thinking in (True, False):
        ours = render_chat(QWEN, [USER], enable_thinking=thinking)
        assert ours == reference(QWEN, [USER], enable_thinking=thinking)


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER, ASSISTANT, USER],
        [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "42"},
        ],
    ],
)
def test_real_deepseek_template(messages):
    path = shared_path("tokenizers/deepseek-r1")
    tokenizer = load_tokenizer(path)
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer.chat_template == config["chat_template"]
    tokens = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    expected = reference(config["chat_template"], messages, **tokens)
    assert render_chat(tokenizer.chat_template, messages, **tokens) == expected
    ids = encode_chat(tokenizer, messages)
    assert ids == tokenizer.encode(expected, add_special_tokens=False)
    assert ids.count(tokenizer.bos_id) == 1


def test_undefined_names_and_dates():
    assert render_chat("[{{ bos_token }}|{{ nothing }}]", []) == "[|]"
    template = "{{ strftime_now('%Y') | int > 2000 }} {{ documents is none }} {{ tools is none }}"
    assert render_chat(template, []) == "True True True"
    assert reference(template, []) == "True True True"


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ ''['__class__'].mro() }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{% set n = namespace(__init__=1) %}{{ n }}",
    "{% set n = namespace() %}{{ n.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ self.__init__.__globals__ }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_template_is_refused(template):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="chat template (refused, it tries|failed)"):
        render_chat(template, messages)
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "not valid, line 1"),
        ("\n\n{% for x in y %}", "not valid, line 3"),
        ("{% include '/etc/passwd' %}", "failed"),
        ("{% for i in range(1000000000) %}{% endfor %}", "failed"),
        ("{{ 1 // 0 }}", "failed"),
        ("{{ messages[0].content + 1 }}", "failed"),
        ("{{ raise_exception('only user turns') }}", "only user turns"),
    ],
)
def test_broken_templates(template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, [{"role": "user", "content": "hi"}])


def test_objects_do_not_reach_the_template():
    with pytest.raises(ValueError, match=r"messages\[0\]\.content must be a JSON value"):
        render_chat("{{ messages }}", [{"role": "user", "content": object()}])


def test_templates_are_found(tmp_path):
    ByteTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    with pytest.raises(ValueError, match="has no chat template"):
        encode_chat(load_tokenizer(tmp_path), [USER])

    config["chat_template"] = "one {{ messages[0].content }}"
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": "x"}])) == "one x"

    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config["chat_template"] = named
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(encode_chat(tokenizer, [USER])) == "a"
    assert tokenizer.decode(encode_chat(tokenizer, [USER], tools=TOOLS)) == "b"
    assert tokenizer.decode(encode_chat(tokenizer, [USER], template="c{{ bos_token }}d")) == "cd"
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_templates == {"default": "a", "tool_use": "b"}

    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_template == "from the file"
