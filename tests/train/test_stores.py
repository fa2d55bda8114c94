"""From texts to a store to a trained language model, small; and what cannot be trained on together."""

import dataclasses
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl.flags import FlagValues
from ml_collections import config_flags

from llm_jax.checkpoint.workdir import load_trained
from llm_jax.config import DistillConfig, LanguageModelConfig, ModelConfig, OptimConfig, from_dict
from llm_jax.data.packing import row_batches
from llm_jax.data.prepare import Plan, prepare
from llm_jax.data.store_rows import SplitRows
from llm_jax.data.token_store import EVAL, TRAIN, fingerprint, open_store
from llm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from llm_jax.sharding import make_mesh
from llm_jax.train import corpus, language_model
from llm_jax.train.loop import make_evaluate
from llm_jax.train.metrics_log import read_metrics
from llm_jax.train.objectives import lm_loss

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    "llama",
    vocab_size=9999,
    num_layers=1,
    embed_dim=16,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=16,
    max_positions=64,
    tie_embeddings=True,
)


PLAN = Plan(clean=("spaces",), dedup="exact", near_threshold=0.8, eval_fraction=0.1, seed=0)
TEXTS = [f"there are {i} sheep and {i + 1} sheep" for i in range(150)]


def config(*data, **changes):
    values = {"model": MODEL, "optim": OptimConfig(1e-2), "batch_size": 4, "steps": 60, "row_tokens": 32}
    return LanguageModelConfig(data=data, **values | changes)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Directories: stores of counted sheep and of counted goats, a tokenizer, a text."""
    directory = tmp_path_factory.mktemp("data")
    ByteTokenizer().save(directory / "bytes")
    for name in ("sheep", "goats"):
        texts = [text.replace("sheep", name) for text in TEXTS]
        (directory / f"{name}.txt").write_text("\n".join(texts) + "\n")
        prepare(texts, directory / "bytes", directory / name, PLAN)
    return directory


@pytest.fixture(scope="module")
def trained(stores, tmp_path_factory):
    """The workdir of a run on the sheep, and its result."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    settings = config(str(stores / "sheep"), eval_every=30)
    return workdir, language_model.run(settings, workdir, make_mesh("data:1"))


def test_a_language_model_from_a_store_to_perplexity(stores, trained):
    workdir, result = trained
    split = open_store(stores / "sheep").splits[EVAL]
    assert result.tokens == split.tokens - split.documents and result.perplexity == math.exp(result.loss)
    assert result.perplexity < 40, "of 260 tokens"
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / split.bytes / math.log(2))
    assert list(result.sources) == [f"{stores.name}/sheep"]
    assert read_metrics(workdir / "metrics.jsonl")[-1]["eval/loss"] == pytest.approx(result.loss)

    mesh = make_mesh("data:1")
    found = load_trained(workdir, mesh)
    tokenizer = load_tokenizer(found.tokenizer)
    assert fingerprint(tokenizer) == open_store(stores / "sheep").tokenizer
    assert found.model.config.vocab_size == tokenizer.vocab_size == 260
    # The same rows, all at once.
    rows = SplitRows(open_store(stores / "sheep"), EVAL, 32)
    batches = row_batches(rows.read(np.arange(len(rows))), 64)
    loss = make_evaluate(found.model, lm_loss, batches, mesh)(found.params)["eval/loss"]
    assert loss == pytest.approx(result.loss, rel=1e-5)


def test_a_run_on_other_data_is_not_resumed(stores, tmp_path):
    """Its settings are the same, the store of that name is not."""
    settings = config(str(tmp_path / "store"), steps=2)
    prepare(TEXTS, stores / "bytes", tmp_path / "store", PLAN)
    first = language_model.run(settings, tmp_path / "run", make_mesh("data:1"))
    assert language_model.run(settings, tmp_path / "run", make_mesh("data:1")) == first
    os.rename(tmp_path / "store", tmp_path / "old")
    prepare(TEXTS[:-1], stores / "bytes", tmp_path / "store", PLAN)
    with pytest.raises(ValueError, match=r"on other batches: crc32 of .*/store: \d+ there, \d+ here"):
        language_model.run(settings, tmp_path / "run", make_mesh("data:1"))


