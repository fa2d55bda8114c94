"""What the small files beside a tokenizer say: special and added tokens, chat templates, options.

Read in this order, later files filling only what earlier ones leave open: `tokenizer_config.json`,
`special_tokens_map.json`, `added_tokens.json`; a `chat_template.jinja` replaces the default
template of `tokenizer_config.json`. The formats are those of Hugging Face tokenizer directories.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")

_CONFIG = "tokenizer_config.json"
_SPECIAL_MAP = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_TEMPLATE = "chat_template.jinja"
# Remote code cannot travel with a saved tokenizer, and the class is decided by the files written.
_NOT_SAVED = ("auto_map", "tokenizer_class", "chat_template")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Options of one tokenizer; every field may be empty.

    values: tokenizer_config.json as read.
    tokens: role ("bos", "eos", "unk", "pad", "cls", "sep", "mask") -> text of the special token.
    extra_special: texts of further tokens that count as special.
    added: id -> token that the vocabulary file itself may lack.
    chat_templates: name -> Jinja2 source; the one used by default is called "default".
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    extra_special: tuple[str, ...] = ()
    added: dict[int, AddedToken] = dataclasses.field(default_factory=dict)
    chat_templates: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def tokenizer_class(self) -> str | None:
        """The transformers class named by the directory, without the suffix `Fast`."""
        name = self.values.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) else None

    def with_default_tokens(self, defaults: dict[str, str]) -> "TokenizerConfig":
        """The same with `defaults` for the roles that are named nowhere."""
        named = {role for role in ROLES if f"{role}_token" in self.values}
        missing = {role: text for role, text in defaults.items() if role not in named}
        return dataclasses.replace(self, tokens={**missing, **self.tokens})

    @property
    def replacements(self) -> tuple[tuple[str, str], ...]:
        """What `llm_jax.data.replacements` applies to every text: an entry of ours."""
        pairs = self.values.get("replacements") or ()
        if not isinstance(pairs, (list, tuple)):
            raise ValueError(f"{_CONFIG}: replacements must be a list of pairs, got {pairs!r}")
        return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in pairs)

    def option(self, name: str, default: bool) -> bool:
        """A boolean of tokenizer_config.json; ValueError when it is there and no boolean."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{_CONFIG}: {name} must be true or false, got {value!r}")
        return value


def read_json(path: Path) -> Any:
    """The JSON document in `path`; ValueError naming the file when it is truncated or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON (truncated?): {error}") from error


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """The options in `directory`; an empty TokenizerConfig when it holds none of the files."""
    values = _read_object(directory / _CONFIG)
    special_map = _read_object(directory / _SPECIAL_MAP)
    named = {**special_map, **{key: value for key, value in values.items() if value is not None}}
    tokens = {role: _text(named.get(f"{role}_token")) for role in ROLES}
    return TokenizerConfig(
        values=values,
        tokens={role: text for role, text in tokens.items() if text is not None},
        extra_special=_extra_special(named),
        added=_added_tokens(values, _read_object(directory / _ADDED)),
        chat_templates=_chat_templates(directory, values),
    )


def write_tokenizer_config(directory: Path, config: TokenizerConfig, **updates: Any) -> None:
    """Write tokenizer_config.json into `directory`: `config`, with `updates` over its values."""
    values = {key: value for key, value in config.values.items() if key not in _NOT_SAVED}
    values |= {f"{role}_token": text for role, text in config.tokens.items()}
    if config.extra_special:
        values["additional_special_tokens"] = list(config.extra_special)
    if config.chat_templates.keys() == {"default"}:
        values["chat_template"] = config.chat_templates["default"]
    elif config.chat_templates:
        named = config.chat_templates.items()
        values["chat_template"] = [{"name": name, "template": text} for name, text in named]
    text = json.dumps({**values, **updates}, ensure_ascii=False, indent=2)
    (directory / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    document = read_json(path)
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document


def _text(token: Any) -> str | None:
    """The text of a token written as a string or as an object with `content`."""
    if token is None or isinstance(token, str):
        return token
    if isinstance(token, dict) and isinstance(token.get("content"), str):
        return token["content"]
    raise ValueError(f"{_CONFIG}: a token must be a string or an object with content, got {token!r}")


def _extra_special(named: dict[str, Any]) -> tuple[str, ...]:
    extra: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = named.get(key) or []
        extra.extend(tokens.values() if isinstance(tokens, dict) else tokens)
    return tuple(dict.fromkeys(text for token in extra if (text := _text(token)) is not None))


def _added_tokens(values: dict[str, Any], plain: dict[str, Any]) -> dict[int, AddedToken]:
    added = {int(id_): AddedToken(text, normalized=False) for text, id_ in plain.items()}
    for id_, token in (values.get("added_tokens_decoder") or {}).items():
        flags = {key: value for key, value in token.items() if key not in ("content", "__type")}
        added[int(id_)] = AddedToken(_text(token), **flags)
    return dict(sorted(added.items()))


def _chat_templates(directory: Path, values: dict[str, Any]) -> dict[str, str]:
    stored = values.get("chat_template") or {}
    if isinstance(stored, str):
        stored = {"default": stored}
    elif isinstance(stored, list):
        stored = {entry["name"]: entry["template"] for entry in stored}
    templates = dict(stored)
    if (directory / _TEMPLATE).is_file():
        templates["default"] = (directory / _TEMPLATE).read_text(encoding="utf-8")
    return templates
