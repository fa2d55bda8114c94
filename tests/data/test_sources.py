"""Files become texts and labels; what cannot be read is refused with file and line."""

import bz2
import csv
import gzip
import json
import lzma
import sys
import tracemalloc

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data import sources, tasks
from tests.shared_data import shared_path


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# Plain text


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("line", ["一行", "two", "three\u2028still three"]),
        ("blank", ["一行\ntwo", "three\u2028still three"]),
        ("file", ["一行\r\ntwo\n\n \n\nthree\u2028still three\n"]),
    ],
)
def test_plain_text_splits(write, split, expected):
    path = write("a.txt", "一行\r\ntwo\n\n \n\nthree\u2028still three\n")
    assert sources.read_texts(path, split=split) == expected


def test_several_files_of_several_formats_in_order(write):
    paths = [
        write("a.txt", "\ufeffone\n"),
        write("b.jsonl", '{"text": "二", "id": 7}\n\n{"text": "three"}\n'),
        write("c.TSV", 'id\tText\n1\tsay "four"\n'),
        write("d.csv", 'text,id\r\n"five, and\nsix",2\r\n'),
    ]
    assert sources.read_texts(paths) == ["one", "二", "three", 'say "four"', "five, and\nsix"]


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_parquet_rows_are_records(tmp_path):
    texts = [f"第{i}行" for i in range(5)]
    path = write_parquet(tmp_path / "a.parquet", text=texts, label=[0, 1, 0, 1, 1], skipped=[1.5] * 5)
    assert sources.read_texts(path) == texts
    assert sources.read_labelled(path)[1].tolist() == [0, 1, 0, 1, 1]


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": pa.Codec("zstd").compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_read_and_cut_ones_refused(write, suffix):
    lines = [f"{i} 一行 {hash((i, 1))}" for i in range(30_000)]
    packed = bytes(PACKERS[suffix]("\n".join(lines).encode()))
    assert sources.read_texts(write(f"a.txt{suffix}", packed)) == lines
    with pytest.raises(ValueError, match=rf"cut.txt{suffix}"):
        sources.read_texts(write(f"cut.txt{suffix}", packed[: len(packed) // 2]))


@pytest.mark.parametrize("scheme", ["memory://{}", "file://{}"])
def test_urls_are_opened_by_fsspec(tmp_path, scheme):
    folder = scheme.format(tmp_path)
    for name, line in (("b.txt", "two"), ("a.jsonl", '{"text": "one"}'), ("a.md", "no data")):
        system, file = fsspec.url_to_fs(f"{folder}/deep/{name}", auto_mkdir=True)
        system.pipe_file(file, line.encode())
    assert sources.read_texts(f"{folder}/deep/b.txt") == ["two"]
    # A folder, and a pattern, stand for the data files in them, sorted.
    assert sources.read_texts(folder) == sources.read_texts(f"{folder}/deep/*") == ["one", "two"]
    assert sources.data_files(f"{folder}/deep/*.txt") == [f"{folder}/deep/b.txt"]
    with pytest.raises(ValueError, match="no file in it ends in"):
        sources.read_texts(f"{folder}/deep/*.csv")


@pytest.mark.parametrize(
    ("url", "reason"),
    [("gs://bucket/a.txt", "gcsfs"), ("nowhere://a.txt", "nowhere://a.txt: .*nowhere")],
)
def test_urls_that_nothing_opens_are_refused(monkeypatch, url, reason):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it was not installed
    with pytest.raises(ValueError, match=reason):
        sources.read_texts(url)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_a_missing_package_is_named(write, monkeypatch, name):
    for missing in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"{name}.*pyarrow: pip install 'llm_jax\[data\]'"):
        sources.read_texts(write(name, "x"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.tsv", "a.csv", "a.txt.gz"])
def test_large_files_are_not_held(write, name):
    """40 MB of texts pass through less than 8 MB."""
    text = "长" * 10_000
    row = {".jsonl": f'{{"text": "{text}"}}\n'}.get(name[1:], f"{text}\n")
    content = ("" if name == "a.jsonl" else "text\n") + row * 1300
    packed = gzip.compress(content.encode(), 1) if name.endswith(".gz") else content
    path = write(name, packed)
    del content, packed
    tracemalloc.start()
    try:
        assert sum(len(text) > 9 for text in sources.iter_texts(path)) == 1300
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# Labelled text


def test_labels_are_sorted_names_and_can_be_given(write):
    train = write("train.tsv", "label\ttext\npos\tgood\nneg\tbad\npos\tfine\n")
    texts, indices, labels = sources.read_labelled(train)
    assert texts == ["good", "bad", "fine"]
    assert labels == ("neg", "pos")
    np.testing.assert_array_equal(indices, np.array([1, 0, 1], np.int32), strict=True)
    dev = write("dev.jsonl", '{"LABEL": "pos", "text": "nice"}')
    assert sources.read_labelled(dev, labels=("pos", "neg"))[1].tolist() == [0]


def test_integer_labels_of_jsonl_are_names(write):
    path = write("a.jsonl", '{"y": 1, "t": "a"}\n{"y": 0, "t": "b"}')
    assert sources.read_labelled(path, text_field="t", label_field="y")[2] == ("0", "1")


# Text that any of the formats can hold in a field, TSV's being the narrowest.
field = st.text(st.characters(exclude_characters="\0\t\r\n", exclude_categories=["Cs"]), min_size=1)
rows = st.lists(
    st.tuples(field.filter(str.strip), st.sampled_from(["积极", "消极", "中性"])), min_size=1
)


@given(rows)
def test_every_format_reads_back_what_was_written(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    table = [("text", "label"), *rows]
    tsv, jsonl, comma = (folder / f"rows.{suffix}" for suffix in ("tsv", "jsonl", "csv"))
    tsv.write_bytes("\n".join("\t".join(row) for row in table).encode())
    jsonl.write_text("\n".join(json.dumps({"text": t, "label": name}) for t, name in rows))
    with comma.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    for path in (tsv, jsonl, comma):
        texts, indices, labels = sources.read_labelled(path)
        assert [(t, labels[i]) for t, i in zip(texts, indices, strict=True)] == rows


# Errors


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.tsv", "", 1, "header"),
        ("a.tsv", "text\tlabel\n", 1, "no records"),
        ("a.tsv", "text\tlabel\nok\tpos\nno label\n", 3, "expected 2 columns"),
        ("a.tsv", "text\tlabel\nok\tpos\n\nok\tpos\n", 3, "expected 2 columns .* got 1"),
        ("a.tsv", "text\tlabel\ttext\n", 1, "once"),
        ("a.tsv", "text\tlabels\nok\tpos\n", 2, "'label': no such field; did you mean labels?"),
        ("a.tsv", "text\tLabel\tLABEL\nok\tpos\tneg\n", 2, "differ only in case"),
        ("a.tsv", "text\tlabel\nok\tpos\n \tpos\n", 3, "not blank"),
        ("a.tsv", "text\tlabel\nok\t\n", 2, "expected a name"),
        ("a.tsv", b"text\tlabel\nok\tpos\n\xd6\xd0\tpos\n", 3, "0xd6 is not UTF-8"),
        ("a.csv", 'text,label\n"two\nlines",pos\nonly one\n', 4, "expected 2 columns"),
        ("a.csv", 'text,label\nok,pos\n"open,pos\n', 3, "not CSV"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": \n', 2, "not JSON"),
        ("a.jsonl", "\n[1]", 2, "expected a JSON object, got list"),
        ("a.jsonl", '{"text": "a"}', 1, "'label': no such field"),
        ("a.jsonl", '{"text": 3, "label": "b"}', 1, "expected a text"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', 1, "expected a name or an integer"),
        ("a.jsonl", '{"text": "\\ud800", "label": "b"}', 1, "lone surrogate"),
        ("a.jsonl", "", 1, "no records"),
        ("a.tsv", "text\tlabel\nok\tpos\n".encode("utf-16"), 1, "0xff is not UTF-8"),
        ("a.tsv", "text\tlabel\nok\tpos\n".encode("utf-16-le"), 1, "NUL in the text"),
        (
            "a.tsv",
            b"text\tlabel\n" + "好\tpos\n坏\tneg\n".encode() * 9000 + b"\xba\xc3\tpos\n",
            18002,
            "0xba",
        ),
        ("a.parquet", b"PAR1 and no more", 1, "not Parquet"),
    ],
)
def test_labelled_files_are_refused_with_file_and_line(write, name, content, line, reason):
    path = write(name, content)
    with pytest.raises(ValueError, match=rf"{path}:{line}: .*{reason}"):
        sources.read_labelled(path)


def test_blank_texts_are_given_where_they_are_allowed(write):
    path = write("a.jsonl", '{"text": "a"}\n{"text": " "}\n{"text": ""}\n')
    assert list(sources.iter_texts(path, allow_blank=True)) == ["a", " ", ""]
    with pytest.raises(ValueError, match=rf"{path}:2: .*not blank"):
        sources.read_texts(path)


def test_label_outside_the_given_ones_is_refused(write):
    path = write("a.tsv", "text\tlabel\na\tpos\nb\tgreat\n")
    with pytest.raises(ValueError, match=rf"{path}:3: label 'great' .* \('neg', 'pos'\)"):
        sources.read_labelled(path, labels=("neg", "pos"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", " \n\n", ":1: .*no documents"),
        ("a.txt", b"fine\n\xff", ":2: byte 0xff is not UTF-8"),
        ("a.doc", "x", "'.doc'; expected"),
    ],
)
def test_text_files_are_refused(write, name, content, reason):
    path = write(name, content)
    with pytest.raises(ValueError, match=rf"{path}.*{reason}"):
        sources.read_texts(path)


def test_unknown_split_is_refused(write):
    with pytest.raises(ValueError, match="split='words'"):
        sources.read_texts(write("a.txt", "x"), split="words")


def test_a_folder_holds_one_table_of_a_name(write, tmp_path):
    write("train.tsv", "text\tlabel\na\t1\n")
    assert sources.find_table(tmp_path, "train") == tmp_path / "train.tsv"
    with pytest.raises(
        ValueError, match=r"dev\.jsonl or dev\.tsv or dev\.csv or dev\.parquet, found none"
    ):
        sources.find_table(tmp_path, "dev")
    write("train.csv", "text,label\na,1\n")
    with pytest.raises(ValueError, match=r"found \['train.tsv', 'train.csv'\]"):
        sources.find_table(tmp_path, "train")


# Real data: counts are those of the folders' own READMEs


@pytest.mark.parametrize(
    ("file", "label_field", "labels", "counts"),
    [
        (
            "sentiment3_zh_weibo/train.tsv",
            "label_zh",
            ("消极", "中性", "积极"),
            [15893, 6974, 8717],
        ),
        ("sentiment2_zh_chnsenticorp/train.tsv", "label", ("0", "1"), [3411, 4131]),
    ],
)
def test_real_labelled_sets(file, label_field, labels, counts):
    texts, indices, _ = sources.read_labelled(shared_path(file), label_field=label_field, labels=labels)
    assert len(texts) == sum(counts)
    assert np.bincount(indices).tolist() == counts


def test_real_pieces_separated_by_blank_lines():
    assert len(sources.read_texts(shared_path("lm_zh_classical/train.txt"), split="blank")) == 30_523


# Tasks


def encode_bytes(text: str) -> list[int]:
    """A tokenizer that puts [1] before and [2] behind every text."""
    return [1, *(byte + 3 for byte in text.encode()), 2]


def test_examples_hold_text_tokens_and_label():
    (first, second) = tasks.classification_examples(["ab", "c"], np.array([1, 0]), encode_bytes, 8)
    assert (first.text, first.tokens.tolist(), first.label) == ("ab", [1, 100, 101, 2], 1)
    assert (second.tokens.dtype, second.label) == (np.int32, 0)


@given(st.text(st.characters(codec="utf-8")), st.integers(3, 12))
def test_long_texts_lose_their_end_but_not_the_closing_tokens(text, max_length):
    tokens = tasks.encode_within(text, encode_bytes, max_length).tolist()
    whole = encode_bytes(text)
    assert tokens == (whole if len(whole) <= max_length else [*whole[: max_length - 1], 2])


def test_texts_without_tokens_or_room_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        tasks.encode_within("", lambda text: [ord(c) for c in text], 4)
    with pytest.raises(ValueError, match="max_length=1"):
        tasks.encode_within("abc", encode_bytes, 1)
    with pytest.raises(ValueError, match="1 labels for 2 texts"):
        tasks.classification_examples(["a", "b"], [0], encode_bytes, 4)


def test_documents_end_in_one_eos():
    assert [d.tolist() for d in tasks.documents(["a"], encode_bytes, eos_id=2)] == [[1, 100, 2]]
    assert [d.tolist() for d in tasks.documents(["a"], encode_bytes, eos_id=9)] == [[1, 100, 2, 9]]
    assert [d.tolist() for d in tasks.documents([""], lambda text: [])] == [[]]


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=20, max_size=60).filter(lambda t: len(set(t)) > 4),
    st.floats(0.1, 0.4),
    st.integers(0, 9),
)
def test_split_parts_the_records_and_never_a_text(texts, fraction, seed):
    kept, held_out = tasks.split(texts, fraction, seed, text=str)
    assert sorted(kept + held_out) == sorted(texts)
    assert not set(kept) & set(held_out)
    largest = max(map(texts.count, texts))
    assert round(fraction * len(texts)) <= len(held_out) < round(fraction * len(texts)) + largest


def test_split_depends_on_the_texts_and_the_seed_only():
    records = [str(i) for i in range(200)]
    _, held_out = tasks.split(records, 0.1, seed=0, text=str)
    assert len(held_out) == 20
    assert set(tasks.split(records[::-1], 0.1, seed=0, text=str)[1]) == set(held_out)
    assert set(tasks.split(records, 0.1, seed=1, text=str)[1]) != set(held_out)
    examples = tasks.classification_examples(records, [0] * 200, encode_bytes, 8)
    assert [e.text for e in tasks.split(examples, 0.1, seed=0)[1]] == held_out


@pytest.mark.parametrize(("texts", "fraction"), [("ab", 0.0), ("aaaa", 0.5), ("ab", 1.0)])
def test_split_with_an_empty_side_is_refused(texts, fraction):
    with pytest.raises(ValueError, match=f"fraction={fraction}"):
        tasks.split(list(texts), fraction, 0, text=str)
