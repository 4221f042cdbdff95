"""Read and check the footer and the page headers of a Parquet file, in bounded time and memory.

pyarrow aborts the process when it reads a column of a damaged footer, and allocates any size that a
page header claims. So untrusted files are checked here before pyarrow reads them. The layout is
`parquet.thrift` of apache/parquet-format, in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

MAGIC = b"PAR1"

# A valid footer takes about 200 bytes per column chunk.
MAX_FOOTER_BYTES = 64 * 2**20

# A page header holds sizes, and at most the smallest and the largest value of the page.
MAX_PAGE_HEADER_BYTES = 2**20

_MAX_DEPTH = 16
_NUM_TYPES, _NUM_ENCODINGS, _NUM_CODECS = 8, 10, 8
_DELTA_BYTE_ARRAY = 7

T = TypeVar("T")


class DamagedFooter(Exception):
    """An error: the bytes are not a valid footer or page header of a Parquet file."""


class _Truncated(DamagedFooter):
    """An error: the bytes end within a value."""


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """One column of a row group; sizes are in bytes, offsets in bytes from the file's start."""

    path: tuple[str, ...]
    physical_type: int
    encodings: tuple[int, ...]
    codec: int
    num_values: int
    total_uncompressed_size: int
    total_compressed_size: int
    data_page_offset: int
    dictionary_page_offset: int | None

    @property
    def start(self) -> int:
        """The offset of the first page; 0 if there is none, as in Arrow's chunks without values."""
        pages = (self.data_page_offset, self.dictionary_page_offset)
        return min((offset for offset in pages if offset), default=0)

    @property
    def end(self) -> int:
        """The offset after the last page."""
        return self.start + self.total_compressed_size

    @property
    def may_expand(self) -> bool:
        """Whether values may take more bytes than the pages, even without a dictionary."""
        return _DELTA_BYTE_ARRAY in self.encodings


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Consecutive rows of a file."""

    num_rows: int
    total_byte_size: int
    columns: tuple[ColumnChunk, ...]


@dataclass(frozen=True, slots=True)
class Footer:
    """The content of a footer; all offsets have been checked to lie within the file."""

    num_rows: int
    row_groups: tuple[RowGroup, ...]


@dataclass(frozen=True, slots=True)
class PageHeader:
    """The header of one page; sizes in bytes."""

    header_size: int
    uncompressed_size: int
    compressed_size: int
    is_dictionary: bool


def footer_size(tail: bytes, file_size: int) -> int:
    """Return the size of a footer in bytes.

    Args:
        tail: the last eight bytes of the file.
        file_size: size of the file in bytes.

    Raises:
        DamagedFooter: `tail` is not the end of a Parquet file, or has an impossible size.
    """
    if len(tail) != 8 or tail[4:] != MAGIC:
        raise DamagedFooter("the file does not end like a Parquet file")
    size = int.from_bytes(tail[:4], "little")
    if size > min(file_size - 12, MAX_FOOTER_BYTES):
        raise DamagedFooter(f"it claims a footer of {size} bytes")
    return size


def read_footer(data: bytes, file_size: int) -> Footer:
    """Parse and check a footer.

    Args:
        data: the footer without the eight bytes that end the file.
        file_size: size of the whole file in bytes.

    Raises:
        DamagedFooter: the footer is damaged; the message says how.
    """
    tree = _Compact(data).struct(0)
    schema = [_of(dict, element) for element in _of(list, tree.get(2))]
    num_leaves = sum(not element.get(5) for element in schema[1:])
    if not schema or num_leaves != sum(1 in element for element in schema[1:]):
        raise DamagedFooter("its schema is not a tree of columns")
    end = file_size - 8 - len(data)
    groups = tuple(_row_group(_of(dict, group), num_leaves, end) for group in _list(tree, 4))
    num_rows = _count(tree, 3)
    if sum(group.num_rows for group in groups) != num_rows:
        raise DamagedFooter("its row groups do not add up to its rows")
    return Footer(num_rows, groups)


def read_page_header(data: bytes) -> PageHeader | None:
    """Return the page header at the start of `data`, or None if `data` ends within it.

    Raises:
        DamagedFooter: `data` does not begin with a page header.
    """
    compact = _Compact(data)
    try:
        tree = compact.struct(0)
    except _Truncated:
        return None
    kind = _of(int, tree.get(1))
    return PageHeader(compact.position, _count(tree, 2), _count(tree, 3), kind == 2)


def _row_group(tree: Mapping[int, Any], num_leaves: int, end: int) -> RowGroup:
    columns = tuple(_column(_of(dict, chunk), end) for chunk in _list(tree, 1))
    if len(columns) != num_leaves:
        raise DamagedFooter("a row group has other columns than the schema")
    return RowGroup(_count(tree, 3), _count(tree, 2), columns)


def _column(chunk: Mapping[int, Any], end: int) -> ColumnChunk:
    if 8 in chunk or 9 in chunk:
        raise DamagedFooter("a column is encrypted")
    tree = _of(dict, chunk.get(3))
    column = ColumnChunk(
        path=tuple(_text(name) for name in _list(tree, 3)),
        physical_type=_below(_of(int, tree.get(1)), _NUM_TYPES, "type"),
        encodings=tuple(_below(_of(int, e), _NUM_ENCODINGS, "encoding") for e in _list(tree, 2)),
        codec=_below(_of(int, tree.get(4)), _NUM_CODECS, "codec"),
        num_values=_count(tree, 5),
        total_uncompressed_size=_count(tree, 6),
        total_compressed_size=_count(tree, 7),
        data_page_offset=_count(tree, 9),
        # Some writers store 0 if there is no dictionary.
        dictionary_page_offset=_count(tree, 11) or None if 11 in tree else None,
    )
    has_pages = column.total_compressed_size > 0
    if has_pages and (column.dictionary_page_offset or 0) >= column.end:
        raise DamagedFooter("a dictionary lies outside its column")
    if column.num_values and column.data_page_offset < len(MAGIC):
        raise DamagedFooter("a column has values, but no data page")
    if has_pages and (column.start < len(MAGIC) or column.end > end):
        raise DamagedFooter("a column lies outside the file")
    return column


def _of(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DamagedFooter(f"a field is not of type {kind.__name__}")
    return value


def _list(tree: Mapping[int, Any], field: int) -> list[Any]:
    return _of(list, tree.get(field))


def _count(tree: Mapping[int, Any], field: int) -> int:
    value = _of(int, tree.get(field))
    if value < 0:
        raise DamagedFooter("a count or an offset is negative")
    return value


def _below(value: int, bound: int, name: str) -> int:
    if not 0 <= value < bound:
        raise DamagedFooter(f"there is no {name} {value}")
    return value


def _text(value: Any) -> str:
    try:
        return _of(bytes, value).decode()
    except UnicodeDecodeError as error:
        raise DamagedFooter("the name of a column is not UTF-8") from error


class _Compact:
    """A parser of values of Thrift's compact protocol.

    A struct becomes a dict from field number to value, binary becomes bytes. Every element takes at
    least one byte of the input, so a claimed length never allocates more than the input's size.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise DamagedFooter("it is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._zigzag()
            if number in fields:
                raise DamagedFooter("it has a field twice")
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        read = _READERS.get(kind)
        if read is None:
            raise DamagedFooter(f"it has a value of the unknown kind {kind}")
        return read(self, depth)

    def _byte(self) -> int:
        try:
            value = self._data[self.position]
        except IndexError:
            raise _Truncated("it ends within a value") from None
        self.position += 1
        return value

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise DamagedFooter("it has a number of more than 64 bits")

    def _zigzag(self, depth: int = 0) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _take(self, size: int) -> bytes:
        piece = self._data[self.position : self.position + size]
        if len(piece) < size:
            raise _Truncated("it ends within a value")
        self.position += size
        return piece

    def _int8(self, depth: int) -> int:
        return int.from_bytes(self._take(1), "little", signed=True)

    def _double(self, depth: int) -> bytes:
        return self._take(8)

    def _binary(self, depth: int) -> bytes:
        return self._take(self._varint())

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        size, kind = head >> 4, head & 15
        size = self._varint() if size == 15 else size
        if size > len(self._data) - self.position:
            raise _Truncated("it ends within a list")
        if depth >= _MAX_DEPTH:
            raise DamagedFooter("it is nested too deeply")
        if kind in (1, 2):
            return [self._byte() == 1 for _ in range(size)]
        return [self._value(kind, depth + 1) for _ in range(size)]

    def _map(self, depth: int) -> list[Any]:
        size = self._varint()
        if size == 0:
            return []
        if size > len(self._data) - self.position or depth >= _MAX_DEPTH:
            raise DamagedFooter("it has a map that is too large")
        kinds = self._byte()
        pairs = []
        for _ in range(size):
            pairs.append(self._value(kinds >> 4, depth + 1))
            pairs.append(self._value(kinds & 15, depth + 1))
        return pairs

    def _nested(self, depth: int) -> dict[int, Any]:
        return self.struct(depth + 1)


_READERS: dict[int, Callable[[_Compact, int], Any]] = {
    3: _Compact._int8,
    4: _Compact._zigzag,
    5: _Compact._zigzag,
    6: _Compact._zigzag,
    7: _Compact._double,
    8: _Compact._binary,
    9: _Compact._list,
    10: _Compact._list,
    11: _Compact._map,
    12: _Compact._nested,
}
