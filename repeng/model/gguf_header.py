"""Check of the header of an untrusted GGUF file: its counts and lengths are compared with the size of the file.

Other readers trust these counts and lengths. With false ones they run or allocate memory for hours.
"""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type
UINTS = {0: "<B", 2: "<H", 4: "<I", 10: "<Q"}
LONGEST_NAME, MOST_DIMENSIONS, MOST_TYPES = 1 << 16, 4, 64
ALIGNMENT, LARGEST_ALIGNMENT = "general.alignment", 1 << 16


class Stored(NamedTuple):
    """A tensor's entry in the header: shape as written, type number, offset in bytes from the start of the data."""

    shape: tuple[int, ...]
    type: int
    offset: int


def check_gguf(path: str | Path) -> dict[str, Stored]:
    """The tensors in the header of a GGUF file, by name.

    Raises:
        ValueError: the file is not a GGUF file, or its header does not match its contents.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        try:
            return _walk(file, size)
        except (struct.error, UnicodeDecodeError, _LyingError) as error:
            told = (
                str(error) if isinstance(error, _LyingError) else "the header ends too early or has a malformed text"
            )
            raise ValueError(f"{path} is not a complete GGUF file: {told}. Copy it from its source again") from None


class _LyingError(ValueError):
    """A header that cannot be true."""


def _walk(file: BinaryIO, size: int) -> dict[str, Stored]:
    if file.read(4) != MAGIC:
        raise _LyingError("it does not begin with 'GGUF'")
    (version,) = struct.unpack("<I", file.read(4))
    if version not in VERSIONS:
        versions = " and ".join(map(str, VERSIONS))
        raise _LyingError(f"its version is {version}; only the little-endian versions {versions} can be read")
    tensors, keys = struct.unpack("<QQ", file.read(16))
    if max(tensors, keys) > size // 12:
        raise _LyingError(f"it declares {tensors} tensors and {keys} keys in {size} bytes")
    alignment, seen = 32, set()
    for _ in range(keys):
        key = _text(file, size, LONGEST_NAME)
        if key in seen:
            raise _LyingError(f"the key {key[:60]!r} is given twice")
        seen.add(key)
        (kind,) = struct.unpack("<I", file.read(4))
        if key == ALIGNMENT:
            alignment = _alignment(file, kind)
        else:
            _skip(file, size, kind)
    found: dict[str, Stored] = {}
    for _ in range(tensors):
        name = _text(file, size, LONGEST_NAME)
        if name in found:
            raise _LyingError(f"the tensor {name[:60]!r} is given twice")
        (dimensions,) = struct.unpack("<I", file.read(4))
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise _LyingError(f"the tensor {name[:60]!r} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", file.read(8 * dimensions))
        found[name] = Stored(shape, *struct.unpack("<IQ", file.read(12)))
    start = -(-file.tell() // alignment) * alignment
    for name, stored in found.items():
        _check_place(name, stored, size - start, alignment)
    return found


def _alignment(file: BinaryIO, kind: int) -> int:
    if kind not in UINTS:
        raise _LyingError(f"{ALIGNMENT} has the type {kind}, which is not an unsigned integer type")
    (value,) = struct.unpack(UINTS[kind], file.read(SIZES[kind]))
    if not 0 < value <= LARGEST_ALIGNMENT or value & (value - 1):
        raise _LyingError(f"{ALIGNMENT} is {value}; it must be a power of 2 up to {LARGEST_ALIGNMENT}")
    return value


def _check_place(name: str, stored: Stored, room: int, alignment: int) -> None:
    elements = 1
    for length in stored.shape:
        elements *= length
    # The densest types hold about 5 elements per byte.
    if elements == 0 or elements // 8 > room or stored.offset + elements // 8 > room or stored.offset >= room:
        raise _LyingError(
            f"the tensor {name[:60]!r} of shape {stored.shape} at {stored.offset} extends beyond the end of the file"
        )
    if stored.offset % alignment or stored.type >= MOST_TYPES:
        raise _LyingError(f"the tensor {name[:60]!r} has the type {stored.type} and the offset {stored.offset}")


def _text(file: BinaryIO, size: int, longest: int) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(longest, size - file.tell()):
        raise _LyingError(f"it declares a text of {length} bytes at byte {file.tell()} of {size}")
    return file.read(length).decode("utf-8")


def _skip(file: BinaryIO, size: int, kind: int, depth: int = 0) -> None:
    """Skip a value of this type."""
    if kind == STRING:
        (length,) = struct.unpack("<Q", file.read(8))
        _go(file, size, length)
    elif kind == ARRAY and depth < 4:
        inner, count = struct.unpack("<IQ", file.read(12))
        if inner in SIZES:
            _go(file, size, SIZES[inner] * count)
        elif count > size - file.tell():
            raise _LyingError(f"it declares an array of {count} values at byte {file.tell()} of {size}")
        else:
            for _ in range(count):
                _skip(file, size, inner, depth + 1)
    elif kind in SIZES:
        _go(file, size, SIZES[kind])
    else:
        raise _LyingError(f"the value at byte {file.tell()} has the unknown type {kind}")


def _go(file: BinaryIO, size: int, length: int) -> None:
    if length > size - file.tell():
        raise _LyingError(f"it declares {length} bytes at byte {file.tell()} of {size}")
    file.seek(length, 1)
