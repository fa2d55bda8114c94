"""Same texts by their digest, similar ones by MinHash: estimates against exact Jaccard similarities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data import duplicates
from llm_jax.data.duplicates import NearDuplicates, digest, ngrams, normalized, signature
from tests.data.multilingual import TEXTS
from tests.shared_data import shared_path

ENGLISH = "river stone quiet lantern morning copper window garden thunder velvet orchard silver".split()
CHINESE = "江河石头灯笼早晨铜窗花园雷声丝绒果树银色山谷渔船稻田风筝茶馆铁路春雨桥梁"


def exact(a, b):
    """Jaccard similarity of the sets of character 5-grams."""
    sets = [{t[i : i + 5] for i in range(max(len(t) - 4, 1))} for t in (normalized(a), normalized(b))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def similar_pair(rng, share, chinese):
    """Two texts, of which the second has about `share` of the first's pieces at their places."""
    if chinese:
        pieces = ["".join(rng.choice(list(CHINESE), 12)) + "。" for _ in range(60)]
        others = ["".join(rng.choice(list(CHINESE), 12)) + "。" for _ in range(60)]
    else:
        pieces = [" ".join(rng.choice(ENGLISH, 6)) + f" {rng.integers(1e6)}. " for _ in range(60)]
        others = [" ".join(rng.choice(ENGLISH, 6)) + f" {rng.integers(1e6)}. " for _ in range(60)]
    mixed = [p if rng.random() < share else o for p, o in zip(pieces, others, strict=True)]
    return "".join(pieces), "".join(mixed)


@pytest.fixture(scope="module", params=[False, True], ids=["english", "chinese"])
def pairs(request):
    """(one, other, exact similarity), of similarities from 0 to 1."""
    rng = np.random.default_rng(0)
    texts = [similar_pair(rng, share, request.param) for share in np.linspace(0, 1, 101)]
    return [(a, b, exact(a, b)) for a, b in texts]


def test_digests_are_equal_for_texts_that_differ_in_case_width_or_spaces():
    assert digest("Ｈello\n  World ") == digest("hello world") == digest("HELLO\tWORLD")
    assert digest("ﬁn é") == digest("fin e\u0301")
    different = {digest(text) for text in TEXTS}
    assert len(different) == len({normalized(text) for text in TEXTS}) and len(digest("")) == 16


@given(st.one_of(st.text(max_size=50), st.sampled_from(TEXTS), st.text("ab", max_size=50)))
def test_there_is_one_hash_for_each_different_five_gram(text):
    filled = normalized(text).ljust(5, "\0")
    grams = {filled[i : i + 5] for i in range(len(filled) - 4)}
    hashes = ngrams(text)
    assert len(hashes) == len(grams) and (np.diff(hashes.astype(np.int64)) > 0).all()
    alone = [ngrams(gram) for gram in grams if normalized(gram) == gram]
    assert {int(hash_) for found in alone for hash_ in found} <= set(hashes.tolist())


def test_estimated_similarities_are_the_exact_ones(pairs):
    """The estimate is a mean of 128 tries: its error is sqrt(j (1 - j) / 128), at most 0.044."""
    estimates = np.array([np.mean(signature(a) == signature(b)) for a, b, _ in pairs])
    truth = np.array([similarity for _, _, similarity in pairs])
    error = estimates - truth
    assert truth.min() < 0.3 and truth.max() == 1
    assert np.abs(error).max() < 4.5 * 0.044
    assert np.sqrt(np.mean(error**2)) < 1.5 * np.sqrt(np.mean(truth * (1 - truth) / 128))
    assert abs(error.mean()) < 0.015


def test_a_long_text_is_looked_at_in_blocks(monkeypatch):
    text = "".join(np.random.default_rng(1).choice(list(CHINESE), 3000))
    whole = signature(text)
    monkeypatch.setattr(duplicates, "_BLOCK", 100)
    np.testing.assert_array_equal(signature(text), whole)
    assert whole.shape == (128,) and whole.dtype == np.uint32


def test_similar_texts_are_found_and_different_ones_kept(pairs):
    """Away from the threshold by more than the estimate errs; in between either may happen."""
    kept = []
    for one, other, similarity in pairs:
        near = NearDuplicates(0.8)
        assert near.add(signature(one))
        kept.append((similarity, near.add(signature(other))))
    assert not any(new for similarity, new in kept if similarity > 0.93)
    assert all(new for similarity, new in kept if similarity < 0.65)


def test_the_first_of_a_family_stays_among_others(pairs):
    """What is compared is what was kept, however much that is."""
    near = NearDuplicates(0.7)
    assert all(near.add(signature(one)) for one, _, _ in pairs)
    assert not any(near.add(signature(one)) for one, _, _ in pairs)
    found = [not near.add(signature(b)) for _, b, similarity in pairs if similarity > 0.85]
    assert found and all(found)


@given(st.floats(0.02, 1))
def test_the_index_finds_pairs_at_the_threshold(threshold):
    """Bands of `size` values agree with probability similarity^size (Leskovec et al., chapter 3)."""
    bands, size = duplicates._bands(threshold)
    assert 2 <= bands and bands * size <= 128
    missed = (1 - threshold**size) ** bands
    assert missed <= 0.01 or (bands, size) == (128, 1)


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01])
def test_thresholds_that_are_no_similarity_are_refused(threshold):
    with pytest.raises(ValueError, match="near_threshold"):
        NearDuplicates(threshold)


def test_at_a_threshold_of_one_only_the_same_set_is_dropped():
    near = NearDuplicates(1.0)
    text = "".join(np.random.default_rng(2).choice(list(CHINESE), 500))
    assert near.add(signature(text))
    assert near.add(signature(text[:250] + "。" * 9 + text[250:]))
    assert not near.add(signature(text))


def test_edited_web_pages_are_found_and_all_others_stay():
    lines = shared_path("lm_zh_web/train.txt").read_text(encoding="utf-8").split("\n")
    texts = [line for line in dict.fromkeys(lines) if len(line) > 300][:250]
    near = NearDuplicates(0.8)
    assert all(near.add(signature(text)) for text in texts)
    copied = [f"转载：{text[:120]}{text[125:]}（完）" for text in texts]
    assert min(map(exact, texts, copied)) > 0.89
    assert not any(near.add(signature(text)) for text in copied)
