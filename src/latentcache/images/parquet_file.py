"""A file object for Arrow that checks the pages of a Parquet file before Arrow reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

from latentcache.errors import StorageError
from latentcache.images.samples import ReserveSample
from latentcache.parquet_footer import (
    MAX_PAGE_HEADER_BYTES,
    ColumnChunk,
    DamagedFooter,
    Footer,
    PageHeader,
    footer_size,
    read_footer,
    read_page_header,
)
from latentcache.storage import Store

# Most page headers are smaller than this.
_HEADER_GUESS_BYTES = 256


class OversizedPage(Exception):
    """A page would take more memory than a sample may take."""


class ParquetBytes:
    """A file object for Arrow. A read returns all requested bytes or raises.

    Arrow may replace the raised exception with its own. `failure` keeps an error of the store, and
    `damage` keeps the problem of a page.

    Args:
        store: the store of the file.
        name: the file's name in the store.
        file: the file, opened for reading.
        size_bytes: the listed size of the file.
    """

    closed = False

    def __init__(self, store: Store, name: str, file: BinaryIO, size_bytes: int) -> None:
        self._store, self._name, self._file = store, name, file
        self._size_bytes = size_bytes
        self._position = 0
        self._walks: dict[int, _PageWalk] = {}
        self.failure: StorageError | None = None
        self.damage: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        """Read at the current position, and check the page headers in the bytes."""
        left = max(0, self._size_bytes - self._position)
        size = left if size < 0 else min(size, left)
        position, data = self._position, self._read_at(self._position, size)
        self._position += size
        for walk in self._walks.values():
            if walk.start <= position < walk.end:
                try:
                    walk.check(position, data)
                except (OversizedPage, DamagedFooter) as error:
                    self.damage = error
                    raise OSError(str(error)) from error
        return data

    def _read_at(self, position: int, size: int) -> bytes:
        try:
            self._file.seek(position)
            data = self._file.read(size)
            if len(data) < size:
                raise StorageError(
                    f"{self._store.url_of(self._name)}: the connection gave {len(data)} of {size} "
                    f"bytes at byte {position}"
                )
        except StorageError as error:
            self.failure = error
            raise
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position; see `io.IOBase.seek`.

        Args:
            offset: bytes.
            whence: what the offset counts from.
        """
        self._position = (0, self._position, self._size_bytes)[whence] + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def close(self) -> None:
        """Do nothing, because the owner of the file closes it."""

    def read_footer(self) -> Footer:
        """Read and check the footer.

        Raises:
            DamagedFooter: the file is not Parquet, or its footer is damaged.
            StorageError: the store cannot be read.
        """
        if self._size_bytes < 12:
            raise DamagedFooter("the file is too short")
        tail = self._read_at(self._size_bytes - 8, 8)
        size = footer_size(tail, self._size_bytes)
        return read_footer(self._read_at(self._size_bytes - 8 - size, size), self._size_bytes)

    def check_pages(
        self, footer: Footer, columns: Sequence[str], max_bytes: int, reserve: ReserveSample
    ) -> None:
        """Check each page header of some columns before Arrow sees it.

        Args:
            footer: the footer of the file.
            columns: the names of top-level columns.
            max_bytes: the limit of a page's size. Reads of a row group with a larger page fail.
            reserve: called with the bytes of each page.
        """
        for group in footer.row_groups:
            for chunk in group.columns:
                if chunk.path[0] in columns:
                    self._walks[chunk.start] = _PageWalk(self, chunk, max_bytes, reserve)

    def dictionary_size(self, chunk: ColumnChunk) -> int:
        """Return the bytes of a column chunk's dictionary; 0 if it has none.

        Raises:
            DamagedFooter: the dictionary has no readable header.
        """
        if chunk.dictionary_page_offset is None or not chunk.num_values:
            return 0
        return self.page_header(chunk.dictionary_page_offset, chunk.end).uncompressed_size

    def page_header(self, position: int, end: int) -> PageHeader:
        """Read the page header at a position of the file.

        Args:
            position: the start of the header.
            end: the end of the column chunk.

        Raises:
            DamagedFooter: there is no header before `end`.
        """
        for most in (_HEADER_GUESS_BYTES, MAX_PAGE_HEADER_BYTES):
            header = read_page_header(self._read_at(position, min(most, end - position)))
            if header is not None:
                return header
        raise DamagedFooter("a page has no header")


class _PageWalk:
    """The check of the pages of a column chunk while they are read."""

    def __init__(
        self, file: ParquetBytes, chunk: ColumnChunk, max_bytes: int, reserve: ReserveSample
    ) -> None:
        self._file, self._max_bytes, self._reserve = file, max_bytes, reserve
        self.start, self.end = chunk.start, chunk.end
        self._next = chunk.start

    def check(self, position: int, data: bytes) -> None:
        """Check the headers of all pages that begin before the end of `data`.

        Args:
            position: the position of `data` in the file.
            data: the bytes that were read.

        Raises:
            OversizedPage: a page takes too much memory.
            DamagedFooter: a page has no readable header.
        """
        while self._next < min(position + len(data), self.end):
            header = None
            if self._next >= position:
                offset = self._next - position
                piece = data[offset : offset + _HEADER_GUESS_BYTES]
                header = read_page_header(piece)
            if header is None:
                header = self._file.page_header(self._next, self.end)
            size = max(header.uncompressed_size, header.compressed_size)
            if size > self._max_bytes:
                raise OversizedPage(
                    f"a page takes {size} bytes, above source.max_sample_bytes "
                    f"({self._max_bytes}): raise it, or write the file with smaller row groups"
                )
            self._reserve(size)
            self._next += header.header_size + header.compressed_size
