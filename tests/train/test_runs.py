"""From files to a trained workdir, small; and the configs and overrides that start such runs."""

import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from absl.flags import FlagValues
from ml_collections import config_flags

from llm_jax.checkpoint.store import restore_params
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.config import (
    ClassificationConfig,
    DraftHeadConfig,
    LanguageModelConfig,
    MaskedLanguageModelConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
    from_dict,
    unknown_override,
)
from llm_jax.data.tasks import Example
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.eval.metrics import classification_report
from llm_jax.sharding import make_mesh
from llm_jax.train import classification, corpus, language_model
from llm_jax.train.masked_lm import masked_lm_model
from llm_jax.train.metrics_log import read_metrics
from llm_jax.tree import flatten

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = ModelConfig(
    "llama",
    vocab_size=400,
    num_layers=1,
    embed_dim=16,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=16,
    max_positions=64,
    tie_embeddings=True,
)
OPTIM = OptimConfig(2e-2, ema_decay=0.9)


def write_reviews(path, rows, seed):
    """Fruit is good, tools are bad, whatever the words between."""
    rng = np.random.default_rng(seed)
    words = {"good": ["apple", "pear", "plum"], "bad": ["saw", "drill", "file"]}
    lines = ["label\ttext"]
    for i in range(rows):
        label = ("good", "bad")[i % 2]
        filler = rng.choice(["the", "a", "red", "old", "and"], 4)
        text = [*filler[:2], rng.choice(words[label]), *filler[2:], str(i)]
        lines.append(f"{label}\t{' '.join(text)}")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_a_classifier_from_a_file_to_answers(tmp_path):
    data, workdir, mesh = tmp_path / "data.tsv", tmp_path / "run", make_mesh("data:2")
    write_reviews(data, 120, 0)
    config = ClassificationConfig(
        data=str(data),
        eval_fraction=0.25,
        subword_alpha=0.5,
        max_tokens=32,
        balance_classes=True,
        model=dataclasses.replace(
            MODEL, head="classifier", causal=False, pooling="mean", num_classes=9, dropout=0.1
        ),
        optim=OPTIM,
        batch_size=16,
        epochs=6.0,
    )
    result = classification.run(config, workdir, mesh)
    assert result.labels == ("bad", "good") and len(result.gold) == 30
    np.testing.assert_allclose(result.probs.sum(axis=1), 1.0, rtol=1e-5)
    assert np.mean(result.gold == result.predicted) == 1.0

    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert last["step"] == round(6 * 90 / 16) and last["eval/accuracy"] == 1.0
    right = result.probs[np.arange(30), result.gold]
    assert last["eval/loss"] == pytest.approx(-np.log(right).mean(), rel=1e-5)
    trained = load_trained(workdir, make_mesh("data:1"))
    assert trained.labels == result.labels and trained.model.config.num_classes == 2
    assert load_tokenizer(trained.tokenizer).vocab_size == trained.model.config.vocab_size
    # The same command again trains nothing and answers the same.
    again = classification.run(config, workdir, mesh)
    np.testing.assert_array_equal(again.probs, result.probs)
    with pytest.raises(ValueError, match=r"config\.label_smoothing: 0\.0 there, 0\.3 here"):
        classification.run(dataclasses.replace(config, label_smoothing=0.3), workdir, mesh)


