"""A text classifier from labelled text: settings in, a trained workdir and its dev predictions out.

file -> texts, labels -> tokenizer, trained on the training texts or a checkpoint's -> Examples
-> batches by length -> transformer with a classifier head, from scratch or from a checkpoint, trained by
llm_jax/train/loop.py -> predictions on held-out text
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.peft import peft_modules
from llm_jax.checkpoint.workdir import begin_run, load_base, load_start
from llm_jax.config import ClassificationConfig, ModelConfig
from llm_jax.data.loader import ExampleLoader, Transform, this_host, whole_to_device
from llm_jax.data.ngrams import character_ngrams
from llm_jax.data.packing import Batch, batches_by_length, length_buckets
from llm_jax.data.replacements import frequent_matches
from llm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llm_jax.data.sources import find_table, read_labelled, read_weights
from llm_jax.data.tasks import Example, classification_examples, encode_within, split
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from llm_jax.distributed import main_first, on_main
from llm_jax.models import Model, Params, Trainable, describe
from llm_jax.models.lora import LoraModel
from llm_jax.sharding import replicated
from llm_jax.train.loop import Task, fit
from llm_jax.train.masked_lm import pretrain_encoder
from llm_jax.train.metrics_log import Record
from llm_jax.train.objectives import classification_logits, classification_loss
from llm_jax.train.pretrained import Start, find_start
from llm_jax.train.tuning import export_adapter
from llm_jax.train.vector_start import vector_start

SHORTEST_BUCKET = 32  # tokens; shorter batches gain too little for one more program to compile


@dataclasses.dataclass(frozen=True)
class Rows:
    """Labelled texts, n of them."""

    texts: list[str]
    gold: np.ndarray  # [n] int32, the class
    parts: np.ndarray  # [n] int32, which part of a class: what is learnt; = gold without finer labels
    groups: np.ndarray | None = None  # [n] int32, by the column `balance_field`
    weights: np.ndarray | None = None  # [n], the column `weight_field`

    def at(self, places: Sequence[int]) -> "Rows":
        """The rows at these places."""
        groups, weights = (None if x is None else x[places] for x in (self.groups, self.weights))
        texts = [self.texts[i] for i in places]
        return Rows(texts, self.gold[places], self.parts[places], groups, weights)


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

    With LoRA the adapters are written to WORKDIR/adapter as PEFT reads them.
    echo: called with every record of metrics.jsonl. Errors in the data name the file and line.
    """
    workdir = Path(workdir)
    found = find_start(config.init_from) if config.init_from else None
    rows, held_out, labels, class_parts = _read(config, found.config.labels if found else ())
    if found is None:
        with main_first("tokenizer"):
            tokenizer = _tokenizer(config, rows.texts, workdir / "tokenizer")
    else:
        tokenizer = _load(found.tokenizer)
    model_config = _model_config(config, found, tokenizer, labels, class_parts)
    ngrams = character_ngrams(tokenizer, model_config)
    encode, longest = tokenizer.encode, config.max_tokens
    examples = classification_examples(rows.texts, rows.parts, encode, longest, ngrams)
    weights = row_weights(rows, balance_classes=config.balance_classes)
    examples = [dataclasses.replace(e, weight=w) for e, w in zip(examples, weights, strict=True)]
    dev = classification_examples(held_out.texts, held_out.gold, encode, longest, ngrams)

    transform = _augmentation(tokenizer, config)
    model = describe(dataclasses.replace(model_config, param_dtype="float32"))  # master weights
    begin = None if found is None else _beginning(config, found, model, mesh)
    begin_run(workdir, config, model_config)
    if found is not None:
        on_main("tokenizer", functools.partial(tokenizer.save, workdir / "tokenizer"))

    lengths = [len(e.tokens) for e in examples + dev]
    buckets = _buckets(longest if transform else max(lengths))
    loader = ExampleLoader(
        examples,
        config.batch_size,
        config.seed,
        buckets,
        transform=transform,
        **this_host(mesh),
    )
    steps = config.steps or round(config.epochs * loader.steps_per_epoch)
    objective = functools.partial(
        classification_loss, label_smoothing=config.label_smoothing, r_drop=config.r_drop
    )
    dev_batches = eval_batches(dev, config.batch_size, buckets)
    trained, start, frozen = begin or (model, None, ())
    first = None
    if config.embed_start == "cooccurrence":
        words = [example.tokens for example in examples]
        first = lambda model, key: vector_start(words, model, mesh, workdir, key)  # noqa: E731
        start = functools.partial(first, model)
    predict = make_predict(trained, dev_batches, labels, mesh, frozen)
    if config.pretraining is not None:
        texts, row = (rows.texts, held_out.texts), config.max_tokens
        stage = (config.pretraining, model, tokenizer, tokenizer.encode, *texts, row, mesh, workdir)
        start = functools.partial(pretrain_encoder, *stage, begin=first)
    task = Task(trained, objective, loader, lambda params: predict(params).metrics(), start, frozen)
    state = fit(task, config, mesh, workdir, steps=steps, echo=echo)
    export_adapter(workdir / "adapter", trained, state.best_params, base=config.init_from)
    return predict(state.best_params)


