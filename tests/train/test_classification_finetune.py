"""Classifiers from checkpoints: their beginning, against transformers and torch, and what they learn."""

import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llm_jax.checkpoint.hf import export_hf, load_config, load_hf
from llm_jax.checkpoint.peft import export_peft
from llm_jax.checkpoint.tensor_file import TensorFile
from llm_jax.checkpoint.workdir import load_start, load_trained
from llm_jax.config import ClassificationConfig, LoraConfig, ModelConfig, OptimConfig, from_dict
from llm_jax.data.fast_tokenizer import ByteTokenizer
from llm_jax.data.packing import pad_batch
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.infer.classify import TextClassifier
from llm_jax.models import describe
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train import classification
from llm_jax.train.objectives import classification_logits, classification_loss
from llm_jax.train.pretrained import find_start
from llm_jax.tree import flatten
from tests import tiny

peft = pytest.importorskip("peft")
CONFIGS = Path(__file__).parents[2] / "configs"
FRUIT, TOOLS, FILLER = ["apple", "pear", "plum"], ["saw", "drill", "file"], ["the", "a", "red", "old"]
LABELS, KEY = ("bad", "good"), jax.random.key(3)
LORA = LoraConfig(rank=3, alpha=6.0, targets=("attn/w[qv]$",), whole=("^(classifier|pooler)/",))


@pytest.fixture
def data(tmp_path):
    """Fruit is good, tools are bad, whatever the words between."""
    rng, lines = np.random.default_rng(0), ["label\ttext"]
    for i in range(80):
        before, after = rng.choice(FILLER, 2), rng.choice(FILLER, rng.integers(4))
        text = [*before, rng.choice((TOOLS, FRUIT)[i % 2]), *after]
        lines.append(f"{LABELS[i % 2]}\t{' '.join(text)}")
    path = tmp_path / "data.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A WordPiece tokenizer of the words."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path.write_text("\n".join([*special, *FRUIT, *TOOLS, *FILLER]) + "\n")
    return load_tokenizer(path)


@pytest.fixture
def bert(tmp_path, words):
    """A Hugging Face directory of a random BERT with a vocabulary head."""
    tiny.MASKED["bert masked"].save_for(tmp_path / "bert", words)
    return tmp_path / "bert"


def settings(data, directory, **changes):
    values = {
        "data": str(data),
        "init_from": str(directory),
        "max_tokens": 48,
        "eval_fraction": 0.25,
        "optim": OptimConfig(3e-3, warmup_fraction=0.1),
        "batch_size": 16,
        "steps": 40,
    }
    return ClassificationConfig(**values | changes)


def beginning(config, labels=LABELS):
    """The model of a run at step 0: model, what trains, its parameters, what is frozen."""
    mesh, found = make_mesh("data:1"), find_start(config.init_from)
    chosen = classification._model_config(config, found, load_tokenizer(found.tokenizer), labels, ())
    model = describe(dataclasses.replace(chosen, param_dtype="float32"))
    trained, start, frozen = classification._beginning(config, found, model, mesh)
    return model, trained, start(KEY), frozen


def with_head(params):
    """The parameters with numbers in the head, which begins as zeros."""
    rng, head = np.random.default_rng(1), params["classifier"]
    assert all((np.asarray(value) == 0).all() for value in head.values())
    drawn = {name: rng.normal(0, 0.3, x.shape).astype(np.float32) for name, x in head.items()}
    return params | {"classifier": jax.tree.map(jnp.asarray, drawn)}


def text_batch(tokenizer, texts=("the red apple", "saw", "a drill the old file")):
    tokens = [tokenizer.encode(text) for text in texts]
    batch = pad_batch(tokens, max(map(len, tokens)) + 2)
    return tokens, {name: jnp.asarray(value) for name, value in batch.items()}


NEW = {"classifier/weight", "classifier/bias"}
CASES = {  # name of a tiny model: what is drawn
    "bert masked": NEW | {"pooler/weight", "pooler/bias"},
    "bert": NEW,
    "roberta masked": NEW | {"pooler/weight", "pooler/bias"},
    "gpt2": {"classifier/weight"},
    "llama": {"classifier/weight"},
}


