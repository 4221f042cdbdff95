"""Read a tar strictly forwards, and distinguish its end from a cut or damage.

tarfile parses the headers. On its own it treats a damaged header, a missing header and the end of
the bytes as the end of the archive, and silently drops the rest.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, cast

from latentcache.errors import Reject

# tarfile reads the extensions of a header (PAX records, long names) into memory. Ordinary ones hold
# paths and times, a few KiB. The limit also applies to all global PAX records together.
_MAX_HEADER_BYTES = 2**20

_CHUNK_BYTES = 2**20


class TarStream:
    """The members of a tar, plain or gzipped. To tarfile it is the file that tarfile reads.

    The exceptions of the archive's `read` are not caught.

    Raises:
        Reject: `not_a_tar`, `truncated_shard` (the bytes end too soon), `corrupt_shard` (a damaged
            header or gzip stream), or `trailing_data` (bytes after the end mark).
    """

    def __init__(self, file: Any, *, is_gzip: bool) -> None:
        # read1, because read would drop the good bytes before a cut.
        self._read_some = gzip.GzipFile(fileobj=file, mode="rb").read1 if is_gzip else file.read
        self._position = self._next_header = 0
        self._num_header_bytes = 0  # of the current member, with all its extensions
        self.at_end = False

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield each member. Names that are not UTF-8 have surrogate escapes."""
        options = {"encoding": "utf-8", "errors": "surrogateescape", "tarinfo": _Header}
        try:
            tar: Any = cast(Any, tarfile.TarFile)(fileobj=self, **options)
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep every member
                self._num_header_bytes = 0
                records = tar.pax_headers.items()
                if sum(len(name) + len(value) for name, value in records) > _MAX_HEADER_BYTES:
                    message = f"global headers hold more than {_MAX_HEADER_BYTES} bytes"
                    raise Reject("read", "corrupt_shard", message)
                self._next_header = tar.offset
                yield member
        except tarfile.ReadError as error:
            raise self._cut() from error
        # From the first block of zeros to the end there are only zeros, at least one block more.
        start, has_data = self._position, False
        while chunk := self._read_data(_CHUNK_BYTES):
            has_data = has_data or bool(chunk.strip(b"\0"))
        if has_data:
            message = f"bytes follow the archive's end at byte {start}, and are not read"
            raise Reject("read", "trailing_data", message)
        if self._position - start < tarfile.BLOCKSIZE:
            raise Reject("read", "truncated_shard", "ends within its end mark")

    def read_member(self, member: tarfile.TarInfo) -> bytes:
        """Read the data of the member that was yielded last, which must be a regular file."""
        self.seek(member.offset_data)
        data = self._read_data(member.size)
        if len(data) < member.size:
            raise self._cut()
        return data

    @property
    def is_in_member(self) -> bool:
        """Whether reading stopped within the last member or its padding."""
        return self._position < self._next_header

    def _cut(self) -> Reject:
        return Reject("read", "truncated_shard", f"ends within a file, at byte {self._position}")

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, size: int) -> bytes:
        """Read `size` bytes of a header for tarfile; fewer only at the end."""
        self._num_header_bytes += size
        if self._num_header_bytes > _MAX_HEADER_BYTES:
            message = f"a header of more than {_MAX_HEADER_BYTES} bytes at byte {self._position}"
            raise Reject("read", "corrupt_shard", message)
        return self._read_data(size)

    def seek(self, position: int) -> None:
        """Read up to a position further on."""
        if position < self._position:
            message = f"a header points back from byte {self._position}"
            raise Reject("read", "corrupt_shard", message)
        while position > self._position:
            if not self._read_piece(min(position - self._position, _CHUNK_BYTES)):
                return

    def _read_data(self, size: int) -> bytes:
        """Read `size` bytes; fewer only at the end."""
        pieces = []
        while size > 0 and (piece := self._read_piece(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _read_piece(self, size: int) -> bytes:
        try:
            piece: bytes = self._read_some(size)
        except EOFError:  # a gzip stream without its end
            piece = b""
        except (gzip.BadGzipFile, zlib.error) as error:
            message = f"damaged gzip after byte {self._position}: {error}"
            raise Reject("read", "corrupt_shard", message) from error
        self._position += len(piece)
        self.at_end = not piece
        return piece


class _Header(tarfile.TarInfo):
    """A member's header, whose damage is not mistaken for the archive's end.

    Sparse members are rejected. Their maps, which can claim any size, are skipped, not parsed.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> _Header:
        stream: TarStream = tarfile_.fileobj
        start = stream.tell()
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        # RecursionError: a chain of extended headers
        except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError) as error:
            reason, message = "corrupt_shard", f"header at byte {start}: {error}"
            if start == 0:
                reason, message = "not_a_tar", f"begins with no tar header: {error}"
            elif stream.at_end:
                reason, message = "truncated_shard", f"ends without an end mark: {error}"
            raise Reject("read", reason, message) from error

    def _proc_sparse(self, tarfile_: Any) -> _Header:
        """Skip the blocks of an old GNU sparse map."""
        header: Any = self
        _, is_extended, _ = header._sparse_structs
        del header._sparse_structs
        while is_extended:
            is_extended = bool(tarfile_.fileobj.read(tarfile.BLOCKSIZE)[504])
        header.sparse = []
        self.offset_data = tarfile_.fileobj.tell()
        tarfile_.offset = self.offset_data + header._block(self.size)
        return self

    def _skip_map(self, next_: Any, *_: Any) -> None:
        next_.sparse = []

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _skip_map
