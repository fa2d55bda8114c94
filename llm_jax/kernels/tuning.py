"""Sizes of kernels that were found by search (`scripts/tune.py`), where they beat the kernel's rule.

Tables are `tuned/KERNEL.json`: generation -> key -> {"case": options of the kernel's case, "sizes":
{name: number}, "estimate_us": what it costs with them, "rule_us": with those of the rule}; "measured_us"
and "measured_rule_us" besides, where it ran on such a chip. What is not in a table goes by the rule.
"""

import functools
import importlib.resources
import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
TIMES = ("estimate_us", "rule_us", "measured_us", "measured_rule_us")
FOLDER = importlib.resources.files("llm_jax") / "kernels" / "tuned"


class Tuning(NamedTuple):
    """What to try for one kind of chip and one shape.

    options: of the kernel's `case`. candidates: options that set its sizes; the first one by the rule.
    guards: options under which the sizes are used as well and must not cost more than the rule's.
    """

    key: str
    options: dict[str, Any]
    candidates: list[dict[str, int]]
    guards: tuple[dict[str, Any], ...] = ()


def table_key(*words: object, **sizes: int) -> str:
    """ "bfloat16 dim=128 tokens=4096" of ("bfloat16", dim=128, tokens=4096)."""
    return " ".join([*map(str, words), *(f"{name}={size}" for name, size in sizes.items())])


def bucket(count: int) -> int:
    """The power of two that stands for so many tokens or rows: the next one."""
    return 1 << max(count - 1, 0).bit_length()


def tuned(kernel: str, generation: str, key: str, *kinds: Callable[..., T]) -> T | None:
    """The sizes of this key, as the one of `kinds` that has fields of their names; None = by the rule.

    Raises ValueError for a broken table and for names that no kind has.
    """
    entry = _table(kernel).get(generation, {}).get(key)
    if entry is None:
        return None
    for kind in kinds:
        if set(inspect.signature(kind).parameters) == set(entry["sizes"]):
            return kind(**entry["sizes"])
    names = " or ".join(str(tuple(inspect.signature(kind).parameters)) for kind in kinds)
    raise ValueError(
        f"tuned/{kernel}.json, {generation}, {key!r}: sizes {entry['sizes']}; expected {names}; run "
        "scripts/tune.py again"
    )


def distinct(candidates: list[dict[str, int]]) -> list[dict[str, int]]:
    """Without those that came before."""
    return [x for i, x in enumerate(candidates) if x not in candidates[:i]]


@functools.lru_cache
def _table(kernel: str) -> dict[str, dict[str, dict[str, Any]]]:
    file = FOLDER / f"{kernel}.json"
    return read_table(file.read_text(), file.name) if file.is_file() else {}


def read_table(text: str, name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """A table from its text. Raises ValueError, with the place, for what is no table."""
    try:
        table = json.loads(text)
    except ValueError as error:
        raise ValueError(f"tuned/{name}: no JSON ({error}); run scripts/tune.py again") from error
    for generation, entries in _items(table, f"tuned/{name}"):
        for key, entry in _items(entries, f"tuned/{name}, {generation}"):
            _check(entry, f"tuned/{name}, {generation}, {key!r}")
    return table


def _items(table: Any, place: str):
    if not isinstance(table, dict):
        raise ValueError(f"{place}: found {table!r:.60}, expected an object; run scripts/tune.py again")
    return table.items()


def _check(entry: Any, place: str) -> None:
    """An entry has sizes and times."""
    fields = dict(_items(entry, place))
    sizes, case = fields.pop("sizes", None), fields.pop("case", None)
    fine = isinstance(sizes, dict) and sizes and all(type(x) is int and x > 0 for x in sizes.values())
    if not fine:
        raise ValueError(f"{place}: sizes={sizes!r}; expected names with whole numbers above 0")
    if not isinstance(case, dict):
        raise ValueError(f"{place}: case={case!r}; expected options of the kernel's case")
    wrong = {k: v for k, v in fields.items() if k not in TIMES or not isinstance(v, int | float)}
    if wrong or not {"estimate_us", "rule_us"} <= set(fields):
        raise ValueError(f"{place}: found {fields}; expected numbers estimate_us and rule_us of {TIMES}")
