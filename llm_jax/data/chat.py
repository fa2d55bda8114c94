"""Conversations rendered to text by a model's chat template.

A chat template is Jinja2 source that comes with the model, so it is code from a stranger. It runs
in Jinja2's sandbox, which refuses attributes that lead to the interpreter and changes to its
inputs, and it sees nothing but copies of plain JSON values. The dialect (trimmed blocks,
`raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop controls, `generation`
blocks) is the one that the templates of published models are written in.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.data.tokenizer_config import ROLES

Messages = Sequence[Mapping[str, Any]]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    **variables: Any,
) -> list[int]:
    """The ids of a conversation, by `template` (Jinja2 source) or the tokenizer's own.

    ValueError when there is neither, or when `render_chat` refuses.
    """
    template = template or chat_template_for(tokenizer, tools)
    tokens = {f"{role}_token": getattr(tokenizer, f"{role}_id") for role in ROLES}
    texts = {name: None if id_ is None else tokenizer.id_to_piece(id_) for name, id_ in tokens.items()}
    text = render_chat(
        template,
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        **{**texts, **variables},
    )
    return tokenizer.encode(text, add_special_tokens=False)


def chat_template_for(tokenizer: Tokenizer, tools: Sequence | None = None) -> str:
    """The tokenizer's template, the one named "tool_use" if there are tools and such a template."""
    if tools and "tool_use" in tokenizer.chat_templates:
        return tokenizer.chat_templates["tool_use"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "this tokenizer has no chat template, so its model was not trained to chat; "
            "prompt it with plain text, or give a template"
        )
    return tokenizer.chat_template


def render_chat(
    template: str,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation.

    messages: each with "role" and "content", and whatever else the template reads, as JSON values.
    add_generation_prompt: end with what opens the assistant's turn.
    tools: JSON schemas of functions that the model may call.
    variables: further names for the template; one that is None is left undefined, as are
        `bos_token` and `eos_token`.

    ValueError when the template is not valid, does what the sandbox forbids, or itself refuses the
    conversation (for instance because roles do not alternate).
    """
    given = {"bos_token": bos_token, "eos_token": eos_token, **variables}
    context = {name: _plain(value, name) for name, value in given.items() if value is not None}
    context["messages"] = _plain(messages, "messages")
    context["tools"] = _plain(tools, "tools")
    context["documents"] = context.get("documents")
    context["add_generation_prompt"] = add_generation_prompt
    try:
        return _compile(template).render(context)
    except jinja2.exceptions.SecurityError as error:
        raise ValueError(f"chat template refused, it tries to leave its sandbox: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template is not valid, line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"chat template failed on these messages: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words; it yields its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja2's `namespace`, less the attributes that Python gives a meaning."""

    def __init__(*args, **kwargs):
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses a forbidden attribute at once, where Jinja2 would yield an undefined value."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(
            f"access to attribute {attribute!r} of {type(obj).__name__!r} is not allowed"
        )


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format_: datetime.datetime.now().strftime(format_)
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _plain(value: Any, name: str) -> Any:
    """A copy of `value` made of JSON types only, so that a template meets no method of ours."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    raise ValueError(
        f"{name} must be a JSON value (text, number, list, dict), got {type(value).__name__}"
    )
