"""Stores hold what a plain loop over the texts would keep; processes and accidents change nothing."""

import collections
import dataclasses
import hashlib
import json
import math
import multiprocessing

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import prepare as preparing
from llm_jax.data.cleaning import clean, parse_steps
from llm_jax.data.duplicates import normalized
from llm_jax.data.fast_tokenizer import FastTokenizer
from llm_jax.data.prepare import Plan, held_out, prepare
from llm_jax.data.token_store import EVAL, TRAIN, open_store
from llm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from llm_jax.data.tokenizer_config import TokenizerConfig

PLAN = Plan(clean=(), dedup="none", near_threshold=0.8, eval_fraction=0.0, seed=0)
STEPS = ("html", "nfc", "control", "spaces", "min_characters=8", "max_repeated_characters=0.5")
WORDS = ["tea", "rice", "boat", "moon", "我喜欢", "编程", "天气", "朋友", "window", "seven"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    ByteTokenizer().save(directory)
    return directory


@pytest.fixture(scope="module")
def texts():
    """A small web of 150 texts: copies in other markup and case, edited ones, and rubbish."""
    rng = np.random.default_rng(0)
    found = [" ".join(rng.choice(WORDS, rng.integers(60, 120))) for _ in range(150)]
    found += [f"<p>{text}</p>" for text in found[:20]] + [text.upper() for text in found[20:30]]
    found += [" ".join([*text.split()[:50], "other", *text.split()[51:]]) for text in found[30:60]]
    found += ["tiny", "   ", "<br>", "spam spam " * 40] * 3
    return [found[i] for i in rng.permutation(len(found))]


def read(store, split):
    """The texts of a split, decoded; every document begins and ends as the tokenizer's do."""
    if split not in store.splits:
        return []
    tokenizer = load_tokenizer(store.directory / "tokenizer")
    found = []
    for shard in store.splits[split].shards:
        tokens, offsets = store.tokens(shard), store.offsets(shard)
        for start, stop in np.lib.stride_tricks.sliding_window_view(offsets, 2):
            document = tokens[start:stop].tolist()
            assert document[0] == tokenizer.bos_id and document[-1] == tokenizer.eos_id
            assert document.count(tokenizer.eos_id) == 1
            found.append(tokenizer.decode(document))
    return found


def contents(store):
    """Bytes of every file below a store."""
    return {
        str(path.relative_to(store.directory)): path.read_bytes()
        for path in sorted(store.directory.rglob("*"))
        if path.is_file()
    }


def test_a_store_holds_what_a_plain_loop_keeps(texts, tokenizer, tmp_path):
    plan = dataclasses.replace(PLAN, clean=STEPS, dedup="exact", eval_fraction=0.2, seed=3)
    store, report = prepare(texts, tokenizer, tmp_path / "store", plan)
    expected, seen, removed = {TRAIN: [], EVAL: []}, set(), collections.Counter()
    for text in texts:
        cleaned, did = clean(text, parse_steps(STEPS))
        if cleaned is None or normalized(cleaned) in seen:
            removed["exact duplicate" if cleaned else did[-1]] += 1
            continue
        seen.add(normalized(cleaned))
        digest = hashlib.blake2b(normalized(cleaned).encode(), digest_size=16).digest()
        expected[EVAL if held_out(digest, 0.2, 3) else TRAIN].append(cleaned)
    assert {split: read(store, split) for split in (TRAIN, EVAL)} == expected
    assert report["removed"] == removed
    for split, found in expected.items():
        assert store.splits[split].bytes == sum(len(text.encode()) for text in found)
    store.verify()


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(["", " ", "a", "A", "b", "<b>c</b>", "dd", "dd ", "e" * 20]), min_size=1),
    st.sampled_from(preparing.DEDUP),
    st.sampled_from([(), ("html", "spaces"), ("min_characters=2", "html")]),
)
def test_the_report_adds_up(tokenizer, tmp_path_factory, texts, dedup, steps):
    plan = dataclasses.replace(PLAN, clean=steps, dedup=dedup)
    output = tmp_path_factory.mktemp("stores") / "store"
    try:
        store, report = prepare(texts, tokenizer, output, plan)
    except ValueError as error:
        assert "0 were kept" in str(error) and not any(clean(t, parse_steps(steps))[0] for t in texts)
        return
    documents = report["documents"]
    assert documents["read"] == len(texts) == documents["kept"] + sum(report["removed"].values())
    assert documents["kept"] == sum(split.documents for split in store.splits.values())
    changed = collections.Counter(name for t in texts for name in clean(t, parse_steps(steps))[1])
    edits = {name for name in steps if "=" not in name}
    assert report["changed"] == {name: n for name, n in changed.items() if name in edits}


