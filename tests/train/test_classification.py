"""Finer labels, weights of rows and R-Drop: against torch, NumPy, and what a served model answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.config import ClassificationConfig, ModelConfig, OptimConfig
from llm_jax.infer.classify import TextClassifier
from llm_jax.models import describe
from llm_jax.models.heads import fold_parts
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train import classification
from llm_jax.train.classification import Rows, number_parts, row_weights
from llm_jax.train.objectives import classification_logits, classification_loss

MODEL = ModelConfig(
    "llama",
    vocab_size=400,
    num_layers=1,
    embed_dim=16,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=16,
    max_positions=32,
    causal=False,
    head="classifier",
    pooling="mean",
    num_classes=3,
)
PARTS = (1, 3, 2)


def bound(**changes):
    """A function that runs f(net, ...) inside jit on random parameters."""
    model = describe(dataclasses.replace(MODEL, **changes))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0.5, 0.3, s.shape).astype(s.dtype), model.shapes)

    def run(f, *args):
        with jax.set_mesh(make_mesh("data:1")):
            return jax.jit(lambda p: f(model.bind(p), *args))(params)

    return run


def batch(labels):
    rng = np.random.default_rng(1)
    shape = (len(labels), 7)
    return {
        "tokens": jnp.asarray(rng.integers(1, 400, shape), jnp.int32),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.tile(jnp.arange(7, dtype=jnp.int32), (len(labels), 1)),
        "labels": jnp.asarray(labels, jnp.int32),
    }


def part_logits(net, rows, key):
    context = FullContext(rows["segment_ids"], key)
    hidden, context = net(rows["tokens"], rows["positions"], context)
    (logits,) = net.classify_parts(hidden, rows["segment_ids"], context)
    return logits


def test_a_class_is_as_probable_as_its_parts_together():
    logits = np.random.default_rng(0).normal(0, 3, (5, 6)).astype(np.float32)
    parts = np.exp(logits.astype(np.float64))
    parts /= parts.sum(axis=1, keepdims=True)
    want = np.stack([parts[:, 0], parts[:, 1:4].sum(axis=1), parts[:, 4:].sum(axis=1)], axis=1)
    got = jax.nn.softmax(fold_parts(jnp.asarray(logits), PARTS), axis=-1)
    np.testing.assert_allclose(got, want, rtol=1e-5)  # float32


def test_parts_are_learnt_and_classes_are_judged():
    run, rows = bound(class_parts=PARTS), batch([0, 3, 5, -1])
    scores = torch.tensor(np.asarray(run(part_logits, rows, None)))
    want = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 3, 5, -1]), ignore_index=-1)
    loss, count, metrics = run(classification_loss, rows, None)
    np.testing.assert_allclose(loss / count, want.item(), rtol=1e-5)
    chosen = np.asarray(run(classification_logits, rows, None)).argmax(axis=1)
    assert float(metrics["accuracy"][0]) == np.sum(chosen[:3] == [0, 1, 2])
    assert float(metrics["accuracy"][1]) == 3.0


def test_r_drop_is_torchs_symmetric_divergence_of_two_passes():
    run, rows, key = bound(dropout=0.5), batch([0, 2, 1, -1]), jax.random.key(3)
    rows["weights"] = jnp.asarray([1.0, 2.0, 0.5, 9.0], jnp.float32)
    labels, weights = torch.tensor([0, 2, 1]), torch.tensor([1.0, 2.0, 0.5])
    a, b = (torch.tensor(np.asarray(run(part_logits, rows, k)))[:3] for k in jax.random.split(key))
    p, q = a.log_softmax(1), b.log_softmax(1)
    kl = functools.partial(torch.nn.functional.kl_div, reduction="none", log_target=True)
    both = 0.5 * (kl(q, p).sum(1) + kl(p, q).sum(1))
    ce = functools.partial(torch.nn.functional.cross_entropy, target=labels, reduction="none")
    want = (weights * (0.5 * (ce(a) + ce(b)) + 0.7 * both)).sum()
    loss, count, _ = run(functools.partial(classification_loss, r_drop=0.7), rows, key)
    np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
    assert float(both.min()) > 0 and float(count) == 3.5


@pytest.mark.parametrize("key", [None, 5], ids=["evaluation", "no dropout"])
def test_r_drop_is_nothing_where_nothing_is_dropped(key):
    run, rows = bound(dropout=0.5 if key is None else 0.0), batch([0, 2, 1])
    key = None if key is None else jax.random.key(key)
    with_it = run(functools.partial(classification_loss, r_drop=2.0), rows, key)
    np.testing.assert_allclose(with_it[0], run(classification_loss, rows, key)[0], rtol=1e-6)


def test_parts_are_numbered_class_after_class():
    gold = np.array([2, 0, 0, 1, 0, 2, 2], np.int32)
    fine = np.array([7, 5, 1, 1, 5, 7, 3], np.int32)  # 1 occurs in two classes
    parts, counts = number_parts(gold, fine)
    assert counts == (2, 1, 2)
    np.testing.assert_array_equal(np.repeat([0, 1, 2], counts)[parts], gold)
    assert len(set(zip(gold.tolist(), fine.tolist(), parts.tolist(), strict=True))) == 5
    with pytest.raises(ValueError, match="fine_label_field"):
        number_parts(gold, gold + 4)


def test_classes_weigh_the_same_and_groups_as_roots():
    gold = np.array([0] * 90 + [1] * 10, np.int32)
    groups = np.array(([0] * 8 + [1] * 2) * 10, np.int32)  # 80 and 20 rows, alike in both classes
    rows = Rows([""] * 100, gold, gold, groups)
    weights = row_weights(rows, balance_classes=True)
    assert weights.mean() == pytest.approx(1.0)
    assert weights[gold == 0].sum() == pytest.approx(weights[gold == 1].sum())
    assert weights[groups == 0].sum() / weights[groups == 1].sum() == pytest.approx(2.0)  # sqrt(80 / 20)
    sure = np.where(np.arange(100) % 5, 1.0, 0.25)
    weights = row_weights(dataclasses.replace(rows, groups=None, weights=sure), balance_classes=True)
    assert weights[gold == 0].sum() == pytest.approx(weights[gold == 1].sum())
    assert weights[1] / weights[0] == pytest.approx(4.0)
    plain = row_weights(dataclasses.replace(rows, groups=None), balance_classes=False)
    np.testing.assert_array_equal(plain, np.ones(100))


def write_posts(path, rows):
    """Three feelings, of which two are bad; every fourth post is about weather."""
    words = {"joy": ("good", "laugh"), "fear": ("bad", "ghost"), "anger": ("bad", "shout")}
    lines = ["label\tfeeling\ttopic\ttext"]
    for i in range(rows):
        feeling = ("joy", "fear", "anger")[i % 3]
        label, word = words[feeling]
        topic = "weather" if i % 4 == 0 else "other"
        lines.append(f"{label}\t{feeling}\t{topic}\tthe {word} and {topic} {i}")
    path.write_text("\n".join(lines) + "\n")


def test_a_run_with_finer_labels_serves_the_labels(tmp_path):
    data, workdir, mesh = tmp_path / "posts.tsv", tmp_path / "run", make_mesh("data:1")
    write_posts(data, 120)
    config = ClassificationConfig(
        data=str(data),
        fine_label_field="feeling",
        balance_field="topic",
        balance_classes=True,
        r_drop=0.5,
        eval_fraction=0.2,
        max_tokens=32,
        model=dataclasses.replace(MODEL, dropout=0.1),
        optim=OptimConfig(2e-2, ema_decay=0.9),
        batch_size=16,
        steps=60,
    )
    result = classification.run(config, workdir, mesh)
    assert result.labels == ("bad", "good") and result.probs.shape == (24, 2)
    assert np.mean(result.predicted == result.gold) == 1.0
    classifier = TextClassifier.load(workdir, mesh)
    assert classifier.model.config.class_parts == (2, 1)
    answers = classifier.classify(["the shout and other 7", "the laugh and weather 8"])
    assert [a.label for a in answers] == ["bad", "good"]
    assert all(set(a.probs) == {"bad", "good"} for a in answers)
    assert all(sum(a.probs.values()) == pytest.approx(1.0, abs=1e-5) for a in answers)


def test_rows_without_weight_teach_nothing(tmp_path):
    """Two thirds of the rows have the wrong label, and the weight 0."""
    words, other = {"good": "laugh", "bad": "shout"}, {"good": "bad", "bad": "good"}
    rows = [(("good", "bad")[i % 2], i % 3 == 0) for i in range(120)]
    lines = [
        f"{k if sure else other[k]}\t{float(sure)}\t{words[k]} {i}" for i, (k, sure) in enumerate(rows)
    ]
    (tmp_path / "train.tsv").write_text("\n".join(["label\tsure\ttext", *lines]) + "\n")
    clean = [f"{k}\t1\t{words[k]} {i}" for i, (k, _) in enumerate(rows[:20])]
    (tmp_path / "dev.tsv").write_text("\n".join(["label\tsure\ttext", *clean]) + "\n")
    config = ClassificationConfig(
        data=str(tmp_path),
        weight_field="sure",
        max_tokens=32,
        model=MODEL,
        optim=OptimConfig(2e-2),
        batch_size=16,
        steps=40,
    )
    result = classification.run(config, tmp_path / "run", make_mesh("data:1"))
    assert np.mean(result.predicted == result.gold) == 1.0


@pytest.mark.parametrize("parts", [(1, 2), (1, 0, 2)])
def test_parts_that_fit_no_class_are_refused(parts):
    with pytest.raises(ValueError, match="class_parts="):
        dataclasses.replace(MODEL, class_parts=parts)


def test_settings_out_of_range_and_unknown_columns_are_refused(tmp_path):
    data = tmp_path / "posts.tsv"
    write_posts(data, 12)
    settings = {"data": str(data), "optim": OptimConfig(1e-2), "batch_size": 4, "steps": 1}
    settings |= {"model": MODEL, "max_tokens": 32}
    with pytest.raises(ValueError, match=r"r_drop=-1"):
        ClassificationConfig(**settings, r_drop=-1.0)
    for name in ("fine_label_field", "balance_field", "weight_field"):
        config = ClassificationConfig(**settings, **{name: "feelin"})
        with pytest.raises(ValueError, match="'feelin'"):
            classification.run(config, tmp_path / "run", make_mesh("data:1"))
    config = ClassificationConfig(**settings, weight_field="feeling")
    with pytest.raises(ValueError, match=r"posts.tsv:2: field 'feeling' is 'joy'"):
        classification.run(config, tmp_path / "run", make_mesh("data:1"))
    tokenizer = {"tokenizer": "some", "symbols": "a"}
    with pytest.raises(ValueError, match=r"symbols='a'.*tokenizer"):
        ClassificationConfig(**settings, **tokenizer)
