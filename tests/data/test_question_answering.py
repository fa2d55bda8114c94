"""Questions, their windows and the way back to the text; answers judged as CMRC 2018 does."""

import json

import numpy as np
import pytest
import transformers

from llm_jax.data.question_answering import (
    Question,
    Reading,
    best_sentence,
    best_spans,
    choose,
    exact_match,
    f1,
    features,
    read_questions,
)
from llm_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from tests.shared_data import shared_path

WORDS = ["the", "a", "cat", "dog", "sat", "mat", "##s", "on", "big", "red", "##der", "who", "what", "?"]
WORDS += [".", ",", "在", "北", "京", "上", "海", "谁"]


@pytest.fixture
def bert(tmp_path):
    """A WordPiece tokenizer and the directory that transformers reads it from."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    return load_tokenizer(tmp_path), tmp_path


def question(context, asked, answer):
    return Question("q", context, asked, (answer,), (context.index(answer),))


CONTEXT = (
    "The big cats sat on a mat , a redder dog 在 北京 , the cat sat 在 上海 . Xyz sat on the dogs ."
)


@pytest.mark.parametrize(("max_tokens", "overlap"), [(40, 8), (16, 4), (14, 0)])
def test_windows_are_those_of_transformers(bert, max_tokens, overlap):
    ours, directory = bert
    theirs = transformers.BertTokenizer(str(directory / "vocab.txt"), do_lower_case=True)
    wanted = theirs(
        "Who sat ?",
        CONTEXT,
        truncation="only_second",
        max_length=max_tokens,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found = ours.encode_pair(
        "Who sat ?", CONTEXT, max_tokens=max_tokens, first_tokens=8, overlap=overlap
    )
    assert [pair.ids for pair in found] == wanted["input_ids"]
    assert [pair.types for pair in found] == wanted["token_type_ids"]
    for row, pair in enumerate(found):
        assert [s == 1 for s in wanted.sequence_ids(row)] == pair.in_second
        assert wanted["offset_mapping"][row] == pair.offsets
    assert len(found) > 1 or max_tokens == 40


def test_a_long_question_loses_its_end_and_no_room_is_refused(bert):
    ours, _ = bert
    (pair,) = ours.encode_pair("who " * 9, "the cat", max_tokens=30, first_tokens=3, overlap=2)
    assert pair.in_second.index(True) == 5  # [CLS] who who who [SEP]
    with pytest.raises(ValueError, match="max_tokens=10: 2 are left"):
        ours.encode_pair("who " * 9, "the cat", max_tokens=10, first_tokens=5, overlap=2)


@pytest.mark.parametrize("answer", ["cats", "redder dog", "北京", "京", "Xyz", "The big"])
def test_answers_come_back_from_their_tokens_exactly(bert, answer):
    asked = question(CONTEXT, "who ?", answer)
    found = features([asked], bert[0], Reading(16, 4, 4, 8, False))
    ends = found.rows["ends"]
    assert (ends > 0).any() and not (ends > 0).all()  # some windows hold it, some do not
    for row in np.flatnonzero(ends):
        logits = np.zeros((len(found.pairs[row].ids), 2))
        logits[found.rows["starts"][row], 0] = logits[ends[row], 1] = 5.0
        (span,) = best_spans(asked, [found.pairs[row]], [logits], count=1, answer_tokens=8)
        assert (span.text, span.score) == (answer, 10.0)
        assert CONTEXT[span.start : span.end] == answer


def test_bytes_of_one_character_come_back_as_the_character():
    asked = question("他住在龘城", "?", "龘城")
    found = features([asked], ByteTokenizer(), Reading(40, 4, 4, 8, False))
    logits = np.zeros((len(found.pairs[0].ids), 2))
    logits[found.rows["starts"][0], 0] = logits[found.rows["ends"][0], 1] = 5.0
    spans = best_spans(asked, found.pairs, [logits], count=1, answer_tokens=8)
    assert spans[0].text == "龘城"


def test_the_best_spans_are_those_of_a_search_over_all(bert):
    asked = question(CONTEXT, "who sat ?", "cats")
    found = features([asked], bert[0], Reading(20, 4, 6, 5, False))
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(found.pairs), 20, 2)).astype(np.float32)
    scores = {}
    for pair, row in zip(found.pairs, logits, strict=True):
        for i in range(len(pair.ids)):
            for j in range(i, min(i + 5, len(pair.ids))):
                if pair.in_second[i] and pair.in_second[j]:
                    place = pair.offsets[i][0], pair.offsets[j][1]
                    scores[place] = max(scores.get(place, -9e9), float(row[i, 0]) + float(row[j, 1]))
    wanted = sorted(scores, key=lambda place: -scores[place])[:4]
    (spans,) = choose([asked], found, logits, 4, 5)
    assert [(span.start, span.end) for span in spans] == wanted
    np.testing.assert_allclose([span.score for span in spans], [scores[p] for p in wanted], rtol=1e-6)


def test_what_the_text_shares_with_the_question_is_marked(bert):
    asked = question("the cat sat on a mat .", "who sat on mat ?", "mat")
    found = features([asked], bert[0], Reading(24, 8, 4, 8, True))
    tokens = found.pairs[0].ids
    types = found.rows["token_types"][0][: len(tokens)]
    words = dict(zip(tokens[7:-1], types[7:-1].tolist(), strict=True))
    named = {bert[0].id_to_piece(id_): kind for id_, kind in words.items()}
    assert named == {"the": 1, "cat": 1, "sat": 3, "on": 3, "a": 1, "mat": 2, ".": 1}


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "overlap"),
    [
        ("1998年", "1998年", 1, 1),
        ("《哈姆雷特》", "哈姆雷特", 1, 1),  # punctuation is left out
        ("ABC", "abc", 1, 1),
        ("在北京大学", "北京", 0, 2 * (2 / 5) / (2 / 5 + 1)),
        ("北方的京", "北京", 0, 2 * (1 / 4) * (1 / 2) / (1 / 4 + 1 / 2)),  # a run, not a subsequence
        ("上海", "北京", 0, 0),
        ("New York city", "new york", 0, 0.8),  # words, for other scripts
        ("", "北京", 0, 0),
    ],
)
def test_scores_are_those_of_the_official_program(prediction, answer, exact, overlap):
    assert exact_match(prediction, [answer, "x"]) == exact
    assert f1(prediction, ["x", answer]) == pytest.approx(overlap)


def test_the_baseline_takes_the_sentence_with_most_in_common():
    text = "鲁迅生于绍兴。他写了《狂人日记》。他在东京学医。"
    assert best_sentence(question(text, "狂人日记是谁写的？", "鲁迅")) == "他写了《狂人日记》。"


def write(path, **changes):
    asked = {"id": "1", "question": "谁？", "answers": ["王"], "answer_starts": [1]} | changes
    path.write_text(json.dumps({"context": "小王走了", "qas": [asked]}, ensure_ascii=False) + "\n")
    return path


def test_both_forms_of_file_are_read(tmp_path, caplog):
    (first,) = read_questions(write(tmp_path / "a.jsonl"))
    assert first == Question("1", "小王走了", "谁？", ("王",), (1,))
    squad = {"id": "1", "question": "谁？", "answers": [{"text": "王", "answer_start": 3}]}
    document = {"data": [{"paragraphs": [{"context": "小王走了", "qas": [squad]}]}]}
    (tmp_path / "b.json").write_text(json.dumps(document))
    assert read_questions(tmp_path / "b.json") == [first]
    assert "1 answers stand elsewhere than the file says" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": ["李"]}, r"a.jsonl:1: question 1: '李' does not stand in the text"),
        ({"id": 3}, r"a.jsonl:1: id=3"),
        ({"answer_starts": [1, 2]}, r"a.jsonl:1: question 1: answers="),
    ],
)
def test_bad_questions_name_file_and_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / "a.jsonl", **changes))


def test_every_answer_of_cmrc2018_comes_back_from_its_window():
    questions = read_questions(shared_path("qa_zh_cmrc2018/trial.jsonl"))[:120]
    tokenizer = load_tokenizer(shared_path("tokenizers/bert-base-chinese"))
    found = features(questions, tokenizer, Reading(512, 64, 128, 512, False))
    logits = np.zeros((len(found.pairs), 512, 2))
    rows = np.flatnonzero(found.rows["ends"])
    logits[rows, found.rows["starts"][rows], 0] = logits[rows, found.rows["ends"][rows], 1] = 5.0
    chosen = choose(questions, found, logits, 1, 512)
    for asked, spans in zip(questions, chosen, strict=True):
        answer = asked.answers[0].strip()  # which may be longer than what two windows share
        assert spans[0].text == answer or len(answer) > 120
