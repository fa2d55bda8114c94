"""The safetensors file format: read through a memory map whose pages are given back, written in order.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the bytes of the tensors without gaps. The format's
own library keeps every page it has touched resident, which doubles the memory of a load; here
`TensorFile.release` drops them.
"""

import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


class TensorFile:
    """One .safetensors file: `names`, `dtype` and `shape` of a tensor, and its values as a view.

    Opening checks the header and that the file holds every byte it promises. Raises ValueError
    naming the file, and the tensor where it is one tensor's fault.
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            self._entries, self._start = _read_header(file, path, size)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def dtype(self, name: str) -> np.dtype:
        return _DTYPES[self._entries[name]["dtype"]]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def view(self, name: str) -> np.ndarray:
        """Read-only array over the mapped file; only what is touched is read from disk."""
        shape = self.shape(name)
        begin = self._start + self._entries[name]["data_offsets"][0]
        flat = np.frombuffer(self._map, self.dtype(name), math.prod(shape), begin)
        return flat.reshape(shape)

    def release(self) -> None:
        """Take the pages read so far out of this process's memory; views stay valid."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    values: Callable[[str], np.ndarray],
) -> None:
    """A .safetensors file of `tensors` {name: (dtype, shape)}, in this order.

    values: the array of a name, asked for once each when its turn to be written comes, so that the
        file never stands in memory as a whole.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        header[name], offset = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in tensors.items():
            value = np.ascontiguousarray(values(name), dtype)
            if value.shape != shape:
                raise ValueError(f"{path}: tensor {name}: expected shape {shape}, got {value.shape}")
            file.write(value.reshape(-1).view(np.uint8).data)


def _read_header(file: Any, path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The entries by name in the order of their bytes, and where the bytes start."""
    if size < 8:
        raise ValueError(f"{path}: {size} bytes are too few for a safetensors file; download it again")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_HEADER:
        raise ValueError(
            f"{path}: header length {length} is not plausible; the file is corrupted or not in the "
            "safetensors format (a Git LFS pointer or a pickle looks like this)"
        )
    if 8 + length > size:
        raise ValueError(f"{path}: truncated: {size} bytes, but its header alone takes {8 + length}")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the header is corrupted: {error}") from error
    end = _check_entries(dict(entries), path)
    if 8 + length + end > size:
        raise ValueError(
            f"{path}: truncated: {size} bytes, but its tensors need {8 + length + end}; "
            "copy or download it again"
        )
    if 8 + length + end < size:
        raise ValueError(f"{path}: {size - 8 - length - end} bytes after the last tensor; expected none")
    return dict(entries), 8 + length


def _check_entries(entries: Mapping[str, Any], path: Path) -> int:
    """Number of tensor bytes, after checking that every entry fits its shape and the one before."""
    position = 0
    for name, entry in entries.items():
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: tensor {name}: dtype {dtype!r}; expected one of {list(_DTYPES)}")
        if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"{path}: tensor {name}: shape {shape!r}; expected a list of sizes")
        expected = [position, position + math.prod(shape) * _DTYPES[dtype].itemsize]
        if offsets != expected:
            raise ValueError(
                f"{path}: the header is corrupted: tensor {name} {dtype}{shape} lies at bytes "
                f"{offsets}, expected {expected}"
            )
        position = expected[1]
    return position
