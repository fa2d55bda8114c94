"""A text classifier from labelled text: settings in, a trained workdir and its dev predictions out.

file -> texts, labels -> tokenizer trained on the training texts -> Examples -> batches by length
-> encoder with a classifier head, trained by llm_jax/train/loop.py -> predictions on held-out text
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import ClassificationConfig, TrainConfig
from llm_jax.data.loader import ExampleLoader, Transform, to_device
from llm_jax.data.packing import Batch, batches_by_length, length_buckets
from llm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llm_jax.data.sources import find_table, read_labelled
from llm_jax.data.tasks import Example, classification_examples, encode_within, split
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from llm_jax.models import Model, Params, describe
from llm_jax.train.loop import Task, fit, make_evaluate
from llm_jax.train.masked_lm import masked_lm_model, masked_lm_objective, with_trunk
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import classification_logits, classification_loss

SHORTEST_BUCKET = 32  # tokens; shorter batches gain too little for one more program to compile


@dataclasses.dataclass(frozen=True)
class ClassificationResult:
    """The held-out part as the trained model sees it: n texts, C classes."""

    labels: tuple[str, ...]
    gold: np.ndarray  # [n] int32
    probs: np.ndarray  # [n, C] float32

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest class of each text, [n] int."""
        return self.probs.argmax(axis=1)

    def metrics(self) -> dict[str, float]:
        """Mean -log p of the right class, the share of right answers, and macro-F1."""
        right = np.take_along_axis(self.probs, self.gold[:, None], axis=1)
        loss = -np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean()
        return {
            "eval/loss": float(loss),
            "eval/accuracy": float((self.gold == self.predicted).mean()),
            "eval/macro_f1": _macro_f1(self.gold, self.predicted),
        }


def run(
    config: ClassificationConfig,
    workdir: str | Path,
    mesh: Mesh,
    *,
    echo: Callable[[Record], None] | None = None,
) -> ClassificationResult:
    """Train (or resume) in `workdir`, then classify the held-out texts with what was trained.

    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    (texts, gold), held_out, labels = _read(config)
    tokenizer = _tokenizer(config, texts, workdir / "tokenizer")
    encode, longest = tokenizer.encode, config.max_tokens
    examples = classification_examples(texts, gold, encode, longest)
    dev = classification_examples(*held_out, encode, longest)

    size = tokenizer.vocab_size
    model_config = dataclasses.replace(
        config.model, vocab_size=size, num_classes=len(labels), labels=labels
    )
    begin_run(workdir, config, model_config)
    model = describe(dataclasses.replace(model_config, param_dtype="float32"))  # master weights

    transform = _augmentation(tokenizer, config)
    lengths = [len(e.tokens) for e in examples + dev]
    buckets = _buckets(longest if transform else max(lengths))
    loader = _loader(examples, config, buckets, transform)
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    objective = functools.partial(
        classification_loss,
        label_smoothing=config.label_smoothing,
        class_weights=_class_weights(gold, len(labels)) if config.balance_classes else (),
    )
    dev_batches = eval_batches(dev, config.batch_size, buckets)
    predict = make_predict(model, dev_batches, labels, mesh)
    start = None
    if config.pretrain is not None:
        data = (tokenizer, examples, dev, buckets)
        start = functools.partial(_pretrain, config, model, *data, mesh, workdir / "pretrain")
    task = Task(model, objective, loader, lambda params: predict(params).metrics(), start)
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)
    return predict(state.best_params)


def _pretrain(
    config: ClassificationConfig,
    model: Model,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    dev: Sequence[Example],
    buckets: Sequence[int],
    mesh: Mesh,
    workdir: Path,
    key: jax.Array,
) -> Params:
    """First parameters of the classifier `model`: masked-LM training on the texts, judged on dev.

    The head is drawn with `key`. The training has a workdir of its own, from which it resumes.
    """
    stage = config.pretrain
    assert stage is not None
    encoder = masked_lm_model(model.config)
    objective = masked_lm_objective(tokenizer, stage.mask_rate)
    whole_texts = dataclasses.replace(config, token_dropout=0.0)
    loader = _loader(examples, stage, buckets, _augmentation(tokenizer, whole_texts))
    batches = eval_batches(dev, stage.batch_size, buckets)
    task = Task(encoder, objective, loader, make_evaluate(encoder, objective, batches, mesh))
    steps = stage.steps or round(stage.epochs * loader.steps_per_epoch)
    trunk = fit(task, stage, mesh, workdir, steps=steps).best_params
    return with_trunk(trunk, model, mesh, key)


def _loader(
    examples: Sequence[Example],
    config: TrainConfig,
    buckets: Sequence[int],
    transform: Transform | None,
) -> ExampleLoader:
    return ExampleLoader(
        examples,
        config.batch_size,
        config.seed,
        buckets,
        transform=transform,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )


def make_predict(
    model: Model, batches: Sequence[Batch], labels: tuple[str, ...], mesh: Mesh
) -> Callable[[Params], ClassificationResult]:
    """f(params) -> what the model says of the labelled rows, in the order of the batches."""

    @jax.jit
    def probabilities(params, batch):
        return jax.nn.softmax(classification_logits(model.bind(params), batch, None), axis=-1)

    gold = np.concatenate([batch["labels"] for batch in batches])
    real = gold >= 0

    def predict(params: Params) -> ClassificationResult:
        with jax.set_mesh(mesh):
            probs = [jax.device_get(probabilities(params, to_device(b, mesh))) for b in batches]
        return ClassificationResult(labels, gold[real], np.concatenate(probs)[real])

    return predict


def eval_batches(examples: Sequence[Example], batch_size: int, buckets: Sequence[int]) -> list[Batch]:
    """All examples once, shortest first, in batches of `batch_size` rows.

    What the last batch lacks is filled with rows of padding (label -1, segment 0).
    """
    batches = []
    for indices, batch in batches_by_length([e.tokens for e in examples], batch_size, buckets):
        labels = np.full(batch_size, -1, np.int32)
        labels[: len(indices)] = [examples[i].label for i in indices]
        batches.append(batch | {"labels": labels})
    return batches


def _macro_f1(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of F1 over the classes that occur."""
    classes = np.unique(np.concatenate([gold, predicted]))[:, None]
    is_gold, is_predicted = gold == classes, predicted == classes
    right = (is_gold & is_predicted).sum(axis=1)
    return float((2.0 * right / (is_gold.sum(axis=1) + is_predicted.sum(axis=1))).mean())


