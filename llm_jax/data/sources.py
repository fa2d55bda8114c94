"""Texts and labelled texts from plain text, JSONL, TSV and CSV files.

The format follows the suffix: `.txt` plain text, `.jsonl` one JSON object per line, `.tsv` a header
line and TAB between columns with no quoting, `.csv` RFC 4180 with a header line. Everything is UTF-8
(a byte order mark is allowed). Nothing is skipped or repaired in silence: what cannot be read raises
ValueError that opens with `file:line:`.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.config import nearest

Record = tuple[int, Mapping[str, Any]]  # line where the record starts, counted from 1; its fields


def read_texts(
    paths: str | Path | Sequence[str | Path], *, field: str = "text", split: str = "line"
) -> list[str]:
    """The documents of one or several files, in order.

    split: what a document is in a plain text file: "line" (each line that is not blank), "blank"
        (blocks of lines separated by blank lines) or "file". The other formats hold one document per
        record, in the column or key `field` (upper or lower case).

    Raises ValueError with file and line for undecodable bytes, malformed records, a missing field, or
    a file without documents.
    """
    if split not in _SPLITS:
        raise ValueError(f"split={split!r}: expected one of {tuple(_SPLITS)}")
    documents = []
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if path.suffix.lower() == ".txt":
            texts = _SPLITS[split](_decode(path))
        else:
            texts = [_text(path, line, record, field) for line, record in read_records(path)]
        if not texts:
            raise ValueError(f"{path}:1: the file holds no documents")
        documents += texts
    if not documents:
        raise ValueError("paths is empty; expected one or more files")
    return documents


def read_labelled(
    path: str | Path,
    *,
    text_field: str = "text",
    label_field: str = "label",
    labels: Sequence[str] | None = None,
) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Texts, their label indices [n] int32, and the label names that the indices point into.

    labels: the names, in order; None takes the names that occur in the file, sorted. Read a second
        file (a dev set) with the `labels` that the first one returned.

    Raises ValueError with file and line as `read_texts` does, and for a label outside `labels`.
    """
    path = Path(path)
    texts, names, lines = [], [], []
    for line, record in read_records(path):
        texts.append(_text(path, line, record, text_field))
        names.append(_label(path, line, record, label_field))
        lines.append(line)
    if not texts:
        raise ValueError(f"{path}:1: the file holds no records")
    labels = tuple(sorted(set(names)) if labels is None else labels)
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels={labels}: expected each name once")
    index = {name: i for i, name in enumerate(labels)}
    for line, name in zip(lines, names, strict=True):
        if name not in index:
            raise ValueError(f"{path}:{line}: {label_field} {name!r} is not one of the labels {labels}")
    return texts, np.array([index[name] for name in names], np.int32), labels


def find_table(folder: Path, stem: str) -> Path:
    """The one JSONL, TSV or CSV file of that stem in a folder; ValueError unless there is just one."""
    found = [folder / f"{stem}{suffix}" for suffix in _READERS if (folder / f"{stem}{suffix}").is_file()]
    if len(found) != 1:
        names = " or ".join(f"{stem}{suffix}" for suffix in _READERS)
        raise ValueError(
            f"{folder}: expected one of {names}, found {[path.name for path in found] or 'none'}; "
            "or name a file instead of the folder"
        )
    return found[0]


def read_records(path: str | Path) -> Iterator[Record]:
    """(line, {field: value}) of each record of a JSONL, TSV or CSV file; table values are strings."""
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: cannot read fields from {path.suffix!r}; expected {tuple(_READERS)}")
    return reader(path, _decode(path))


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8; convert the file to UTF-8 first"
        ) from error


def _lines(text: str) -> list[str]:
    """Lines ended by LF or CRLF only: `str.splitlines` would also cut at U+2028, U+0085, FF, ..."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _blocks(text: str) -> list[str]:
    blocks: list[list[str]] = [[]]
    for line in _lines(text):
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return ["\n".join(block) for block in blocks if block]


_SPLITS = {
    "line": lambda text: [line for line in _lines(text) if line.strip()],
    "blank": _blocks,
    "file": lambda text: [text] if text.strip() else [],
}


def _jsonl(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg}, column {error.colno}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
        yield number, record


def _tsv(path: Path, text: str) -> Iterator[Record]:
    return _table(path, ((n, line.split("\t")) for n, line in enumerate(_lines(text), 1)))


def _csv(path: Path, text: str) -> Iterator[Record]:
    return _table(path, _csv_rows(path, text))


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1  # of the first line of the row; a quoted field may span several
    try:
        for row in reader:
            if row:  # [] is a blank line
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not CSV: {error}") from error


def _table(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    _, header = next(rows, (1, []))
    if not any(header):
        raise ValueError(f"{path}:1: expected a header line with the names of the columns")
    if len(set(header)) != len(header):
        raise ValueError(f"{path}:1: expected each column name once, got {header}")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}:{line}: expected {len(header)} columns {header}, got {len(row)}")
        yield line, dict(zip(header, row, strict=True))


_READERS = {".jsonl": _jsonl, ".tsv": _tsv, ".csv": _csv}


def _field(path: Path, line: int, record: Mapping[str, Any], name: str) -> Any:
    """record[name], or the one field whose name differs from it only in case."""
    if name in record:
        return record[name]
    matches = [key for key in record if key.casefold() == name.casefold()]
    if len(matches) != 1:
        found = f"{matches} differ only in case" if matches else f"no such field{nearest(name, record)}"
        raise ValueError(f"{path}:{line}: field {name!r}: {found}")
    return record[matches[0]]


def _text(path: Path, line: int, record: Mapping[str, Any], name: str) -> str:
    text = _field(path, line, record, name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{path}:{line}: field {name!r} is {text!r}; expected a text that is not blank")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError(f"{path}:{line}: field {name!r} holds a lone surrogate, not Unicode") from error
    return text


def _label(path: Path, line: int, record: Mapping[str, Any], name: str) -> str:
    label = _field(path, line, record, name)
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise ValueError(f"{path}:{line}: field {name!r} is {label!r}; expected a name or an integer")
    return str(label)
