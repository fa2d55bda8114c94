"""Word vectors: the nearest words of a word, whatever model the table of vectors comes from.

    words = load_word_vectors("runs/word_vectors")  # skip-gram tables of scripts/train.py
    words = transformer_words("runs/demo_lm")       # the embedding table of a transformer
    words.neighbors("国王", 5)                       # [("皇帝", 0.71), ...]

Letters: V vocab, D embed.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.store import latest_step, restore_params
from llm_jax.config import WordVectorConfig, from_dict
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.infer.classify import TextClassifier
from llm_jax.models.skip_gram import SkipGram
from llm_jax.sharding import fetch


class WordVectors:
    """A table of vectors [V, D] float32, scaled to length 1, and the tokenizer whose pieces it is of.

    The words are the pieces, without the space that some begin with. Of pieces that spell one word
    ("king", " king") the first in the vocabulary, the most frequent one, is the word.
    """

    def __init__(self, table: np.ndarray, tokenizer: Tokenizer):
        length = np.linalg.norm(table, axis=1, keepdims=True)
        self.table = table / np.maximum(length, np.finfo(np.float32).tiny)
        self.tokenizer = tokenizer

    @functools.cached_property
    def words(self) -> dict[str, int]:
        """Word -> id; special tokens, bytes and punctuation are none."""
        special = set(self.tokenizer.special_tokens.values())
        found: dict[str, int] = {}
        for id_ in range(min(self.tokenizer.vocab_size, len(self.table))):
            word = "" if id_ in special else self.tokenizer.decode([id_]).strip()
            if any(c.isalnum() for c in word) and not word.startswith("##"):
                found.setdefault(word, id_)
        return found

    def vector(self, text: str) -> np.ndarray:
        """The vector of a word, or the mean vector of a text's tokens; [D], of length 1."""
        if text in self.words:
            return self.table[self.words[text]]
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise ValueError(f"text {text!r} has no tokens; expected a word or a text")
        mean = self.table[ids].mean(axis=0)
        return mean / max(float(np.linalg.norm(mean)), np.finfo(np.float32).tiny)

    def neighbors(self, text: str, count: int) -> list[tuple[str, float]]:
        """The `count` words of the largest cosine with the text, without the text itself."""
        words = [word for word in self.words if word != text]
        ids = [self.words[word] for word in words]
        return nearest(self.vector(text), words, self.table[ids], count)


def nearest(
    vector: np.ndarray, names: Sequence[str], table: np.ndarray, count: int
) -> list[tuple[str, float]]:
    """(name, cosine) of the `count` rows nearest to `vector` [D], best first; all of length 1."""
    cosines = table @ vector
    best = np.argsort(-cosines, kind="stable")[:count]
    return [(names[int(i)], float(cosines[i])) for i in best]


def load_word_vectors(workdir: str | Path, mesh: Mesh) -> WordVectors:
    """The vectors that a run of the task "word_vectors" has trained, of its newest step.

    FileNotFoundError or ValueError, saying what was expected, where there is no such run.
    """
    workdir = Path(workdir).expanduser()
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} has no config.json: expected the --workdir of a run")
    settings = json.loads(path.read_text(encoding="utf-8"))["config"]
    if settings.get("task") != "word_vectors":
        raise ValueError(
            f"{workdir} is a run of the task {settings.get('task')!r}; expected 'word_vectors', such as "
            "configs/word_vectors.py trains"
        )
    config, tokenizer = from_dict(WordVectorConfig, settings), load_tokenizer(workdir / "tokenizer")
    step = latest_step(workdir / "checkpoints")
    if step is None:
        raise FileNotFoundError(f"{workdir}/checkpoints holds no finished checkpoint; train first")
    directory = workdir / "checkpoints" / str(step)
    item = "ema" if (directory / "ema").is_dir() else "params"
    model = SkipGram(tokenizer.vocab_size, config.embed_dim)
    params = restore_params(directory, model, mesh, item=item)
    return WordVectors(fetch(model.bind(params).centers), tokenizer)


def transformer_words(encoder: TextClassifier) -> WordVectors:
    """The embedding table of a loaded transformer as word vectors."""
    table = fetch(encoder.params["embed"]["tokens"]).astype(np.float32)
    return WordVectors(table, encoder.tokenizer)
