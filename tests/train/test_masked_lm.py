"""Masked-LM training: what is hidden, runs from texts to transformers, and what goes on from them."""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.config import (
    ClassificationConfig,
    MaskedLanguageModelConfig,
    ModelConfig,
    OptimConfig,
    QuestionAnsweringConfig,
    from_dict,
)
from llm_jax.data.fast_tokenizer import ByteTokenizer
from llm_jax.data.loader import this_host
from llm_jax.data.packing import pack
from llm_jax.data.tasks import documents
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.models import describe
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train import classification, masked_lm, question_answering
from llm_jax.tree import flatten
from tests import tiny
from tests.data.small_store import write_store

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = ModelConfig(
    "bert",
    head="masked_lm",
    causal=False,
    tie_embeddings=True,
    vocab_size=330,
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_positions=48,
    positions="learned",
    norm="layer",
    norm_eps=1e-12,
    norm_position="post",
    embed_norm=True,
    token_types=2,
    activation="gelu",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
CONFIG = MaskedLanguageModelConfig(
    data="x.txt",
    model=MODEL,
    row_tokens=32,
    eval_fraction=0.2,
    mask_rate=0.3,
    optim=OptimConfig(1e-2, warmup_fraction=0.1),
    batch_size=8,
    steps=80,
)

DEFAULT_EVAL = MaskedLanguageModelConfig.eval_fraction


@pytest.fixture
def data(tmp_path):
    """Sentences in which each word tells the others."""
    lines = [
        f"{a} {b} {a} {b} {a} {b} {n}" for n, (a, b) in enumerate(10 * [("up", "on"), ("at", "by")])
    ]
    (tmp_path / "data.txt").write_text("\n".join(lines) + "\n")
    table = "text\tother\n" + "".join(f"{n}\tit is so it is so {n}\n" for n in range(20))
    (tmp_path / "table.tsv").write_text(table)
    return f"{tmp_path}/data.txt, {tmp_path}/table.tsv#other"


@pytest.mark.slow
def test_a_run_from_texts_to_a_model_of_transformers(data, tmp_path):
    config, workdir, mesh = dataclasses.replace(CONFIG, data=data), tmp_path / "run", make_mesh("data:2")
    texts, held_out = masked_lm._split(config)
    assert len(texts) == 32 and len(held_out) == 8 and not set(texts) & set(held_out)
    result = masked_lm.run(config, workdir, mesh)
    tokenizer = load_tokenizer(workdir / "tokenizer")
    assert result.perplexity == pytest.approx(np.exp(result.loss)) and result.perplexity < 15
    assert result.accuracy > 0.4 and result.vocab_size == tokenizer.vocab_size > 260
    assert result.tokens == sum(len(tokenizer.encode(text)) for text in held_out)
    assert masked_lm.run(config, workdir, mesh) == result, "trains nothing more"

    command = [sys.executable, "scripts/convert.py", f"--workdir={workdir}"]
    subprocess.run([*command, f"--output={tmp_path}/out"], check=True, capture_output=True)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    hidden = "up on <mask> on up on 7"
    assert words.mask_token == "<mask>" and words.mask_token_id == tokenizer.mask_id
    assert words(hidden)["input_ids"] == tokenizer.encode(hidden)
    ids = np.array([tokenizer.encode(texts[0])])
    right, ids[0, 4] = ids[0, 4], tokenizer.mask_id
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    trained = load_trained(workdir, mesh)
    np.testing.assert_allclose(logits(trained.model, trained.params, ids), want, atol=1e-4)
    assert want[0, 4].argmax() == right


def logits(model, params, tokens):
    """Vocabulary logits [B, T, V] of rows without padding."""

    @jax.jit
    def run(params, tokens):
        net, ones = model.bind(params), jnp.ones_like(tokens)
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        return net.unembed(net(tokens, places, FullContext(ones))[0])

    return run(params, jnp.asarray(tokens, jnp.int32))


class Shown:
    """Stands for a bound model and keeps the tokens that it is shown."""

    def __call__(self, tokens, positions, context):
        self.tokens = np.asarray(tokens)
        return jnp.zeros((*tokens.shape, 1)), context

    def unembed(self, hidden):
        return jnp.zeros((*hidden.shape[:-1], 300))


def test_special_tokens_are_never_hidden(tmp_path):
    tokenizer = ByteTokenizer()  # without a mask token: its unknown token hides
    texts = ["a text of bytes", "", "another"]
    rows = pack(documents(texts, tokenizer.encode, tokenizer.eos_id), 64)
    batch = {name: jnp.asarray(value) for name, value in rows.items()}
    net, objective = Shown(), masked_lm.masked_lm_objective(tokenizer, 0.999)
    _, count, _ = objective(net, batch, None)
    special = np.isin(rows["tokens"], [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id])
    np.testing.assert_array_equal(net.tokens[special], rows["tokens"][special])
    assert count == sum(map(len, texts)) == (~special).sum()
    assert (net.tokens == tokenizer.unk_id).sum() > 0.5 * float(count)


STILL = {"optim": OptimConfig(1e-30), "steps": 1, "batch_size": 8}  # nothing moves


def test_it_goes_on_from_a_checkpoint(data, tmp_path):
    mesh, start, workdir = make_mesh("data:1"), tmp_path / "start", tmp_path / "run"
    tiny.MASKED["bert masked untied"].save_for(start, ByteTokenizer())
    config = MaskedLanguageModelConfig(
        data=data, init_from=str(start), row_tokens=48, dropout=0.25, **STILL
    )
    masked_lm.run(config, workdir, mesh)
    before, trained = load_hf(start, describe(load_config(start)), mesh), load_trained(workdir, mesh)
    jax.tree.map(np.testing.assert_array_equal, trained.params, before)
    found = dataclasses.replace(trained.model.config, dropout=load_config(start).dropout)
    assert trained.model.config.dropout == 0.25
    assert found.with_dtypes("cpu") == load_config(start).with_dtypes("cpu")


def test_a_token_store_is_read_with_its_own_tokenizer(tmp_path):
    tokenizer, rng = ByteTokenizer(), np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd "), 30)) for _ in range(40)]
    parts = [[tokenizer.encode(text) for text in part] for part in (texts[:32], texts[32:])]
    write_store(tmp_path / "store", *parts)
    mesh, config = (
        make_mesh("data:1"),
        dataclasses.replace(CONFIG, data=str(tmp_path / "store"), eval_fraction=DEFAULT_EVAL, steps=2),
    )
    corpus = masked_lm._read_store(config, None, tmp_path / "none", this_host(mesh))
    rows = [batch["tokens"][batch["segment_ids"] > 0] for batch in corpus.batches]
    assert np.concatenate(rows).tolist() == sum(parts[1], [])
    assert corpus.loader(0)["tokens"].shape == (8, 32)
    result = masked_lm.run(config, tmp_path / "run", mesh)
    assert result.tokens == sum(map(len, parts[1])) and result.vocab_size == tokenizer.vocab_size
    assert load_tokenizer(tmp_path / "run" / "tokenizer").encode("ab") == tokenizer.encode("ab")

    tiny.ENCODERS["bert"].save_for(tmp_path / "other", other_tokenizer(tmp_path))
    other = dataclasses.replace(config, model=None, init_from=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="was made by another tokenizer"):
        masked_lm.run(other, tmp_path / "other_run", mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_field": "body"}, "text_field='body': expected its default 'text'"),
        ({"eval_data": "x"}, "eval_data='x': expected its default ''"),
        ({"eval_fraction": 0.2}, f"eval_fraction=0.2: expected its default {DEFAULT_EVAL}"),
        ({"character_coverage": 1.0}, "character_coverage=1.0: expected its default 0.9995"),
        (
            {"text_field": "body", "eval_fraction": 0.2},
            f"text_field='body', eval_fraction=0.2: expected the defaults 'text', {DEFAULT_EVAL}",
        ),
    ],
)
def test_what_describes_texts_is_refused_beside_a_token_store(changes, message, tmp_path):
    ids = [ByteTokenizer().encode(text) for text in ("some text", "some more", "and more")]
    store = tmp_path / "store"
    write_store(store, ids[:2], ids[2:])
    changes = {"data": str(store), "eval_fraction": DEFAULT_EVAL} | changes
    config = dataclasses.replace(CONFIG, **changes)
    whole = re.escape(f"{message}: a run on the token store {store} does not read ")
    with pytest.raises(ValueError, match=whole):
        masked_lm.run(config, tmp_path / "run", make_mesh("data:1"))
    assert not (tmp_path / "run").exists()  # nothing stands in the way of the mended command


