"""Token stores: large corpora as token ids on a disk, written once, mapped into memory by every run.

    STORE/manifest.json       what is in it, with sizes and CRC-32 of all files
          tokenizer/          the tokenizer that made the ids, for `load_tokenizer`
          train-00000.bin     ids of the training documents, one after the other, uint16 or uint32
          train-00000.idx     where each document begins, and the end of the last: [n + 1] int64
          eval-00000.bin ...  the same of the held-out documents

Everything is little-endian. A document stands in one shard whole, has one token or more and ends with
the tokenizer's EOS, if it has one. `prepare.py` fills a store, `store_rows.py` reads rows from it.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data.tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
TRAIN, EVAL = "train", "eval"
FORMAT = 1
_OFFSET = np.dtype("<i8")
_READ = 16 << 20  # bytes, or tokens, looked at a time
_DAMAGED = "not as it was written; prepare the store again"
_PROBE = "Hello, world! don't  e\u0301 \u00e9\n\t 1,234.5 你好，世界。 ｆｕｌｌ ﬁ 한국어 नमस्ते 😀 <s></s>"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One .bin file and its .idx."""

    name: str  # of the files, without suffix
    documents: int
    tokens: int
    crc32: tuple[int, int]  # of .bin and .idx


@dataclasses.dataclass(frozen=True)
class Split:
    """The training or the held-out part of a store."""

    documents: int
    tokens: int  # EOS of each document among them
    bytes: int  # of the texts in UTF-8
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """What the manifest of a store says. `open_store` reads it."""

    directory: Path
    vocab_size: int
    tokenizer: str  # `fingerprint` of the tokenizer
    splits: Mapping[str, Split]
    crc32: int  # of the manifest, which holds those of all shards

    @property
    def dtype(self) -> np.dtype:
        return id_dtype(self.vocab_size)

    def tokens(self, shard: Shard) -> np.ndarray:
        """Ids [tokens] of a shard, mapped."""
        return np.memmap(self._path(shard, ".bin"), self.dtype, mode="r", shape=(shard.tokens,))

    def offsets(self, shard: Shard) -> np.ndarray:
        """Where the documents of a shard begin, and its end: [documents + 1] int64, mapped."""
        return np.memmap(self._path(shard, ".idx"), _OFFSET, mode="r", shape=(shard.documents + 1,))

    def check_tokenizer(self, tokenizer: Tokenizer, name: str) -> None:
        """ValueError when `tokenizer`, which `name` names, is not the one that made this store."""
        if fingerprint(tokenizer) != self.tokenizer:
            raise ValueError(
                f"{self.directory} was made by another tokenizer than {name}: its ids mean other text. "
                f"Use {self.directory / 'tokenizer'}, or prepare the store again with this one"
            )

    def check_ids(self, shard: Shard, ids: np.ndarray, offset: int) -> None:
        """ValueError for an id that the vocabulary does not have; `offset` is the place of ids[0]."""
        if ids.size and ids.max() >= self.vocab_size:
            place = int(np.argmax(ids >= self.vocab_size))
            raise ValueError(
                f"{self._path(shard, '.bin')}: token {offset + place} has the id {ids[place]} of "
                f"{self.vocab_size}; the file is damaged: prepare the store again"
            )

    def verify(self) -> None:
        """Read everything. ValueError names a file that is not as it was written, or holds wrong ids."""
        for shard in (shard for split in self.splits.values() for shard in split.shards):
            for suffix, crc32 in zip((".bin", ".idx"), shard.crc32, strict=True):
                _verify(self._path(shard, suffix), crc32)
            tokens = self.tokens(shard)
            for start in range(0, shard.tokens, _READ):
                self.check_ids(shard, tokens[start : start + _READ], start)
        self.check_tokenizer(load_tokenizer(self.directory / "tokenizer"), "the one in it")

    def _path(self, shard: Shard, suffix: str) -> Path:
        return self.directory / f"{shard.name}{suffix}"


def is_store(path: str | Path) -> bool:
    """Whether this is the directory of a token store."""
    return "://" not in str(path) and (Path(path) / MANIFEST).is_file()


