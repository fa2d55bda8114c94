"""Texts in, class probabilities or sentence vectors out.

    classifier = TextClassifier.load("runs/sentiment")  # a workdir, or a Hugging Face directory
    for result in classifier.classify(["我是一个热爱编程的程序员。"]):
        print(result.label, result.probs)
    vectors = classifier.embed(["一句话", "另一句话"])  # [2, D]

Texts are sorted by length and padded to a few bucketed lengths, so few programs are compiled.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_config, load_hf, resolve
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.compress.quantize import quantize, read_weights
from llm_jax.data.loader import whole_to_device
from llm_jax.data.ngrams import character_ngrams
from llm_jax.data.packing import Batch, batches_by_length, length_buckets
from llm_jax.data.tasks import encode_within
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.models import Model, Params, describe
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import data_shards, fetch

Rows = tuple[np.ndarray, Batch]  # places in the list of texts [b]; the batch, [B >= b, T]
Program = Callable[[Params, dict[str, jax.Array]], jax.Array]


def make_classify(model: Model) -> Program:
    """f(params, batch) -> class probabilities [B, C] float32, jit-compiled.

    batch: tokens, segment_ids, positions [B, T] int32, one text a row, padded right (segment 0); ngrams
    [B, N] int32 for a model with `ngram_orders`.
    """

    @jax.jit
    def probabilities(params, batch):
        net, mask = model.bind(params), batch["segment_ids"]
        hidden, context = net(batch["tokens"], batch["positions"], FullContext(mask))
        logits = net.classify(hidden, mask, context, batch.get("ngrams"))
        return jax.nn.softmax(logits, axis=-1)

    return probabilities


def make_embed(model: Model) -> Program:
    """f(params, batch) -> sentence vectors [B, D] float32, jit-compiled.

    The pooled (and, where the model has a pooler, projected) hidden states, not scaled to length 1.
    """

    @jax.jit
    def vectors(params, batch):
        net, mask = model.bind(params), batch["segment_ids"]
        hidden, _ = net(batch["tokens"], batch["positions"], FullContext(mask))
        return net.sentence(hidden, mask).astype(jnp.float32)

    return vectors


def classify(model: Model, params: Params, mesh: Mesh, batches: Iterable[Rows]) -> np.ndarray:
    """Class probabilities [n, C] float32 of the n texts in `batches`, in the order of the texts."""
    return _apply(make_classify(model), params, mesh, batches)


def embed(model: Model, params: Params, mesh: Mesh, batches: Iterable[Rows]) -> np.ndarray:
    """Sentence vectors [n, D] float32 of the n texts in `batches`, in the order of the texts."""
    return _apply(make_embed(model), params, mesh, batches)


@dataclasses.dataclass(frozen=True)
class Classified:
    """What the model says of one text."""

    text: str
    label: str  # the likeliest
    probs: dict[str, float]  # label -> probability, in the model's order


class TextClassifier:
    """A trained encoder or classifier with its tokenizer, on a mesh.

    labels: one for each class; () when the model has no classifier and can only `embed`.
    batch_size: rows at once, rounded up to a multiple of the mesh's data shards.
    max_tokens: longer texts lose their end; None = what the model's positions allow.

    Raises ValueError naming the argument that is out of range.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        mesh: Mesh,
        labels: Sequence[str],
        *,
        batch_size: int = 32,
        max_tokens: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more")
        self.model, self.params, self.tokenizer, self.mesh = model, params, tokenizer, mesh
        self.labels, shards = tuple(labels), data_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards
        self.max_tokens = model.config.max_positions if max_tokens is None else max_tokens
        if not 1 <= self.max_tokens <= model.config.max_positions:
            raise ValueError(
                f"max_tokens={max_tokens}: expected 1 to max_positions={model.config.max_positions}"
            )
        self.buckets = length_buckets(self.max_tokens)
        self._ngrams = character_ngrams(tokenizer, model.config)
        self._classify, self._embed = make_classify(model), make_embed(model)

    @classmethod
    def load(
        cls, path: str | Path, mesh: Mesh, *, batch_size: int = 32, weights: str = ""
    ) -> "TextClassifier":
        """From a workdir of scripts/train.py, its checkpoints/<step>, or a Hugging Face model.

        weights: as `LLM` has them.
        FileNotFoundError or ValueError, saying what was expected, where there is no such model.
        """
        (param_dtype, scheme), path = read_weights(weights), Path(path).expanduser()
        if path.parent.name == "checkpoints" or (path / "checkpoints").is_dir():
            trained = load_trained(path, mesh, param_dtype=param_dtype)
            tokenizer = load_tokenizer(trained.tokenizer)
            params = trained.params
            return cls(
                trained.model,
                quantize(params, trained.model, mesh, scheme) if scheme else params,
                tokenizer,
                mesh,
                trained.labels,
                batch_size=batch_size,
                max_tokens=trained.max_tokens,
            )
        directory = resolve(path)
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"{directory} is no model: expected the --workdir of scripts/train.py (with "
                "checkpoints/) or a Hugging Face directory (with config.json)"
            )
        model = describe(dataclasses.replace(load_config(directory), param_dtype=param_dtype))
        tokenizer, labels = load_tokenizer(directory), _labels(model)
        params = load_hf(directory, model, mesh, scheme=scheme)
        return cls(model, params, tokenizer, mesh, labels, batch_size=batch_size)

    def classify(self, texts: Sequence[str]) -> list[Classified]:
        """One result for each text; ValueError when the model has no classifier head."""
        if not self.labels:
            raise ValueError(
                f"head={self.model.config.head!r} has no classes; expected a sequence classifier, "
                "such as configs/sentiment.py trains"
            )
        probs = _apply(self._classify, self.params, self.mesh, self.batches(texts))
        return [
            Classified(
                text, self.labels[row.argmax()], dict(zip(self.labels, row.tolist(), strict=True))
            )
            for text, row in zip(texts, probs, strict=True)
        ]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Sentence vectors [n, D] float32, as `make_embed` makes them."""
        return _apply(self._embed, self.params, self.mesh, self.batches(texts))

    def batches(self, texts: Sequence[str]) -> Iterator[Rows]:
        """The texts as padded batches, shortest first; what is too long loses its end."""
        encode, longest = self.tokenizer.encode, self.max_tokens
        tokens = [encode_within(text, encode, longest) for text in texts]
        ngrams = None if self._ngrams is None else [self._ngrams(row) for row in tokens]
        return batches_by_length(tokens, self.batch_size, self.buckets, ngrams)


def _apply(program: Program, params: Params, mesh: Mesh, batches: Iterable[Rows]) -> np.ndarray:
    """`program` on every batch; its rows [n, ...] in the order of the texts."""
    places, parts = [], []
    with jax.set_mesh(mesh):
        for rows, batch in batches:
            out = program(params, whole_to_device(batch, mesh))
            places.append(rows)
            parts.append(fetch(out)[: len(rows)])
    if not parts:
        raise ValueError("there are no texts; expected one or more")
    found = np.concatenate(parts)
    ordered = np.empty_like(found)
    ordered[np.concatenate(places)] = found
    return ordered


def _labels(model: Model) -> tuple[str, ...]:
    """Names of the classes; LABEL_0, ... (as transformers does) where the model has none."""
    config = model.config
    if config.head != "classifier":
        return ()
    return config.labels or tuple(f"LABEL_{i}" for i in range(config.num_classes))
