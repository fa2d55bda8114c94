"""Sentence pairs: a split without leaks, loss on the target alone, and a run from a table to BLEU."""

import dataclasses
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
import torch

from llm_jax.config import ModelConfig, OptimConfig, TranslationConfig, from_dict
from llm_jax.data.packing import NO_TARGET, pack
from llm_jax.data.parallel import (
    SEPARATOR,
    SentencePair,
    encode_pair,
    read_pairs,
    split_pairs,
    translation_prompt,
)
from llm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from llm_jax.data.train_tokenizer import train_sentencepiece
from llm_jax.eval.translation import load_translator, nearest_translations, score, translate
from llm_jax.models import describe, init_params
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train import translation
from llm_jax.train.objectives import lm_loss

CONFIGS = Path(__file__).parents[2] / "configs"
NUMBERS = {"一": "one", "二": "two", "三": "three", "四": "four", "五": "five", "六": "six"}
MODEL = ModelConfig(
    "llama",
    vocab_size=310,
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_positions=96,
    tie_embeddings=True,
)
CONFIG = TranslationConfig(
    data="x.tsv",
    source_field="zh",
    target_field="en",
    model=MODEL,
    eval_fraction=0.1,
    row_tokens=48,
    optim=OptimConfig(1e-2, warmup_fraction=0.1),
    batch_size=8,
    steps=250,
    log_every=100,
)


@pytest.fixture
def table(tmp_path):
    """All lists of three different numbers, in figures of both languages."""
    lines = ["en\tzh"]
    for a in NUMBERS:
        for b in NUMBERS:
            for c in NUMBERS:
                if len({a, b, c}) == 3:
                    lines.append(f"{NUMBERS[a]} {NUMBERS[b]} {NUMBERS[c]}\t{a} {b} {c}")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.tsv"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = ["一 二 三", "one two three"] * 4
    train_sentencepiece(texts, directory, vocab_size=310, control_symbols=(SEPARATOR,))
    return load_tokenizer(directory)


def test_held_out_pairs_share_no_text_with_the_others():
    # Two sources share one target, four another one: groups of eight pairs, but one of ten.
    pairs = [SentencePair(f"源 {i}", f"Half {i // 2}.") for i in range(200)]
    pairs += [SentencePair(f"源 {i}", f"Quarter {i // 4}.") for i in range(200)]
    pairs += [SentencePair("源，0！", "Something else"), SentencePair("別的", "HALF 0")]
    kept, held_out = split_pairs(pairs, 0.2, 3)
    bare = lambda text: "".join(c for c in text.casefold() if c.isalnum())  # noqa: E731
    for side in ("source", "target"):
        sides = [{bare(getattr(pair, side)) for pair in part} for part in (kept, held_out)]
        assert not sides[0] & sides[1] and sides[1]
    assert len(kept) + len(held_out) == len(pairs) and 80 <= len(held_out) <= 90
    assert split_pairs(pairs, 0.2, 3) == (kept, held_out)


def test_only_the_target_and_its_end_are_predicted(tokenizer):
    pair = SentencePair("一 二", "two one")
    tokens, trained = encode_pair(pair, tokenizer)
    cut = tokens.index(tokenizer.special_tokens[SEPARATOR]) + 1
    assert tokens[:cut] == tokenizer.encode(translation_prompt("一 二"))
    assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(tokens[cut:]).strip() == "two one"
    assert trained == [False] * cut + [True] * (len(tokens) - cut)
    with pytest.raises(ValueError, match=r"lacks <\|translate\|>"):
        encode_pair(pair, ByteTokenizer())


def test_the_loss_is_torchs_on_the_targets_of_packed_rows(tokenizer):
    pairs = [SentencePair("一 二", "one two"), SentencePair("三", "three"), SentencePair("二", "two")]
    encoded = [encode_pair(pair, tokenizer) for pair in pairs]
    rows = pack([t for t, _ in encoded], 64, [m for _, m in encoded])
    assert len(rows["tokens"]) == 1 and rows["segment_ids"].max() == 3
    model = describe(dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size))
    mesh = make_mesh("data:1")
    params = init_params(model, mesh, jax.random.key(0))
    batch = {name: jnp.asarray(value) for name, value in rows.items()}

    def logits(params, tokens):
        net = model.bind(params)
        positions, one = jnp.arange(tokens.shape[1])[None], jnp.ones(tokens.shape, jnp.int32)
        return net.unembed(net(tokens, positions, FullContext(one))[0])

    wanted, count = 0.0, 0
    with jax.set_mesh(mesh):
        loss, counted, _ = jax.jit(lambda p: lm_loss(model.bind(p), batch, None))(params)
        for tokens, trained in encoded:  # each pair alone, as if nothing was packed
            scores = jax.jit(logits)(params, jnp.asarray([tokens]))[0, :-1]
            where = torch.tensor(trained[1:])
            targets = torch.tensor(tokens[1:])[where]
            wanted += torch.nn.functional.cross_entropy(
                torch.tensor(np.asarray(scores))[where], targets, reduction="sum"
            ).item()
            count += len(targets)
    assert float(counted) == count == (rows["targets"] != NO_TARGET).sum()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)  # float32, other shapes


