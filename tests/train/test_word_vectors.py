"""Skip-gram: its loss against float64 sums over single pairs, its draws, and neighbours it must find."""

import dataclasses
import functools
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import OptimConfig, WordVectorConfig, from_dict
from llm_jax.data.sources import read_records
from llm_jax.eval.word_similarity import auc, score_pairs
from llm_jax.infer.word_vectors import WordVectors, load_word_vectors
from llm_jax.models.skip_gram import SkipGram, WordTables
from llm_jax.sharding import make_mesh
from llm_jax.train import word_vectors
from llm_jax.train.metrics_log import read_metrics
from llm_jax.train.word_vectors import draw_noise, draw_pairs, make_objective, skip_gram_loss

VOCAB = 11
CONFIG = WordVectorConfig(
    data="x.txt",
    vocab_size=300,
    embed_dim=16,
    window=2,
    subsample=0.0,
    noise_pool=16,
    row_tokens=32,
    optim=OptimConfig(2e-2, clip_norm=0.0),
    batch_size=8,
    steps=400,
    log_every=100,
)


def rows(seed=0):
    """Three rows: two texts, one text with padding, padding alone."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((3, 12), np.int32)
    segments[0, :7], segments[0, 7:], segments[1, :9] = 1, 2, 1
    tokens = np.where(segments > 0, rng.integers(0, VOCAB, segments.shape), 0)
    return {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.asarray(segments)}


def tables(seed=0):
    rng = np.random.default_rng(seed)
    shape = (VOCAB, 5)
    return WordTables(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)))


def test_the_loss_is_the_papers_sum_over_pairs():
    batch, net, keep = rows(), tables(), np.full(VOCAB, 0.7, np.float32)
    noise = np.linspace(1 / VOCAB, 1, VOCAB, dtype=np.float32)
    key = jax.random.key(3)
    options = {"window": 3, "negatives": 5, "pool": 8, "keep": keep, "noise": noise}
    loss, count, _ = skip_gram_loss(net, batch, key, **options)

    pairs_key, noise_key = jax.random.split(key)
    pairs = np.asarray(draw_pairs(batch, pairs_key, 3, keep))
    words = np.asarray(draw_noise(noise_key, (3, 8), noise))
    u, v = (np.asarray(table, np.float64) for table in net)
    tokens, wanted = np.asarray(batch["tokens"]), 0.0
    for b, i, j in np.argwhere(pairs):
        center = u[tokens[b, i]]
        wanted += np.log1p(np.exp(-center @ v[tokens[b, j]]))
        wanted += 5 * np.mean([np.log1p(np.exp(center @ v[n])) for n in words[b]])
    assert float(count) == pairs.sum() > 10
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)  # float32 sums of some hundred terms


def test_evaluation_uses_every_pair_within_the_window_and_a_text():
    batch = rows()
    segments = np.asarray(batch["segment_ids"])
    pairs = np.asarray(draw_pairs(batch, None, 2, np.zeros(VOCAB, np.float32)))
    wanted = {
        (b, i, j)
        for b in range(3)
        for i in range(12)
        for j in range(12)
        if i != j and abs(i - j) <= 2 and segments[b, i] == segments[b, j] > 0
    }
    assert {tuple(map(int, place)) for place in np.argwhere(pairs)} == wanted
    noise = np.linspace(1 / VOCAB, 1, VOCAB, dtype=np.float32)
    options = {"window": 2, "negatives": 5, "pool": 8, "keep": np.ones(VOCAB), "noise": noise}
    first, second = (skip_gram_loss(tables(), batch, None, **options)[0] for _ in range(2))
    assert first == second


def test_training_draws_the_papers_reach_and_leaves_frequent_words_out():
    length, n = 41, 4000
    batch = {"tokens": np.zeros((n, length), np.int32), "segment_ids": np.ones((n, length), np.int32)}
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    whole = np.asarray(draw_pairs(batch, jax.random.key(0), 5, np.ones(1, np.float32)))
    share = whole[:, 20, 21:26].mean(axis=0)  # distance d is in reach with (5 - d + 1) / 5
    np.testing.assert_allclose(share, [1.0, 0.8, 0.6, 0.4, 0.2], atol=4 * 0.5 / n**0.5)
    some = np.asarray(draw_pairs(batch, jax.random.key(0), 5, np.full(1, 0.3, np.float32)))
    # A pair at distance 1 stays when both of its places do; four standard deviations.
    assert some[:, 20, 21].mean() == pytest.approx(0.09, abs=4 * (0.09 * 0.91 / n) ** 0.5)


def test_noise_follows_the_counts_to_the_power_of_three_quarters():
    counts = np.array([1, 0, 16, 81])
    objective = make_objective(dataclasses.replace(CONFIG, subsample=1e-3), counts)
    assert isinstance(objective, functools.partial)
    options = objective.keywords
    drawn = np.asarray(draw_noise(jax.random.key(0), (100_000,), options["noise"]))
    share = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(share, np.array([1, 0, 8, 27]) / 36, atol=4 * 0.5 / 100_000**0.5)
    wanted = np.sqrt(1e-3 * 98 / np.array([16, 81]))  # sqrt(t / f)
    np.testing.assert_allclose(options["keep"][2:], wanted, rtol=1e-6)
    assert options["keep"][1] == 1.0


def write_corpus(path: Path) -> None:
    """Words (one character each) of three kinds; only the company that a kind keeps makes them alike."""
    rng = np.random.default_rng(0)
    kinds = {"桃 梨 李": "吃 甜 熟", "锯 钻 锉": "切 铁 尖", "猫 狗 狐": "跑 叫 毛"}
    lines = []
    for i in range(900):
        words, company = list(kinds.items())[i % 3]
        before, after = rng.choice(company.split(), 2, replace=False)
        lines.append(f"{before} {rng.choice(words.split())} {after}")
    path.write_text("\n".join(sorted(set(lines)) * 12) + "\n")


def test_neighbours_are_recovered_from_a_corpus_with_known_kinds(tmp_path):
    write_corpus(tmp_path / "corpus.txt")
    config = dataclasses.replace(CONFIG, data=str(tmp_path / "corpus.txt"), eval_fraction=0.05)
    mesh = make_mesh("data:2,tensor:2")
    result = word_vectors.run(config, tmp_path / "run", mesh)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert result.loss == pytest.approx(last["eval/loss"], rel=1e-6)
    words = load_word_vectors(tmp_path / "run", make_mesh("data:1"))
    for group in ("桃 梨 李", "锯 钻 锉", "猫 狗 狐"):
        for word in group.split():
            assert {w for w, _ in words.neighbors(word, 2)} == set(group.split()) - {word}
    pairs = [("桃", "梨"), ("锯", "钻"), ("猫", "狗"), ("没", "有")]
    scores = score_pairs(words, pairs)
    assert (scores.auc, scores.pairs, scores.listed) == (1.0, 3, 4)
    # The same command trains nothing more; the script says the same.
    assert word_vectors.run(config, tmp_path / "run", mesh) == result
    command = [sys.executable, "scripts/embed.py", f"--vectors={tmp_path / 'run'}", "--text=桃"]
    done = subprocess.run([*command, "--neighbors=2"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("桃: ") and "梨" in done.stdout and "李" in done.stdout


class Spelling:
    """A tokenizer of four pieces, one of them a special token, two of one word."""

    vocab_size, special_tokens = 5, {"<s>": 0}

    def decode(self, ids):
        return ["", "king", " king", "queen", "!"][ids[0]]

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [3, 4] if text == "queen!" else []


def test_words_are_pieces_and_texts_the_mean_of_theirs():
    table = np.array([[9, 9], [2, 0], [0, 1], [0, 3], [4, 0]], np.float32)
    words = WordVectors(table, Spelling())
    assert words.words == {"king": 1, "queen": 3}
    assert words.neighbors("king", 5) == [("queen", 0.0)]
    np.testing.assert_allclose(words.vector("queen!"), np.array([1, 1]) / 2**0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="no tokens"):
        words.vector("?")


def test_auc_counts_ties_as_half():
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 0.0, 3.0])) == pytest.approx((1.5 + 2) / 6)


@pytest.mark.parametrize(
    ("change", "message"), [({"window": 0}, "window"), ({"subsample": 1.5}, "subsample")]
)
def test_bad_settings_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_another_run_is_not_taken_for_word_vectors(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"task": "lm"}}')
    with pytest.raises(ValueError, match="task 'lm'; expected 'word_vectors'"):
        load_word_vectors(tmp_path, make_mesh("data:1"))
    with pytest.raises(FileNotFoundError, match="--workdir"):
        load_word_vectors(tmp_path / "no", make_mesh("data:1"))


def test_tables_live_on_their_shards():
    mesh = make_mesh("fsdp:2,tensor:4")
    params = SkipGram(16, 6).init(mesh, jax.random.key(0))
    assert params["centers"].addressable_shards[0].data.shape == (4, 3)
    assert float(jnp.abs(params["contexts"]).max()) == 0.0


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_config_is_whole_and_the_pairs_are_a_table(language):
    root = Path(__file__).parents[2] / "configs"
    get_config = runpy.run_path(str(root / "word_vectors.py"))["get_config"]
    assert isinstance(from_dict(WordVectorConfig, get_config(language).to_dict()), WordVectorConfig)
    records = [record for _, record in read_records(root / "data" / "word_pairs" / f"{language}.tsv")]
    assert len({(r["first"], r["second"]) for r in records}) == len(records) > 100
