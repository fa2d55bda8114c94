"""How every script starts: flags that suggest the nearest name, errors that read like advice."""

import functools
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from llm_jax import distributed
from llm_jax.config import unknown_override
from llm_jax.host_memory import use_huge_pages

# Bad input, a disk, a loss that is not finite, too little memory: not bugs.
ADVICE = (ValueError, OSError, FloatingPointError, MemoryError)


def run(main: Callable[[list[str]], None], *, huge_pages: bool = False) -> None:
    """`app.run(main)`, in which the errors of `ADVICE` end the script with their message and status 2.

    Such a message says what to do, so it stands alone on standard error, as `NAME.py: MESSAGE`; the
    traceback comes above it with --verbosity=1. Other exceptions are bugs and keep their traceback.
    Warnings and worse are logged, unless --verbosity says otherwise. Where the environment describes
    several processes they come together first, and go on only with the same code and command line.
    huge_pages: of a script that trains; see `host_memory.use_huge_pages`.
    """
    if huge_pages:
        use_huge_pages()
    _advising(_run)(main)


def _run(main: Callable[[list[str]], None]) -> None:
    """`run`, but for errors at the start."""

    def agreed(argv: list[str]) -> None:
        distributed.agree("code", distributed.code(), "Install the same versions for all of them.")
        line = {"arguments": sys.argv[1:]}
        distributed.agree("command line", line, "Start all of them with the same command.")
        main(argv)

    with distributed.member():
        app.run(_advising(agreed), flags_parser=_advising(_parse_flags))


def _advising(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`function`, whose errors of `ADVICE` end the program as `run` says."""

    @functools.wraps(function)
    def call(argument: Any) -> Any:
        try:
            return function(argument)
        except ADVICE as error:
            hint = " (--verbosity=1 shows the traceback)"
            if int(flags.FLAGS["verbosity"].value or 0) >= logging.DEBUG:
                traceback.print_exc()
                hint = ""
            print(f"{Path(sys.argv[0]).name}: {error}{hint}", file=sys.stderr)
            sys.exit(2)

    return call


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's flag parsing; ValueError that says what to do about a `--config.a.b=v` that cannot be."""
    if any(word.split("=")[-1] == "None" for word in argv):
        problem = unknown_override(argv)  # absl would end the program with what ml_collections says
        if problem is not None:
            raise ValueError(problem)
    try:
        rest = app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # as ml_collections tells of an unknown setting
        problem = unknown_override(argv)
        if problem is None:
            raise
        raise ValueError(problem) from error
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl would take INFO
    return rest


def show(record: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a record in one line: an object of JSON, or names and values."""
    text = "  ".join(f"{name} {value}" for name, value in record.items())
    print(json.dumps(record) if as_json else text, flush=True)