def open_store(directory: str | Path) -> TokenStore:
    """The store in a directory, its files there and of the right size; `verify` looks into them."""
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"{path}: format {content['format']}, this version reads {FORMAT}")
        crc32 = content.pop("crc32")
        splits = {name: _split(values) for name, values in content["splits"].items()}
        store = TokenStore(directory, content["vocab_size"], content["tokenizer"], splits, crc32)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not the manifest of a token store: {error!r}") from error
    if crc32 != _checksum(content):
        raise ValueError(f"{path}: {_DAMAGED}")
    for split in splits.values():
        for shard in split.shards:
            _check_sizes(store, shard)
    return store


def _split(values: Mapping[str, Any]) -> Split:
    shards = [Shard(**{**shard, "crc32": tuple(shard["crc32"])}) for shard in values["shards"]]
    return Split(**{**values, "shards": tuple(shards)})


def _check_sizes(store: TokenStore, shard: Shard) -> None:
    sizes = {
        ".bin": shard.tokens * store.dtype.itemsize,
        ".idx": (shard.documents + 1) * _OFFSET.itemsize,
    }
    for suffix, expected in sizes.items():
        path = store.directory / f"{shard.name}{suffix}"
        if (found := path.stat().st_size) != expected:
            raise ValueError(f"{path}: {found} bytes, {expected} were written; prepare the store again")


def _verify(path: Path, crc32: int) -> None:
    found = 0
    with path.open("rb") as file:
        while block := file.read(_READ):
            found = zlib.crc32(block, found)
    if found != crc32:
        raise ValueError(f"{path}: {_DAMAGED}")


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def id_dtype(vocab_size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds all ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of what a tokenizer does: its pieces in order, and how it cuts a text of many scripts.

    The same for copies of a tokenizer in other formats.
    """
    pieces = [_piece(tokenizer, id_) for id_ in range(tokenizer.vocab_size)]
    described = json.dumps([pieces, tokenizer.eos_id, tokenizer.encode(_PROBE)])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _piece(tokenizer: Tokenizer, id_: int) -> str | None:
    try:
        return tokenizer.id_to_piece(id_)
    except ValueError:  # vocabularies may have gaps
        return None


class SplitWriter:
    """Writes the documents of one split into shards of about `shard_tokens` tokens."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype, shard_tokens: int):
        self._directory, self._name, self._dtype = directory, name, dtype
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._bytes = 0
        self._open()

    def add(self, tokens: np.ndarray, size: int) -> None:
        """One document: its ids, and the bytes of its text."""
        data = tokens.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._bytes += size
        if self._offsets[-1] >= self._shard_tokens:
            self._close()
            self._open()

    def finish(self) -> Split:
        """Everything on the disk; what was written."""
        self._close()
        return Split(
            sum(shard.documents for shard in self._shards),
            sum(shard.tokens for shard in self._shards),
            self._bytes,
            tuple(self._shards),
        )

    def _open(self) -> None:
        self._path = self._directory / f"{self._name}-{len(self._shards):05d}.bin"
        self._file, self._crc32, self._offsets = self._path.open("wb"), 0, array("q", [0])

    def _close(self) -> None:
        _sync(self._file)
        documents, tokens = len(self._offsets) - 1, self._offsets[-1]
        if not documents:
            self._path.unlink()
            return
        offsets = np.asarray(self._offsets, _OFFSET).tobytes()
        with self._path.with_suffix(".idx").open("wb") as file:
            file.write(offsets)
            _sync(file)
        checksums = self._crc32, zlib.crc32(offsets)
        self._shards.append(Shard(self._path.stem, documents, tokens, checksums))


def write_manifest(
    directory: Path, tokenizer: Tokenizer, splits: Mapping[str, Split], **about: Any
) -> None:
    """Make a directory with finished splits a store. about: further entries, for people, of JSON."""
    content = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": fingerprint(tokenizer),
        "splits": {name: dataclasses.asdict(split) for name, split in splits.items()},
    }
    content |= about
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content | {"crc32": _checksum(content)}, file, indent=1, ensure_ascii=False)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
