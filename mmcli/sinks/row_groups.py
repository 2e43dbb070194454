"""A Parquet file that is put together from row groups of other ones, as bytes: nothing is encoded again.

Arrow writes vectors at 200 to 300 MB/s, since a list's numbers have levels; their bytes, with the checksum of each
page looked at, are copied at a GB/s. Format: parquet.thrift of parquet-format, whose numbers of fields these are.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.sinks.compact import I64, LIST, STRUCT, Struct, read_struct, struct_bytes

MAGIC = b"PAR1"
# Of the whole file (FileMetaData).
_FILE_SCHEMA, _FILE_ROWS, _FILE_GROUPS = 2, 3, 4
# Of a row group.
_GROUP_COLUMNS, _GROUP_ROWS, _GROUP_OFFSET, _GROUP_ORDINAL = 1, 3, 5, 7
# Of a column in it (ColumnChunk), and what is behind the pages: indexes, which are not copied.
_COLUMN_OFFSET, _COLUMN_DATA, _COLUMN_INDEXES = 2, 3, (4, 5, 6, 7)
# Of its ColumnMetaData: its type, its path and how its pages are compressed; then what it holds, and where.
_DATA_KIND, _DATA_VALUES = (1, 3, 4), 5
_DATA_BYTES, _DATA_PAGES, _INDEX_PAGE, _DICTIONARY, _BLOOM = 7, 9, 10, 11, (14, 15)
# Of a page's header; and of one of data, of version 1 or 2, how many values there are.
_PAGE_BYTES, _PAGE_CHECKSUM, _PAGE_DATA, _PAGE_VALUES = 3, 4, (5, 8), 1


@dataclass(frozen=True, slots=True)
class Group:
    """A row group: the columns of its file, what the footer says of it, and the pages of each column."""

    schema: Any
    described: Struct
    pages: tuple[bytes, ...]


class GroupSource:
    """The row groups of a Parquet file as bytes. A context manager.

    Everything raises OSError, and ValueError where the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        try:
            self._size = self._file.seek(0, os.SEEK_END)
            self._footer = self._read_footer()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def schema(self) -> Any:
        """The columns of the file, as its footer describes them."""
        return self._footer.get(_FILE_SCHEMA)

    def kinds(self, number: int) -> list[Any]:
        """Of each column of that row group its type, its path and how it is compressed."""
        try:
            return _kinds(self._footer[_FILE_GROUPS][1][1][number])
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError("the footer lacks something") from error

    def group(self, number: int) -> Group:
        """That one, the checksums of its pages verified."""
        pages = []
        try:
            group: Struct = self._footer[_FILE_GROUPS][1][1][number]
            for column in group[_GROUP_COLUMNS][1][1]:
                data: Struct = column[_COLUMN_DATA][1]
                pages.append(self._read(_begin(data), data[_DATA_BYTES][1]))
                if check_pages(pages[-1]) != data[_DATA_VALUES][1]:
                    raise ValueError("a column has not as many values as its pages")
            return Group(self._footer[_FILE_SCHEMA], group, tuple(pages))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError("the footer lacks something") from error

    def _read(self, start: int, count: int) -> bytes:
        # As damaged footers have it; memory for so much is asked for at once.
        if start < 0 or not 0 <= count <= self._size - start:
            raise ValueError("pages are told to be outside of the file")
        found = os.pread(self._file.fileno(), count, start)
        while len(found) < count:
            more = os.pread(self._file.fileno(), count - len(found), start + len(found))
            if not more:
                raise ValueError("the file is cut off")
            found += more
        return found

    def _read_footer(self) -> Struct:
        if self._size < 12:
            raise ValueError("the file is cut off")
        length, magic = struct.unpack("<I4s", self._read(self._size - 8, 8))
        if magic != MAGIC or length > self._size - 12:
            raise ValueError("the file has no footer of Parquet")
        return read_struct(self._read(self._size - 8 - length, length))[0]


