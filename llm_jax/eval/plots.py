"""Pictures of results as PNG files: confusion matrix and loss curves. Needs no display.

Figures are made without pyplot, so nothing global is set and nothing stays in memory.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font

from llm_jax.train.metrics_log import read_metrics

# Tried in this order before any other font that has the glyphs; the first one is matplotlib's own.
_PREFERRED_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti SC",
    "Microsoft YaHei",
    "SimHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Arial Unicode MS",
)
# Draws a box with the name of the Unicode block for every character: it "has" all glyphs and shows none.
_PLACEHOLDER_FONT = "Last Resort"


def plot_confusion(
    matrix: np.ndarray,
    labels: Sequence[str],
    path: str | Path,
    *,
    fallback_labels: Sequence[str] | None = None,
) -> list[str]:
    """Draw a confusion matrix [C, C] (rows = true class) with counts and row percentages.

    labels: C class names. Where no installed font has all their characters, `fallback_labels` (say,
    romanised names; class indices if None) are drawn instead, with a note below the picture.
    Returns the names that were drawn. Raises ValueError if a number of names is not C.
    """
    matrix = np.asarray(matrix)
    names, note, font = _drawable(labels, fallback_labels)
    if matrix.shape != (len(names), len(names)) or len(labels) != len(names):
        raise ValueError(
            f"matrix has shape {matrix.shape}: expected one row and column per name in {names}"
        )
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.6 + 0.9 * len(names)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        text = f"{count:,}\n{100 * share[row, column]:.1f}%"
        color = "white" if share[row, column] > 0.5 else "#222222"
        axes.text(column, row, text, ha="center", va="center", color=color)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, fontproperties=font)
    axes.set_yticks(ticks, names, fontproperties=font)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    accuracy = np.trace(matrix) / max(matrix.sum(), 1)
    axes.set_title(f"accuracy {accuracy:.3f}, {matrix.sum():,} examples", fontsize=11)
    axes.set(xlabel="predicted" + (f"\n\n{note}" if note else ""), ylabel="true")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    _save(figure, path)
    return names


def plot_loss(metrics_jsonl: str | Path, path: str | Path) -> None:
    """Draw the losses of a run's metrics.jsonl against the step, and the learning rate below them.

    Lines carry "step" and "train/loss", "eval/loss" or "train/learning_rate". Raises ValueError if no
    line has a loss.
    """
    records = read_metrics(metrics_jsonl)
    train, evaluation = _series(records, "train/loss"), _series(records, "eval/loss")
    if not (train or evaluation):
        raise ValueError(
            f"{metrics_jsonl}: no line has 'train/loss' or 'eval/loss'; is this a run's file?"
        )
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    if train:
        axes.plot(*zip(*train, strict=True), color="#4477aa", lw=1.2, label="train")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, color="#cc3311", lw=1.5, marker="o", ms=4, label="evaluation")
        best = int(np.argmin(losses))
        axes.axhline(losses[best], color="#cc3311", lw=0.8, ls=":", alpha=0.7)
        axes.set_title(
            f"best evaluation loss {losses[best]:.4g} at step {steps[best]}", loc="left", fontsize=11
        )
    axes.legend(frameon=False)
    axes.set(ylabel="loss")
    if rates := _series(records, "train/learning_rate"):
        below.plot(*zip(*rates, strict=True), color="#228833", lw=1.2)
    below.set(xlabel="step", ylabel="learning rate")
    for panel in (axes, below):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


@functools.cache
def font_with(characters: str) -> FontProperties | None:
    """An installed font that has a glyph for each of `characters`, or None: no boxes, ever."""
    rank = {name: i for i, name in enumerate(_PREFERRED_FONTS)}
    candidates = [entry for entry in fontManager.ttflist if not entry.name.startswith(_PLACEHOLDER_FONT)]
    for entry in sorted(candidates, key=lambda e: (rank.get(e.name, len(rank)), e.style, str(e.weight))):
        font = FT2Font(entry.fname)
        if all(font.get_char_index(ord(c)) for c in characters):
            return FontProperties(fname=entry.fname)
    return None


def _drawable(
    labels: Sequence[str], fallback_labels: Sequence[str] | None
) -> tuple[list[str], str, FontProperties | None]:
    """(names that a font can draw, a note if they are not `labels`, that font)."""
    font = font_with("".join(sorted(set("".join(labels)))))
    if font is not None:
        return list(labels), "", font
    names = list(fallback_labels or (str(i) for i in range(len(labels))))
    kind = "other names" if fallback_labels else "class indices"
    return names, f"({kind} shown: no installed font can draw the labels)", None


def _series(records: Sequence[dict], name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in records if name in record]


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
