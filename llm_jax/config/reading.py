"""The one way to make settings from a mapping or a config file, and back.

`from_dict` builds a frozen dataclass from nested mappings and refuses unknown keys with the nearest
name; `to_dict` is its inverse (JSON-ready). absl's `--config.a.b=v` overrides go through
`ml_collections`.
"""

import dataclasses
import difflib
import re
import runpy
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict


def from_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """A frozen dataclass `cls` from nested mappings; unknown keys and wrong types are errors.

    Raises ValueError that names the key, what was expected and the nearest known name.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{where}.{key} is not a setting{nearest(key, fields)}")
        built[key] = _convert(hints[key], value, f"{where}.{key}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in built
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}, which {cls.__name__} needs")
    return cls(**built)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config dataclass, tuples as lists: what config.json holds."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(config)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """The `ml_collections` form that a file under configs/ returns, so that flags can override it.

    A None that may be a number or a text becomes a placeholder, as a flag overrides no plain None.
    """
    hints = typing.get_type_hints(type(config))
    fields = {
        f.name: _overridable(getattr(config, f.name), hints[f.name]) for f in dataclasses.fields(config)
    }
    return ml_collections.ConfigDict(fields, type_safe=False)


def _overridable(value: Any, hint: Any) -> Any:
    """A setting of the type `hint` as `to_config_dict` has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_config_dict(value)
    plain = [kind for kind in (int, float, str) if kind in typing.get_args(hint)]
    return config_dict.placeholder(plain[0]) if value is None and plain else value


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?' for the closest known name, or the list of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def unknown_override(argv: typing.Iterable[str]) -> str | None:
    """What is wrong with the first `--config.a.b` in argv that the `--config` file cannot take.

    It has no such setting; or it has a group of settings there and the value is None, which
    ml_collections does not put in the place of a group.
    """
    text = " ".join(argv)
    path = re.search(r"(?:^|\s)--?config[= ](\S+)", text)
    if path is None:
        return None
    file, _, argument = path[1].partition(":")  # --config=FILE:ARGUMENT calls get_config(ARGUMENT)
    config = runpy.run_path(file)["get_config"](*([argument] if argument else []))
    for name, value in re.findall(r"(?:^|\s)--?(?:no)?config\.([\w.]+)(?:(?:=| (?!-))(\S+))?", text):
        node = config
        for key in name.split("."):
            if not isinstance(node, ml_collections.ConfigDict):
                return f"--config.{name}: {path[1]} has a value there, not a group of settings"
            if key not in node:
                return f"--config.{name}: {path[1]} has no setting {key!r}{nearest(key, node.keys())}"
            node = node[key]
        if isinstance(node, ml_collections.ConfigDict) and value == "None":
            remedy = "take a config without it"
            if "epochs" in node:  # a stage of the training
                remedy = f"say --config.{name}.epochs=0" + f" --config.{name}.steps=0" * (node.steps > 0)
            return f"--config.{name}=None: {path[1]} has a group of settings there; {remedy}"
    return None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type: nested dataclasses, optionals, tuples, numbers, strings."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _convert(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where}={value!r}: expected {getattr(hint, '__name__', hint)}")
    return value
