"""Check the footer and the page headers of a Parquet file before pyarrow reads them.

pyarrow aborts the process on damaged columns in a footer, and allocates any size that a page header
claims. The layout is `parquet.thrift` of apache/parquet-format (compact protocol).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

_MAGIC = b"PAR1"

# A valid footer takes about 200 bytes per column chunk.
_MAX_FOOTER_BYTES = 64 * 2**20

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
    """Return the size of a footer in bytes; raise `DamagedFooter` if it is impossible.

    Args:
        tail, file_size: the last eight bytes of the file, and its size in bytes.
    """
    if len(tail) != 8 or tail[4:] != _MAGIC:
        raise DamagedFooter("the file does not end like a Parquet file")
    size = int.from_bytes(tail[:4], "little")
    if size > min(file_size - 12, _MAX_FOOTER_BYTES):
        raise DamagedFooter(f"it claims a footer of {size} bytes")
    return size


def read_footer(data: bytes, file_size: int) -> Footer:
    """Parse and check a footer; raise `DamagedFooter` with the reason if it is damaged.

    Args:
        data, file_size: the footer without the eight bytes that end the file, and the file's size.
    """
    tree = _Compact(data).struct()
    schema = [_of(dict, element) for element in _of(list, tree.get(2))]
    num_leaves = sum(not element.get(5) for element in schema[1:])
    if not schema or num_leaves != sum(1 in element for element in schema[1:]):
        raise DamagedFooter("its schema is not a tree of columns")
    end = file_size - 8 - len(data)
    groups = []
    for group in _of(list, tree.get(4)):
        group = _of(dict, group)
        columns = tuple(_column(_of(dict, chunk), end) for chunk in _of(list, group.get(1)))
        if len(columns) != num_leaves:
            raise DamagedFooter("a row group has other columns than the schema")
        groups.append(RowGroup(_count(group, 3), _count(group, 2), columns))
    num_rows = _count(tree, 3)
    if sum(group.num_rows for group in groups) != num_rows:
        raise DamagedFooter("its row groups do not add up to its rows")
    return Footer(num_rows, tuple(groups))


def read_page_header(data: bytes) -> PageHeader | None:
    """Return the page header at the start of `data`, or None if `data` ends within it."""
    compact = _Compact(data)
    try:
        tree = compact.struct()
    except _Truncated:
        return None
    kind = _of(int, tree.get(1))
    return PageHeader(compact.position, _count(tree, 2), _count(tree, 3), kind == 2)


def _column(chunk: dict[int, Any], end: int) -> ColumnChunk:
    if 8 in chunk or 9 in chunk:
        raise DamagedFooter("a column is encrypted")
    tree = _of(dict, chunk.get(3))
    try:
        path = tuple(_of(bytes, name).decode() for name in _of(list, tree.get(3)))
    except UnicodeDecodeError as error:
        raise DamagedFooter("the name of a column is not UTF-8") from error
    column = ColumnChunk(
        path=path,
        physical_type=_below(tree.get(1), _NUM_TYPES, "type"),
        encodings=tuple(_below(e, _NUM_ENCODINGS, "encoding") for e in _of(list, tree.get(2))),
        codec=_below(tree.get(4), _NUM_CODECS, "codec"),
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
    if column.num_values and column.data_page_offset < len(_MAGIC):
        raise DamagedFooter("a column has values, but no data page")
    if has_pages and (column.start < len(_MAGIC) or column.end > end):
        raise DamagedFooter("a column lies outside the file")
    return column


def _of(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise DamagedFooter(f"a field is not of type {kind.__name__}")
    return value


def _count(tree: dict[int, Any], field: int) -> int:
    value = _of(int, tree.get(field))
    if value < 0:
        raise DamagedFooter("a count or an offset is negative")
    return value


def _below(value: Any, bound: int, name: str) -> int:
    number = _of(int, value)
    if not 0 <= number < bound:
        raise DamagedFooter(f"there is no {name} {number}")
    return number


class _Compact:
    """A parser of values of Thrift's compact protocol.

    A struct becomes a dict from field number to value, binary becomes bytes. Every element takes at
    least one byte of the input, so a claimed length never allocates more than the input's size.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
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
        if 4 <= kind <= 6:
            return self._zigzag()
        if kind == 8:
            return self._take(self._varint())
        if kind == 3:
            return int.from_bytes(self._take(1), signed=True)
        if kind == 7:
            return self._take(8)
        if depth >= _MAX_DEPTH:
            raise DamagedFooter("it is nested too deeply")
        if kind == 12:
            return self.struct(depth + 1)
        if kind in (9, 10):
            head = self._byte()
            size = self._varint() if head >> 4 == 15 else head >> 4
            return self._values(size, [head & 15], depth + 1)
        if kind == 11:
            size = self._varint()
            kinds = self._byte() if size else 0
            return self._values(size, [kinds >> 4, kinds & 15], depth + 1)
        raise DamagedFooter(f"it has a value of the unknown kind {kind}")

    def _values(self, size: int, kinds: list[int], depth: int) -> list[Any]:
        """Read the elements of a list or, of alternating kinds, of a map."""
        if size > len(self._data) - self.position:
            raise _Truncated("it ends within a list")
        return [
            self._byte() == 1 if kind in (1, 2) else self._value(kind, depth)
            for _ in range(size)
            for kind in kinds
        ]

    def _byte(self) -> int:
        try:
            value = self._data[self.position]
        except IndexError:
            raise _Truncated("it ends within a value") from None
        self.position += 1
        return value

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) >= 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise DamagedFooter("it has a number of more than 64 bits")
        return value | byte << shift

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _take(self, size: int) -> bytes:
        piece = self._data[self.position : self.position + size]
        if len(piece) < size:
            raise _Truncated("it ends within a value")
        self.position += size
        return piece