@pytest.mark.parametrize("name", CASES)
def test_step_0_has_the_hidden_states_of_transformers_and_a_new_head(tmp_path, data, words, name):
    tokenizer = words if name.startswith("bert") else ByteTokenizer()
    directory = tmp_path / "model"
    tiny.ALL[name].save_for(directory, tokenizer)
    model, _, params, _ = beginning(settings(data, directory))
    params = with_head(params)
    assert set(load_start(str(directory), model, make_mesh("data:1"), KEY)[1]) == CASES[name]
    tokens, batch = text_batch(tokenizer)

    @jax.jit
    def run(params, batch):
        net, context = model.bind(params), FullContext(batch["segment_ids"])
        hidden, _ = net(batch["tokens"], batch["positions"], context)
        return hidden, net.classify(hidden, batch["segment_ids"], context)

    hidden, logits = run(params, batch)
    theirs = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    for row, ids in enumerate(tokens):  # one by one: no padding there
        with torch.no_grad():
            want = theirs(torch.tensor([ids])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(hidden[row, : len(ids)], want, atol=2e-5 * np.abs(want).max())

    # What is exported says the same in transformers' class of such classifiers.
    export_hf(tmp_path / "out", model, params)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    for row, ids in enumerate(tokens):
        with torch.no_grad():
            want = theirs(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(logits[row], want, atol=2e-5)


def test_the_gradient_of_a_step_is_that_of_torch(tmp_path, data, bert, words):
    model, _, params, _ = beginning(settings(data, bert, dropout=0.0))
    params = with_head(params)
    tokens, batch = text_batch(words)
    labels = np.array([1, 0, 0], np.int32)
    batch["labels"] = jnp.asarray(labels)

    def loss(params):
        total, count, _ = classification_loss(model.bind(params), batch, None)
        return total / count

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    for name, tree in (("params", params), ("gradient", gradient)):
        export_hf(tmp_path / name, model, tree)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "params").eval()
    mask = torch.tensor(np.array(batch["segment_ids"]))
    ids = torch.tensor(np.array(batch["tokens"]))
    out = theirs(ids, attention_mask=mask, labels=torch.tensor(labels, dtype=torch.long))
    out.loss.backward()
    assert float(value) == pytest.approx(out.loss.item(), rel=1e-5)
    ours = TensorFile(tmp_path / "gradient" / "model.safetensors")
    wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert set(ours.names) == set(wanted)
    for name, want in wanted.items():
        # Sums of float32 in another order, against the largest gradient of the tensor; biases of keys
        # have the gradient zero but for rounding.
        atol = 1e-4 * np.abs(want).max() + 1e-7
        np.testing.assert_allclose(ours.view(name), want, atol=atol, err_msg=name)


def test_it_learns_resumes_exactly_and_answers(tmp_path, data, bert):
    config, mesh, workdir = (
        settings(data, bert, checkpoint_every=20),
        make_mesh("data:2"),
        tmp_path / "run",
    )
    result = classification.run(config, workdir, mesh)
    assert result.labels == LABELS and np.mean(result.gold == result.predicted) == 1.0
    assert len(result.gold) == 20
    whole = load_trained(workdir, mesh)
    assert whole.model.config.dropout == load_config(bert).dropout > 0, "that of the checkpoint"
    shutil.rmtree(workdir / "checkpoints" / "40")
    again = classification.run(config, workdir, mesh)
    np.testing.assert_array_equal(again.probs, result.probs)
    jax.tree.map(np.testing.assert_array_equal, load_trained(workdir, mesh).params, whole.params)

    command = [sys.executable, "scripts/classify.py", f"--checkpoint={workdir}", "--json"]
    command += ["--text=the old pear", "--text=a red drill"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["good", "bad"]
    # The workdir is a beginning too, and keeps its head for the same classes.
    model, _, params, _ = beginning(settings(data, workdir))
    jax.tree.map(np.testing.assert_array_equal, params, whole.params)
    assert model.config.labels == LABELS


def test_lora_trains_adapters_and_the_head_alone(tmp_path, data, bert, words):
    config = settings(data, bert, lora=LORA, optim=OptimConfig(2e-2), steps=100)
    mesh, workdir = make_mesh("data:2"), tmp_path / "run"
    result = classification.run(config, workdir, mesh)
    assert np.mean(result.gold == result.predicted) == 1.0
    trained = load_trained(workdir, mesh)
    before = flatten(beginning(dataclasses.replace(config, lora=None))[2])
    moved = {p for p, v in flatten(trained.params).items() if not np.array_equal(v, before[p])}
    heads = {"classifier/weight", "classifier/bias", "pooler/weight", "pooler/bias"}
    assert moved == {"layers/attn/wq", "layers/attn/wv"} | heads

    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    theirs = peft.PeftModel.from_pretrained(base, workdir / "adapter").eval()
    tokens, batch = text_batch(words)
    ours = jax.jit(lambda p, b: classification_logits(trained.model.bind(p), b, None))(
        trained.params, batch
    )
    for row, ids in enumerate(tokens):
        with torch.no_grad():
            want = theirs(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(ours[row], want, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("roberta masked", "^(classifier|pooler)/"),
        ("llama", "^classifier/"),
        ("roberta classifier", "^classifier/"),  # of a head that is kept, a part
        ("llama classifier", "^norm/"),
    ],
)
def test_peft_reads_adapters_and_head_of_other_families(tmp_path, data, name, whole):
    tokenizer, directory = ByteTokenizer(), tmp_path / "model"
    tiny.ALL[name].save_for(directory, tokenizer)
    config = settings(data, directory, lora=dataclasses.replace(LORA, whole=(whole,)))
    labels = load_config(directory).labels or LABELS
    _, lora, adapters, frozen = beginning(config, labels)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), adapters)
    export_peft(tmp_path / "adapter", lora, adapters, base=str(directory))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=len(labels)
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens, batch = text_batch(tokenizer)
    ours = jax.jit(lambda a, b, f: classification_logits(lora.bind(a, f), b, None))(
        adapters, batch, *frozen
    )
    for row, ids in enumerate(tokens):
        with torch.no_grad():
            want = theirs(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(ours[row], want, atol=1e-4)


def test_the_head_of_a_classifier_stays_for_the_same_labels(tmp_path, data, words):
    names = {"id2label": {0: "good", 1: "bad"}}  # not in alphabetical order
    tiny.CLASSIFIERS["bert classifier"].save_for(tmp_path / "model", words, **names)
    config = settings(data, tmp_path / "model")
    rows, held_out, labels, _ = classification._read(config, ("good", "bad"))
    assert labels == ("good", "bad")
    found = {"good": 0, "bad": 1}
    lines = [line.split("\t") for line in data.read_text().splitlines()[1:]]
    assert sorted([*rows.gold, *held_out.gold]) == sorted(found[label] for label, _ in lines)

    before = flatten(
        load_hf(tmp_path / "model", describe(load_config(tmp_path / "model")), make_mesh(""))
    )
    kept = flatten(beginning(config, labels)[2])
    assert all(np.array_equal(kept[path], before[path]) for path in before)
    mean = dataclasses.replace(config, pooling="mean")
    for other, names in ((config, ("bad", "worse")), (mean, labels)):
        params = flatten(beginning(other, names)[2])
        assert not np.array_equal(params["classifier/weight"], before["classifier/weight"])
        assert np.array_equal(params["layers/attn/wq"], before["layers/attn/wq"])


def test_token_dropout_spares_what_the_checkpoint_reads_the_text_from(data, bert, words):
    config = settings(data, bert, token_dropout=0.9)
    transform = classification._augmentation(words, config)
    example = classification.Example("", np.array(words.encode("the red apple"), np.int32), 0)
    rng = np.random.default_rng(0)
    found = [transform(example, rng).tokens.tolist() for _ in range(50)]
    assert all(row[0] == words.cls_id and row[-1] == words.sep_id and len(row) > 2 for row in found)
    assert min(map(len, found)) == 3


CAUSAL = ModelConfig(
    "llama",
    vocab_size=300,
    num_layers=1,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_positions=64,
    head="classifier",
    num_classes=2,
)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoder_from_scratch_classifies(tmp_path, data, pooling):
    model = dataclasses.replace(CAUSAL, pooling=pooling)
    config = settings(data, "", model=model, optim=OptimConfig(1e-2))
    workdir, mesh = tmp_path / "run", make_mesh("data:1")
    result = classification.run(config, workdir, mesh)
    assert np.mean(result.gold == result.predicted) > 0.9
    texts = classification._read(config)[1].texts
    answers = TextClassifier.load(workdir, mesh).classify(texts)
    # The same probabilities, one text a row in whatever batch.
    found = np.array([list(answer.probs.values()) for answer in answers])
    np.testing.assert_allclose(np.sort(found, 0), np.sort(result.probs, 0), atol=1e-5)
    if pooling == "mean":
        trained = load_trained(workdir, mesh)
        with pytest.raises(ValueError, match="cannot have pooling='mean'"):
            export_hf(tmp_path / "out", trained.model, trained.params)
        return
    command = [sys.executable, "scripts/convert.py", f"--workdir={workdir}", f"--output={tmp_path}/out"]
    subprocess.run(command, capture_output=True, check=True)
    theirs = transformers.pipeline("text-classification", str(tmp_path / "out"), batch_size=20)
    scores = {label: score for label, score in zip(LABELS, found.T, strict=True)}
    for n, said in enumerate(theirs(texts)):
        assert said["score"] == pytest.approx(scores[said["label"]][n], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": CAUSAL}, "init_from='x': expected '' with model, or model=None"),
        ({"init_from": ""}, "init_from='': expected a trained model, or a `model` from scratch"),
        ({"tokenizer": "t"}, "tokenizer='t': expected its default '': init_from"),
        ({"pooling": "sum"}, "pooling='sum'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"init_from": "", "model": CAUSAL, "lora": LORA}, "lora=.*default None: model"),
        ({"init_from": "", "model": CAUSAL, "pooling": "mean"}, "pooling='mean': .*model"),
        ({"init_from": "", "model": dataclasses.replace(CAUSAL, pooling="cls")}, "model.pooling='cls'"),
        ({"init_from": "", "model": dataclasses.replace(CAUSAL, head="lm")}, "model.head='lm'"),
    ],
)
def test_bad_settings_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        settings("data.tsv", "x", **changes)


def test_what_does_not_fit_the_checkpoint_is_refused(tmp_path, data, bert, words):
    def refused(message, directory=bert, **changes):
        with pytest.raises(ValueError, match=message):
            classification.run(settings(data, directory, **changes), tmp_path / "run", make_mesh(""))
        assert not (tmp_path / "run").exists()

    refused("max_tokens=65: expected at most the 64 positions", max_tokens=65)
    refused("subword_alpha=0.1: only a sentencepiece tokenizer", subword_alpha=0.1)
    head = LoraConfig(targets=("attn/w[qv]$",), whole=("^classifier/",))
    refused(r"lora.whole .* expected patterns that find \['pooler/bias', 'pooler/weight'\]", lora=head)
    refused("lora.targets='attn/wz' matches none", lora=dataclasses.replace(LORA, targets=("attn/wz",)))
    tiny.DECODERS["gpt2"].save_for(tmp_path / "gpt2", ByteTokenizer())
    refused("pooling='cls' with init_from", tmp_path / "gpt2", pooling="cls")
    refused(
        "c_attn.weight, which has one adapter in PEFT",
        tmp_path / "gpt2",
        lora=dataclasses.replace(LORA, whole=("^classifier/",)),
    )
    tiny.MASKED["bert masked"].save(tmp_path / "small")
    ByteTokenizer().save(tmp_path / "small")
    refused("has 260 tokens, the model in .* 97", tmp_path / "small")
    with pytest.raises(ValueError, match="no directory here"):
        classification.run(settings(data, tmp_path / "none"), tmp_path / "run", make_mesh(""))


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_configs_are_whole(name):
    get_config = runpy.run_path(str(CONFIGS / "sentiment_finetune.py"))["get_config"]
    config = from_dict(ClassificationConfig, get_config(name).to_dict())
    assert config.model is None and (config.lora is not None) == (name == "lora")
    assert Path(config.data).is_dir()