def test_a_mixture_is_judged_by_each_of_its_stores(stores, tmp_path):
    data = ((str(stores / "sheep"), "", 3.0), (str(stores / "goats"), "", 1.0))
    result = language_model.run(config(*data, steps=5), tmp_path / "run", make_mesh("data:2"))
    sheep, goats = (result.sources[f"{stores.name}/{name}"] for name in ("sheep", "goats"))
    assert result.tokens == sheep.tokens + goats.tokens
    mean = (sheep.loss * sheep.tokens + goats.loss * goats.tokens) / result.tokens
    assert result.loss == pytest.approx(mean) and sheep.loss != goats.loss


def test_epochs_are_those_of_one_store(stores, tmp_path):
    one = corpus.read_corpus(config(str(stores / "sheep")), tmp_path / "tokenizer")
    rows = SplitRows(open_store(stores / "sheep"), TRAIN, 32)
    assert one.loader.steps_per_epoch == len(rows) / 4
    both = config(str(stores / "sheep"), str(stores / "goats"), steps=0, epochs=0.5)
    with pytest.raises(ValueError, match="epochs of .*expected steps"):
        language_model.run(both, tmp_path / "both", make_mesh("data:1"))
    assert not (tmp_path / "both" / "config.json").exists()


def test_what_cannot_be_trained_on_together_is_refused(stores, tmp_path):
    def refused(message, *data, **changes):
        with pytest.raises(ValueError, match=message):
            language_model.run(config(*data, **changes), tmp_path / "run", make_mesh("data:1"))
        assert not (tmp_path / "run").exists()  # nothing stands in the way of the mended command

    sheep = str(stores / "sheep")
    refused(f"prepare_data.py --tokenizer={sheep}/tokenizer", sheep, str(stores / "goats.txt"))
    refused("field='text' and join=1 of .*sheep: expected '' and 1", (sheep, "text"))
    refused("field='' and join=2", (sheep, "", 1.0, 2))
    prepare(TEXTS, stores / "bytes", tmp_path / "whole", dataclasses.replace(PLAN, eval_fraction=0.0))
    refused("whole has no held-out part .* --eval_fraction=0.01", str(tmp_path / "whole"))
    train_sentencepiece(TEXTS, tmp_path / "pieces", vocab_size=300)
    prepare(TEXTS, tmp_path / "pieces", tmp_path / "other", PLAN)
    other = str(tmp_path / "other")
    refused(f"other was made by another tokenizer than {sheep}/tokenizer", sheep, other)
    pieces = str(tmp_path / "pieces")
    refused(f"sheep was made by another tokenizer than {pieces}", sheep, tokenizer=pieces)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"document": "blank"}, "document='blank': expected its default 'line'"),
        ({"eval_fraction": 0.02}, "eval_fraction=0.02: expected its default 0.01"),
        ({"eval_split": "tail"}, "eval_split='tail': expected its default 'random'"),
        ({"tokenizer_kind": "bpe"}, "tokenizer_kind='bpe': expected its default 'unigram'"),
        ({"character_coverage": 1.0}, "character_coverage=1.0: expected its default 0.9995"),
        (
            {"eval_split": "tail", "document": "file"},
            "document='file', eval_split='tail': expected the defaults 'line', 'random'",
        ),
    ],
)
def test_what_describes_texts_is_refused_beside_a_store(changes, message, stores, tmp_path):
    sheep = str(stores / "sheep")
    whole = re.escape(f"{message}: a run on the token store {sheep} does not read ")
    with pytest.raises(ValueError, match=whole):
        language_model.run(config(sheep, **changes), tmp_path / "run", make_mesh("data:1"))
    assert not (tmp_path / "run").exists()  # nothing stands in the way of the mended command
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(TEXTS))
    read = corpus.read_corpus(config(str(texts), **changes), tmp_path / "tokenizer")
    assert [part.targets > 0 for part in read.held_out.values()] == [True]  # texts take them


