"""Classifying texts: the same as transformers, whatever the batch and the mesh; and from the script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llm_jax.checkpoint.workdir import load_trained
from llm_jax.config import ClassificationConfig, ModelConfig, OptimConfig
from llm_jax.infer.classify import TextClassifier, classify, embed
from llm_jax.sharding import make_mesh
from llm_jax.train import classification
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{i}" for i in range(tiny.VOCAB - 4)]
LENGTHS = (3, 60, 1, 20, 5, 9, 2)  # three buckets
SHARDED = "data:4,tensor:2"


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, length)) for length in LENGTHS]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]) + "\n")
    return path


def save(name, directory, vocab):
    """(transformers model, transformers tokenizer) of a tiny model written to `directory`."""
    model = tiny.ALL[name].save(directory)
    (directory / "vocab.txt").write_text(vocab.read_text())
    return model, transformers.BertTokenizer(str(directory / "vocab.txt"))


def one_by_one(model, tokenizer, texts):
    """What transformers says of each text alone, without any padding."""
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")) for text in texts]


def test_probabilities_are_those_of_transformers(tmp_path, vocab, texts):
    model, tokenizer = save("bert classifier", tmp_path, vocab)
    expected = [torch.softmax(out.logits[0], -1).numpy() for out in one_by_one(model, tokenizer, texts)]
    results = TextClassifier.load(tmp_path, make_mesh("data:1"), batch_size=4).classify(texts)
    assert [result.text for result in results] == texts
    assert {tuple(result.probs) for result in results} == {("neg", "neu", "pos")}
    found = np.array([list(result.probs.values()) for result in results])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert [r.label for r in results] == [("neg", "neu", "pos")[p.argmax()] for p in expected]


def test_vectors_are_those_of_transformers(tmp_path, vocab, texts):
    model, tokenizer = save("bert", tmp_path, vocab)
    expected = [out.pooler_output[0].numpy() for out in one_by_one(model, tokenizer, texts)]
    found = TextClassifier.load(tmp_path, make_mesh("data:1"), batch_size=4).embed(texts)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_mesh_and_batch_do_not_matter(tmp_path, vocab, texts):
    save("bert classifier", tmp_path, vocab)
    alone = TextClassifier.load(tmp_path, make_mesh("data:1"), batch_size=3)
    sharded = TextClassifier.load(tmp_path, make_mesh(SHARDED), batch_size=6)
    assert sharded.batch_size == 8
    probs, vectors = (
        f(alone.model, alone.params, alone.mesh, alone.batches(texts)) for f in (classify, embed)
    )
    batches = list(sharded.batches(texts))
    found = classify(sharded.model, sharded.params, sharded.mesh, batches)
    np.testing.assert_allclose(found, probs, atol=1e-6)
    found = embed(sharded.model, sharded.params, sharded.mesh, batches)
    np.testing.assert_allclose(found, vectors, atol=1e-5)


def test_a_model_without_classes_is_refused(tmp_path, vocab, texts):
    save("bert", tmp_path, vocab)
    encoder = TextClassifier.load(tmp_path, make_mesh("data:1"))
    with pytest.raises(ValueError, match="head='embedding' has no classes"):
        encoder.classify(texts)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the --workdir of scripts/train.py"):
        TextClassifier.load(tmp_path, make_mesh("data:1"))


def test_no_texts_are_refused(tmp_path, vocab):
    save("bert classifier", tmp_path, vocab)
    with pytest.raises(ValueError, match="there are no texts"):
        TextClassifier.load(tmp_path, make_mesh("data:1")).classify([])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, dev texts, result) of a short training on texts that one word decides."""
    directory = tmp_path_factory.mktemp("run")
    rng, fillers = np.random.default_rng(1), ["今天", "我们", "这里", "非常", "真的"]
    rows = [
        (label, "".join(rng.choice(fillers, 3)) + word + "。")
        for _ in range(60)
        for label, word in (("好", "喜欢"), ("坏", "讨厌"))
    ]
    rows += [
        ("好", "喜欢" + "1" * 50),
        ("坏", "讨厌" + "2" * 50),
    ]  # a digit is a token: beyond max_tokens
    lines = ["label\ttext", *(f"{label}\t{text}" for label, text in rows)]
    (directory / "data.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = ModelConfig(
        "bert",
        head="classifier",
        pooling="mean",
        causal=False,
        num_classes=2,
        vocab_size=400,
        num_layers=1,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=32,
        max_positions=64,
    )
    data = str(directory / "data.tsv")
    config = ClassificationConfig(
        data=data,
        model=model,
        optim=OptimConfig(1e-2),
        batch_size=16,
        steps=30,
        eval_data=data,
        max_tokens=32,
    )
    result = classification.run(config, directory / "work", make_mesh("data:1"))
    return directory / "work", [text for _, text in rows], result


def test_a_workdir_answers_as_it_did_in_training(run):
    workdir, texts, result = run
    found = TextClassifier.load(workdir, make_mesh("data:1")).classify(texts)
    assert (result.predicted == result.gold).mean() == 1
    assert {r.label for r in found if "喜欢" in r.text} == {"好"}
    assert {r.label for r in found if "讨厌" in r.text} == {"坏"}
    probs = np.array([list(r.probs.values()) for r in found])
    np.testing.assert_allclose(np.sort(probs[:, 0]), np.sort(result.probs[:, 0]), atol=1e-5)


def test_max_tokens_beyond_the_positions_is_refused(run):
    trained = load_trained(run[0], make_mesh("data:1"))
    for wrong in (0, 65):
        with pytest.raises(ValueError, match=f"max_tokens={wrong}: expected 1 to max_positions=64"):
            TextClassifier(
                trained.model, trained.params, None, make_mesh("data:1"), ("a", "b"), max_tokens=wrong
            )


def script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "classify.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_script_writes_one_object_a_text(run, tmp_path):
    workdir, texts, _ = run
    (tmp_path / "in.jsonl").write_text(json.dumps({"post": texts[0]}) + "\n")
    arguments = (f"--input={tmp_path}/in.jsonl", "--field=post", f"--text={texts[1]}", "--json")
    done = script(f"--checkpoint={workdir}", *arguments)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [list(record) for record in records] == [["text", "label", "probs"]] * 2
    assert [(r["text"], r["label"]) for r in records] == [(texts[1], "坏"), (texts[0], "好")]
    for record in records:
        assert sum(record["probs"].values()) == pytest.approx(1)


def test_script_says_what_to_do(tmp_path):
    done = script(f"--checkpoint={tmp_path}", "--text=好")
    assert done.returncode == 2 and not done.stdout
    assert "expected the --workdir of scripts/train.py" in done.stderr and "Traceback" not in done.stderr
