"""Frozen, typed settings, and the one way to make them from a mapping or a config file.

A config is a tree of frozen dataclasses. `from_dict` builds one from nested mappings and refuses
unknown keys with the nearest name; `to_dict` is its inverse (JSON-ready). Files under configs/ are
Python with `get_config()`; absl's `--config.a.b=v` overrides go through `ml_collections`.
No layer below this file has a default for a hyperparameter.
"""

import dataclasses
import difflib
import re
import runpy
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (`kind` names the rule).

    linear: Chen et al. 2023 (position interpolation). llama3: the Llama 3.1 release.
    yarn: Peng et al. 2023. Frequencies are radians per token.
    """

    kind: str  # "linear" | "llama3" | "yarn"
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn; 0 = 0.1 ln(factor) + 1

    def __post_init__(self):
        _choice("rope_scaling.kind", self.kind, ("linear", "llama3", "yarn"))
        _require(self.factor > 0, "rope_scaling.factor", self.factor, "a positive number")
        if self.kind != "linear":
            _require(
                self.original_max_positions > 0,
                "rope_scaling.original_max_positions",
                self.original_max_positions,
                "the context length of the original training run",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes one transformer, decoder or encoder. Hashable, so it can key a jit.

    Letters: V vocab_size, L num_layers, D embed_dim, N num_heads, K num_kv_heads, H head_dim,
    F mlp_dim, C num_classes.
    """

    family: str  # Hugging Face model_type that import and export speak, e.g. "llama"
    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int  # longest sequence the positions are defined (or trained) for
    causal: bool = True
    # Positions
    positions: str = "rope"  # "rope" | "learned"
    position_offset: int = 0  # RoBERTa counts from padding_idx + 1
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # theta of windowed layers, unscaled (Gemma 3)
    token_types: int = 0  # number of segment embeddings (BERT)
    # Attention
    windows: tuple[int, ...] = ()  # one per layer, 0 = full attention; () = all full
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    attn_scale: float | None = None  # None = head_dim ** -0.5
    attn_softcap: float | None = None
    # Norms
    norm: str = "rms"  # "rms" | "layer"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False  # weight stored as w - 1 (Gemma)
    norm_position: str = "pre"  # "pre" | "post" | "sandwich" (before and after, Gemma)
    # Feed-forward
    activation: str = "silu"  # "silu" | "gelu" | "gelu_tanh" | "relu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    # Embedding and heads
    embed_scale: bool = False  # multiply embeddings by sqrt(D) (Gemma)
    embed_norm: bool = False  # LayerNorm after the embedding sum (BERT)
    ngram_orders: tuple[int, ...] = ()  # n of the n-grams whose hashed embeddings are added; encoders
    ngram_buckets: int = 0  # rows of the table that the n-grams of each order share
    ngram_dropout: float = 0.0  # share of the n-grams left out while training
    tie_embeddings: bool = False
    final_softcap: float | None = None
    head: str = "lm"  # "lm" | "masked_lm" | "classifier" | "embedding" | "span"
    pooler: bool = False  # BERT's dense + tanh on the pooled vector
    pooling: str = "last"  # "cls" | "mean" | "max" | "last"; classifier and embedding heads
    num_classes: int = 0
    labels: tuple[str, ...] = ()
    class_parts: tuple[int, ...] = ()  # finer classes that make up each class; () = the classes alone
    dropout: float = 0.0  # residual, embedding and classifier dropout while training
    # What a layer keeps for its backward pass, which computes the rest again: "none" = everything;
    # "dots" = the results of all products; "dots_no_batch" = of those with weights; "full" = its input
    remat: str = "none"
    # Dtypes: "" = float32 on CPU, bfloat16 on TPU and GPU (see `with_dtypes`)
    param_dtype: str = ""
    compute_dtype: str = ""
    cache_dtype: str = ""

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive integer")
        for name in ("head_dim", "mlp_dim", "max_positions"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive integer")
        _choice("positions", self.positions, ("rope", "learned"))
        _choice("norm", self.norm, ("rms", "layer"))
        _choice("norm_position", self.norm_position, ("pre", "post", "sandwich"))
        _choice("activation", self.activation, ("silu", "gelu", "gelu_tanh", "relu"))
        _choice("head", self.head, ("lm", "masked_lm", "classifier", "embedding", "span"))
        _choice("pooling", self.pooling, ("cls", "mean", "max", "last"))
        _choice("remat", self.remat, ("none", "dots", "dots_no_batch", "full"))
        for name in ("param_dtype", "compute_dtype", "cache_dtype"):
            _choice(name, getattr(self, name), ("", "float32", "bfloat16", "float16"))
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        if self.positions == "rope":
            _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even, for rotary pairs")
        _require(
            len(self.windows) in (0, self.num_layers),
            "windows",
            self.windows,
            f"empty, or one entry for each of the {self.num_layers} layers",
        )
        if self.head == "classifier":
            _require(self.num_classes > 1, "num_classes", self.num_classes, "two or more")
        if self.labels:
            _require(
                len(self.labels) == self.num_classes,
                "labels",
                self.labels,
                f"one name for each of num_classes={self.num_classes}",
            )
        if self.class_parts:
            parts = f"one count, 1 or more, for each of num_classes={self.num_classes}"
            fits = len(self.class_parts) == self.num_classes and min(self.class_parts) > 0
            _require(fits, "class_parts", self.class_parts, parts)
        for name in ("dropout", "ngram_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        if self.ngram_orders:
            orders = self.ngram_orders
            _require(min(orders) > 1, "ngram_orders", orders, "2 or more each; 1 is the token itself")
            _require(self.ngram_buckets > 0, "ngram_buckets", self.ngram_buckets, "a positive number")
            without = "() for a causal model: a decode step sees one token"
            _require(not self.causal, "ngram_orders", orders, without)

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Sliding window of each layer in tokens, 0 = full attention; length L."""
        return self.windows or (0,) * self.num_layers

    def with_dtypes(self, backend: str) -> "ModelConfig":
        """Fill unset dtypes with the backend's default.

        float32 on CPU, because XLA:CPU up-casts whole bfloat16 matrices at every call.
        """
        default = "float32" if backend == "cpu" else "bfloat16"
        names = ("param_dtype", "compute_dtype", "cache_dtype")
        return dataclasses.replace(self, **{n: getattr(self, n) or default for n in names})


def from_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """A frozen dataclass `cls` from nested mappings; unknown keys and wrong types are errors.

    Raises ValueError that names the key, what was expected and the nearest known name.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{where}.{key} is not a setting{nearest(key, fields)}")
        built[key] = _convert(hints[key], value, f"{where}.{key}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in built
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}, which {cls.__name__} needs")
    return cls(**built)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config dataclass, tuples as lists: what config.json holds."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(config)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """The `ml_collections` form that a file under configs/ returns, so that flags can override it."""

    def convert(value):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [f.name for f in dataclasses.fields(value)]
            return ml_collections.ConfigDict(
                {n: convert(getattr(value, n)) for n in names}, type_safe=False
            )
        return value

    return convert(config)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?' for the closest known name, or the list of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type: nested dataclasses, optionals, tuples, numbers, strings."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _convert(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where}={value!r}: expected {getattr(hint, '__name__', hint)}")
    return value


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r}: expected {expected}")


def _choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r}: expected one of {allowed}{nearest(value, allowed)}")


def _one_beginning(config: Any) -> None:
    """A run starts from `init_from` or has a `model` to train from scratch; not both, not neither."""
    if config.model is None:
        _require(config.init_from != "", "init_from", "", "a trained model, or a `model` from scratch")
    else:
        _require(config.init_from == "", "init_from", config.init_from, "'' with model, or model=None")


def _fits(field: str, tokens: int, model: ModelConfig) -> None:
    expected = f"at most model.max_positions={model.max_positions}"
    _require(tokens <= model.max_positions, field, tokens, expected)


def _unread(config: Any, name: str, by: str, where: str = "") -> None:
    """Refuse a setting that was changed although nothing reads it."""
    default, value = type(config).__dataclass_fields__[name].default, getattr(config, name)
    expected = f"its default {default!r}: {by} does not read it"
    _require(value == default, f"{where}{name}", value, expected)


# The optimizers, and which of these settings each of them reads; the other settings serve them all.
OPTIMIZERS = {
    "adamw": ("b1", "b2", "eps"),  # Loshchilov & Hutter 2019
    "adafactor": (),  # Shazeer & Stern 2018; learning_rate is relative to the RMS of each parameter
    "lion": ("b1", "b2"),  # Chen et al. 2023
    "muon": ("momentum", "b1", "b2", "eps"),  # Jordan et al. 2024 on the layers' matrices, else AdamW
    "sgd": ("momentum",),  # with momentum
}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimizer, its learning rate over time, clipping, weight decay (decoupled) and averaging."""

    learning_rate: float  # at the end of the warmup
    schedule: str = "cosine"  # "cosine" | "linear" | "constant" | "wsd", after a linear warmup from 0
    warmup_fraction: float = 0.05  # of all steps
    final_fraction: float = 0.0  # learning rate of the last step / learning_rate
    optimizer: str = "adamw"  # of OPTIMIZERS
    decay_fraction: float = 0.2  # of all steps; wsd is constant, then falls linearly over these
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices and embeddings; never on norms and biases
    clip_norm: float = 1.0  # largest global norm of the gradient; 0 = no clipping
    ema_decay: float = 0.0  # of a moving average of the parameters, used for evaluation; 0 = none

    def __post_init__(self):
        _require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "positive")
        _choice("optim.schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
        _choice("optim.optimizer", self.optimizer, tuple(OPTIMIZERS))
        for name in ("warmup_fraction", "final_fraction", "decay_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "in [0, 1]")
        for name in ("momentum", "b1", "b2", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "clip_norm"):
            _require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more")
        _require(self.eps > 0, "optim.eps", self.eps, "positive")
        for name in ("momentum", "b1", "b2", "eps"):
            if name not in OPTIMIZERS[self.optimizer]:
                _unread(self, name, f"optimizer={self.optimizer!r}", "optim.")
        if self.schedule != "wsd":
            _unread(self, "decay_fraction", f"schedule={self.schedule!r}", "optim.")
        if self.schedule == "constant":
            _unread(self, "final_fraction", "schedule='constant'", "optim.")
        _require(
            self.schedule != "wsd" or self.warmup_fraction + self.decay_fraction <= 1,
            "optim.decay_fraction",
            self.decay_fraction,
            f"at most 1 - warmup_fraction={1 - self.warmup_fraction}",
        )


# Settings of a run that may differ when it is resumed: how it is watched, kept and mended.
MAY_CHANGE = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep",
    "keep_best",
    "best_metric",
    "keep_every",
    "on_bad_loss",
    "spike_factor",
    "max_rollbacks",
    "wandb_project",
    "profile_steps",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training run has: how to optimize, how long, how often to log, evaluate and save."""

    optim: OptimConfig
    batch_size: int  # rows per optimizer step, over all devices
    steps: int = 0  # optimizer steps; 0 = as many as `epochs` makes
    epochs: float = 0.0  # passes over the training data, where `steps` is 0
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    seed: int = 0
    log_every: int = 10  # steps; all of these count optimizer steps
    eval_every: int = 0  # 0 = at the end only
    checkpoint_every: int = 0  # 0 = at the end only
    keep: int = 2  # newest checkpoints that stay
    keep_best: int = 0  # best ones that stay besides; each checkpoint is then evaluated as it is written
    best_metric: str = "eval/loss"  # which are best: a loss is good when low, other metrics when high
    keep_every: int = 0  # steps; checkpoints of their multiples stay for ever; 0 = none
    # When loss or gradient are not finite, or the loss is a spike: "abort"; "skip" the step; "rollback"
    # to the newest checkpoint and go on with the batch after the bad one.
    on_bad_loss: str = "abort"
    spike_factor: float = 0.0  # a positive loss above so many times the median of 64 is one; 0 = none is
    max_rollbacks: int = 3  # in one run
    wandb_project: str = ""  # Weights & Biases gets the records too; "" = it does not
    profile_steps: str = ""  # "10-12" writes a trace of these steps to WORKDIR/profile; "" = none

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "log_every", "keep"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        counts = ("steps", "epochs", "eval_every", "checkpoint_every", "keep_best", "keep_every", "seed")
        for name in (*counts, "max_rollbacks"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _choice("on_bad_loss", self.on_bad_loss, ("abort", "skip", "rollback"))
        _require(
            self.spike_factor == 0 or self.spike_factor > 1,
            "spike_factor",
            self.spike_factor,
            "more than 1, or 0 for no spikes",
        )
        _require(
            self.best_metric.startswith("eval/"),
            "best_metric",
            self.best_metric,
            'a name of the evaluation, such as "eval/loss" or "eval/accuracy"',
        )
        _require(
            self.steps > 0 or self.epochs > 0,
            "steps, epochs",
            (self.steps, self.epochs),
            "one of them positive",
        )
        _require(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"a divisor of batch_size={self.batch_size}",
        )
        if self.profile_steps:
            numbers = re.fullmatch(r"(\d+)-(\d+)", self.profile_steps)
            ordered = numbers is not None and 0 < int(numbers[1]) <= int(numbers[2])
            _require(ordered, "profile_steps", self.profile_steps, 'first and last step, as "10-12"')

    @property
    def traced_steps(self) -> tuple[int, int]:
        """First and last step of `profile_steps`; (0, 0), before all steps, where there is none."""
        first, last = (self.profile_steps or "0-0").split("-")
        return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): weights W + (alpha / rank) b a, of which a and b train.

    Patterns are regular expressions found in parameter paths such as "layers/attn/wq".
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attn/w[qkvo]$",)  # weights that get adapters
    whole: tuple[str, ...] = ()  # parameters that are trained as they are, such as a new head

    def __post_init__(self):
        _require(self.rank > 0, "lora.rank", self.rank, "1 or more")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "positive")
        _require(len(self.targets) > 0, "lora.targets", self.targets, "one pattern or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Masked-LM training of an encoder on texts, such as a classifier's before it sees labels."""

    mask_rate: float = 0.15  # share of a text's tokens to guess (Devlin et al. 2019)

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.mask_rate < 1, "mask_rate", self.mask_rate, "in (0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TrainConfig):
    """One run that trains a text classifier on labelled text (task "classification").

    It starts from the trained model in `init_from`, whose head is kept if its labels are those of the
    data, or is the `model` described here, from scratch; `model.vocab_size` is then the size of the
    tokenizer to train at most. The labels, and with them `model.num_classes`, come from the data.
    """

    # TSV, CSV or JSONL with a text and a label in each row; a folder: its train.* and dev.* of that kind
    data: str
    task: str = "classification"
    model: ModelConfig | None = None
    init_from: str = ""  # a Hugging Face directory or hub id, or a workdir; an encoder or a decoder
    # With init_from: "cls" (through BERT's pooler), "mean", "max" or "last"; "" = "cls" of an encoder,
    # "last" of a decoder.
    pooling: str = ""
    dropout: float | None = None  # with init_from; None = as it is there
    lora: LoraConfig | None = None  # adapters, with the head in `whole`; None = all parameters train
    eval_data: str = ""  # "" = the folder's dev.*, or `eval_fraction` of the file, held out
    eval_fraction: float = 0.1
    text_field: str = "text"
    label_field: str = "label"
    fine_label_field: str = ""  # a column that divides the labels further and is learnt; "" = none
    tokenizer: str = ""  # a tokenizer for `model`; "" = train one on the training text
    character_coverage: float = 0.9995  # of the training text by tokens of its own; the rest is bytes
    max_tokens: int = 128  # longer texts are cut
    label_smoothing: float = 0.0
    balance_classes: bool = False  # weigh each class by the inverse of its frequency
    balance_field: str = ""  # a column whose groups weigh as the square roots of their sizes
    r_drop: float = 0.0  # weight of the disagreement of two dropout passes (Liang et al. 2021); 0 = one
    subword_alpha: float = 0.0  # sampled segmentations while training (Kudo 2018); 0 = none
    token_dropout: float = 0.0  # share of a text's tokens left out while training (Iyyer et al. 2015)
    pretrain: PretrainConfig | None = None  # None = the classifier starts from random parameters

    def __post_init__(self):
        super().__post_init__()
        _choice("task", self.task, ("classification",))
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        _require(self.subword_alpha >= 0, "subword_alpha", self.subword_alpha, "0 or more")
        _require(self.r_drop >= 0, "r_drop", self.r_drop, "0 or more")
        _require(0 <= self.token_dropout < 1, "token_dropout", self.token_dropout, "in [0, 1)")
        _require(self.max_tokens > 0, "max_tokens", self.max_tokens, "1 or more")
        _one_beginning(self)
        if self.model is None:
            _choice("pooling", self.pooling, ("", "cls", "mean", "max", "last"))
            _require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
            for name in ("tokenizer", "character_coverage", "pretrain"):
                _unread(self, name, "init_from (its own tokenizer and weights are taken)")
            return
        for name in ("pooling", "dropout", "lora"):
            _unread(self, name, "model (whose own settings say it)")
        _choice("model.head", self.model.head, ("classifier",))
        _fits("max_tokens", self.max_tokens, self.model)
        if self.model.causal:
            why = "with model.causal=True: a token sees only what stands before it"
            _require(self.model.pooling != "cls", "model.pooling", "cls", f"another one {why}")
            _require(self.pretrain is None, "pretrain", self.pretrain, f"None {why}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLanguageModelConfig(PretrainConfig):
    """One run that trains an encoder to guess hidden tokens of texts (task "masked_lm").

    It goes on from the encoder in `init_from`, or is the `model` described here, from scratch;
    `model.vocab_size` is then the size of the tokenizer to train at most.
    """

    # Texts: FILE or FILE#COLUMN, several of them separated by commas; or one token store, which brings
    # its tokenizer and its held-out part.
    data: str
    task: str = "masked_lm"
    model: ModelConfig | None = None
    init_from: str = ""  # a Hugging Face directory or hub id, or a workdir, of an encoder
    text_field: str = "text"  # column of a table without #COLUMN
    eval_data: str = ""  # as `data`; "" = `eval_fraction` of the texts, held out
    eval_fraction: float = 0.02
    tokenizer: str = ""  # a tokenizer for `model`; "" = train one on the training text
    character_coverage: float = 0.9995  # of the training text by tokens of its own; the rest is bytes
    row_tokens: int = 128  # texts are packed into rows of this many tokens

    def __post_init__(self):
        super().__post_init__()
        _choice("task", self.task, ("masked_lm",))
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        _require(self.row_tokens > 1, "row_tokens", self.row_tokens, "2 or more")
        _one_beginning(self)
        if self.model is None:
            for name in ("tokenizer", "character_coverage"):
                _unread(self, name, "init_from (its own tokenizer is taken)")
            return
        _choice("model.head", self.model.head, ("masked_lm",))
        _require(not self.model.causal, "model.causal", True, "False: both sides of a token tell it")
        _fits("row_tokens", self.row_tokens, self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A language model learns from a larger one besides the text (Hinton et al. 2015)."""

    teacher: str  # a Hugging Face directory or hub id, or a workdir; the student takes its tokenizer
    temperature: float = 2.0  # softens both distributions
    weight: float = 0.5  # of the divergence from the teacher; the text's cross entropy has the rest
    hidden_weight: float = 0.0  # of the mean squared distance between the last hidden states

    def __post_init__(self):
        _require(self.temperature > 0, "distill.temperature", self.temperature, "positive")
        _require(0 < self.weight <= 1, "distill.weight", self.weight, "in (0, 1]")
        _require(self.hidden_weight >= 0, "distill.hidden_weight", self.hidden_weight, "0 or more")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """What one entry of `LanguageModelConfig.data` says, in this order: a path, or more than that."""

    path: str  # of texts, as data/sources.py reads them, or of a token store
    field: str = ""  # column or key that holds the text; "" = "text"
    weight: float = 1.0  # how often a text comes in one epoch; of stores, their shares of the rows
    join: int = 1  # 2 to so many related texts make one document

    @classmethod
    def of(cls, entry: Any) -> "DataSource":
        values = entry if isinstance(entry, (tuple, list)) else (entry,)
        try:
            source = cls(*values)
            if len(source.path) > 0 and source.weight > 0 and source.join >= 1:
                return source
        except TypeError:  # too many values, none, or one of another type
            pass
        raise ValueError(
            f'data={entry!r}: expected PATH or (PATH, field, weight, join), with field "" for a text '
            "file, a positive weight and join 1 or more"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(TrainConfig):
    """One run that trains a causal language model from scratch on texts or token stores (task "lm").

    `model.vocab_size` is the size of the tokenizer to train at most. Stores bring their tokenizer and
    their held-out part, so with them `eval_fraction` and what describes a tokenizer are not needed.
    """

    # Each a path alone, or the fields of a `DataSource`: ("corpus.jsonl", "text", 1.0).
    data: tuple[Any, ...]
    model: ModelConfig
    task: str = "lm"
    document: str = "line"  # of a text file: "line" | "blank" (what blank lines part) | "file"
    eval_fraction: float = 0.01  # of each source
    eval_split: str = "random"  # of the source: "random" documents | its "tail", cut at a character
    tokenizer: str = ""  # a tokenizer to use; "" = train one on the training text
    tokenizer_kind: str = "unigram"  # "unigram" | "bpe" | "char"
    character_coverage: float = 0.9995  # of the training text by tokens of its own; the rest is bytes
    row_tokens: int = 128  # documents are packed into rows of this many tokens
    loss_chunk: int = 0  # positions whose vocabulary logits are held at a time; 0 = all
    z_loss: float = 0.0  # weight of log(Z)^2 while training, to keep Z near 1; 1e-4 in PaLM
    distill: DistillConfig | None = None  # None = the text alone is learned from

    def __post_init__(self):
        super().__post_init__()
        _choice("task", self.task, ("lm",))
        _choice("model.head", self.model.head, ("lm",))
        _choice("document", self.document, ("line", "blank", "file"))
        _choice("eval_split", self.eval_split, ("random", "tail"))
        _choice("tokenizer_kind", self.tokenizer_kind, ("unigram", "bpe", "char"))
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        _require(self.loss_chunk >= 0, "loss_chunk", self.loss_chunk, "0 or more")
        _require(
            1 < self.row_tokens <= self.model.max_positions,
            "row_tokens",
            self.row_tokens,
            f"2 to model.max_positions={self.model.max_positions}",
        )
        _require(
            self.distill is None or not self.tokenizer,
            "tokenizer",
            self.tokenizer,
            "'' with distill: the student takes the tokenizer of its teacher",
        )
        _require(self.z_loss >= 0, "z_loss", self.z_loss, "0 or more")
        _require(self.distill is None or not self.z_loss, "z_loss", self.z_loss, "0 with distill")
        _require(len(self.data) > 0, "data", self.data, "one path, or (path, field, weight), or more")
        places = [(source.path, source.field) for source in self.sources]
        _require(
            len(set(places)) == len(places), "data", places, "each once; give one the sum of the weights"
        )

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The entries of `data`."""
        return tuple(map(DataSource.of, self.data))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """What every run has that goes on from a trained language model."""

    init_from: str  # a Hugging Face directory or hub id, or a workdir of a language model
    eval_fraction: float = 0.1  # of the records, held out where there is no `eval_data`
    chat_template: str = ""  # Jinja2 source; "" = the tokenizer's own
    row_tokens: int = 512  # examples are packed into rows of this many tokens
    loss_chunk: int = 0  # positions whose vocabulary logits are held at a time; 0 = all
    lora: LoraConfig | None = None  # None = all parameters are trained

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        _require(self.loss_chunk >= 0, "loss_chunk", self.loss_chunk, "0 or more")
        _require(self.row_tokens > 1, "row_tokens", self.row_tokens, "2 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuneConfig):
    """One run that teaches a language model to answer as the assistant of chats does (task "sft")."""

    data: str  # JSONL with the messages of a chat in each line
    task: str = "sft"
    eval_data: str = ""  # "" = `eval_fraction` of the chats, held out
    messages_field: str = "messages"

    def __post_init__(self):
        super().__post_init__()
        _choice("task", self.task, ("sft",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TuneConfig):
    """One run that teaches a language model which of two answers is better (task "dpo").

    A row holds whole pairs, both answers with their prompts, so `row_tokens` bounds the longest pair.
    """

    data: str  # JSONL of prompt, chosen and rejected answer
    task: str = "dpo"
    eval_data: str = ""  # "" = the pairs of `eval_fraction` of the prompts, held out
    beta: float = 0.1  # how dear it is to leave the model that the run starts from: small = cheap
    label_smoothing: float = 0.0  # share of the pairs that are taken to be named the wrong way round

    def __post_init__(self):
        super().__post_init__()
        _choice("task", self.task, ("dpo",))
        _require(self.beta > 0, "beta", self.beta, "positive")
        smoothing = self.label_smoothing
        _require(0 <= smoothing < 0.5, "label_smoothing", smoothing, "in [0, 0.5)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordVectorConfig(TrainConfig):
    """One run that trains skip-gram word vectors on texts (task "word_vectors").

    The words are the pieces of the tokenizer.
    """

    data: str  # texts: FILE or FILE#COLUMN, several of them separated by commas
    task: str = "word_vectors"
    text_field: str = "text"  # column of a table without #COLUMN
    eval_fraction: float = 0.02  # of the texts
    tokenizer: str = ""  # a tokenizer to use; "" = train one on the training text
    vocab_size: int = 16_000  # of the tokenizer to train, at most
    character_coverage: float = 0.9995  # of the training text by tokens of its own; the rest is bytes
    embed_dim: int = 128
    window: int = 5  # places to either side in which words are neighbours
    negatives: int = 5  # noise words to each pair
    noise_pool: int = 64  # noise words that are drawn for each row, and shared by its pairs
    subsample: float = 1e-4  # frequency above which a word is left out at times; 0 = none is
    row_tokens: int = 64  # texts are packed into rows of this many tokens

    def __post_init__(self):
        super().__post_init__()
        _choice("task", self.task, ("word_vectors",))
        for name in ("vocab_size", "embed_dim", "window", "negatives", "noise_pool"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        _require(self.row_tokens > 1, "row_tokens", self.row_tokens, "2 or more")
        _require(0 <= self.subsample < 1, "subsample", self.subsample, "in [0, 1)")
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringConfig(TrainConfig):
    """One run that trains an encoder to find answers in a text (task "question_answering").

    It starts from the encoder in `init_from`, or is the `model` described here, from scratch;
    `model.vocab_size` is then the size of the tokenizer to train at most. Lengths are tokens.
    """

    data: str  # JSONL of {"context", "qas"}, or SQuAD's JSON, the form of CMRC 2018 too
    task: str = "question_answering"
    model: ModelConfig | None = None
    init_from: str = ""  # a Hugging Face directory or hub id, or a workdir, of an encoder
    eval_data: str = ""  # "" = the questions on `eval_fraction` of the texts, held out
    eval_fraction: float = 0.2
    tokenizer: str = ""  # a tokenizer to use; "" = that of `init_from`, or train one on the texts
    max_tokens: int = 384  # of a row: the question and a window of the text
    question_tokens: int = 64  # longer questions are cut
    overlap: int = 128  # of two neighbouring windows
    answer_tokens: int = 128  # longest answer
    mark_matches: bool = False  # token types 2 and 3 say what of the text the question has too
    pretrain: PretrainConfig | None = None  # masked-LM training of `model` before it sees questions
    pretrain_data: str = ""  # further texts for it: FILE or FILE#COLUMN, separated by commas

    def __post_init__(self):
        super().__post_init__()
        _choice("task", self.task, ("question_answering",))
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        for name in ("question_tokens", "answer_tokens"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        room = self.max_tokens - self.question_tokens - 4
        window = f"0 to {room - 1}, less than what max_tokens leaves beside a question"
        _require(0 <= self.overlap < room, "overlap", self.overlap, window)
        if self.model is None:
            _require(
                self.init_from != "", "init_from", "", "an encoder, or a model to train from scratch"
            )
            scratch = "None with init_from, which starts from a trained encoder"
            _require(self.pretrain is None, "pretrain", self.pretrain, scratch)
            _require(not self.mark_matches, "mark_matches", True, "False with init_from")
            return
        _require(self.init_from == "", "init_from", self.init_from, "'' with model, or model=None")
        _choice("model.head", self.model.head, ("span",))
        types = "4 or more with mark_matches"
        _require(
            not self.mark_matches or self.model.token_types > 3,
            "model.token_types",
            self.model.token_types,
            types,
        )
        _require(
            self.max_tokens <= self.model.max_positions,
            "max_tokens",
            self.max_tokens,
            f"at most model.max_positions={self.model.max_positions}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationConfig(TrainConfig):
    """One run that trains a translator from scratch on sentence pairs (task "translation").

    `model.vocab_size` is the size of the tokenizer to train at most, one for both languages.
    """

    data: str  # TSV, CSV or JSONL with a column for each language
    source_field: str
    target_field: str
    model: ModelConfig
    task: str = "translation"
    eval_data: str = ""  # "" = `eval_fraction` of the pairs, and all that share a text with them
    eval_fraction: float = 0.03
    tokenizer: str = ""  # a tokenizer to use, which must have the token <|translate|>; "" = train one
    character_coverage: float = 0.9995  # of the training text by tokens of its own; the rest is bytes
    row_tokens: int = 128  # pairs are packed into rows of this many tokens
    loss_chunk: int = 0  # positions whose vocabulary logits are held at a time; 0 = all

    def __post_init__(self):
        super().__post_init__()
        _choice("task", self.task, ("translation",))
        _choice("model.head", self.model.head, ("lm",))
        _require(self.model.causal, "model.causal", False, "True: a translator continues its source")
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        _require(self.loss_chunk >= 0, "loss_chunk", self.loss_chunk, "0 or more")
        _require(
            1 < self.row_tokens <= self.model.max_positions,
            "row_tokens",
            self.row_tokens,
            f"2 to model.max_positions={self.model.max_positions}",
        )


def unknown_override(argv: typing.Iterable[str]) -> str | None:
    """What is wrong with the first `--config.a.b` in argv that the `--config` file does not have."""
    argv = list(argv)
    text = " ".join(argv)
    path = re.search(r"(?:^|\s)--?config[= ](\S+)", text)
    if path is None:
        return None
    file, _, argument = path[1].partition(":")  # --config=FILE:ARGUMENT calls get_config(ARGUMENT)
    config = runpy.run_path(file)["get_config"](*([argument] if argument else []))
    for name in re.findall(r"(?:^|\s)--?(?:no)?config\.([\w.]+)", text):
        node = config
        for key in name.split("."):
            if not isinstance(node, ml_collections.ConfigDict):
                return f"--config.{name}: {path[1]} has a value there, not a group of settings"
            if key not in node:
                return f"--config.{name}: {path[1]} has no setting {key!r}{nearest(key, node.keys())}"
            node = node[key]
    return None