def test_a_language_model_from_files_to_perplexity(tmp_path):
    data, table = tmp_path / "lines.txt", tmp_path / "pairs.tsv"
    data.write_text("".join(f"one two three four {i % 3} six\n" for i in range(60)))
    table.write_text("id\ten\n" + "".join(f"{i}\tseven eight nine {i}\n" for i in range(40)))
    config = LanguageModelConfig(
        data=((str(data), "", 0.5), (str(table), "en", 2.0)),
        eval_fraction=0.1,
        row_tokens=32,
        loss_chunk=8,
        model=MODEL,
        optim=OPTIM,
        batch_size=4,
        steps=120,
    )
    sources = [corpus._read(config, source, source.path) for source in config.sources]
    assert all(not set(s.texts) & set(s.held_out) for s in sources)
    # 60 lines are three texts, of which one is held out with its 20 repeats; half of the rest stay.
    assert [len(s.held_out) for s in sources] == [20, 4]
    assert [len(corpus._weighted(s, 0)) for s in sources] == [20, 2 * 36]

    result = language_model.run(config, tmp_path / "run", make_mesh("data:1"))
    assert result.perplexity == pytest.approx(np.exp(result.loss))
    assert result.perplexity < 40, "of 287 tokens"
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    # Every token but the first of a document is a target; its end is one more.
    held_out = [text for s in sources for text in s.held_out]
    targets = sum(len(tokenizer.encode(text)) for text in held_out)
    size = sum(len(text.encode()) for text in held_out)
    assert result.tokens == targets and len(result.sources) == 2
    assert result.bits_per_byte == pytest.approx(result.loss * targets / size / np.log(2), rel=1e-6)


def test_eval_batches_hold_every_example_once_and_padding_has_no_label():
    rng = np.random.default_rng(0)
    examples = [Example("", rng.integers(1, 9, n).astype(np.int32), n % 3) for n in range(1, 12)]
    batches = classification.eval_batches(examples, 4, (6, 12))
    assert [b["tokens"].shape for b in batches] == [(4, 6), (4, 12), (4, 12)]
    labels = np.concatenate([b["labels"] for b in batches])
    assert sorted(labels[labels >= 0]) == sorted(e.label for e in examples)
    lengths = np.concatenate([b["segment_ids"].sum(axis=1) for b in batches])
    assert sorted(lengths) == [0, *range(1, 12)] and labels[lengths == 0] == [-1]


def test_the_macro_f1_that_is_logged_is_that_of_the_report():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.5] * 4, 50).astype(np.float32)
    gold = rng.integers(0, 3, 50).astype(np.int32)  # the last class is only ever predicted
    result = classification.ClassificationResult(("a", "b", "c", "d"), gold, probs)
    report = classification_report(gold, result.predicted, result.labels)
    assert result.metrics()["eval/macro_f1"] == pytest.approx(report["macro_f1"])


def test_classes_weigh_the_same_when_balanced():
    gold = np.array([0, 0, 0, 1], np.int32)
    weights = classification.row_weights(
        classification.Rows(["text"] * 4, gold, gold), balance_classes=True
    )
    assert weights == pytest.approx([4 / 6] * 3 + [2.0])


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("sentiment", [], ClassificationConfig),
        ("sentiment", ["weibo"], ClassificationConfig),
        ("sentiment", ["chnsenticorp"], ClassificationConfig),
        ("demo_lm", [], LanguageModelConfig),
        ("distill", [], LanguageModelConfig),
        ("distill", ["alone"], LanguageModelConfig),
        ("draft_head", [], DraftHeadConfig),
    ],
)
def test_configs_are_whole(name, arguments, kind):
    get_config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]
    assert isinstance(from_dict(kind, get_config(*arguments).to_dict()), kind)


COMMON = ("steps", "batch_size", "seed", "log_every", "eval_every", "checkpoint_every")


def kinds(parent):
    """{task: the config class of it}."""
    found = {parent.task: parent} if hasattr(parent, "task") else {}
    for kind in parent.__subclasses__():
        found |= kinds(kind)
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_takes_the_common_settings_by_flag(path, monkeypatch):
    given = FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=given)
    task = runpy.run_path(str(path))["get_config"]().task
    if task == "documents_mlp":
        return  # a network of three layers, no text: settings of its own
    values = {name: 7 + i for i, name in enumerate(COMMON)}
    other = (("mine.txt", "", 1.0),) if task in ("lm", "draft_head") else "mine.tsv"
    flags = [f"--config.{name}={value}" for name, value in (values | {"data": other}).items()]
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={path}", *flags])  # ml_collections reads it
    given(sys.argv)
    config = from_dict(kinds(TrainConfig)[task], given.config.to_dict())
    assert {name: getattr(config, name) for name in COMMON} == values
    assert config.data == other


