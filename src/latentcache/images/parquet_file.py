"""Read a Parquet file that may be malicious: each page is checked before Arrow reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentcache.errors import StorageError, first_line
from latentcache.images.samples import ReadRequest
from latentcache.parquet_footer import (
    MAX_PAGE_HEADER_BYTES,
    DamagedFooter,
    PageHeader,
    footer_size,
    read_footer,
    read_page_header,
)

# Most page headers are smaller than this.
_HEADER_GUESS_BYTES = 256

# The size of a read from the store. Without it Arrow fetches all images of a row group at once.
_BUFFER_BYTES = 8 * 2**20

# The limits of a batch of rows. A batch has at least one row.
_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 64


class ParquetFile:
    """A Parquet file, opened for reading. To Arrow it is the file object that Arrow reads.

    pyarrow aborts the process on some damaged footers, and allocates the size that a page header
    claims. So `parquet_footer` checks the footer first, and `read` checks each page header.
    """

    closed = False  # for Arrow

    def __init__(self, request: ReadRequest, file: BinaryIO) -> None:
        self._request, self._file = request, file
        self._size_bytes = request.shard.size_bytes
        self._position = 0
        # The position of the next page header to check, by start and end of the column chunk.
        self._next_page: dict[tuple[int, int], int] = {}
        # Arrow may replace an exception that `read` raises with its own.
        self._failure: StorageError | None = None
        self._damage: DamagedFooter | None = None
        with self.reading():
            if self._size_bytes < 12:
                raise DamagedFooter("the file is too short")
            tail = self._read_at(self._size_bytes - 8, 8)
            size = footer_size(tail, self._size_bytes)
            data = self._read_at(self._size_bytes - 8 - size, size)
            self.row_groups = read_footer(data, self._size_bytes).row_groups
            self._parquet = pq.ParquetFile(
                self, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
            )
            self.schema = self._parquet.schema_arrow

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn all errors of damaged data into `DamagedFooter`, and restore those of the store."""
        try:
            yield
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError, DamagedFooter) as error:
            if self._failure:
                raise self._failure from error
            raise DamagedFooter(first_line(self._damage or error)) from error

    def batches(
        self, number: int, columns: Sequence[str], most: int = _BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a row group in batches of bounded size. Call it in `reading`.

        Args:
            number, columns, most: the row group, names or paths of columns, and the maximum rows.
        """
        group, self._damage = self.row_groups[number], None
        fitting = min(most, _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size))
        for chunk in group.columns:
            path = ".".join(chunk.path)
            if not any(f"{path}.".startswith(f"{column}.") for column in columns):
                continue  # Arrow does not read it
            self._next_page.setdefault((chunk.start, chunk.end), chunk.start)
            # Every row may repeat one value that is as large as the dictionary or the page.
            repeated = chunk.total_uncompressed_size if chunk.may_expand else 1
            if chunk.dictionary_page_offset is not None and chunk.num_values:
                header = self._page_header(chunk.dictionary_page_offset, chunk.end)
                repeated = max(repeated, header.uncompressed_size)
            fitting = min(fitting, _BATCH_BYTES // max(1, repeated))
        # Arrow's threads may outlive the process, so they are not used; see dataset/parquet.py.
        yield from self._parquet.iter_batches(
            max(1, fitting), [number], list(columns), use_threads=False
        )

    def read(self, size: int = -1) -> bytes:
        """Read at the current position for Arrow, and check the page headers in the bytes."""
        left = max(0, self._size_bytes - self._position)
        size = left if size < 0 else min(size, left)
        position, data = self._position, self._read_at(self._position, size)
        self._position += size
        try:
            for start, end in self._next_page:
                if start <= position < end:
                    self._check_pages(start, end, position, data)
        except DamagedFooter as error:
            self._damage = error
            raise OSError(str(error)) from error
        return data

    def _read_at(self, position: int, size: int) -> bytes:
        try:
            self._file.seek(position)
            data = self._file.read(size)
            if len(data) < size:
                raise StorageError(
                    f"{self._request.shard.url}: the connection gave {len(data)} of {size} bytes "
                    f"at byte {position}"
                )
        except StorageError as error:
            self._failure = error
            raise
        return data

    def _check_pages(self, start: int, end: int, position: int, data: bytes) -> None:
        """Check the headers of all pages of a column chunk that begin before the end of `data`."""
        max_bytes = self._request.selection.max_sample_bytes
        while (page := self._next_page[start, end]) < min(position + len(data), end):
            header = None
            if page >= position:
                piece = data[page - position : page - position + _HEADER_GUESS_BYTES]
                header = read_page_header(piece)
            if header is None:
                header = self._page_header(page, end)
            size = max(header.uncompressed_size, header.compressed_size)
            if size > max_bytes:
                raise DamagedFooter(
                    f"a page takes {size} bytes, above source.max_sample_bytes ({max_bytes}): "
                    "raise it, or write the file with smaller row groups"
                )
            self._request.reserve(size)
            self._next_page[start, end] = page + header.header_size + header.compressed_size

    def _page_header(self, position: int, end: int) -> PageHeader:
        """Read the page header at a position; raise `DamagedFooter` if none ends before `end`."""
        for most in (_HEADER_GUESS_BYTES, MAX_PAGE_HEADER_BYTES):
            header = read_page_header(self._read_at(position, min(most, end - position)))
            if header is not None:
                return header
        raise DamagedFooter("a page has no header")

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position. Args: see `io.IOBase.seek`."""
        self._position = (0, self._position, self._size_bytes)[whence] + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def close(self) -> None:
        """Do nothing, because the owner of the file closes it."""
