"""Cleaning of texts by named steps, in the order that one gives them.

    steps = parse_steps(["html", "nfc", "control", "spaces", "min_characters=20"])
    clean(" <b>Hi</b> ... ", steps)      # (the text or None, names of the steps that did something)

EDITS change a text, LIMITS remove it. Each is a pure function of one text, so that the work can be
spread over processes and a text is cleaned the same wherever it stands.
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from llm_jax.config import nearest

Step = tuple[str, float | None]  # name, and limit of a step that has one

BLANK = "blank"  # the step that removes what the others left nothing of

_BLOCKS = "address|article|blockquote|br|center|dd|div|dl|dt|footer|form|h[1-6]|header|hr|li|ol|option|p"
_BLOCKS += "|pre|section|table|tbody|td|tfoot|th|thead|title|tr|ul"
_INLINE = "a|abbr|b|big|body|button|code|em|embed|font|head|html|i|iframe|img|input|label|link|meta|nav"
_INLINE += "|nobr|s|select|small|span|strike|strong|sub|sup|tt|u|video"
_UNSEEN = re.compile(
    r"<!--.*?-->|<!doctype[^<>]*>|<(script|style)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL
)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCKS})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_CONTROL = {code: "" for code in [*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x200B, 0x2060, 0xFEFF]}
_CONTROL |= {code: "\n" for code in b"\n\x0b\x0c\r\x85"} | {9: "\t"}
_NGRAM = 10  # characters; Gopher looks at words (Rae et al. 2021), which Chinese does not mark


def strip_html(text: str) -> str:
    """Without comments, scripts and tags of HTML; entities become characters. `a < b` stays.

    Tags of blocks, such as <p>, become line ends.
    """
    text = _INLINE_TAG.sub("", _BLOCK_TAG.sub("\n", _UNSEEN.sub("", text)))
    return html.unescape(text)


def strip_control(text: str) -> str:
    """Without control characters, soft hyphens, zero-width spaces; line ends become LF, TAB stays.

    The joiners U+200C and U+200D stay: emoji, Persian and Indic scripts need them.
    """
    return text.replace("\r\n", "\n").translate(_CONTROL)


def squeeze_spaces(text: str) -> str:
    """Runs of spaces as one, none at the ends of lines, one blank line at most. Not for program code."""
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def count_characters(text: str) -> int:
    """Characters that are not white space."""
    return sum(map(len, text.split()))


def repeated_lines(text: str) -> float:
    """Share of the characters that stand in lines which stood in the text before."""
    lines = [line for line in text.split("\n") if line.strip()]
    again = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    return again / max(sum(map(len, lines)), 1)


def repeated_characters(text: str) -> float:
    """Share of the runs of ten characters that stood in the text before."""
    count = len(text) - _NGRAM + 1
    return 1 - len({text[i : i + _NGRAM] for i in range(count)}) / count if count > 0 else 0.0


EDITS = {
    "html": strip_html,
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),  # also makes （） and ， ASCII
    "control": strip_control,
    "spaces": squeeze_spaces,
}
LIMITS = {  # name: whether a text may stay
    "min_characters": lambda text, limit: count_characters(text) >= limit,
    "max_characters": lambda text, limit: count_characters(text) <= limit,
    "max_repeated_lines": lambda text, limit: repeated_lines(text) <= limit,
    "max_repeated_characters": lambda text, limit: repeated_characters(text) <= limit,
}


def parse_steps(given: Sequence[str]) -> tuple[Step, ...]:
    """Steps from "name" (of EDITS) and "name=limit" (of LIMITS); ValueError names the one nearest."""
    steps: list[Step] = []
    for step in given:
        name, equals, limit = step.partition("=")
        if name not in EDITS and name not in LIMITS:
            raise ValueError(f"clean={step!r}: no such step{nearest(name, [*EDITS, *LIMITS])}")
        if name in EDITS and equals:
            raise ValueError(f"clean={step!r}: expected {name} alone, it takes no number")
        if name in LIMITS and not re.fullmatch(r"\d*\.?\d+", limit):
            raise ValueError(f"clean={step!r}: expected {name}=NUMBER")
        steps.append((name, float(limit) if name in LIMITS else None))
    return tuple(steps)


def clean(text: str, steps: Sequence[Step]) -> tuple[str | None, list[str]]:
    """The text after all steps, and the names of those that changed it; or None, and those before the
    last name, which is of the step that removed it.
    """
    done = []
    for name, limit in steps:
        if limit is None:
            edited = EDITS[name](text)
            if edited != text:
                text = edited
                done.append(name)
        elif not LIMITS[name](text, limit):
            return None, [*done, name]
    return (text, done) if text.strip() else (None, [*done, BLANK])
