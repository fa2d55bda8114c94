"""Extractive question answering: questions on a text, windows to read, answers found and judged.

file -> `Question` (text, question, answers and where they stand) -> `features`: rows that a model reads
logits of the rows -> `best_spans`: the likeliest answers, exactly as they stand in the text
answers -> `exact_match`, `f1`: the measures of CMRC 2018

Letters: R rows, T tokens of a row.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.config import QuestionAnsweringConfig
from llm_jax.data.fast_tokenizer import FastTokenizer, Pair
from llm_jax.data.packing import Batch, pad_batch
from llm_jax.data.sources import read_records

logger = logging.getLogger(__name__)

# What the CMRC 2018 evaluation takes out of answers before it compares them.
PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》…·、「」（）－～『』")
_WORD = re.compile(r"[^\W_]+(?:[.,'][^\W_]+)*|\S")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question on a text, and the answers that count as right."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]  # () when they are not known
    starts: tuple[int, ...]  # character of `context` at which each answer begins


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of a text as an answer."""

    text: str
    start: int  # characters [start, end) of the text
    end: int
    score: float  # logit of the first token + logit of the last


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the texts are cut into rows, and which spans can be answers. Counts are tokens."""

    max_tokens: int  # of a row: question, window of the text, special tokens
    question_tokens: int  # longer questions lose their end
    overlap: int  # that two neighbouring windows share (Hugging Face: stride)
    answer_tokens: int  # longest answer
    mark_matches: bool  # token types 2 and 3 for what the text has in common with the question


@dataclasses.dataclass(frozen=True)
class Features:
    """The rows of some questions, and the way back from tokens to their texts."""

    rows: Batch  # tokens, segment_ids, positions, token_types [R, T]; starts, ends [R]
    question: np.ndarray  # [R] int32: which question a row belongs to
    pairs: list[Pair]


def reading_of(config: QuestionAnsweringConfig) -> Reading:
    """The part of a run's settings that answering needs too."""
    return Reading(
        config.max_tokens,
        config.question_tokens,
        config.overlap,
        config.answer_tokens,
        config.mark_matches,
    )


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file: JSONL of {"context", "qas"} or SQuAD's JSON, which CMRC 2018 uses too.

    Each of "qas" has "id", "question" and "answers": texts, with "answer_starts" beside them, or SQuAD's
    {"text", "answer_start"}. Raises ValueError naming the file, the line (JSONL) and the question where
    a field is missing or an answer does not stand in its text. Where it stands elsewhere than the file
    says, its first occurrence is taken, and the number of such answers is logged.
    """
    path = Path(path)
    questions, moved = [], 0
    for where, paragraph in _paragraphs(path):
        context = paragraph.get("context")
        if not isinstance(context, str) or not context.strip():
            raise ValueError(f"{where}: context={context!r}; expected a text that is not blank")
        for record in paragraph.get("qas") or ():
            question = _question(where, context, record)
            moved += sum(
                context[start : start + len(answer)] != answer
                for start, answer in zip(question.starts, question.answers, strict=True)
            )
            questions.append(_located(where, question))
    if not questions:
        raise ValueError(f"{path}: the file holds no questions")
    if moved:
        logger.warning("%s: %d answers stand elsewhere than the file says", path, moved)
    return questions


def _paragraphs(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and line for messages, paragraph)."""
    if path.suffix.lower() != ".json":
        yield from ((f"{path}:{line}", record) for line, record in read_records(path))
        return
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected SQuAD\'s JSON, {{"data": [...]}}: {error!r}') from error
    for article in articles:
        for paragraph in article.get("paragraphs") or ():
            yield str(path), paragraph


def _question(where: str, context: str, record: Mapping[str, Any]) -> Question:
    id_, text = record.get("id"), record.get("question")
    if not isinstance(id_, str) or not isinstance(text, str):
        raise ValueError(f"{where}: id={id_!r}, question={text!r}; expected two texts")
    answers = record.get("answers") or []
    starts = record.get("answer_starts") or [-1] * len(answers)
    if answers and isinstance(answers[0], Mapping):
        starts = [answer.get("answer_start", -1) for answer in answers]
        answers = [answer.get("text") for answer in answers]
    if len(starts) != len(answers) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(f"{where}: question {id_}: answers={answers!r} with starts={starts!r}")
    return Question(id_, context, text, tuple(answers), tuple(starts))


def _located(where: str, question: Question) -> Question:
    """The question with starts at which its answers do stand."""
    starts = []
    for answer, start in zip(question.answers, question.starts, strict=True):
        if question.context[start : start + len(answer)] != answer:
            start = question.context.find(answer)
        if start < 0:
            raise ValueError(f"{where}: question {question.id}: {answer!r} does not stand in the text")
        starts.append(start)
    return dataclasses.replace(question, starts=tuple(starts))


def features(questions: Sequence[Question], tokenizer: FastTokenizer, reading: Reading) -> Features:
    """Rows for a model with a span head, padded to `max_tokens`.

    starts, ends: first and last token of the first answer; 0 and 0, the first token of the row, where
    the window does not hold all of it, or there is none.
    """
    pairs, index, starts, ends, types = [], [], [], [], []
    for number, question in enumerate(questions):
        for pair in tokenizer.encode_pair(
            question.question,
            question.context,
            max_tokens=reading.max_tokens,
            first_tokens=reading.question_tokens,
            overlap=reading.overlap,
        ):
            first, last = _target(question, pair)
            pairs.append(pair)
            index.append(number)
            starts.append(first)
            ends.append(last)
            types.append(_marked(pair) if reading.mark_matches else pair.types)
    rows = pad_batch([pair.ids for pair in pairs], reading.max_tokens)
    rows["token_types"] = pad_batch(types, reading.max_tokens)["tokens"]
    rows |= {"starts": np.array(starts, np.int32), "ends": np.array(ends, np.int32)}
    return Features(rows, np.array(index, np.int32), pairs)