def classification_config(data, **settings):
    model = dataclasses.replace(MODEL, head="classifier", num_classes=2)
    defaults = {"optim": OptimConfig(1e-3), "batch_size": 8, "steps": 1, "max_tokens": 64}
    return ClassificationConfig(data=str(data), model=model, **defaults | settings)


def test_a_folder_is_trained_on_and_held_out_by_its_files(tmp_path):
    (tmp_path / "train.tsv").write_text("said\tkind\na\tx\nb\ty\n")
    (tmp_path / "dev.tsv").write_text("said\tkind\nc\ty\n")
    (tmp_path / "other.tsv").write_text("said\tkind\nd\tx\n")
    fields = {"text_field": "said", "label_field": "kind"}
    rows, held_out, labels, parts = classification._read(classification_config(tmp_path, **fields))
    assert (rows.texts, rows.gold.tolist()) == (["a", "b"], [0, 1])
    assert (held_out.texts, held_out.gold.tolist()) == (["c"], [1])
    assert labels == ("x", "y") and parts == ()
    other = classification_config(tmp_path, eval_data=str(tmp_path / "other.tsv"), **fields)
    assert classification._read(other)[1].texts == ["d"]


def test_character_coverage_decides_what_is_spelled_in_bytes(tmp_path):
    found = {}
    for coverage in (1.0, 0.98):  # the rare character is one of 201
        config = classification_config("x.tsv", character_coverage=coverage)
        tokenizer = classification._tokenizer(config, ["你好世界" * 50, "龘"], tmp_path / str(coverage))
        found[coverage] = tokenizer.piece_to_id("龘") is not None
    assert found == {1.0: True, 0.98: False}


def test_an_unknown_data_set_is_told_the_nearest_name():
    get_config = runpy.run_path(str(CONFIGS / "sentiment.py"))["get_config"]
    with pytest.raises(ValueError, match="did you mean weibo"):
        get_config("webo")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optim.lerning_rate=1", "'lerning_rate'; did you mean learning_rate?"),
        ("--config.optm.learning_rate=1", "'optm'; did you mean optim?"),
        ("--noconfig.balance_clases", "'balance_clases'; did you mean balance_classes?"),
        ("--config.data.path=x", "a value there, not a group"),
        ("--noconfig.balance_classes --config.optm.b1=0.5", "'optm'; did you mean optim?"),
        ("--config.pretrain=None", "a group of settings there; say --config.pretrain.epochs=0"),
        ("--config.pretrain None", "a group of settings there; say --config.pretrain.epochs=0"),
        ("--config.optim=None", "a group of settings there; take a config without it"),
        ("--config.lora=None", None),
        ("--config.optim.learning_rate=1", None),
    ],
)
def test_an_override_that_cannot_be_says_what_can(override, message):
    config = f"--config={CONFIGS / 'sentiment.py'}:weibo"
    found = unknown_override(["train.py", config, *override.split()])
    assert (found is None) if message is None else (found is not None and message in found)


def command_line(*arguments, monkeypatch):
    """The settings that train.py reads from `arguments`."""
    flags = FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=flags)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])  # ml_collections reads it
    flags(sys.argv)
    return from_dict(ClassificationConfig, flags.config.to_dict())


@pytest.mark.parametrize("name", ["bundled", "weibo", "chnsenticorp", "airline", "thucnews"])
def test_flags_take_pretraining_away_and_add_it(name, monkeypatch):
    config = f"--config={CONFIGS / 'sentiment.py'}:{name}"
    without = command_line(config, "--config.pretrain.epochs=0", monkeypatch=monkeypatch)
    assert without.pretrain is not None and without.pretraining is None
    with_it = command_line(config, "--config.pretrain.epochs=5", monkeypatch=monkeypatch)
    assert with_it.pretraining is not None and with_it.pretraining.epochs == 5
    counted = ("--config.pretrain.epochs=0", "--config.pretrain.steps=7")
    by_steps = command_line(config, *counted, monkeypatch=monkeypatch)
    assert by_steps.pretraining is not None and by_steps.pretraining.steps == 7