def _model_config(
    config: ClassificationConfig,
    found: Start | None,
    tokenizer: Tokenizer,
    labels: tuple[str, ...],
    class_parts: tuple[int, ...],
) -> ModelConfig:
    """The classifier: what was `found` with a head for the labels, or as the config has it."""
    classes = {"num_classes": len(labels), "labels": labels, "class_parts": class_parts}
    if found is None:
        assert config.model is not None
        return dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size, **classes)
    found.check("max_tokens", config.max_tokens, tokenizer)
    causal = found.config.causal
    pooling = config.pooling or ("last" if causal else "cls")
    if causal and pooling == "cls":
        raise ValueError(
            f"pooling='cls' with init_from={found.path!r}: expected another one; the first token of a "
            "decoder sees no other"
        )
    pooler = pooling == "cls"  # as BERT's and RoBERTa's own classifiers have it
    dropout = found.config.dropout if config.dropout is None else config.dropout
    changes = {"head": "classifier", "pooling": pooling, "pooler": pooler, "dropout": dropout}
    return dataclasses.replace(found.config, **changes, **classes)


def _beginning(
    config: ClassificationConfig, found: Start, model: Model, mesh: Mesh
) -> tuple[Model | LoraModel, Callable[[jax.Array], Params], tuple[Params, ...]]:
    """What trains of `model`, f(key) -> its first parameters, and what stays as it is beside them.

    The head of what was `found` is kept when it tells the same classes from the same vector. A new one
    is zero, as ViT's (Dosovitskiy et al. 2021): on large hidden states a random head is sure of wrong
    answers, which training has to mend first.
    """
    fields = ("head", "labels", "class_parts", "pooling", "pooler")
    kept = all(getattr(model.config, name) == getattr(found.config, name) for name in fields)
    redraw = () if kept else ("classifier/", "ngram_logits/")

    def begun(params: Params) -> Params:
        return params if kept else params | {"classifier": jax.tree.map(_zeros, params["classifier"])}

    if config.lora is None:
        load = functools.partial(load_start, found.path, model, mesh, redraw=redraw)
        return model, lambda key: begun(load(key)[0]), ()
    lora = LoraModel(model, config.lora)
    peft_modules(lora)  # raises where the adapters could not be written after the training
    base = begun(load_base(found.path, lora, mesh, jax.random.key(config.seed), redraw=redraw))
    return lora, functools.partial(lora.init, base, mesh), (base,)


def _zeros(x: jax.Array) -> jax.Array:
    """Zeros on the shards of `x`."""
    return 0.0 * x


def make_predict(
    model: Trainable,
    batches: Sequence[Batch],
    labels: tuple[str, ...],
    mesh: Mesh,
    frozen: tuple[Params, ...] = (),
) -> Callable[[Params], ClassificationResult]:
    """f(params) -> what the model says of the labelled rows, in the order of the batches."""

    @functools.partial(jax.jit, out_shardings=replicated(mesh))  # every host takes them all
    def probabilities(params, batch, *frozen):
        net = model.bind(params, *frozen)
        return jax.nn.softmax(classification_logits(net, batch, None), axis=-1)

    gold = np.concatenate([batch["labels"] for batch in batches])
    real = gold >= 0

    def predict(params: Params) -> ClassificationResult:
        with jax.set_mesh(mesh):
            on_device = (whole_to_device(batch, mesh) for batch in batches)
            probs = [jax.device_get(probabilities(params, b, *frozen)) for b in on_device]
        return ClassificationResult(labels, gold[real], np.concatenate(probs)[real])

    return predict


def eval_batches(examples: Sequence[Example], batch_size: int, buckets: Sequence[int]) -> list[Batch]:
    """All examples once, shortest first, in batches of `batch_size` rows.

    What the last batch lacks is filled with rows of padding (label -1, segment 0).
    """
    batches, tokens = [], [e.tokens for e in examples]
    ngrams = [e.ngrams for e in examples if e.ngrams is not None] or None
    for indices, batch in batches_by_length(tokens, batch_size, buckets, ngrams):
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


