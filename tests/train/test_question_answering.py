"""Answers found in texts: the loss against transformers, runs from scratch and from a checkpoint."""

import dataclasses
import json
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

from llm_jax.checkpoint.hf import export_hf, load_config, load_hf
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.config import (
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    QuestionAnsweringConfig,
    from_dict,
)
from llm_jax.data.question_answering import exact_match, read_questions
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.infer.question_answering import Reader
from llm_jax.models import describe
from llm_jax.sharding import make_mesh
from llm_jax.train import question_answering
from llm_jax.train.metrics_log import read_metrics
from llm_jax.train.question_answering import span_loss
from llm_jax.tree import flatten
from tests import tiny

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = "安 宝 晨 丹 恩 方 高 洪".split()
THINGS = "茶 书 花 米 马 船 灯 纸".split()
MODEL = ModelConfig(
    "bert",
    head="span",
    causal=False,
    vocab_size=99,
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_positions=48,
    positions="learned",
    norm="layer",
    norm_position="post",
    embed_norm=True,
    token_types=4,
    activation="gelu",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
CONFIG = QuestionAnsweringConfig(
    data="x.jsonl",
    model=MODEL,
    max_tokens=32,
    question_tokens=8,
    overlap=6,
    answer_tokens=4,
    mark_matches=True,
    eval_fraction=0.2,
    optim=OptimConfig(5e-3, warmup_fraction=0.1),
    batch_size=32,
    steps=150,
    log_every=50,
)


@pytest.fixture
def data(tmp_path):
    """Who has what, in any order: an answer is the thing after the name that the question has."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(60):
        names, things = (rng.permutation(x)[:6].tolist() for x in (NAMES, THINGS))
        context = "，".join(f"{n}有{t}" for n, t in zip(names, things, strict=True)) + "。"
        qas = [
            {
                "id": f"{number}-{n}",
                "question": f"{n}有？",
                "answers": [t],
                "answer_starts": [context.index(t)],
            }
            for n, t in list(zip(names, things, strict=True))[::2]
        ]
        lines.append(json.dumps({"context": context, "qas": qas}, ensure_ascii=False))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NAMES, *THINGS, "有", "，", "。", "？"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return tmp_path / "data.jsonl"


def from_scratch(data, **changes):
    settings = {"data": str(data), "tokenizer": str(data.parent / "vocab.txt")} | changes
    return dataclasses.replace(CONFIG, **settings)


def test_a_run_from_a_file_to_answers(data, tmp_path):
    config, workdir, mesh = from_scratch(data), tmp_path / "run", make_mesh("data:2")
    result = question_answering.run(config, workdir, mesh)
    assert result.questions == 36 == len(result.answers)
    assert result.exact_match > 0.95 and result.f1 >= result.exact_match
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert last["eval/exact_match"] == result.exact_match and last["eval/accuracy"] > 0.9

    # No text of a held-out question was trained on, and the scores are those of the answers.
    train, held_out = question_answering._read(config)
    assert not {q.context for q in train} & {q.context for q in held_out}
    found = [exact_match(result.answers[q.id], q.answers) for q in held_out]
    assert np.mean(found) == result.exact_match
    assert set(read_questions(workdir / "held_out.jsonl")) == set(held_out)
    assert question_answering.run(config, workdir, mesh) == result  # trains nothing more

    reader = Reader.load(workdir, make_mesh("data:1"))
    again = {q.id: spans[0].text for q, spans in zip(held_out, reader.answers(held_out), strict=True)}
    assert again == result.answers
    asked = held_out[0]
    command = [sys.executable, "scripts/answer.py", f"--checkpoint={workdir}", "--json", "--best=2"]
    command += [f"--context={asked.context}", f"--question={asked.question}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (record,) = map(json.loads, done.stdout.splitlines())
    assert record["answers"][0]["text"] == again[asked.id] and len(record["answers"]) == 2

    command = [sys.executable, "scripts/answer.py", f"--checkpoint={workdir}", f"--questions={data}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    scores = json.loads(done.stdout)
    assert scores["questions"] == 180 and scores["exact_match"] > 0.95
    assert scores["baseline_exact_match"] == 0.0 < scores["baseline_f1"]


@pytest.mark.slow
def test_pretraining_starts_the_encoder(data, tmp_path):
    stage = PretrainConfig(optim=OptimConfig(5e-3), batch_size=8, steps=20, log_every=20)
    more = tmp_path / "more.txt"
    more.write_text("安有茶，宝有书。\n" * 3)
    config = from_scratch(
        data, pretrain=stage, pretrain_data=str(more), steps=1, optim=OptimConfig(1e-30)
    )
    question_answering.run(config, tmp_path / "run", make_mesh("data:1"))
    records = read_metrics(tmp_path / "run" / "pretrain" / "metrics.jsonl")
    assert records[-1]["eval/loss"] < np.log(25)  # of 25 words
    params = flatten(load_trained(tmp_path / "run", make_mesh("data:1")).params)
    assert "span/weight" in params and not any(path.startswith("lm_head") for path in params)


def test_the_loss_is_that_of_transformers(tmp_path):
    model = tiny.SPANS["bert span"].save(tmp_path)
    mesh, config = make_mesh("data:1"), load_config(tmp_path)
    described = describe(config)
    params = load_hf(tmp_path, described, mesh)
    rng = np.random.default_rng(0)
    shape = (3, 11)
    tokens, types = rng.integers(3, tiny.VOCAB, shape), rng.integers(0, 2, shape)
    starts, ends = rng.integers(0, 5, 3), rng.integers(5, 11, 3)
    with torch.no_grad():
        ids = [torch.tensor(x) for x in (tokens, types, starts, ends)]
        names = ("input_ids", "token_type_ids", "start_positions", "end_positions")
        wanted = model(**dict(zip(names, ids, strict=True)))
    batch = {"tokens": tokens, "token_types": types, "starts": starts, "ends": ends}
    batch |= {"segment_ids": np.ones(shape), "positions": np.tile(np.arange(11), (3, 1))}
    # Two rows of padding, and padding within the rows, must change nothing.
    wide = {k: ((0, 2), (0, 4)) if v.ndim == 2 else ((0, 2),) for k, v in batch.items()}
    for padding in ({k: ((0, 0),) * v.ndim for k, v in batch.items()}, wide):
        padded = {k: jnp.asarray(np.pad(v, padding[k]), jnp.int32) for k, v in batch.items()}
        with jax.set_mesh(mesh):
            loss, count, metrics = jax.jit(lambda p, b: span_loss(described.bind(p), b, None))(
                params, padded
            )
        np.testing.assert_allclose(loss / count, wanted.loss.item(), rtol=1e-5)
        right = (wanted.start_logits.argmax(1).numpy() == starts) & (
            wanted.end_logits.argmax(1).numpy() == ends
        )
        assert (float(metrics["accuracy"][0]), float(count)) == (right.sum(), 3)


@pytest.fixture
def encoder(data):
    """A Hugging Face directory of a random BERT without a head, for the words of `data`."""
    directory = data.parent / "encoder"
    case = tiny.ENCODERS["bert"]
    settings = case.settings | {"vocab_size": 25}
    dataclasses.replace(case, settings=settings).save(directory)
    load_tokenizer(data.parent / "vocab.txt").save(directory)
    return directory


def test_fine_tuning_starts_from_a_checkpoint_and_ends_in_one(data, encoder, tmp_path):
    config = QuestionAnsweringConfig(
        data=str(data),
        init_from=str(encoder),
        max_tokens=32,
        question_tokens=8,
        overlap=6,
        answer_tokens=4,
        optim=OptimConfig(1e-30),
        batch_size=16,
        steps=1,
    )
    mesh = make_mesh("data:1")
    question_answering.run(config, tmp_path / "run", mesh)
    trained = load_trained(tmp_path / "run", mesh)
    before = load_hf(encoder, describe(load_config(encoder)), mesh)
    for name in ("embed", "layers"):
        after = flatten(trained.params[name])
        for path, value in flatten(before[name]).items():
            np.testing.assert_array_equal(value, after[path], err_msg=path)

    # The export answers in transformers as here: logits of the rows, and the best span by search.
    tokenizer = load_tokenizer(trained.tokenizer)
    export_hf(tmp_path / "out", trained.model, trained.params, tokenizer=tokenizer)
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    ours = Reader.load(tmp_path / "out", mesh)
    for asked in read_questions(data)[:5]:
        encoded = transformers.BertTokenizer(str(data.parent / "vocab.txt"))(
            asked.question, asked.context, return_tensors="pt", return_offsets_mapping=True
        )
        offsets, second = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
        with torch.no_grad():
            out = theirs(**encoded)
        scores = {
            (offsets[i][0], offsets[j][1]): float(out.start_logits[0, i] + out.end_logits[0, j])
            for i in range(len(offsets))
            for j in range(i, min(i + ours.reading.answer_tokens, len(offsets)))
            if second[i] == second[j] == 1
        }
        best = sorted(scores, key=lambda place: -scores[place])[:3]
        spans = ours.answer(asked.question, asked.context, count=3)
        assert [(span.start, span.end) for span in spans] == best
        # Two float32 programs; logits are near 1.
        np.testing.assert_allclose([s.score for s in spans], [scores[b] for b in best], atol=1e-5)


NO_STAGE = PretrainConfig(optim=OptimConfig(1e-3), batch_size=8)


def test_pretraining_of_no_length_is_none(data, tmp_path):
    config = from_scratch(data, pretrain=NO_STAGE, steps=1)
    question_answering.run(config, tmp_path / "run", make_mesh("data:1"))
    assert not (tmp_path / "run" / "pretrain").exists()
    tuned = dataclasses.replace(config, model=None, init_from="x", mark_matches=False)
    assert tuned.pretraining is None  # so what a config offers does not stand in the way


@pytest.mark.parametrize("name", ["scratch", "finetune"])
def test_the_configs_are_whole(name):
    get_config = runpy.run_path(str(CONFIGS / "question_answering.py"))["get_config"]
    config = from_dict(QuestionAnsweringConfig, get_config(name).to_dict())
    assert (config.model is None) == (name == "finetune")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "init_from='': expected an encoder"),
        ({"init_from": "bert"}, "init_from='bert': expected '' with model"),
        ({"overlap": 20}, "overlap=20: expected 0 to 19"),
        ({"pretrain_data": "x"}, "pretrain_data='x': expected its default '': a run without masked-LM"),
        ({"pretrain_data": "x", "pretrain": NO_STAGE}, "pretrain_data='x': expected its default ''"),
        (
            {"model": None, "init_from": "x", "pretrain": dataclasses.replace(NO_STAGE, steps=3)},
            "pretrain.steps=3, pretrain.epochs=0.0: expected 0 and 0, or no pretrain, with init_from",
        ),
        ({"max_tokens": 64}, "max_tokens=64: expected at most model.max_positions=48"),
        ({"model": dataclasses.replace(MODEL, token_types=2)}, "model.token_types=2"),
        ({"model": dataclasses.replace(MODEL, head="lm")}, "model.head='lm'"),
    ],
)
def test_bad_settings_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_another_head_does_not_answer(encoder):
    with pytest.raises(ValueError, match="head='embedding' finds no answers"):
        Reader.load(encoder, make_mesh("data:1"))