def test_flags_set_a_number_that_is_none(monkeypatch):
    config = f"--config={CONFIGS / 'sentiment_finetune.py'}"
    assert command_line(config, monkeypatch=monkeypatch).dropout is None
    assert command_line(config, "--config.dropout=0.25", monkeypatch=monkeypatch).dropout == 0.25
    config = f"--config={CONFIGS / 'sentiment.py'}"
    changed = ("--config.model.attn_softcap=50", "--config.pretrain.dropout=0.5")
    found = command_line(config, *changed, monkeypatch=monkeypatch)
    assert found.model is not None and found.pretrain is not None
    assert (found.model.attn_softcap, found.pretrain.dropout) == (50.0, 0.5)
    assert found.model.final_softcap is None


def test_pretraining_of_no_length_is_none(tmp_path):
    """The same classifier, to the bit, as one without `pretrain`; other runs need a length."""
    data, mesh = tmp_path / "data.tsv", make_mesh("data:1")
    write_reviews(data, 60, 0)
    none = PretrainConfig(optim=OPTIM, batch_size=8, mask_rate=0.5)
    encoder = dataclasses.replace(MODEL, head="classifier", causal=False, pooling="mean", num_classes=9)
    plain = dataclasses.replace(classification_config(str(data)), model=encoder, max_tokens=32)
    found = {}
    for stage in (none, None):
        workdir = tmp_path / f"{stage is None}"
        classification.run(dataclasses.replace(plain, pretrain=stage), workdir, mesh)
        assert not (workdir / "pretrain").exists()
        found[stage is None] = flatten(load_trained(workdir, mesh).params)
    for path, value in found[True].items():
        np.testing.assert_array_equal(value, found[False][path], err_msg=path)

    assert dataclasses.replace(plain, model=None, init_from="x", pretrain=none).pretraining is None
    some = dataclasses.replace(none, epochs=2.0)
    with pytest.raises(ValueError, match=r"pretrain.steps=0, pretrain.epochs=2.0: .* with init_from"):
        dataclasses.replace(plain, model=None, init_from="x", pretrain=some)
    causal = dataclasses.replace(encoder, causal=True)
    assert dataclasses.replace(plain, model=causal, pretrain=none).pretraining is None
    with pytest.raises(ValueError, match=r"pretrain.epochs=2.0: expected 0 and 0, .*causal=True"):
        dataclasses.replace(plain, model=causal, pretrain=some)
    with pytest.raises(ValueError, match=r"steps, epochs=\(0, 0.0\): expected one of them positive"):
        MaskedLanguageModelConfig(data="x", init_from="x", optim=OPTIM, batch_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"accumulate": 3}, "accumulate"),
        ({"max_tokens": 65}, "max_positions=64"),
        ({"eval_fraction": 0.0}, "eval_fraction"),
        ({"optim": {"learning_rate": 1.0, "lr": 2.0}}, r"config\.optim\.lr is not a setting"),
    ],
)
def test_bad_settings_name_the_field(change, message):
    model = dataclasses.asdict(dataclasses.replace(MODEL, head="classifier", num_classes=2))
    good = {"data": "x.tsv", "model": model, "optim": {"learning_rate": 1.0}}
    good |= {"batch_size": 8, "steps": 1, "max_tokens": 64}
    assert from_dict(ClassificationConfig, good)
    with pytest.raises(ValueError, match=message):
        from_dict(ClassificationConfig, good | change)


@pytest.mark.slow
def test_pretraining_has_a_dropout_of_its_own(tmp_path):
    data = tmp_path / "data.tsv"
    write_reviews(data, 40, 0)

    def first_loss(of_model, of_stage):
        model = dataclasses.replace(
            MODEL, head="classifier", causal=False, pooling="mean", num_classes=9
        )
        stage = PretrainConfig(optim=OPTIM, batch_size=8, steps=1, log_every=1, dropout=of_stage)
        config = ClassificationConfig(
            data=str(data),
            max_tokens=32,
            model=dataclasses.replace(model, dropout=of_model),
            optim=OPTIM,
            batch_size=8,
            steps=1,
            pretrain=stage,
        )
        workdir = tmp_path / f"{of_model} {of_stage}"
        classification.run(config, workdir, make_mesh("data:1"))
        return read_metrics(workdir / "pretrain" / "metrics.jsonl")[0]["train/loss"]

    without = first_loss(0.0, None)
    assert first_loss(0.5, 0.0) == without
    assert first_loss(0.5, None) == first_loss(0.0, 0.5) != without


