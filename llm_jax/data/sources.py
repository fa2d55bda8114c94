"""Texts and labelled texts from plain text, JSONL, TSV, CSV and Parquet files, near or far.

The format follows the suffix: `.txt` plain text, `.jsonl` one JSON object per line, `.tsv` a header
line and TAB between columns with no quoting, `.csv` RFC 4180 with a header line, `.parquet`. Behind it
may stand `.gz`, `.bz2`, `.xz` or `.zst`. Text is UTF-8 (a byte order mark is allowed). A path is a local
one or a URL that fsspec opens, such as gs://bucket/file.jsonl.gz; a folder or a pattern with `*` stands
for all such files in it. Files are read as a stream: none is ever held whole.

Nothing is skipped or repaired in silence: what cannot be read raises ValueError that opens with
`file:line:` (Parquet: the number of the row).
"""

import csv
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
import numpy as np

from llm_jax.config import nearest

Record = tuple[int, Mapping[str, Any]]  # line where the record starts, counted from 1; its fields

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def read_texts(
    paths: str | Path | Sequence[str | Path], *, field: str = "text", split: str = "line"
) -> list[str]:
    """The documents of one or several files, in order: `iter_texts` as a list."""
    return list(iter_texts(paths, field=field, split=split))


def iter_texts(
    paths: str | Path | Sequence[str | Path],
    *,
    field: str = "text",
    split: str = "line",
    allow_blank: bool = False,
) -> Iterator[str]:
    """The documents of one or several files, in order, one at a time.

    split: what a document is in a plain text file: "line" (each line that is not blank), "blank"
        (blocks of lines separated by blank lines) or "file". The other formats hold one document per
        record, in the column or key `field` (upper or lower case).
    allow_blank: give the texts of records that hold only white space, rather than refuse them.

    Raises ValueError with file and line for undecodable bytes, malformed records, a missing field, or
    a file without documents.
    """
    if split not in _SPLITS:
        raise ValueError(f"split={split!r}: expected one of {tuple(_SPLITS)}")
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    if not paths:
        raise ValueError("paths is empty; expected one or more files")
    files = [file for path in paths for file in data_files(path)]
    return _documents(files, field, split, allow_blank)


def read_listed(listed: str, *, field: str = "text") -> list[str]:
    """The texts of FILE or FILE#COLUMN, several of them separated by commas, as `read_texts` reads them.

    field: the column of a table that is named without one.
    """
    entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
    if not entries:
        raise ValueError(f"{listed!r} names no file; expected FILE or FILE#COLUMN, separated by commas")
    pairs = [entry.partition("#") for entry in entries]
    return [text for path, _, column in pairs for text in read_texts(path, field=column or field)]


def _documents(files: Sequence[str], field: str, split: str, allow_blank: bool) -> Iterator[str]:
    for path in files:
        if _suffix(path) == ".txt":
            texts = _SPLITS[split](line for _, line in _lines(path))
        else:
            texts = (
                _text(path, line, record, field, allow_blank) for line, record in read_records(path)
            )
        count = 0
        for text in texts:
            count += 1
            yield text
        if not count:
            raise ValueError(f"{path}:1: the file holds no documents")


def data_files(path: str | Path) -> list[str]:
    """The files that a path stands for: the file itself, or those of a folder or a pattern, sorted.

    Of a folder these are the files of a format that can be read, in its subfolders too. Raises
    ValueError when there is none, or nothing to open such a path with.
    """
    path = str(path)
    try:
        system, name = fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:  # an unknown protocol, or its package is missing
        raise ValueError(f"{path}: {error}; a local path has no '://' in it") from error
    if "*" in name:
        found = system.glob(name)
    elif system.isdir(name):
        found = system.find(name)
    else:
        return [path]
    names = sorted(str(name) for name in found if _suffix(str(name)) in _SUFFIXES)
    if not names:
        raise ValueError(f"{path}: no file in it ends in one of {_SUFFIXES}")
    return [system.unstrip_protocol(name) for name in names] if "://" in path else names


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
    path = str(path)
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


def read_weights(path: str | Path, field: str) -> np.ndarray:
    """The column `field` of a table or JSONL, numbers of 0 or more: [n] float64.

    Raises ValueError with file and line for anything else, and where all of them are 0.
    """
    path, weights = str(path), []
    for line, record in read_records(path):
        value = record_field(path, line, record, field)
        try:
            weight = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"{path}:{line}: field {field!r} is {value!r}; expected a number of 0 or more"
            )
        weights.append(weight)
    if not any(weights):
        raise ValueError(f"{path}: every {field!r} is 0, so no record counts")
    return np.array(weights)


def find_table(folder: Path, stem: str) -> Path:
    """The one table or JSONL file of that stem in a folder; ValueError unless there is just one."""
    found = [folder / f"{stem}{suffix}" for suffix in _READERS if (folder / f"{stem}{suffix}").is_file()]
    if len(found) != 1:
        names = " or ".join(f"{stem}{suffix}" for suffix in _READERS)
        raise ValueError(
            f"{folder}: expected one of {names}, found {[path.name for path in found] or 'none'}; "
            "or name a file instead of the folder"
        )
    return found[0]