def _read(config: ClassificationConfig):
    """((texts, labels), (held-out texts, labels), label names)."""
    path, eval_path = Path(config.data), config.eval_data
    if path.is_dir():
        path, dev = find_table(path, "train"), find_table(path, "dev")
        eval_path = eval_path or dev
    fields = {"text_field": config.text_field, "label_field": config.label_field}
    texts, gold, labels = read_labelled(path, **fields)
    if eval_path:
        eval_texts, eval_gold, _ = read_labelled(eval_path, labels=labels, **fields)
        return (texts, gold), (eval_texts, eval_gold), labels
    rows = list(zip(texts, gold.tolist(), strict=True))
    sides = split(rows, config.eval_fraction, config.seed, text=lambda row: row[0])
    kept, held_out = (tuple(map(list, zip(*side, strict=True))) for side in sides)
    return kept, held_out, labels


def _tokenizer(config: ClassificationConfig, texts: Sequence[str], directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, put there first where there is none: the given one, or a new one."""
    if not directory.is_dir() and not config.tokenizer:
        return train_sentencepiece(
            texts,
            directory,
            vocab_size=config.model.vocab_size,
            character_coverage=config.character_coverage,
        )
    if not directory.is_dir():
        _load(Path(config.tokenizer)).save(directory)
    return _load(directory)


def _load(path: Path) -> Tokenizer:
    """A tokenizer; by its sentencepiece model where it has one, as only that samples segmentations."""
    sentencepiece = path / "tokenizer.model"
    return load_tokenizer(sentencepiece if sentencepiece.is_file() else path)


def _buckets(longest: int) -> tuple[int, ...]:
    return length_buckets(-(-longest // 8) * 8, shortest=SHORTEST_BUCKET)


def _class_weights(gold: Sequence[int], classes: int) -> tuple[float, ...]:
    """n / (C n_c): every class weighs the same in the sum."""
    counts = np.maximum(np.bincount(np.asarray(gold), minlength=classes), 1)
    return tuple(float(w) for w in len(gold) / (classes * counts))


def _augmentation(tokenizer: Tokenizer, config: ClassificationConfig) -> Transform | None:
    """What training does to a text each time anew: a random segmentation, tokens left out; or None."""
    alpha, rate = config.subword_alpha, config.token_dropout
    if not (alpha or rate):
        return None
    sampler = tokenizer if isinstance(tokenizer, SentencePieceTokenizer) else None
    if alpha and sampler is None:
        raise ValueError(
            f"subword_alpha={alpha}: only a sentencepiece tokenizer samples segmentations; "
            "set subword_alpha=0 or tokenizer=''"
        )

    def transform(example: Example, rng: np.random.Generator) -> Example:
        tokens = example.tokens
        if alpha and sampler is not None:
            seed = int(rng.integers(2**32))
            encode = functools.partial(sampler.encode_sampled, alpha=alpha, seed=seed)
            tokens = encode_within(example.text, encode, config.max_tokens)
        keep = rng.random(len(tokens)) >= rate
        return dataclasses.replace(example, tokens=tokens[keep] if keep.any() else tokens)

    return transform
