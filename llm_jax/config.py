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
    tie_embeddings: bool = False
    final_softcap: float | None = None
    head: str = "lm"  # "lm" | "masked_lm" | "classifier" | "embedding"
    pooler: bool = False  # BERT's dense + tanh on the pooled vector
    pooling: str = "last"  # "cls" | "mean" | "max" | "last"; classifier and embedding heads
    num_classes: int = 0
    labels: tuple[str, ...] = ()
    dropout: float = 0.0  # residual, embedding and classifier dropout while training
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
        _choice("head", self.head, ("lm", "masked_lm", "classifier", "embedding"))
        _choice("pooling", self.pooling, ("cls", "mean", "max", "last"))
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
        _require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")

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


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019), its learning rate over time, clipping and averaging."""

    learning_rate: float  # at the end of the warmup
    schedule: str = "cosine"  # "cosine" | "linear" | "constant", after a linear warmup from 0
    warmup_fraction: float = 0.05  # of all steps
    final_fraction: float = 0.0  # learning rate of the last step / learning_rate
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices and embeddings; never on norms and biases
    clip_norm: float = 1.0  # largest global norm of the gradient; 0 = no clipping
    ema_decay: float = 0.0  # of a moving average of the parameters, used for evaluation; 0 = none

    def __post_init__(self):
        _require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "positive")
        _choice("optim.schedule", self.schedule, ("cosine", "linear", "constant"))
        for name in ("warmup_fraction", "final_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "in [0, 1]")
        for name in ("b1", "b2", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "clip_norm"):
            _require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more")
        _require(self.eps > 0, "optim.eps", self.eps, "positive")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, on how much at a time, and how often to log, evaluate and save."""

    batch_size: int  # rows per optimizer step, over all devices
    steps: int = 0  # optimizer steps; 0 = as many as `epochs` makes
    epochs: float = 0.0  # passes over the training data, where `steps` is 0
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    seed: int = 0
    log_every: int = 10  # steps; all of these count optimizer steps
    eval_every: int = 0  # 0 = at the end only
    save_every: int = 0  # 0 = at the end only
    keep: int = 2  # newest checkpoints that stay

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "log_every", "keep"):
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "1 or more")
        for name in ("steps", "epochs", "eval_every", "save_every", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        _require(
            self.steps > 0 or self.epochs > 0,
            "train.steps, train.epochs",
            (self.steps, self.epochs),
            "one of them positive",
        )
        _require(
            self.batch_size % self.accumulate == 0,
            "train.accumulate",
            self.accumulate,
            f"a divisor of batch_size={self.batch_size}",
        )


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """One run that trains a text classifier from scratch on labelled text (task "classification").

    `model.vocab_size` is the size of the tokenizer to train at most; the labels, and with them
    `model.num_classes`, come from the data.
    """

    # TSV, CSV or JSONL with a text and a label in each row; a folder: its train.* and dev.* of that kind
    data: str
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    task: str = "classification"
    eval_data: str = ""  # "" = the folder's dev.*, or `eval_fraction` of the file, held out
    eval_fraction: float = 0.1
    text_field: str = "text"
    label_field: str = "label"
    tokenizer: str = ""  # a tokenizer to use; "" = train one on the training text
    character_coverage: float = 0.9995  # of the training text by tokens of its own; the rest is bytes
    max_tokens: int = 128  # longer texts are cut
    label_smoothing: float = 0.0
    balance_classes: bool = False  # weigh each class by the inverse of its frequency
    subword_alpha: float = 0.0  # sampled segmentations while training (Kudo 2018); 0 = none
    token_dropout: float = 0.0  # share of a text's tokens left out while training (Iyyer et al. 2015)

    def __post_init__(self):
        _choice("task", self.task, ("classification",))
        _choice("model.head", self.model.head, ("classifier",))
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        _require(self.subword_alpha >= 0, "subword_alpha", self.subword_alpha, "0 or more")
        _require(0 <= self.token_dropout < 1, "token_dropout", self.token_dropout, "in [0, 1)")
        _require(
            0 < self.max_tokens <= self.model.max_positions,
            "max_tokens",
            self.max_tokens,
            f"1 to model.max_positions={self.model.max_positions}",
        )


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """One run that trains a causal language model from scratch on text files (task "lm").

    `model.vocab_size` is the size of the tokenizer to train at most.
    """

    # (path, field, weight) or (path, field, weight, join): a text file (field ""), or a column of a
    # table; how often a text comes in one epoch; 2 to `join` related texts make one document.
    data: tuple[Any, ...]
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    task: str = "lm"
    eval_fraction: float = 0.01  # of the documents of each source
    tokenizer: str = ""  # a tokenizer to use; "" = train one on the training text
    tokenizer_kind: str = "unigram"  # "unigram" | "bpe"
    character_coverage: float = 0.9995  # of the training text by tokens of its own; the rest is bytes
    row_tokens: int = 128  # documents are packed into rows of this many tokens
    loss_chunk: int = 0  # positions whose vocabulary logits are held at a time; 0 = all

    def __post_init__(self):
        _choice("task", self.task, ("lm",))
        _choice("model.head", self.model.head, ("lm",))
        _choice("tokenizer_kind", self.tokenizer_kind, ("unigram", "bpe"))
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        _require(self.loss_chunk >= 0, "loss_chunk", self.loss_chunk, "0 or more")
        _require(
            1 < self.row_tokens <= self.model.max_positions,
            "row_tokens",
            self.row_tokens,
            f"2 to model.max_positions={self.model.max_positions}",
        )
        _require(len(self.data) > 0, "data", self.data, "one (path, field, weight) or more")
        for source in self.data:
            _require(
                len(source) in (3, 4)
                and isinstance(source[0], str)
                and source[2] > 0
                and (len(source) == 3 or source[3] >= 1),
                "data",
                source,
                '(path, field, weight) or (path, field, weight, join), with field "" for a text file, '
                "a positive weight and join 1 or more",
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