class GroupFile:
    """A new Parquet file with the columns of `schema`. It is a valid file once it is finished.

    options  of pyarrow's ParquetWriter
    schema   its columns, as its footer describes them
    size     bytes written so far
    """

    def __init__(self, target: Path, schema: pa.Schema, options: dict[str, Any]) -> None:
        self._options = options
        self._file = target.open("wb", buffering=0)
        self.size = 0
        self._write(MAGIC)
        # What the footer is to say of each row group, 1 to 11 kB, is kept in a file without a name: of 10 million
        # texts of 5 kB it would be 66 MB.
        self._described = tempfile.TemporaryFile(dir=target.parent)  # noqa: SIM115 - closed with the other one
        self._groups = self.rows = 0
        empty = self._encoded(schema.empty_table())[0]
        self.schema = empty[_FILE_SCHEMA]
        self._kinds = _kinds(empty[_FILE_GROUPS][1][1][0])

    def takes(self, source: GroupSource, number: int) -> bool:
        """Whether that row group can be added as it is. Raises ValueError where its file is damaged."""
        return bool(source.schema == self.schema and source.kinds(number) == self._kinds)

    def add(self, group: Group) -> None:
        """A row group of another file. Raises ValueError where that has other columns."""
        if group.schema != self.schema or _kinds(group.described) != self._kinds:
            raise ValueError("the columns of a row group are not those of the file")
        begin, columns = self.size, []
        for column, pages in zip(group.described[_GROUP_COLUMNS][1][1], group.pages, strict=True):
            columns.append(_moved(column, self.size - _begin(column[_COLUMN_DATA][1])))
            self._write(pages)
        self._describe(group.described, columns, begin)

    def write(self, table: pa.Table) -> None:
        """Rows as one more row group."""
        footer, content = self._encoded(table)
        if footer[_FILE_SCHEMA] != self.schema:
            raise ValueError("the columns of a table are not those of the file")
        begin = self.size
        # It begins with the magic number, as this file does.
        self._write(content[len(MAGIC) :])
        for group in footer[_FILE_GROUPS][1][1]:
            columns = [_moved(column, begin - len(MAGIC)) for column in group[_GROUP_COLUMNS][1][1]]
            self._describe(group, columns, begin)

    def sync(self) -> None:
        """Make durable what is written."""
        os.fsync(self._file.fileno())

    def finish(self, schema: pa.Schema) -> None:
        """Write the footer, with the metadata of a schema of the same columns, and close the file."""
        # What a file without rows says of its columns, and metadata.
        empty = self._encoded(schema.empty_table())[0]
        # Where they go, for the first one; the others take no place in the struct.
        mark = os.urandom(16)
        groups = (LIST, (STRUCT, [mark, *[b""] * (self._groups - 1)] if self._groups else []))
        footer = struct_bytes({**empty, _FILE_ROWS: (I64, self.rows), _FILE_GROUPS: groups})
        before, _, behind = footer.partition(mark)
        begin = self.size
        self._write(before)
        self._described.seek(0)
        while described := self._described.read(2**20):
            self._write(described)
        self._write(behind)
        self._write(struct.pack("<I4s", self.size - begin, MAGIC))
        self.close()

    def close(self) -> None:
        """Without a footer, unless it is there."""
        try:
            self._file.close()
        finally:
            self._described.close()

    def _encoded(self, table: pa.Table) -> tuple[Struct, memoryview]:
        """The table as a file of its own: its footer, and the bytes in front of it."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=max(1, len(table)), **self._options)
        # Arrow gives signed bytes.
        content = memoryview(sink.getvalue()).cast("B")
        length = struct.unpack("<I", content[-8:-4])[0]
        end = len(content) - 8 - length
        return read_struct(content, end)[0], content[:end]

    def _describe(self, group: Struct, columns: list[Struct], begin: int) -> None:
        moved = {number: field for number, field in group.items() if number != _GROUP_ORDINAL}
        described = {**moved, _GROUP_COLUMNS: (LIST, (STRUCT, columns)), _GROUP_OFFSET: (I64, begin)}
        self._described.write(struct_bytes(described))
        self._groups += 1
        self.rows += group[_GROUP_ROWS][1]

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        # Without a buffer a call may write less: on a full disk it does, and the next one says why.
        while view.nbytes:
            view = view[self._file.write(view) :]
        self.size += len(data)


def _kinds(group: Struct) -> list[Any]:
    """Of each column of a row group its type, its path and how it is compressed."""
    columns = [column[_COLUMN_DATA][1] for column in group[_GROUP_COLUMNS][1][1]]
    return [[data.get(number) for number in _DATA_KIND] for data in columns]


def _begin(column: Struct) -> int:
    """Where the pages of a column begin."""
    return int(min(column[place][1] for place in (_DATA_PAGES, _DICTIONARY) if place in column))


def _moved(column: Struct, by: int) -> Struct:
    """A column as it is described when its pages are so many bytes further on."""
    places = (_DATA_PAGES, _INDEX_PAGE, _DICTIONARY)
    data = {
        number: (kind, value + by if number in places else value)
        for number, (kind, value) in column[_COLUMN_DATA][1].items()
        if number not in _BLOOM
    }
    # A copy of the description may stand behind the pages; here it does not.
    moved = {**column, _COLUMN_DATA: (STRUCT, data), _COLUMN_OFFSET: (I64, 0)}
    return {number: field for number, field in moved.items() if number not in _COLUMN_INDEXES}


def check_pages(pages: bytes) -> int:
    """Of one column, one behind the other: how many values they hold.

    Raises ValueError where a checksum is wrong, or a page is cut off.
    """
    view, at, values = memoryview(pages), 0, 0
    while at < len(view):
        header, at = read_struct(view, at)
        size = header.get(_PAGE_BYTES, (0, -1))[1]
        if not 0 <= size <= len(view) - at:
            raise ValueError("a page is cut off")
        wanted = header.get(_PAGE_CHECKSUM, (0, None))[1]
        # Thrift has no unsigned numbers.
        if wanted is not None and zlib.crc32(view[at : at + size]) != wanted & 0xFFFFFFFF:
            raise ValueError("the checksum of a page is wrong")
        values += sum(header[kind][1][_PAGE_VALUES][1] for kind in _PAGE_DATA if kind in header)
        at += size
    return values
