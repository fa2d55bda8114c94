"""Answers to questions on a text: a trained encoder with a span head, text in, stretches of it out.

reader = Reader.load("runs/qa", make_mesh())   # a workdir, or a Hugging Face directory
for span in reader.answer("谁写的?", text, count=3):
    print(span.text, span.start, span.end, span.score)
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_config, load_hf, resolve
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.config import QuestionAnsweringConfig, from_dict
from llm_jax.data.fast_tokenizer import FastTokenizer
from llm_jax.data.loader import whole_to_device
from llm_jax.data.packing import row_batches
from llm_jax.data.question_answering import (
    Question,
    Reading,
    Span,
    choose,
    features,
    reading_of,
)
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.models import Model, Params, describe
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import fetch

MOST_TOKENS = 384  # of a row, for a Hugging Face model: what extractive readers are trained with


class Reader:
    """An encoder with a span head, its tokenizer, and how it was trained to read.

    Raises ValueError where the model has no span head or the tokenizer does not give places in the text.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        reading: Reading,
        mesh: Mesh,
        *,
        batch_size: int = 8,
    ):
        if model.config.head != "span":
            raise ValueError(
                f"head={model.config.head!r} finds no answers; expected a span head, such as "
                "configs/question_answering.py trains"
            )
        if not isinstance(tokenizer, FastTokenizer):
            raise ValueError("answers need a tokenizer with a tokenizer.json or a BERT vocab.txt")
        self.model, self.params, self.mesh = model, params, mesh
        self.tokenizer, self.reading, self.batch_size = tokenizer, reading, batch_size
        typed = model.config.token_types > 1

        def logits(params, batch):
            types = batch["token_types"] if typed else None
            context = FullContext(batch["segment_ids"])
            net = model.bind(params)
            hidden, _ = net(batch["tokens"], batch["positions"], context, types)
            return net.spans(hidden).astype(jnp.float32)

        self._logits = jax.jit(logits)

    @classmethod
    def load(cls, path: str | Path, mesh: Mesh) -> "Reader":
        """From a workdir of scripts/train.py, its checkpoints/<step>, or a Hugging Face model.

        FileNotFoundError or ValueError, saying what was expected, where there is no such model.
        """
        path = Path(path).expanduser()
        if path.parent.name == "checkpoints" or (path / "checkpoints").is_dir():
            trained = load_trained(path, mesh)
            run = json.loads((trained.tokenizer.parent / "config.json").read_text(encoding="utf-8"))
            if run["config"].get("task") != "question_answering":
                raise ValueError(
                    f"{path} is a run of the task {run['config'].get('task')!r}; expected "
                    "'question_answering'"
                )
            reading = reading_of(from_dict(QuestionAnsweringConfig, run["config"]))
            return cls(trained.model, trained.params, load_tokenizer(trained.tokenizer), reading, mesh)
        directory = resolve(path)
        model = describe(load_config(directory))
        longest = min(MOST_TOKENS, model.config.max_positions)
        reading = Reading(longest, longest // 4, longest // 3, longest // 3, mark_matches=False)
        tokenizer, params = load_tokenizer(directory), load_hf(directory, model, mesh)
        return cls(model, params, tokenizer, reading, mesh)

    def answer(self, question: str, context: str, *, count: int = 1) -> list[Span]:
        """The `count` likeliest answers to one question, best first."""
        return self.answers([Question("", context, question, (), ())], count=count)[0]

    def answers(self, questions: Sequence[Question], *, count: int = 1) -> list[list[Span]]:
        """The `count` likeliest answers to each question."""
        if not questions:
            raise ValueError("there are no questions; expected one or more")
        parts = features(questions, self.tokenizer, self.reading)
        found = []
        with jax.set_mesh(self.mesh):
            for batch in row_batches(parts.rows, self.batch_size):
                on_device = whole_to_device(batch, self.mesh)
                found.append(fetch(self._logits(self.params, on_device)))
        return choose(questions, parts, np.concatenate(found), count, self.reading.answer_tokens)
