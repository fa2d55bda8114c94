"""The bundled Chinese sentiment set is what its card says: clean, balanced, varied, honestly split."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "configs" / "data" / "sentiment_zh"
LABELS = ("积极", "消极", "中性")
DOCUMENTED_SENTENCE = "我是一个热爱编程的程序员。"

Row = tuple[str, str]


def read_rows(split: str) -> list[Row]:
    """(label, text) of each line below the header."""
    header, *lines = (DATA / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    assert header == "label\ttext"
    return [(label, text) for label, text in (line.split("\t") for line in lines)]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return {split: read_rows(split) for split in ("train", "dev")}


@pytest.fixture(scope="module")
def texts(splits: dict[str, list[Row]]) -> list[str]:
    return [text for rows in splits.values() for _, text in rows]


def trigrams(text: str) -> frozenset[str]:
    return frozenset(text[i : i + 3] for i in range(len(text) - 2))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


@pytest.mark.parametrize(("split", "per_class"), [("train", 418), ("dev", 71)])
def test_classes_are_balanced(splits: dict[str, list[Row]], split: str, per_class: int) -> None:
    assert Counter(label for label, _ in splits[split]) == dict.fromkeys(LABELS, per_class)


def test_dev_is_about_fifteen_percent(splits: dict[str, list[Row]], texts: list[str]) -> None:
    assert 0.14 < len(splits["dev"]) / len(texts) < 0.16


def test_texts_are_clean_and_short(texts: list[str]) -> None:
    for text in texts:
        assert 5 <= len(text) <= 60, text
        assert text == text.strip() and text.isprintable(), text
        assert '"' not in text, text


def test_no_near_duplicates_within_or_across_splits(texts: list[str]) -> None:
    assert len(set(texts)) == len(texts)
    pairs = combinations([trigrams(text) for text in texts], 2)
    assert max(jaccard(a, b) for a, b in pairs) <= 0.5


def test_openings_vary(texts: list[str]) -> None:
    _, count = Counter(text[:4] for text in texts).most_common(1)[0]
    assert count < 0.015 * len(texts)


def test_documented_sentence_and_its_variants_are_held_out(texts: list[str]) -> None:
    """Nothing near it: a variant with one word swapped would share about half of its trigrams."""
    documented = trigrams(DOCUMENTED_SENTENCE)
    assert all(DOCUMENTED_SENTENCE.rstrip("。") not in text for text in texts)
    assert max(jaccard(documented, trigrams(text)) for text in texts) < 0.25