def _read(config: ClassificationConfig, known: tuple[str, ...] = ()):
    """(rows to train on, held-out rows, label names, how many parts each class has).

    The names are in the order of `known` if they are the same ones.
    """
    path, eval_path = Path(config.data), config.eval_data
    if path.is_dir():
        path, dev = find_table(path, "train"), find_table(path, "dev")
        eval_path = eval_path or dev
    fields = {"text_field": config.text_field, "label_field": config.label_field}
    texts, gold, labels = read_labelled(path, **fields)
    if set(labels) == set(known):
        gold, labels = np.array([known.index(name) for name in labels], np.int32)[gold], known
    fine, groups = (
        read_labelled(path, text_field=config.text_field, label_field=field)[1] if field else None
        for field in (config.fine_label_field, config.balance_field)
    )
    parts, class_parts = (gold, ()) if fine is None else number_parts(gold, fine)
    weights = read_weights(path, config.weight_field) if config.weight_field else None
    rows = Rows(texts, gold, parts, groups, weights)
    if eval_path:
        eval_texts, eval_gold, _ = read_labelled(eval_path, labels=labels, **fields)
        return rows, Rows(eval_texts, eval_gold, eval_gold), labels, class_parts
    places = range(len(texts))
    kept, held_out = split(places, config.eval_fraction, config.seed, text=texts.__getitem__)
    return rows.at(kept), rows.at(held_out), labels, class_parts


def _tokenizer(config: ClassificationConfig, texts: Sequence[str], directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, put there first where there is none: the given one, or a new one."""
    if not directory.is_dir() and not config.tokenizer:
        assert config.model is not None
        return train_sentencepiece(
            texts,
            directory,
            vocab_size=config.model.vocab_size,
            character_coverage=config.character_coverage,
            normalization=config.normalization,
            user_defined_symbols=frequent_matches(texts, config.symbols) if config.symbols else (),
            replacements=config.replacements,
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


def number_parts(gold: np.ndarray, fine: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Finer labels `fine` [n] of rows of class `gold` [n] -> parts [n] int32, how many each class has.

    Parts are numbered class after class, as `models.heads.fold_parts` has them; a finer label that
    occurs in two classes is a part of each. ValueError where no class is divided.
    """
    pairs, parts = np.unique(np.stack([gold, fine], axis=1), axis=0, return_inverse=True)
    counts = np.bincount(pairs[:, 0])
    if counts.max() == 1:
        raise ValueError("fine_label_field: it divides no label; expected a finer column, or ''")
    return parts.reshape(-1).astype(np.int32), tuple(counts.tolist())


def row_weights(rows: Rows, *, balance_classes: bool) -> np.ndarray:
    """What each row weighs in the loss, [n] with mean 1.

    Each row's own weight, if it has one. balance_classes: rows of a class are divided by their sum, so
    that all classes weigh the same. Groups of `balance_field` weigh 1 / sqrt of their number, half way
    there (as Mahajan et al. 2018 sample).
    """
    weights = np.ones(len(rows.gold)) if rows.weights is None else rows.weights.astype(np.float64)
    if balance_classes:
        weights = weights / np.maximum(np.bincount(rows.gold, weights), 1e-300)[rows.gold]
    if rows.groups is not None:
        weights /= np.sqrt(np.bincount(rows.groups)[rows.groups])
    return weights / weights.mean()


def _augmentation(tokenizer: Tokenizer, config: ClassificationConfig) -> Transform | None:
    """What training does to a text each time anew: a random segmentation, tokens left out; or None."""
    alpha, rate = config.subword_alpha, config.token_dropout
    if not (alpha or rate):
        return None
    sampler = tokenizer if isinstance(tokenizer, SentencePieceTokenizer) else None
    if alpha and sampler is None:
        raise ValueError(
            f"subword_alpha={alpha}: only a sentencepiece tokenizer samples segmentations; "
            "set subword_alpha=0, or train one (a model from scratch with tokenizer='')"
        )

    around = [id_ for id_ in (tokenizer.cls_id, tokenizer.sep_id) if id_ is not None]

    def transform(example: Example, rng: np.random.Generator) -> Example:
        tokens = example.tokens
        if alpha and sampler is not None:
            seed = int(rng.integers(2**32))
            encode = functools.partial(sampler.encode_sampled, alpha=alpha, seed=seed)
            tokens = encode_within(example.text, encode, config.max_tokens)
        special = np.isin(tokens, around)  # [CLS] is what a checkpoint reads the text from
        keep = rng.random(len(tokens)) >= rate
        some = (keep & ~special).any()
        return dataclasses.replace(example, tokens=tokens[keep | special] if some else tokens)

    return transform