def test_the_same_bytes_whatever_the_number_of_processes(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_CHUNK", 2000)  # many pieces of work
    plan = dataclasses.replace(PLAN, clean=STEPS, dedup="near", eval_fraction=0.1)
    stores = [
        prepare(texts, tokenizer, tmp_path / f"workers{n}", plan, workers=n, shard_tokens=5000)
        for n in (0, 2)
    ]
    assert contents(stores[0][0]) == contents(stores[1][0]) and stores[0][1] == stores[1][1]
    assert len(stores[0][0].splits[TRAIN].shards) > 2
    assert {"exact duplicate", "near duplicate", "min_characters"} <= stores[0][1]["removed"].keys()


@pytest.mark.parametrize(("dedup", "left"), [("none", 210), ("exact", 180), ("near", 150)])
def test_duplicates_are_dropped_as_asked(texts, tokenizer, tmp_path, dedup, left):
    plan = dataclasses.replace(PLAN, clean=STEPS, dedup=dedup)
    store, report = prepare(texts, tokenizer, tmp_path / "store", plan)
    assert report["documents"]["kept"] == left
    if dedup == "exact":  # the first of all copies is what stays
        cleaned = [clean(text, parse_steps(STEPS))[0] for text in texts]
        first = {normalized(text): text for text in reversed(cleaned) if text}
        assert set(read(store, TRAIN)) == set(first.values())


def test_a_text_of_unknown_letters_alone_is_no_document(tmp_path):
    """The tokenizer has neither an unknown token nor an end."""
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    FastTokenizer(letters, TokenizerConfig(tokens={})).save(tmp_path / "letters")
    store, report = prepare(["ab", "xyz", "zb"], tmp_path / "letters", tmp_path / "store", PLAN)
    assert report["removed"] == {"no tokens": 1} and store.splits[TRAIN].tokens == 3


# The held-out part


@pytest.mark.parametrize("dedup", preparing.DEDUP)
def test_no_text_stands_on_both_sides(texts, tokenizer, tmp_path, dedup):
    """Copies go where their first goes, whether they are dropped or not."""
    plan = dataclasses.replace(PLAN, clean=STEPS, dedup=dedup, eval_fraction=0.3)
    store, _ = prepare(texts, tokenizer, tmp_path / "store", plan)
    sides = [{normalized(text) for text in read(store, split)} for split in (TRAIN, EVAL)]
    assert all(sides) and not sides[0] & sides[1]


def test_the_fraction_is_held_out_and_seeds_differ():
    digests = [
        hashlib.blake2b(bytes([i % 256, i // 256]), digest_size=16).digest() for i in range(20_000)
    ]
    sides = np.array([[held_out(digest, 0.1, seed) for digest in digests] for seed in (0, 1)])
    assert np.abs(sides.sum(axis=1) - 2000).max() < 4 * math.sqrt(20_000 * 0.1 * 0.9)
    assert 100 < (sides[0] & sides[1]).sum() < 300  # 200 by chance
    # A larger part holds the smaller one.
    assert all(held_out(digest, 0.2, 0) for digest, out in zip(digests, sides[0], strict=True) if out)
    assert not any(held_out(digest, 0.0, 0) for digest in digests)


def test_more_texts_move_none_to_the_other_side(texts, tokenizer, tmp_path):
    plan = dataclasses.replace(PLAN, eval_fraction=0.3)
    texts = [text for text in texts if text.strip()]
    before, _ = prepare(texts[:100], tokenizer, tmp_path / "before", plan)
    after, _ = prepare(texts, tokenizer, tmp_path / "after", plan)
    for split in (TRAIN, EVAL):
        few, many = read(before, split), read(after, split)
        assert few == many[: len(few)]


# Accidents


class Unplugged(Exception):
    """What no code expects."""


@pytest.mark.parametrize("accident", [Unplugged, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_breaks_off_leaves_nothing(texts, tokenizer, tmp_path, accident, workers):
    def breaking():
        yield from texts
        raise accident

    with pytest.raises(accident):
        prepare(breaking(), tokenizer, tmp_path / "out" / "store", PLAN, workers=workers)
    assert not list((tmp_path / "out").iterdir())


def test_a_process_that_dies_ends_the_run_with_advice(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_CHUNK", 2000)

    def killing():
        yield from texts
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        yield from texts

    with pytest.raises(MemoryError, match="workers=1: one of them died"):
        prepare(killing(), tokenizer, tmp_path / "out" / "store", PLAN, workers=1)
    assert not list((tmp_path / "out").iterdir())


def test_what_a_killed_run_left_is_thrown_away(texts, tokenizer, tmp_path, caplog):
    left = tmp_path / "store.partial"
    left.mkdir()
    (left / "train-00007.bin").write_bytes(b"half of it")
    store, _ = prepare(texts, tokenizer, tmp_path / "store", PLAN)
    assert "cut off" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert "train-00007.bin" not in contents(store)


def test_a_store_is_never_written_over(texts, tokenizer, tmp_path):
    store, _ = prepare(texts, tokenizer, tmp_path / "store", PLAN)
    before = contents(store)
    with pytest.raises(ValueError, match="exists already; remove it"):
        prepare(texts[:3], tokenizer, tmp_path / "store", PLAN)
    assert contents(open_store(tmp_path / "store")) == before


@pytest.mark.parametrize("changes", [{"clean": ("min_characters=99999",)}, {"eval_fraction": 1e-9}])
def test_a_side_without_texts_is_refused_with_the_reasons(texts, tokenizer, tmp_path, changes):
    with pytest.raises(ValueError, match="Expected some on each side: clean less, or change eval_frac"):
        prepare(texts, tokenizer, tmp_path / "store", dataclasses.replace(PLAN, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": ("spacs",)}, "did you mean spaces"),
        ({"dedup": "nera"}, "did you mean near"),
        ({"near_threshold": 0.0}, "near_threshold=0"),
        ({"eval_fraction": 1.0}, "eval_fraction=1.0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_plans_name_the_setting(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **changes)


def test_the_manifest_tells_how_the_store_was_made(texts, tokenizer, tmp_path):
    store, report = prepare(texts, tokenizer, tmp_path / "store", PLAN)
    content = json.loads((store.directory / "manifest.json").read_text(encoding="utf-8"))
    assert content["report"] == report and content["plan"]["near_threshold"] == 0.8
