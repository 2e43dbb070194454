"""Thrift's compact protocol: what Parquet's footers and page headers are written in.

Specification: doc/specs/thrift-compact-protocol.md of Apache Thrift. Structs are dicts of field id -> (type, value)
in the order that they were written in, so fields that nobody here knows are written again as they were read. To be
written, a struct may also be given as its bytes.
"""

from __future__ import annotations

from typing import Any

TRUE, FALSE, I8, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

Struct = dict[int, tuple[int, Any]]
# Of a list: the type of its elements, and they.
Elements = tuple[int, list[Any]]


def read_struct(data: bytes | memoryview, at: int = 0) -> tuple[Struct, int]:
    """The struct that begins there, and where it ends. Raises ValueError where there is none."""
    reader = _Reader(data, at)
    try:
        return reader.struct(), reader.at
    except (IndexError, RecursionError) as error:
        raise ValueError("a struct of Thrift is cut off or damaged") from error


def struct_bytes(struct: Struct) -> bytes:
    """The reverse of `read_struct`."""
    out = bytearray()
    _write_struct(out, struct)
    return bytes(out)


class _Reader:
    def __init__(self, data: bytes | memoryview, at: int) -> None:
        self._data, self.at = data, at

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = head & 15, self._value(head & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (TRUE, FALSE):
            # The type is the value.
            return None
        if kind == I8:
            return self._byte()
        if kind in (I16, I32, I64):
            return self._signed()
        if kind == DOUBLE:
            return self._bytes(8)
        if kind == BINARY:
            return self._bytes(self._unsigned())
        if kind in (LIST, SET):
            return self._elements()
        if kind == STRUCT:
            return self.struct()
        # Parquet has no maps.
        raise ValueError(f"a field of Thrift has type {kind}")

    def _elements(self) -> Elements:
        head = self._byte()
        kind, count = head & 15, head >> 4
        if count == 15:
            count = self._unsigned()
        if kind in (TRUE, FALSE):
            return kind, [self._byte() for _ in range(count)]
        return kind, [self._value(kind) for _ in range(count)]

    def _byte(self) -> int:
        byte = self._data[self.at]
        self.at += 1
        return byte

    def _bytes(self, count: int) -> bytes:
        taken = bytes(self._data[self.at : self.at + count])
        if len(taken) < count:
            raise IndexError(count)
        self.at += count
        return taken

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)


def _write_struct(out: bytearray, struct: Struct) -> None:
    last = 0
    for number, (kind, value) in struct.items():
        if 0 < number - last < 16:
            out.append(number - last << 4 | kind)
        else:
            out.append(kind)
            _write_signed(out, number)
        last = number
        _write_value(out, kind, value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind == I8:
        out.append(value)
    elif kind in (I16, I32, I64):
        _write_signed(out, value)
    elif kind == DOUBLE:
        out += value
    elif kind == BINARY:
        _write_unsigned(out, len(value))
        out += value
    elif kind in (LIST, SET):
        of, elements = value
        if len(elements) < 15:
            out.append(len(elements) << 4 | of)
        else:
            out.append(15 << 4 | of)
            _write_unsigned(out, len(elements))
        for element in elements:
            if of in (TRUE, FALSE):
                out.append(element)
            else:
                _write_value(out, of, element)
    elif kind == STRUCT and isinstance(value, bytes):
        out += value
    elif kind == STRUCT:
        _write_struct(out, value)


def _write_unsigned(out: bytearray, value: int) -> None:
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _write_signed(out: bytearray, value: int) -> None:
    # Zigzag; Python's integers have no width, so the sign is asked for.
    _write_unsigned(out, value << 1 if value >= 0 else (-value << 1) - 1)