def _target(question: Question, pair: Pair) -> tuple[int, int]:
    """First and last token of the first answer in this window; (0, 0) when it is not all there."""
    if not question.answers:
        return 0, 0
    start = question.starts[0]
    start, end = _stripped(question.context, start, start + len(question.answers[0]))
    inside = [
        i
        for i, (second, (a, b)) in enumerate(zip(pair.in_second, pair.offsets, strict=True))
        if second and a < end and b > start
    ]
    if not inside or pair.offsets[inside[0]][0] > start or pair.offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def _marked(pair: Pair) -> list[int]:
    """Types of the tokens: of the text, 2 where the question has the token, 3 where also its neighbour.

    (The exact-match feature of Chen et al. 2017, arXiv:1704.00051, on tokens and pairs of tokens.)
    """
    split = pair.in_second.index(True) if True in pair.in_second else len(pair.ids)
    asked, two = set(pair.ids[1:split]), set(zip(pair.ids[1:split], pair.ids[2:split], strict=False))
    types = list(pair.types)
    for i in range(split, len(pair.ids)):
        if pair.in_second[i] and pair.ids[i] in asked:
            near = tuple(pair.ids[i - 1 : i + 1]) in two or tuple(pair.ids[i : i + 2]) in two
            types[i] = 3 if near else 2
    return types


def best_spans(
    question: Question,
    pairs: Sequence[Pair],
    logits: Sequence[np.ndarray],
    *,
    count: int,
    answer_tokens: int,
) -> list[Span]:
    """The `count` likeliest answers over all rows of a question, best first, each text place once.

    pairs, logits: of each row; logits [T, 2] of a token to be the first and the last of the answer. A
    span lies within the window, has at most `answer_tokens` tokens and no space at its ends.
    """
    found: dict[tuple[int, int], float] = {}
    for pair, scores in zip(pairs, logits, strict=True):
        places = np.flatnonzero(pair.in_second)
        if not len(places):
            continue
        first, last = (scores[places, side].astype(np.float64) for side in (0, 1))
        total = first[:, None] + last[None, :]
        length = np.arange(len(places))[None, :] - np.arange(len(places))[:, None] + 1
        total[(length < 1) | (length > answer_tokens)] = -np.inf
        for flat in np.argsort(-total, axis=None, kind="stable")[: 4 * count]:
            i, j = divmod(int(flat), len(places))
            if total[i, j] == -np.inf:
                break
            place = _stripped(question.context, pair.offsets[places[i]][0], pair.offsets[places[j]][1])
            found[place] = max(found.get(place, -np.inf), float(total[i, j]))
    best = sorted(found, key=lambda place: (-found[place], place))[:count]
    return [Span(question.context[a:b], a, b, found[a, b]) for a, b in best if b > a]


def choose(
    questions: Sequence[Question], parts: Features, logits: np.ndarray, count: int, answer_tokens: int
) -> list[list[Span]]:
    """The `count` likeliest answers of each question; logits [>= R, T, 2] of its rows."""
    chosen = []
    for number, question in enumerate(questions):
        rows = np.flatnonzero(parts.question == number)
        pairs = [parts.pairs[row] for row in rows]
        scores = [logits[row, : len(parts.pairs[row].ids)] for row in rows]
        chosen.append(best_spans(question, pairs, scores, count=count, answer_tokens=answer_tokens))
    return chosen


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """The same stretch without the space at its ends."""
    stretch = text[start:end]
    return start + len(stretch) - len(stretch.lstrip()), end - len(stretch) + len(stretch.rstrip())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction is one of the answers, punctuation and case aside; else 0.0.

    As cmrc2018_evaluate.py counts it.
    """
    bare = ["".join(c for c in text.lower().strip() if c not in PUNCTUATION) for text in answers]
    return float("".join(c for c in prediction.lower().strip() if c not in PUNCTUATION) in bare)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the longest common run of characters (words, for other scripts), of the best answer.

    As cmrc2018_evaluate.py counts it, but that words of other scripts are cut by a rule of ours where
    that program calls nltk.
    """
    return max((_overlap(_segments(prediction), _segments(answer)) for answer in answers), default=0.0)


def _segments(text: str) -> list[str]:
    """Chinese characters one by one, other text in words; no punctuation of `PUNCTUATION`."""
    kept = "".join(c for c in text.lower().strip() if c not in PUNCTUATION)
    spaced = re.sub(r"([\u4e00-\u9fa5])", r" \1 ", kept)
    return [word for part in spaced.split() for word in _WORD.findall(part)]


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common run."""
    longest, above = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else 0)
        longest, above = max(longest, *row), row
    if not longest:
        return 0.0
    precision, recall = longest / len(a), longest / len(b)
    return 2 * precision * recall / (precision + recall)


def best_sentence(question: Question) -> str:
    """The sentence of the text that shares most pairs of characters with the question: a baseline."""
    pairs = lambda text: {text[i : i + 2] for i in range(len(text) - 1)}  # noqa: E731
    sentences = [s for s in re.split(r"(?<=[。！？!?；;\n])", question.context) if s.strip()]
    asked = pairs(question.question)
    return max(sentences, key=lambda s: len(asked & pairs(s)) / (len(s) + 20) ** 0.5).strip()
