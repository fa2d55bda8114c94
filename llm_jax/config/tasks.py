"""The settings of each task, on top of those of every run."""

import dataclasses
from typing import Any, ClassVar

from llm_jax.config.checks import choice, one_beginning, require, unread
from llm_jax.config.model import ModelConfig
from llm_jax.config.training import TrainConfig


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
        require(self.rank > 0, "lora.rank", self.rank, "1 or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "positive")
        require(len(self.targets) > 0, "lora.targets", self.targets, "one pattern or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Masked-LM training of an encoder on texts, such as a classifier's before it sees labels.

    As a stage before another training it may have no length, `steps` and `epochs` of 0: then there is
    none, and the rest of it is not read. So --config.pretrain.epochs=0 takes it away, and a config file
    may offer it by `epochs` of 0.
    """

    optional: ClassVar[bool] = True
    mask_rate: float = 0.15  # share of a text's tokens to guess (Devlin et al. 2019)
    dropout: float | None = None  # of this training; None = the model's own

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.mask_rate < 1, "mask_rate", self.mask_rate, "in (0, 1)")
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


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
    normalization: str = "identity"  # of Unicode, sentencepiece's rule of that name: "nmt_nfkc_cf", ...
    # Of the tokenizer to train: (regular expression, text) pairs, applied to every text in this order
    replacements: tuple[tuple[str, str], ...] = ()
    symbols: str = ""  # likewise: what this regular expression finds 5 times in training is one token
    max_tokens: int = 128  # longer texts are cut
    label_smoothing: float = 0.0
    balance_classes: bool = False  # weigh each class by the inverse of its frequency
    weight_field: str = ""  # a column of weights in the loss, such as how sure the annotators were
    balance_field: str = ""  # a column whose groups weigh as the square roots of their sizes
    r_drop: float = 0.0  # weight of the disagreement of two dropout passes (Liang et al. 2021); 0 = one
    subword_alpha: float = 0.0  # sampled segmentations while training (Kudo 2018); 0 = none
    token_dropout: float = 0.0  # share of a text's tokens left out while training (Iyyer et al. 2015)
    # Token embeddings of `model`: "random", or "cooccurrence" = word vectors of the training texts
    embed_start: str = "random"
    # None, or one without steps and epochs = no masked-LM training before the labels are seen
    pretrain: PretrainConfig | None = None

    @property
    def pretraining(self) -> PretrainConfig | None:
        """The masked-LM training to do first; None = none."""
        return _with_length(self.pretrain)

    def __post_init__(self):
        super().__post_init__()
        choice("task", self.task, ("classification",))
        choice("embed_start", self.embed_start, ("random", "cooccurrence"))
        require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        require(self.subword_alpha >= 0, "subword_alpha", self.subword_alpha, "0 or more")
        require(self.r_drop >= 0, "r_drop", self.r_drop, "0 or more")
        require(0 <= self.token_dropout < 1, "token_dropout", self.token_dropout, "in [0, 1)")
        require(self.max_tokens > 0, "max_tokens", self.max_tokens, "1 or more")
        trained = ("character_coverage", "normalization", "replacements", "symbols")
        one_beginning(self)
        if self.model is None:
            choice("pooling", self.pooling, ("", "cls", "mean", "max", "last"))
            require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
            unread(self, ("tokenizer", *trained), "init_from (its own tokenizer is taken)")
            unread(self, "embed_start", "init_from (whose weights are taken)")
            _no_pretraining(self.pretraining, "with init_from, whose weights are taken")
            return
        if self.tokenizer:
            unread(self, trained, "tokenizer (which is taken as it is)")
        unread(self, ("pooling", "dropout", "lora"), "model (whose own settings say it)")
        choice("model.head", self.model.head, ("classifier",))
        _fits("max_tokens", self.max_tokens, self.model)
        if self.model.causal:
            why = "with model.causal=True: a token sees only what stands before it"
            require(self.model.pooling != "cls", "model.pooling", "cls", f"another one {why}")
            _no_pretraining(self.pretraining, why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLanguageModelConfig(PretrainConfig):
    """One run that trains an encoder to guess hidden tokens of texts (task "masked_lm").

    It goes on from the encoder in `init_from`, or is the `model` described here, from scratch;
    `model.vocab_size` is then the size of the tokenizer to train at most.
    """

    optional: ClassVar[bool] = False
    # Texts: FILE or FILE#COLUMN, several of them separated by commas; or one token store, which brings
    # its tokenizer and its held-out part, so that settings which say how texts are read, held out and
    # cut (`masked_lm.OF_TEXTS`) must keep their defaults.
    data: str
    task: str = "masked_lm"
    model: ModelConfig | None = None
    init_from: str = ""  # a Hugging Face directory or hub id, or a workdir, of an encoder
    text_field: str = "text"  # column of a table without #COLUMN
    eval_data: str = ""  # texts, as `data`; "" = `eval_fraction` of the texts, held out
    eval_fraction: float = 0.05
    tokenizer: str = ""  # a tokenizer for `model`; "" = train one on the training text
    character_coverage: float = 0.9995  # of the training text by tokens of its own; the rest is bytes
    row_tokens: int = 128  # texts are packed into rows of this many tokens

    def __post_init__(self):
        super().__post_init__()
        choice("task", self.task, ("masked_lm",))
        require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        require(self.row_tokens > 1, "row_tokens", self.row_tokens, "2 or more")
        one_beginning(self)
        if self.model is None:
            other = ("tokenizer", "character_coverage")
            unread(self, other, "init_from (its own tokenizer is taken)")
            return
        unread(self, "dropout", "model (whose own dropout says it)")
        choice("model.head", self.model.head, ("masked_lm",))
        require(not self.model.causal, "model.causal", True, "False: both sides of a token tell it")
        _fits("row_tokens", self.row_tokens, self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A language model learns from a larger one besides the text (Hinton et al. 2015)."""

    teacher: str  # a Hugging Face directory or hub id, or a workdir; the student takes its tokenizer
    temperature: float = 2.0  # softens both distributions
    weight: float = 0.5  # of the divergence from the teacher; the text's cross entropy has the rest
    hidden_weight: float = 0.0  # of the mean squared distance between the last hidden states

    def __post_init__(self):
        require(self.temperature > 0, "distill.temperature", self.temperature, "positive")
        require(0 < self.weight <= 1, "distill.weight", self.weight, "in (0, 1]")
        require(self.hidden_weight >= 0, "distill.hidden_weight", self.hidden_weight, "0 or more")


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
    their held-out part: with them, settings that say how texts are read, held out and cut
    (`corpus.OF_TEXTS`) must keep their defaults, or the run is refused when it opens the stores.
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
        choice("task", self.task, ("lm",))
        choice("document", self.document, ("line", "blank", "file"))
        choice("eval_split", self.eval_split, ("random", "tail"))
        choice("tokenizer_kind", self.tokenizer_kind, ("unigram", "bpe", "char"))
        _language_model(self)
        require(
            self.distill is None or not self.tokenizer,
            "tokenizer",
            self.tokenizer,
            "'' with distill: the student takes the tokenizer of its teacher",
        )
        require(self.z_loss >= 0, "z_loss", self.z_loss, "0 or more")
        require(self.distill is None or not self.z_loss, "z_loss", self.z_loss, "0 with distill")
        require(len(self.data) > 0, "data", self.data, "one path, or (path, field, weight), or more")
        places = [(source.path, source.field) for source in self.sources]
        require(
            len(set(places)) == len(places), "data", places, "each once; give one the sum of the weights"
        )

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The entries of `data`."""
        return tuple(map(DataSource.of, self.data))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftHeadConfig(TrainConfig):
    """One run that trains a draft head for a language model on texts or stores (task "draft_head").

    The texts are read, held out and cut as `LanguageModelConfig` says of the settings of these names, in
    the tokens of the model. That itself stays as it is.
    """

    base: str  # a Hugging Face directory or hub id, or a workdir: the model to draft for
    data: tuple[Any, ...]
    task: str = "draft_head"
    width: int = 0  # of the head's cell; 0 = twice the model's embed_dim
    draft_steps: int = (
        4  # tokens of a draft that are trained and judged; engines may draft more or fewer
    )
    decay: float = 0.8  # weight of a drafted token in the loss / that of the one before it
    base_weight: float = 0.5  # of the divergence from the model; the text's cross entropy has the rest
    document: str = "line"
    eval_fraction: float = 0.01
    eval_split: str = "random"
    row_tokens: int = 128
    loss_chunk: int = 0  # positions whose vocabulary logits, draft_steps + 1 each, are held at a time

    def __post_init__(self):
        super().__post_init__()
        choice("task", self.task, ("draft_head",))
        require(self.base != "", "base", "", "the model to draft for")
        require(self.width >= 0, "width", self.width, "1 or more, or 0 for twice the model's embed_dim")
        require(self.draft_steps > 0, "draft_steps", self.draft_steps, "1 or more")
        require(0 < self.decay <= 1, "decay", self.decay, "in (0, 1]")
        require(0 <= self.base_weight <= 1, "base_weight", self.base_weight, "in [0, 1]")
        most = "more than draft_steps, or no row has a whole draft"
        require(self.row_tokens > self.draft_steps, "row_tokens", self.row_tokens, most)


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
        require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        require(self.loss_chunk >= 0, "loss_chunk", self.loss_chunk, "0 or more")
        require(self.row_tokens > 1, "row_tokens", self.row_tokens, "2 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuneConfig):
    """One run that teaches a language model to answer as the assistant of chats does (task "sft")."""

    data: str  # JSONL with the messages of a chat in each line
    task: str = "sft"
    eval_data: str = ""  # "" = `eval_fraction` of the chats, held out
    messages_field: str = "messages"

    def __post_init__(self):
        super().__post_init__()
        choice("task", self.task, ("sft",))


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
        choice("task", self.task, ("dpo",))
        require(self.beta > 0, "beta", self.beta, "positive")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "label_smoothing", smoothing, "in [0, 0.5)")


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
        choice("task", self.task, ("word_vectors",))
        for name in ("vocab_size", "embed_dim", "window", "negatives", "noise_pool"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        require(self.row_tokens > 1, "row_tokens", self.row_tokens, "2 or more")
        require(0 <= self.subsample < 1, "subsample", self.subsample, "in [0, 1)")
        require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")


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
    # Masked-LM training of `model` before it sees questions; None, or without steps and epochs = none
    pretrain: PretrainConfig | None = None
    pretrain_data: str = ""  # further texts for it: FILE or FILE#COLUMN, separated by commas

    @property
    def pretraining(self) -> PretrainConfig | None:
        """The masked-LM training to do first; None = none."""
        return _with_length(self.pretrain)

    def __post_init__(self):
        super().__post_init__()
        choice("task", self.task, ("question_answering",))
        require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in (0, 1)")
        for name in ("question_tokens", "answer_tokens"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        room = self.max_tokens - self.question_tokens - 4
        window = f"0 to {room - 1}, less than what max_tokens leaves beside a question"
        require(0 <= self.overlap < room, "overlap", self.overlap, window)
        if self.pretraining is None:
            unread(self, "pretrain_data", "a run without masked-LM training (`pretrain`)")
        if self.model is None:
            require(
                self.init_from != "", "init_from", "", "an encoder, or a model to train from scratch"
            )
            _no_pretraining(self.pretraining, "with init_from, whose weights are taken")
            require(not self.mark_matches, "mark_matches", True, "False with init_from")
            return
        require(self.init_from == "", "init_from", self.init_from, "'' with model, or model=None")
        choice("model.head", self.model.head, ("span",))
        types = "4 or more with mark_matches"
        require(
            not self.mark_matches or self.model.token_types > 3,
            "model.token_types",
            self.model.token_types,
            types,
        )
        require(
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
        choice("task", self.task, ("translation",))
        require(self.model.causal, "model.causal", False, "True: a translator continues its source")
        _language_model(self)


def _language_model(config: LanguageModelConfig | TranslationConfig) -> None:
    """What a model that predicts the next token is trained with."""
    choice("model.head", config.model.head, ("lm",))
    require(0 < config.eval_fraction < 1, "eval_fraction", config.eval_fraction, "in (0, 1)")
    require(config.loss_chunk >= 0, "loss_chunk", config.loss_chunk, "0 or more")
    expected = f"2 to model.max_positions={config.model.max_positions}"
    valid = 1 < config.row_tokens <= config.model.max_positions
    require(valid, "row_tokens", config.row_tokens, expected)


def _with_length(stage: PretrainConfig | None) -> PretrainConfig | None:
    """The stage, or None where it has neither steps nor epochs."""
    return stage if stage is not None and (stage.steps or stage.epochs) else None


def _no_pretraining(stage: PretrainConfig | None, why: str) -> None:
    if stage is not None:
        length = f"pretrain.steps={stage.steps}, pretrain.epochs={stage.epochs}"
        raise ValueError(f"{length}: expected 0 and 0, or no pretrain, {why}")


def _fits(field: str, tokens: int, model: ModelConfig) -> None:
    expected = f"at most model.max_positions={model.max_positions}"
    require(tokens <= model.max_positions, field, tokens, expected)
