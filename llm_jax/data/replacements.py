"""Replacing parts of a text before it is cut into tokens: links, names of users, authors of replies.

What differs from text to text and says little is given one token, so that there is something to learn
about it. The pairs belong to the tokenizer, which applies them to whatever it is asked to encode.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

Replacements = Sequence[tuple[str, str]]  # (regular expression, text to put in place of what it finds)


def replacer(pairs: Replacements) -> Callable[[str], str]:
    """f(text) -> the text after each pair in turn; `text` of a pair stands for itself, "\\1" too.

    ValueError where a pair is no pair of texts, or has no regular expression that finds something.
    """
    compiled = [_compiled(*_checked(pair)) for pair in pairs]

    def replace(text: str) -> str:
        for pattern, by in compiled:
            text = pattern.sub(by, text)
        return text

    return replace


def frequent_matches(texts: Iterable[str], pattern: str, *, least: int = 5) -> list[str]:
    """What `pattern` finds at least so many times in all texts, the most frequent first."""
    counts: Counter[str] = Counter()
    finder = _pattern(pattern)
    for text in texts:
        counts.update(match.group() for match in finder.finditer(text))
    found = [text for text, count in counts.items() if count >= least]
    return sorted(found, key=lambda text: (-counts[text], text))


def _checked(pair: Sequence[str]) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise ValueError(f"replacements: {pair!r} is no pair of a regular expression and a text")
    return pair[0], pair[1]


def _compiled(pattern: str, by: str) -> tuple[re.Pattern[str], Callable[[re.Match[str]], str]]:
    return _pattern(pattern), lambda _: by


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if compiled.match("") is not None:
        raise ValueError(f"{pattern!r} finds the empty text; expected a character at least")
    return compiled