def test_a_token_store_without_held_out_part_is_refused(tmp_path):
    write_store(tmp_path / "store", [ByteTokenizer().encode("some text")])
    config = dataclasses.replace(CONFIG, data=str(tmp_path / "store"), eval_fraction=DEFAULT_EVAL)
    with pytest.raises(ValueError, match="store' has no held-out part .* --eval_fraction=0.01"):
        masked_lm.run(config, tmp_path / "run", make_mesh("data:1"))


def other_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    return load_tokenizer(tmp_path / "vocab.txt")


@pytest.mark.slow
def test_others_go_on_from_it(data, tmp_path):
    mesh, workdir = make_mesh("data:1"), tmp_path / "run"
    masked_lm.run(dataclasses.replace(CONFIG, data=data, steps=2), workdir, mesh)
    before = flatten(load_trained(workdir, mesh).params)
    table = tmp_path / "labelled.tsv"
    table.write_text("label\ttext\n" + "".join(f"{'ab'[n % 2]}\ttext {n}\n" for n in range(20)))
    classifier = ClassificationConfig(
        data=str(table), init_from=str(workdir), max_tokens=32, subword_alpha=0.1, **STILL
    )
    classification.run(classifier, tmp_path / "classifier", mesh)
    questions = tmp_path / "questions.jsonl"
    records = [
        {"context": f"{n} is so.", "qas": [{"id": f"{n}", "question": "?", "answers": [f"{n}"]}]}
        for n in range(10)
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    reader = QuestionAnsweringConfig(
        data=str(questions),
        init_from=str(workdir / "checkpoints" / "2"),
        max_tokens=40,
        question_tokens=8,
        overlap=4,
        **STILL,
    )
    question_answering.run(reader, tmp_path / "reader", mesh)
    for name, head in (("classifier", "classifier/weight"), ("reader", "span/weight")):
        after = flatten(load_trained(tmp_path / name, mesh).params)
        assert head in after
        for path, value in before.items():
            if not path.startswith("lm_head"):
                np.testing.assert_array_equal(value, after[path], err_msg=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "init_from='': expected a trained model"),
        ({"init_from": "x"}, "init_from='x': expected '' with model"),
        ({"init_from": "x", "model": None, "tokenizer": "t"}, "tokenizer='t': expected its default ''"),
        ({"row_tokens": 49}, "row_tokens=49: expected at most model.max_positions=48"),
        ({"mask_rate": 1.0}, "mask_rate=1.0"),
        ({"dropout": 0.2}, "dropout=0.2: expected its default None: model"),
        ({"init_from": "x", "model": None, "dropout": 1.0}, "dropout=1.0"),
        ({"model": dataclasses.replace(MODEL, causal=True)}, "model.causal=True"),
        ({"model": dataclasses.replace(MODEL, head="span")}, "model.head='span'"),
    ],
)
def test_bad_settings_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_what_cannot_guess_is_refused(data, tmp_path):
    def refused(message, directory, **changes):
        config = dataclasses.replace(CONFIG, data=data, model=None, init_from=str(directory), **changes)
        with pytest.raises(ValueError, match=message):
            masked_lm.run(config, tmp_path / "run", make_mesh(""))
        assert not (tmp_path / "run").exists()

    for name, directory in (("gpt2", tmp_path / "gpt2"), ("bert", tmp_path / "bert")):
        tiny.ALL[name].save_for(directory, ByteTokenizer())
    refused("is a 'gpt2' decoder; expected an encoder", tmp_path / "gpt2")
    refused("row_tokens=65: expected at most the 64 positions", tmp_path / "bert", row_tokens=65)
    with pytest.raises(ValueError, match="' , ' names no file"):
        masked_lm.run(dataclasses.replace(CONFIG, data=" , "), tmp_path / "run", make_mesh(""))


@pytest.mark.parametrize("name", ["scratch", "adapt"])
def test_the_configs_are_whole(name):
    get_config = runpy.run_path(str(CONFIGS / "masked_lm.py"))["get_config"]
    config = from_dict(MaskedLanguageModelConfig, get_config(name).to_dict())
    assert (config.model is None) == (name == "adapt") and Path(config.data).is_file()
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for setting in masked_lm.OF_TEXTS:  # so that `data` may be a token store
        assert getattr(config, setting) == defaults[setting]
