"""Read a tar strictly forwards, and distinguish its end from a cut or damage.

tarfile parses the headers. On its own it treats a damaged header, a missing header and the end of
the bytes as the end of the archive, and silently drops the rest. This module reports each case.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, Protocol, cast

# tarfile reads the extensions of a header (PAX records, long names) into memory. Ordinary ones hold
# paths and times, a few KiB. The limit also applies to all global PAX records together.
MAX_HEADER_BYTES = 2**20

# POSIX ends an archive with two blocks of zeros.
_END_MARK_BYTES = 2 * tarfile.BLOCKSIZE

_CHUNK_BYTES = 2**20


class Readable(Protocol):
    """An object with a `read` method."""

    def read(self, size: int, /) -> bytes:
        """Read at most `size` bytes."""
        ...


class TarEnds(Exception):
    """The archive cannot be read beyond this point, which is not its regular end.

    Args:
        reason: `not_a_tar`, `truncated_shard`, `corrupt_shard` or `trailing_data`.
        message: one line.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


class TarStream:
    """The members of a tar, plain or gzipped.

    Args:
        file: the archive. Its `read` returns no bytes only at the end. Its exceptions are not
            caught.
        is_gzip: whether the bytes are a gzipped tar.
    """

    def __init__(self, file: Readable, *, is_gzip: bool) -> None:
        self._stream = _ForwardFile(file, is_gzip)
        self._tar: tarfile.TarFile | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield each member. Names that are not UTF-8 have surrogate escapes.

        Raises:
            TarEnds: the archive ends too soon, is damaged, or has data after its end.
        """
        try:
            self._tar = tarfile.TarFile(
                fileobj=cast(IO[bytes], self._stream),
                tarinfo=_Header,
                encoding="utf-8",
                errors="surrogateescape",
            )
            while (member := self._next()) is not None:
                self._tar.members = []  # type: ignore[attr-defined]  # it would keep every member
                self._check_global_headers()
                yield member
        except tarfile.ReadError as error:
            raise self._cut() from error
        self._check_end()

    def _next(self) -> tarfile.TarInfo | None:
        assert self._tar is not None
        self._stream.num_header_bytes = 0
        return self._tar.next()

    def _check_global_headers(self) -> None:
        records = cast(Any, self._tar).pax_headers
        if sum(len(name) + len(value) for name, value in records.items()) > MAX_HEADER_BYTES:
            message = f"global headers hold more than {MAX_HEADER_BYTES} bytes"
            raise TarEnds("corrupt_shard", message)

    def read(self, member: tarfile.TarInfo) -> bytes:
        """Read the data of the member that was yielded last, which must be a regular file.

        Raises:
            TarEnds: the data is cut or damaged.
        """
        self._stream.seek(member.offset_data)
        data = self._stream.read_data(member.size)
        if len(data) < member.size:
            raise self._cut()
        return data

    @property
    def is_in_member(self) -> bool:
        """Whether reading stopped within the member that was yielded last or its padding."""
        # tarfile's `offset` is the start of the next header.
        return self._tar is not None and self._stream.tell() < cast(Any, self._tar).offset

    def _cut(self) -> TarEnds:
        return TarEnds("truncated_shard", f"ends within a file, at byte {self._stream.tell()}")

    def _check_end(self) -> None:
        """Read from the first block of zeros to the end: only zeros, at least one block, follow."""
        start = self._stream.tell()
        has_data = False
        while chunk := self._stream.read_data(_CHUNK_BYTES):
            has_data = has_data or bool(chunk.strip(b"\0"))
        if has_data:
            raise TarEnds(
                "trailing_data", f"bytes follow the archive's end at byte {start}, and are not read"
            )
        if self._stream.tell() - start + tarfile.BLOCKSIZE < _END_MARK_BYTES:
            raise TarEnds("truncated_shard", "ends within its end mark")


class _Header(tarfile.TarInfo):
    """A member's header, whose damage is not mistaken for the archive's end.

    The maps of sparse members are skipped and not parsed: such members are rejected
    (`sparse_member`), and a small map can claim any number of entries and any size.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Header:
        stream = cast(_ForwardFile, tarfile_.fileobj)
        start = stream.tell()
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (
            tarfile.TarError,
            ValueError,
            LookupError,
            OverflowError,
            RecursionError,  # a chain of extended headers
        ) as error:
            if start == 0:
                raise TarEnds("not_a_tar", f"begins with no tar header: {error}") from error
            if stream.at_end:
                raise TarEnds("truncated_shard", f"ends without an end mark: {error}") from error
            raise TarEnds("corrupt_shard", f"header at byte {start}: {error}") from error

    def _proc_sparse(self, tarfile_: tarfile.TarFile) -> _Header:
        """Skip the blocks of an old GNU sparse map."""
        stream, header = cast(_ForwardFile, tarfile_.fileobj), cast(Any, self)
        _, is_extended, _ = header._sparse_structs
        del header._sparse_structs
        while is_extended:
            is_extended = bool(stream.read(tarfile.BLOCKSIZE)[504])
        header.sparse = []
        self.offset_data = stream.tell()
        cast(Any, tarfile_).offset = self.offset_data + header._block(self.size)
        return self

    def _proc_gnusparse_00(self, next_: Any, *_: Any) -> None:
        next_.sparse = []

    def _proc_gnusparse_01(self, next_: Any, *_: Any) -> None:
        next_.sparse = []

    def _proc_gnusparse_10(self, next_: Any, *_: Any) -> None:
        next_.sparse = []


class _ForwardFile:
    """The part of the file interface that tarfile needs to read forwards."""

    def __init__(self, file: Readable, is_gzip: bool) -> None:
        self._read_some = file.read
        if is_gzip:
            # read1, because read would drop the good bytes before a cut.
            self._read_some = gzip.GzipFile(fileobj=cast(IO[bytes], file), mode="rb").read1
        self._position = 0
        self.at_end = False
        self.num_header_bytes = 0  # of the current member, with all its extensions

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        """Read `size` bytes of a header for tarfile; fewer only at the end."""
        self.num_header_bytes += size
        if self.num_header_bytes > MAX_HEADER_BYTES:
            message = f"a header of more than {MAX_HEADER_BYTES} bytes at byte {self._position}"
            raise TarEnds("corrupt_shard", message)
        return self.read_data(size)

    def read_data(self, size: int) -> bytes:
        """Read `size` bytes; fewer only at the end."""
        pieces = []
        while size > 0 and (piece := self._read_piece(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def seek(self, position: int) -> None:
        if position < self._position:
            raise TarEnds("corrupt_shard", f"a header points back from byte {self._position}")
        while position > self._position:
            if not self._read_piece(min(position - self._position, _CHUNK_BYTES)):
                return

    def _read_piece(self, size: int) -> bytes:
        try:
            piece = self._read_some(size)
        except EOFError:  # a gzip stream without its end
            piece = b""
        except (gzip.BadGzipFile, zlib.error) as error:
            message = f"damaged gzip after byte {self._position}: {error}"
            raise TarEnds("corrupt_shard", message) from error
        self._position += len(piece)
        self.at_end = not piece
        return piece