def test_the_demo_config_for_stores_opens_one(stores, tmp_path):
    get_config = runpy.run_path(str(ROOT / "configs" / "demo_lm.py"))["get_config"]
    values = get_config("store").to_dict() | {"data": (str(stores / "sheep"),)}
    settings = from_dict(LanguageModelConfig, values)
    rows = corpus.read_corpus(settings, tmp_path / "tokenizer").loader(0)["tokens"]
    assert rows.shape == (settings.batch_size, settings.row_tokens)
    with pytest.raises(ValueError, match="eval_fraction=0.02, character_coverage=0.999: expected the"):
        values = get_config().to_dict() | {"data": (str(stores / "sheep"),)}
        corpus.read_corpus(from_dict(LanguageModelConfig, values), tmp_path / "other")
    with pytest.raises(ValueError, match="demo_lm.py:stores: expected one of .* did you mean store?"):
        get_config("stores")


def test_a_teacher_must_have_the_tokenizer_of_the_store(stores, trained, tmp_path):
    distill = DistillConfig(teacher=str(trained[0]))
    settings = config(str(stores / "goats"), steps=1, distill=distill)
    result = language_model.run(settings, tmp_path / "small", make_mesh("data:1"))
    split = open_store(stores / "goats").splits[EVAL]
    assert result.tokens == split.tokens - split.documents
    train_sentencepiece(TEXTS, tmp_path / "pieces", vocab_size=300)
    prepare(TEXTS, tmp_path / "pieces", tmp_path / "other", PLAN)
    settings = dataclasses.replace(settings, data=(str(tmp_path / "other"),))
    with pytest.raises(ValueError, match="other was made by another tokenizer than .*/wrong/tokenizer"):
        language_model.run(settings, tmp_path / "wrong", make_mesh("data:1"))


# The command line


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ("store", ["store"]),
        ("runs/my-store_2.jsonl", ["runs/my-store_2.jsonl"]),
        ("gs://bucket/*.parquet", ["gs://bucket/*.parquet"]),
        ("'my file.txt'", ["my file.txt"]),
        ("('a.txt','b.txt')", ["a.txt", "b.txt"]),
        ("(('a.txt','',2.0),'b.txt')", ["a.txt", "b.txt"]),
    ],
)
def test_data_can_be_a_plain_path_on_the_command_line(given, paths, monkeypatch):
    flags, path = FlagValues(), ROOT / "configs" / "demo_lm.py"
    config_flags.DEFINE_config_file("config", flag_values=flags)
    arguments = ["train.py", f"--config={path}", f"--config.data={given}"]
    monkeypatch.setattr(sys, "argv", arguments)  # ml_collections reads it
    flags(arguments)
    settings = from_dict(LanguageModelConfig, flags.config.to_dict())
    assert [source.path for source in settings.sources] == paths


def test_sources_whose_paths_end_alike_are_told_apart():
    sources = config("a/x/web", "b/x/web", ("a/y/web", "text"), "own.txt").sources
    assert corpus._names(sources) == ["a/x/web", "b/x/web", "y/web/text", "own.txt"]


SMALL = """
from llm_jax.config import LanguageModelConfig, ModelConfig, OptimConfig, to_config_dict

def get_config():
    shape = dict(num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)
    model = ModelConfig("llama", vocab_size=300, max_positions=16, **shape)
    data = (("elsewhere.txt", "", 1.0),)
    return to_config_dict(LanguageModelConfig(
        data=data, row_tokens=16, batch_size=2, steps=2, optim=OptimConfig(1e-2), model=model))
"""


@pytest.mark.slow  # three processes, two of which import all that trains
def test_prepare_and_train_as_a_user_does(stores, tmp_path):
    def script(name, *arguments):
        command = [sys.executable, str(ROOT / "scripts" / name), *arguments, "--json"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    (tmp_path / "small.py").write_text(SMALL)
    report = script(
        "prepare_data.py",
        f"--input={stores}/sheep.txt",
        f"--tokenizer={stores}/bytes",
        "--output=store",
        "--clean=nfc,spaces,min_characters=4",
        "--dedup=near",
        "--near_threshold=1.0",
        "--eval_fraction=0.1",
        "--workers=1",
    )
    assert report["documents"] == {"read": 150, "kept": 150}
    train = ("train.py", "--config=small.py")
    results = script(*train, "--config.data=store", "--workdir=a")
    assert (
        results["tokens"]
        == report["tokens"]["eval"] - open_store(tmp_path / "store").splits[EVAL].documents
    )
    assert list(results["sources"]) == ["store"]
    results = script(*train, f"--config.data={stores}/sheep.txt", "--workdir=b")
    assert list(results["sources"]) == [f"{stores.name}/sheep.txt"]