def read_records(path: str | Path) -> Iterator[Record]:
    """(line, {field: value}) of each record of a table or JSONL; values of TSV and CSV are strings."""
    path = str(path)
    suffix = _suffix(path)
    if suffix not in _READERS:
        raise ValueError(f"{path}: cannot read fields from {suffix!r}; expected {tuple(_READERS)}")
    return _READERS[suffix](path)


def _suffix(path: str) -> str:
    """What names the format, in lower case: `.jsonl` of a.JSONL.gz."""
    name = PurePosixPath(path)
    return (name.with_suffix("") if name.suffix.lower() in _COMPRESSED else name).suffix.lower()


def _open(path: str) -> BinaryIO:
    """The bytes of a file, decompressed as its name says."""
    zstd = path.lower().endswith(".zst")
    system, name = fsspec.url_to_fs(path)
    file = system.open(name, "rb", compression=None if zstd else "infer")
    if not zstd:
        return file
    try:  # fsspec would use zstandard, which takes a file that was cut short for a whole one
        from pyarrow import CompressedInputStream
    except ImportError as error:
        raise ValueError(f"{path}: .zst needs pyarrow: pip install 'llm_jax[data]'") from error
    return CompressedInputStream(file, "zstd")


def _lines(path: str, newline: str = "\n") -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end). By default lines end in LF only: not at U+2028, U+0085, ..."""
    try:
        with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
            for number, line in enumerate(text, 1):
                if "\0" in line:
                    raise ValueError(f"{path}:{number}: NUL in the text, as in UTF-16; convert to UTF-8")
                yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable(path)) from error
    except FileNotFoundError:
        raise
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read, it may be damaged or cut short: {error}") from error


def _undecodable(path: str) -> str:
    """What to say of a file that is not UTF-8: a decoder of blocks does not know the line."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return f"{path}:{number}: byte {byte:#04x} is not UTF-8; convert the file to UTF-8 first"
    return f"{path}: not UTF-8"


def _stripped(lines: Iterable[str]) -> Iterator[str]:
    """Lines without LF or CRLF."""
    return (line.removesuffix("\n").removesuffix("\r") for line in lines)


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    for line in _stripped(lines):
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def _whole(lines: Iterable[str]) -> Iterator[str]:
    text = "".join(lines)
    if text.strip():
        yield text


_SPLITS = {
    "line": lambda lines: (line for line in _stripped(lines) if line.strip()),
    "blank": _blocks,
    "file": _whole,
}


def _jsonl(path: str) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg}, column {error.colno}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
        yield number, record


def _tsv(path: str) -> Iterator[Record]:
    lines = _stripped(line for _, line in _lines(path))
    return _table(path, ((number, line.split("\t")) for number, line in enumerate(lines, 1)))


def _csv(path: str) -> Iterator[Record]:
    return _table(path, _csv_rows(path))


def _csv_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line for _, line in _lines(path, newline="")), strict=True)
    line = 1  # of the first line of the row; a quoted field may span several
    try:
        for row in reader:
            if row:  # [] is a blank line
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not CSV: {error}") from error


def _parquet(path: str) -> Iterator[Record]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install 'llm_jax[data]'") from error
    number = 0
    with _open(path) as file:
        try:
            for batch in ParquetFile(file).iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
        except (ValueError, OSError) as error:  # pyarrow raises these of damaged files
            raise ValueError(f"{path}:{number + 1}: not Parquet, or damaged: {error}") from error


def _table(path: str, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    _, header = next(rows, (1, []))
    if not any(header):
        raise ValueError(f"{path}:1: expected a header line with the names of the columns")
    if len(set(header)) != len(header):
        raise ValueError(f"{path}:1: expected each column name once, got {header}")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}:{line}: expected {len(header)} columns {header}, got {len(row)}")
        yield line, dict(zip(header, row, strict=True))


_READERS = {".jsonl": _jsonl, ".tsv": _tsv, ".csv": _csv, ".parquet": _parquet}
_SUFFIXES = (".txt", *_READERS)


def record_field(path: str | Path, line: int, record: Mapping[str, Any], name: str) -> Any:
    """record[name], or the one field whose name differs only in case; ValueError with file and line."""
    if name in record:
        return record[name]
    matches = [key for key in record if key.casefold() == name.casefold()]
    if len(matches) != 1:
        found = f"{matches} differ only in case" if matches else f"no such field{nearest(name, record)}"
        raise ValueError(f"{path}:{line}: field {name!r}: {found}")
    return record[matches[0]]


def _text(path: str, line: int, record: Mapping[str, Any], name: str, allow_blank: bool = False) -> str:
    text = record_field(path, line, record, name)
    if not isinstance(text, str) or not (text.strip() or allow_blank):
        raise ValueError(f"{path}:{line}: field {name!r} is {text!r}; expected a text that is not blank")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError(f"{path}:{line}: field {name!r} holds a lone surrogate, not Unicode") from error
    return text


def _label(path: str, line: int, record: Mapping[str, Any], name: str) -> str:
    label = record_field(path, line, record, name)
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise ValueError(f"{path}:{line}: field {name!r} is {label!r}; expected a name or an integer")
    return str(label)
