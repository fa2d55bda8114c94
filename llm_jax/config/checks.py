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


def unread(config: Any, name: str, by: str, where: str = "") -> None:
    """Refuse a setting that was changed although nothing reads it."""
    default, value = type(config).__dataclass_fields__[name].default, getattr(config, name)
    expected = f"its default {default!r}: {by} does not read it"
    require(value == default, f"{where}{name}", value, expected)
