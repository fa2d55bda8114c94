"""Logits of n-grams: what they add to a classifier's own, and that a trained model serves with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.checkpoint.hf import export_hf
from llm_jax.config import ClassificationConfig, ModelConfig, OptimConfig, PretrainConfig
from llm_jax.data.ngrams import ABSENT
from llm_jax.infer.classify import TextClassifier
from llm_jax.models import describe, init_params
from llm_jax.models.heads import NgramLogits
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train import classification
from llm_jax.train.objectives import classification_loss

BUCKETS = 64
SIZES = {
    "vocab_size": 31,
    "num_layers": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 24,
    "max_positions": 16,
    "causal": False,
    "head": "classifier",
    "num_classes": 3,
    "pooling": "mean",
    "ngram_orders": (2, 3),
    "ngram_buckets": BUCKETS,
}


def batch():
    """Four texts of 8, 5, 2 and 1 tokens with 6, 3, 1 and no n-grams."""
    rng = np.random.default_rng(0)
    tokens, positions, mask = np.zeros((3, 4, 8), np.int32)
    ngrams = np.full((4, 8), ABSENT, np.int32)
    for row, (size, number) in enumerate(((8, 6), (5, 3), (2, 1), (1, 0))):
        tokens[row, :size] = rng.integers(0, 31, size)
        positions[row, :size], mask[row, :size] = np.arange(size), 1
        ngrams[row, :number] = rng.choice(2 * BUCKETS, number, replace=False)
    return tokens, positions, mask, ngrams


def with_table(model, seed=1):
    """Parameters at random, and a table that says something."""
    params = init_params(model, make_mesh("data:1"), jax.random.key(0))
    shape = params["ngram_logits"]["table"].shape
    table = np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)
    return params | {"ngram_logits": {"table": jnp.asarray(table)}}


def paths(model, params, rows, key=None):
    """Logits [B, 3] of each path, and of the classes."""
    tokens, positions, mask, ngrams = map(jnp.asarray, rows)

    def run(params):
        net, context = model.bind(params), FullContext(mask, key)
        hidden, context = net(tokens, positions, context)
        classes = net.classify(hidden, mask, context, ngrams)
        return *net.classify_parts(hidden, mask, context, ngrams), classes

    return [np.asarray(x) for x in jax.jit(run)(params)]


def test_one_path_is_the_sum_over_the_root_of_the_number():
    """As a loop has it in float64; the other is as without n-grams; the classes have their mean."""
    model = describe(ModelConfig("llama", **SIZES))
    plain = describe(ModelConfig("llama", **SIZES | {"ngram_orders": (), "ngram_buckets": 0}))
    params, rows = with_table(model), batch()
    deep, wide, classes = paths(model, params, rows)
    alone, _ = paths(plain, {k: v for k, v in params.items() if k != "ngram_logits"}, rows)
    np.testing.assert_allclose(deep, alone, atol=1e-6)
    np.testing.assert_allclose(classes, (deep + wide) / 2, atol=1e-6)
    table = np.asarray(params["ngram_logits"]["table"], np.float64)
    for got, row in zip(wide, rows[-1], strict=True):
        seen = [table[place] for place in row if place != ABSENT]
        want = NgramLogits.GAIN * np.sum(seen, axis=0) / np.sqrt(len(seen)) if seen else np.zeros(3)
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_each_path_learns_by_its_own_loss_and_the_encoder_by_the_answers_too():
    model = describe(ModelConfig("llama", **SIZES | {"class_parts": (1, 2, 1)}))
    params, rows = with_table(model), batch()
    labels = np.array([0, 2, 3, -1])
    names = ("tokens", "positions", "segment_ids", "ngrams", "labels")
    given = {n: jnp.asarray(x, jnp.int32) for n, x in zip(names, (*rows, labels), strict=True)}

    def loss_of(params):
        loss, count, metrics = classification_loss(model.bind(params), given, None, label_smoothing=0.1)
        return loss, (count, metrics)

    (loss, (count, metrics)), slopes = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    deep, wide, _ = paths(model, params, rows)
    want, answer = 0.0, np.float64(deep + wide) / 2
    for logits, smoothing in ((np.float64(deep), 0.1), (answer, 0.1), (np.float64(wide), 0.0)):
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        right = logp[np.arange(3), labels[:3]]
        want -= ((1 - smoothing) * right + smoothing * logp[:3].mean(axis=1)).sum()
    assert float(loss) == pytest.approx(want, rel=1e-5) and float(count) == 3
    parts = [np.exp(answer)[:3, part].sum(axis=1) for part in ([0], [1, 2], [3])]
    right = np.argmax(parts, axis=0) == [0, 1, 2]
    assert [float(x) for x in metrics["accuracy"]] == [right.sum(), 3]

    probs = np.exp(np.float64(wide) - np.log(np.exp(np.float64(wide)).sum(axis=1, keepdims=True)))
    slope = np.zeros(params["ngram_logits"]["table"].shape)
    for row, label, p in zip(rows[-1][:3], labels, probs, strict=False):
        seen = row[row != ABSENT]
        slope[seen] += NgramLogits.GAIN / np.sqrt(len(seen)) * (p - np.eye(4)[label])
    np.testing.assert_allclose(slopes["ngram_logits"]["table"], slope, atol=1e-5)


def test_a_batch_without_them_is_refused():
    model = describe(ModelConfig("llama", **SIZES))
    *rows, _ = batch()
    with pytest.raises(ValueError, match=r"ngrams=None.*ngram_orders=\(2, 3\)"):
        net = model.bind(with_table(model))
        mask = jnp.asarray(rows[2])
        net.classify(jnp.zeros((4, 8, 16)), mask, FullContext(mask))


def test_parts_of_classes_have_logits_of_their_own():
    model = describe(ModelConfig("llama", **SIZES | {"class_parts": (1, 2, 1)}))
    assert model.shapes["ngram_logits"]["table"].shape == (2 * BUCKETS, 4)


def test_the_table_is_silent_at_first():
    model = describe(ModelConfig("llama", **SIZES))
    params = init_params(model, make_mesh("data:1"), jax.random.key(0))
    assert not np.asarray(params["ngram_logits"]["table"]).any()


def test_dropout_drops_whole_ngrams_and_only_while_training():
    model = describe(ModelConfig("llama", **SIZES | {"ngram_dropout": 0.75}))
    params = with_table(model)
    table = params["ngram_logits"]["table"]
    params["ngram_logits"]["table"] = jnp.ones_like(table).at[1].set(10.0)  # tells which are there
    tokens = np.ones((256, 2), np.int32)
    ngrams = np.tile(np.array([0, 1, ABSENT], np.int32), (256, 1))
    rows = tokens, np.tile(np.arange(2, dtype=np.int32), (256, 1)), tokens, ngrams

    def share(key):
        wide = paths(model, params, rows, key)[1]
        assert np.ptp(wide, axis=1).max() == 0, "an n-gram goes as a whole"
        return wide[:, 0] * np.sqrt(2) / NgramLogits.GAIN

    np.testing.assert_allclose(share(None), 11.0, rtol=1e-5)
    trained = share(jax.random.key(0))
    kinds, counts = np.unique(np.round(trained, 2), return_counts=True)
    np.testing.assert_allclose(kinds, [0, 4, 40, 44], atol=0.02)  # each stays with probability 1/4
    wanted = 256 * np.array([9, 3, 3, 1]) / 16
    assert (np.abs(counts - wanted) < 4 * np.sqrt(wanted)).all()


def test_sharded_equals_unsharded():
    model = describe(ModelConfig("llama", **SIZES))
    rows, whole = batch(), with_table(model)
    results = []
    for name in ("data:1", "data:2,fsdp:2,tensor:2"):
        mesh = make_mesh(name)
        params = jax.device_put(whole, model.shardings(mesh))
        with jax.set_mesh(mesh):
            results.append(np.stack(paths(model, params, rows)))
    table = params["ngram_logits"]["table"]
    assert table.addressable_shards[0].data.shape == (BUCKETS, 3)  # of two orders, over two devices
    np.testing.assert_allclose(*results, rtol=2e-5, atol=2e-5)


def test_a_run_learns_from_pairs_and_serves_them(tmp_path):
    """Only which word comes first tells the classes apart; masked-LM training has no such table."""
    lines = ["label\ttext"]
    for i in range(240):
        first, second = ("wet", "dry") if i % 2 else ("dry", "wet")
        lines.append(f"{first}\t{first} {second} {i // 2}")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    encoder = dataclasses.replace(
        ModelConfig("bert", **SIZES | {"vocab_size": 300, "max_positions": 32}),
        embed_norm=True,
        token_types=2,
        positions="learned",
        norm="layer",
        norm_position="post",
        ngram_orders=(1, 2, 3),
        ngram_buckets=4096,
    )
    config = ClassificationConfig(
        data=str(tmp_path / "pairs.tsv"),
        eval_fraction=0.2,
        max_tokens=32,
        model=encoder,
        optim=OptimConfig(1e-2),
        batch_size=16,
        steps=60,
        pretrain=PretrainConfig(optim=OptimConfig(1e-3), batch_size=4, steps=2),
    )
    mesh = make_mesh("data:1")
    result = classification.run(config, tmp_path / "run", mesh)
    assert np.mean(result.predicted == result.gold) == 1.0
    classifier = TextClassifier.load(tmp_path / "run", mesh)
    assert np.abs(np.asarray(classifier.params["ngram_logits"]["table"])).max() > 0.01
    answers = classifier.classify(["wet dry 7", "dry wet 7"])
    assert [a.label for a in answers] == ["wet", "dry"]
    texts = ["dry wet 7 and wet", "wet dry 7", "dry"]  # sorted by length in a batch, each with its own
    together = [a.probs["wet"] for a in classifier.classify(texts)]
    alone = [classifier.classify([text])[0].probs["wet"] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    classifier.params["ngram_logits"]["table"] *= 0.0
    silent = [a.probs["wet"] for a in classifier.classify(texts)]
    assert np.abs(np.subtract(silent, together)).max() > 0.01, "the table is part of the answer"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head": "embedding", "num_classes": 0}, "ngram_orders=.*head='embedding'"),
        ({"ngram_buckets": 0}, "ngram_buckets=0"),
        ({"ngram_buckets": 2**30}, "ngram_buckets=1073741824.*1 to 1073741823"),
        ({"ngram_orders": (0, 2)}, "1 or more"),
        ({"ngram_dropout": 1.0}, "ngram_dropout=1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig("llama", **SIZES | change)


def test_export_names_what_transformers_has_no_place_for(tmp_path):
    model = describe(ModelConfig("llama", **SIZES))
    params = init_params(model, make_mesh("data:1"), jax.random.key(0))
    with pytest.raises(ValueError, match="cannot have .*ngram_orders"):
        export_hf(tmp_path / "out", model, params)
    assert not (tmp_path / "out").exists()
