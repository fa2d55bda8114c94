"""Pictures are written, not blank, and never show a box in place of a character."""

import json
import warnings

import numpy as np
import pytest
from matplotlib import image

from llm_jax.eval.plots import font_with, plot_confusion, plot_loss

MATRIX = np.array([[92, 6, 2], [9, 80, 11], [4, 16, 80]])
CHINESE = ("积极", "消极", "中性")


def shades(path) -> int:
    """Number of distinct colours in a picture: a blank one has 1."""
    pixels = (image.imread(path) * 255).astype(np.uint8)
    return len(np.unique(pixels.view(np.uint32)))  # red, green, blue and alpha as one number


def test_confusion_with_latin_labels(tmp_path):
    path = tmp_path / "plots" / "confusion.png"
    assert plot_confusion(MATRIX, ["positive", "negative", "neutral"], path) == [
        "positive",
        "negative",
        "neutral",
    ]
    assert shades(path) > 50


@pytest.mark.parametrize("fallback", [None, ("jiji", "xiaoji", "zhongxing")])
def test_chinese_labels_are_drawn_or_replaced(tmp_path, fallback):
    """matplotlib warns about each missing glyph, so a picture without warning has no boxes."""
    path = tmp_path / "confusion.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = plot_confusion(MATRIX, CHINESE, path, fallback_labels=fallback)
    expected = CHINESE if font_with("".join(sorted(set("".join(CHINESE))))) else fallback or "012"
    assert drawn == list(expected)
    assert shades(path) > 50


def test_no_font_has_an_unassigned_character():
    assert font_with("\U000e0fff") is None
    assert font_with("abc").get_name() == "DejaVu Sans"


def test_confusion_refuses_wrong_number_of_labels(tmp_path):
    with pytest.raises(ValueError, match=r"matrix has shape \(3, 3\)"):
        plot_confusion(MATRIX, ["a", "b"], tmp_path / "x.png")


def test_loss_curves(tmp_path):
    records = [{"step": s, "train/loss": 3 / s, "train/learning_rate": 1e-3} for s in range(1, 101)]
    records += [{"step": s, "eval/loss": 3.2 / s} for s in (50, 100)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 101, "tra')
    plot_loss(metrics, tmp_path / "loss.png")
    assert shades(tmp_path / "loss.png") > 50


@pytest.mark.parametrize("name", ["train/loss", "eval/loss"])
def test_one_curve_is_enough(tmp_path, name):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": s, name: 1 / s}) + "\n" for s in (1, 2, 3)))
    plot_loss(metrics, tmp_path / "loss.png")
    assert shades(tmp_path / "loss.png") > 10


def test_metrics_without_loss_are_refused(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "perf/tokens_per_s": 3.0}\n')
    with pytest.raises(ValueError, match="no line has 'train/loss'"):
        plot_loss(metrics, tmp_path / "loss.png")
