"""The header of a GGUF file, read with distrust.

Layout (version 2 and 3, little-endian): magic, version, number of tensors, number of metadata entries; the entries,
each a key, a type and a value; the tensor descriptions, each a name, dimensions, a type and an offset; padding; data.

Every count, length and offset is compared with what the file can hold before it is believed, so that a hostile header
costs neither memory nor time: nothing here allocates more than a small multiple of the bytes really present.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanmo.models.checkpoints.weights import refuse, refuse_impostor

SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
TENSOR_TYPES = {  # ggml's number: (name, values per block, bytes per block)
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}
OTHER_TYPES = {15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"}
MAX_ELEMENTS = 1 << 22  # of one metadata array; the largest known vocabularies have about 2**18.5 tokens
MAX_KEY = 65_535  # the specification's limit
MAX_NAME = 64  # bytes of a tensor's name, ggml's own limit
MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``shape`` is in row-major order, ``offset`` counts from the start of the file."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """The metadata and the tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf_header(path: Path) -> Header:
    """Read and check everything before the tensor data.

    Raises:
        ModelError: the file is missing, is not GGUF, is truncated, or contradicts itself; the message says where.
    """
    if not path.is_file():
        refuse(path, "there is no such file", fix="check the path")
    size = path.stat().st_size
    with path.open("rb") as stream:
        refuse_impostor(path, stream.read(64))
        if size < 24:
            refuse(path, f"the file has {size} bytes, a GGUF file has at least 24")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Reader(path, data).header()


class Reader:
    """A cursor over the header that never steps outside the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.position = path, data, len(data), 0

    def header(self) -> Header:
        """Read the whole header."""
        if self.data[:4] != b"GGUF":
            refuse(self.path, f"the file begins with {self.data[:4]!r}, not with GGUF")
        self.position = 4
        version = self.scalar("<I")
        if version & 0xFFFF == 0:
            refuse(self.path, "the file is big-endian", fix="use the little-endian file of this model")
        if version not in (2, 3):
            refuse(self.path, f"GGUF version {version} is not known", fix="known: 2 and 3; convert the model again")
        num_tensors, num_entries = self.scalar("<Q"), self.scalar("<Q")
        self.room(num_tensors, 8 + 1 + 4 + 8 + 4 + 8, "tensors")
        self.room(num_entries, 8 + 1 + 4 + 1, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.string("a metadata key")
            if not 0 < len(key) <= MAX_KEY or key in metadata:
                refuse(self.path, f"the metadata key {key[:80]!r} is empty, too long, or occurs twice")
            metadata[key] = self.value(self.scalar("<I"), key)
        described = [self.tensor() for _ in range(num_tensors)]
        return Header(metadata, self.place(described, metadata.get("general.alignment", 32)))

    def take(self, count: int, what: str) -> int:
        """Step over ``count`` bytes and return where they begin."""
        start = self.position
        if count > self.size - start:
            refuse(self.path, f"{what} at byte {start} needs {count} bytes, the file ends after {self.size - start}")
        self.position = start + count
        return start

    def room(self, count: int, each: int, what: str) -> None:
        """Refuse a count of things, of at least ``each`` bytes, that cannot be in the rest of the file."""
        if count > (self.size - self.position) // each:
            refuse(self.path, f"the header claims {count} {what}, more than {self.size} bytes can hold")

    def scalar(self, code: str) -> Any:
        """Read one number or truth value."""
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code), "a number"))[0]

    def string(self, what: str) -> str:
        """Read a length and that many bytes of UTF-8."""
        length = self.scalar("<Q")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            refuse(self.path, f"{what} at byte {start} is not UTF-8")

    def strings(self, count: int) -> list[str] | None:
        """Many strings at three times the speed; None, and the cursor where it was, if one of them is damaged."""
        texts: list[str] = []
        position, data, length = self.position, self.data, struct.Struct("<Q")
        try:
            for _ in range(count):
                start = position + 8
                position = start + length.unpack_from(data, position)[0]
                texts.append(str(data[start:position], "utf-8"))
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError):
            return None
        if position > self.size:  # only the last one can end there: the next would have no length
            return None
        self.position = position
        return texts

    def value(self, kind: int, key: str) -> Any:
        """Read a metadata value of a given type."""
        if kind == STRING:
            return self.string(f"the value of '{key}'")
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            refuse(self.path, f"the metadata '{key}' has the unknown type {kind}")
        return self.scalar(SCALARS[kind])

    def array(self, key: str) -> list[Any]:
        """Read an array of numbers or strings; arrays of arrays, which no model uses, are refused."""
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if count > MAX_ELEMENTS:
            refuse(self.path, f"the array '{key}' claims {count} elements, at most {MAX_ELEMENTS} are read")
        if kind == STRING:
            self.room(count, 8, f"strings in '{key}'")
            return self.strings(count) or [self.string(f"a string of '{key}'") for _ in range(count)]
        if kind not in SCALARS:
            refuse(self.path, f"the array '{key}' has elements of the type {kind}, which is not known or nested")
        code = SCALARS[kind].lstrip("<")
        start = self.take(count * struct.calcsize("<" + code), f"the array '{key}'")
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def tensor(self) -> TensorInfo:
        """Read a tensor description; its offset still counts from the start of the data."""
        name = self.string("a tensor name")
        if not 0 < len(name.encode()) <= MAX_NAME:
            refuse(self.path, f"a tensor name has {len(name.encode())} bytes, 1 to {MAX_NAME} are allowed")
        num_dims = self.scalar("<I")
        if not 1 <= num_dims <= 4:
            refuse(self.path, f"the tensor '{name}' has {num_dims} dimensions, 1 to 4 are allowed")
        dims = [self.scalar("<Q") for _ in range(num_dims)]
        kind, offset = self.scalar("<I"), self.scalar("<Q")
        if kind not in TENSOR_TYPES:
            known = ", ".join(known_name for known_name, _, _ in TENSOR_TYPES.values())
            given = OTHER_TYPES.get(kind, f"number {kind}")
            fix = f"known: {known}; download the model in one of them"
            refuse(self.path, f"the tensor '{name}' is stored as {given}, which is not known", fix=fix)
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        if min(dims) < 1 or dims[0] % block:
            refuse(self.path, f"the tensor '{name}' has dimensions {dims}, which {type_name} cannot store")
        return TensorInfo(name, kind, tuple(reversed(dims)), offset, math.prod(dims) // block * block_bytes)

    def place(self, described: list[TensorInfo], alignment: Any) -> dict[str, TensorInfo]:
        """Check that the tensors follow one another, aligned, and lie inside the file."""
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            refuse(self.path, f"the alignment {alignment!r} is not a power of two up to {MAX_ALIGNMENT}")
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for info in described:
            if info.name in tensors:
                refuse(self.path, f"the tensor '{info.name}' occurs twice")
            if info.offset != expected:
                refuse(self.path, f"the tensor '{info.name}' has offset {info.offset}, expected {expected}")
            if start + info.offset + info.num_bytes > self.size:
                end = start + info.offset + info.num_bytes
                refuse(self.path, f"the tensor '{info.name}' ends at byte {end}, the file has {self.size}")
            tensors[info.name] = TensorInfo(info.name, info.type, info.shape, start + info.offset, info.num_bytes)
            expected += -(-info.num_bytes // alignment) * alignment
        return tensors
