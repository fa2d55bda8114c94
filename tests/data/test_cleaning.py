"""Each step does what its name says and nothing else, judged by other implementations of the same."""

import html
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data import cleaning
from llm_jax.data.cleaning import EDITS, LIMITS, clean, parse_steps
from tests.data.multilingual import TEXTS

texts = st.one_of(
    st.text(max_size=80), st.text(" \t\n\r\u3000ab你。", max_size=40), st.sampled_from(TEXTS)
)


# Edits


@given(st.sampled_from(sorted(set(EDITS) - {"html"})), texts)
def test_an_edit_has_no_more_to_do_on_its_own_result(name, text):
    """But for html: `&amp;lt;` is what a page about entities says."""
    edited = EDITS[name](text)
    assert EDITS[name](edited) == edited


BLOCKS, INLINE = ("p", "div", "LI", "h2", "td"), ("b", "a", "span", "EM", "sup")
ATTRIBUTES = ("", ' class="x y"', " href='/a?b=1&amp;c=2'", "\n id=q")
leaves = st.one_of(
    st.text("ab <>&;\"'你 ", max_size=12).map(html.escape),
    st.sampled_from(
        ["<br>", "<br/>", "<hr />", "<!-- <p>note</p>\n -->", "<script>if (a<b) x()</script>"]
    ),
    st.sampled_from(
        ["<style type='t'>p > b {}</style>", "<img src=x>", "&nbsp;&eacute;&#20320;", "3 &lt; 4"]
    ),
)
pages = st.recursive(
    leaves,
    lambda inner: st.builds(
        lambda tag, attributes, parts: f"<{tag}{attributes}>{''.join(parts)}</{tag}>",
        st.sampled_from(BLOCKS + INLINE),
        st.sampled_from(ATTRIBUTES),
        st.lists(inner, max_size=4),
    ),
    max_leaves=12,
)


class Reader(HTMLParser):
    """The text of a page as Python's own parser sees it."""

    def __init__(self, page):
        super().__init__()
        self.parts, self.hidden = [], 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("script", "style")
        self._tag(tag)

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")
        self._tag(tag)

    def handle_startendtag(self, tag, attrs):
        self._tag(tag)

    def _tag(self, tag):
        self.parts += ["\n"] if tag in ("br", "hr", *map(str.lower, BLOCKS)) else []

    def handle_data(self, data):
        self.parts += [] if self.hidden else [data]


@given(pages)
def test_html_becomes_the_text_that_a_parser_finds(page):
    assert cleaning.strip_html(page).split() == "".join(Reader(page).parts).split()


@pytest.mark.parametrize(
    "text",
    ["a < b and c > d", "List<String> x", "x <3 you", "<你好>", "1<2>0", "<unk>", "if (a<b)"],
)
def test_what_is_no_tag_stays(text):
    assert cleaning.strip_html(text) == text


def test_blocks_end_lines_and_entities_are_read_once():
    assert (
        cleaning.strip_html("<!DOCTYPE html><p>你<b>好</b></p>x<br>y &amp;lt; z")
        == "\n你好\nx\ny &lt; z"
    )


@given(texts)
def test_control_characters_go_and_line_ends_are_lf(text):
    found = cleaning.strip_control(text)
    assert all(c in "\t\n" or unicodedata.category(c) != "Cc" for c in found)
    kept = [c for c in text if unicodedata.category(c) not in ("Cc", "Cf")]
    assert [c for c in found if c in kept] == kept


def test_the_joiners_of_emoji_and_persian_stay():
    text = "👨‍👩‍👧 می‌خواهم"
    assert cleaning.strip_control(text) == text
    assert cleaning.strip_control("a\u200bb\u00adc\ufeff\x00") == "abc"
    assert cleaning.strip_control("1\r\n2\r3\x0c4\x855\t6") == "1\n2\n3\n4\n5\t6"


@given(texts)
def test_spaces_are_squeezed_and_words_stay(text):
    found = cleaning.squeeze_spaces(text)
    assert found.split() == text.split() and found == found.strip()
    assert not any(pair in found for pair in ("  ", "\n\n\n", " \n", "\n ", "\t", "\u3000"))
    assert ("\n" in found) <= ("\n" in text)


# Limits


@given(texts)
def test_characters_are_counted_without_white_space(text):
    assert cleaning.count_characters(text) == sum(not c.isspace() for c in text)


@given(st.lists(st.sampled_from(["", " ", "a", "bb", "你好你好"]), max_size=12).map("\n".join))
def test_repeated_lines_are_those_that_stood_before(text):
    again, seen = 0, set()
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines:
        again += len(line) * (line in seen)
        seen.add(line)
    assert cleaning.repeated_lines(text) == pytest.approx(again / max(sum(map(len, lines)), 1))


@given(st.text("ab", max_size=60))
def test_repeated_characters_are_runs_that_stood_before(text):
    runs = [text[i : i + 10] for i in range(len(text) - 9)]
    again = sum(run in runs[:i] for i, run in enumerate(runs))
    assert cleaning.repeated_characters(text) == pytest.approx(again / max(len(runs), 1))


@given(texts, st.floats(0, 1), st.integers(0, 40))
def test_limits_are_inclusive(text, share, count):
    assert LIMITS["max_repeated_characters"](text, share) == (
        cleaning.repeated_characters(text) <= share
    )
    assert LIMITS["min_characters"](text, count) == (cleaning.count_characters(text) >= count)
    assert LIMITS["max_characters"](text, count) != LIMITS["min_characters"](text, count + 1)


# All of them


def test_steps_are_done_in_order_and_named():
    steps = parse_steps(["html", "nfkc", "control", "spaces", "min_characters=4"])
    assert clean(" <b>Ｈｉ</b>  there\x00 ", steps) == (
        "Hi there",
        ["html", "nfkc", "control", "spaces"],
    )
    assert clean("plain text", steps) == ("plain text", [])
    assert clean("<b>abc</b>", steps) == (None, ["html", "min_characters"])
    # Tags count where the limit comes first.
    assert clean("<b>abc</b>", parse_steps(["min_characters=4", "html"])) == ("abc", ["html"])
    assert clean("<p></p>", parse_steps(["html"])) == (None, ["html", "blank"])
    assert clean(" \n", ()) == (None, ["blank"])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("htlm", "did you mean html"),
        ("nfc=1", "nfc alone"),
        ("min_characters", "min_characters=NUMBER"),
        ("min_characters=few", "min_characters=NUMBER"),
        ("max_repeated_lines=-1", "max_repeated_lines=NUMBER"),
        ("", "no such step"),
    ],
)
def test_what_is_no_step_is_refused(step, message):
    with pytest.raises(ValueError, match=message):
        parse_steps([step])
