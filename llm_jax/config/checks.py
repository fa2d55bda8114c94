"""Checks of settings: errors that name the field, its value and what was expected."""

from typing import Any

from llm_jax.config.reading import nearest


def require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r}: expected {expected}")


def choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r}: expected one of {allowed}{nearest(value, allowed)}")


def one_beginning(config: Any) -> None:
    """A run starts from `init_from` or has a `model` to train from scratch; not both, not neither."""
    if config.model is None:
        require(config.init_from != "", "init_from", "", "a trained model, or a `model` from scratch")
    else:
        require(config.init_from == "", "init_from", config.init_from, "'' with model, or model=None")


def unread(config: Any, names: str | tuple[str, ...], by: str, where: str = "") -> None:
    """Refuse settings that were changed although nothing reads them: ValueError that has them all."""
    fields = type(config).__dataclass_fields__
    names = (names,) if isinstance(names, str) else names
    changed = [name for name in names if getattr(config, name) != fields[name].default]
    found = ", ".join(f"{where}{name}={getattr(config, name)!r}" for name in changed)
    defaults = ", ".join(repr(fields[name].default) for name in changed)
    if len(changed) == 1:
        raise ValueError(f"{found}: expected its default {defaults}: {by} does not read it")
    if changed:
        raise ValueError(f"{found}: expected the defaults {defaults}: {by} does not read them")