@pytest.mark.slow
def test_a_run_from_a_table_to_translations(table, tmp_path):
    config = dataclasses.replace(CONFIG, data=str(table))
    workdir, mesh = tmp_path / "run", make_mesh("data:2")
    result = translation.run(config, workdir, mesh)
    assert (result.pairs, result.held_out) == (108, 12)
    assert result.perplexity == pytest.approx(math.exp(result.loss)) and result.accuracy > 0.95
    held_out = read_pairs(workdir / "held_out.tsv", "zh", "en")
    assert held_out == translation._read(config)[1]

    llm = load_translator(workdir, make_mesh("data:1"))
    sources, references = [p.source for p in held_out], [p.target for p in held_out]
    for beams in (1, 3):
        found = translate(llm, sources, num_beams=beams, max_new_tokens=24)
        assert np.mean([a == b for a, b in zip(found, references, strict=True)]) > 0.9
    assert translation.run(config, workdir, mesh) == result  # trains nothing more

    command = [sys.executable, "scripts/translate.py", f"--checkpoint={workdir}"]
    flags = [f"--pairs={workdir / 'held_out.tsv'}", f"--known={table}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    scores = json.loads(done.stdout)
    # (BLEU counts runs of four words, which lists of three numbers do not have.)
    assert scores["pairs"] == 12 and scores["chrf"] > 95 > scores["baseline"]["chrf"]
    done = subprocess.run([*command, "--text=三 一 二"], capture_output=True, text=True, check=True)
    assert done.stdout == "三 一 二\tthree one two\n"


def test_scores_are_sacrebleus_and_the_baseline_takes_the_nearest():
    references = ["the cat sat on the mat .", "he reads a book every day ."]
    translations = ["the cat sat on a mat .", "he reads a book daily ."]
    found = score(translations, references)
    assert found.bleu == pytest.approx(sacrebleu.corpus_bleu(translations, [references]).score)
    assert found.chrf == pytest.approx(sacrebleu.corpus_chrf(translations, [references]).score)
    assert "tok:13a" in found.signature
    known = [SentencePair("我喜欢茶", "I like tea"), SentencePair("他去北京", "He goes to Beijing")]
    assert nearest_translations(["我不喜欢", "去"], known) == ["I like tea", "He goes to Beijing"]


def test_the_nearest_source_is_that_of_a_plain_search():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("天地人山水火"), rng.integers(1, 9))) for _ in range(60)]

    def dice(a, b):
        common = 0
        for n in (1, 2):
            left, right = ([t[i : i + n] for i in range(len(t) - n + 1)] for t in (a, b))
            common += sum(min(left.count(g), right.count(g)) for g in set(left))
        return 2 * common / (2 * len(a) - 1 + 2 * len(b) - 1)

    known = [SentencePair(text, str(i)) for i, text in enumerate(texts[:40])]
    for source, found in zip(texts[40:], nearest_translations(texts[40:], known), strict=True):
        likeness = [dice(source, text) for text in texts[:40]]
        assert likeness[int(found)] == pytest.approx(max(likeness))


def test_a_pair_that_does_not_fit_is_refused(tokenizer):
    pairs = [SentencePair("一", "one " * 40)]
    with pytest.raises(ValueError, match="row_tokens=16: the pair of '一' has"):
        translation._rows(pairs, tokenizer, 16)


@pytest.mark.parametrize("line", ["\t二", " \t二"])
def test_a_blank_side_names_file_and_line(tmp_path, line):
    (tmp_path / "a.tsv").write_text(f"en\tzh\none\t一\n{line}\n")
    with pytest.raises(ValueError, match=r"a\.tsv:3: zh='二', en="):
        read_pairs(tmp_path / "a.tsv", "zh", "en")


def test_the_config_is_whole():
    get_config = runpy.run_path(str(CONFIGS / "translation.py"))["get_config"]
    assert isinstance(from_dict(TranslationConfig, get_config().to_dict()), TranslationConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_tokens": 97}, "row_tokens=97: expected 2 to model.max_positions=96"),
        ({"model": dataclasses.replace(MODEL, causal=False)}, "model.causal=False"),
        ({"eval_fraction": 1.0}, "eval_fraction=1.0"),
    ],
)
def test_bad_settings_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