@pytest.mark.parametrize(
    "stage", [None, PretrainConfig(optim=OptimConfig(1e-30), batch_size=8, steps=1)]
)
def test_a_classifier_and_its_pretraining_start_from_word_vectors(stage, tmp_path):
    data, workdir, mesh = tmp_path / "data.tsv", tmp_path / "run", make_mesh("data:1")
    write_reviews(data, 60, 0)
    encoder = dataclasses.replace(MODEL, head="classifier", causal=False, pooling="mean", num_classes=9)
    plain = dataclasses.replace(
        classification_config(str(data)),
        max_tokens=32,
        model=encoder,
        optim=OptimConfig(1e-30),  # no step moves the parameters
        pretrain=stage,
    )
    classification.run(dataclasses.replace(plain, embed_start="cooccurrence"), workdir, mesh)
    trained = load_trained(workdir, mesh).params
    vectors = np.load(workdir / "vectors.npy")
    np.testing.assert_array_equal(trained["embed"]["tokens"], vectors)
    classification.run(plain, tmp_path / "random", mesh)
    other = flatten(load_trained(tmp_path / "random", mesh).params)
    for path, value in flatten(trained).items():
        same = np.allclose(value, other[path], rtol=0, atol=1e-20)
        assert same == (path != "embed/tokens"), path


def test_word_vectors_of_another_size_are_not_taken(tmp_path):
    data, mesh = tmp_path / "data.tsv", make_mesh("data:1")
    write_reviews(data, 60, 0)
    encoder = dataclasses.replace(MODEL, head="classifier", causal=False, pooling="mean", num_classes=9)
    config = dataclasses.replace(
        classification_config(str(data)), max_tokens=32, model=encoder, embed_start="cooccurrence"
    )
    np.save(tmp_path / "vectors.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"vectors.npy: vectors \(3, 4\); expected .*count anew"):
        classification.run(config, tmp_path, mesh)


def test_word_vectors_are_for_models_from_scratch():
    with pytest.raises(ValueError, match="did you mean cooccurrence"):
        dataclasses.replace(classification_config("x.tsv"), embed_start="coocurrence")
    with pytest.raises(ValueError, match="embed_start='cooccurrence': .* init_from .* does not read it"):
        dataclasses.replace(
            classification_config("x.tsv"), embed_start="cooccurrence", model=None, init_from="x"
        )


@pytest.mark.slow
def test_a_classifier_starts_from_the_encoder_that_was_pretrained(tmp_path):
    data, workdir, mesh = tmp_path / "data.tsv", tmp_path / "run", make_mesh("data:1")
    write_reviews(data, 60, 0)
    # No step moves the classifier: it keeps the parameters that it started from.
    config = ClassificationConfig(
        data=str(data),
        max_tokens=32,
        model=dataclasses.replace(MODEL, head="classifier", causal=False, pooling="mean", num_classes=9),
        optim=OptimConfig(1e-30),
        batch_size=16,
        steps=1,
        pretrain=PretrainConfig(optim=OPTIM, batch_size=16, steps=30, log_every=30, mask_rate=0.3),
    )
    classification.run(config, workdir, mesh)
    model = load_trained(workdir, mesh).model
    encoder = masked_lm_model(model.config)
    pretrained = restore_params(workdir / "pretrain" / "checkpoints" / "30", encoder, mesh, item="ema")
    classifier = load_trained(workdir, mesh).params
    for name in ("embed", "layers"):
        for path, value in flatten(pretrained[name]).items():
            np.testing.assert_array_equal(value, flatten(classifier[name])[path], err_msg=path)
    assert "lm_head" not in classifier and "classifier" in classifier
    records = read_metrics(workdir / "pretrain" / "metrics.jsonl")
    assert records[0]["train/loss"] < np.log(model.config.vocab_size)
