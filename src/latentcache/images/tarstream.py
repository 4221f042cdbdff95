"""Read a tar strictly forwards, and distinguish its end from a cut or damage.

tarfile parses the headers. On its own it treats a damaged header, a missing header and the end of
the bytes as the end of the archive, and silently drops the rest. Here each case is a keyless
`Reject`: `not_a_tar`, `truncated_shard`, `corrupt_shard` or `trailing_data`.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

from latentcache.errors import Reject

# tarfile reads the extensions of a header (PAX records, long names) into memory. Ordinary ones hold
# paths and times, a few KiB. The limit also applies to all global PAX records together.
_MAX_HEADER_BYTES = 2**20

_CHUNK_BYTES = 2**20


class Readable(Protocol):
    """An object with a `read` method, which returns no bytes only at the end."""

    def read(self, size: int, /) -> bytes:
        """Read at most `size` bytes."""
        ...


class TarStream:
    """The members of a tar, plain or gzipped. Exceptions of `file` are not caught."""

    def __init__(self, file: Readable, *, is_gzip: bool) -> None:
        self._stream = _ForwardFile(file, is_gzip)
        self._next_header = 0

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield each member. Names that are not UTF-8 have surrogate escapes.

        Raises:
            Reject: the archive ends too soon, is damaged, or has data after its end.
        """
        stream: Any = self._stream
        try:
            tar: Any = tarfile.TarFile(
                fileobj=stream, tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
            )
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep every member
                stream.num_header_bytes = 0
                records = tar.pax_headers.items()
                if sum(len(name) + len(value) for name, value in records) > _MAX_HEADER_BYTES:
                    message = f"global headers hold more than {_MAX_HEADER_BYTES} bytes"
                    raise _damage("corrupt_shard", message)
                self._next_header = tar.offset
                yield member
        except tarfile.ReadError as error:
            raise self._cut() from error
        self._check_end()

    def read(self, member: tarfile.TarInfo) -> bytes:
        """Read the data of the member that was yielded last, which must be a regular file.

        Raises:
            Reject: the data is cut or damaged.
        """
        self._stream.seek(member.offset_data)
        data = self._stream.read_data(member.size)
        if len(data) < member.size:
            raise self._cut()
        return data

    @property
    def is_in_member(self) -> bool:
        """Whether reading stopped within the member that was yielded last or its padding."""
        return self._stream.tell() < self._next_header

    def _cut(self) -> Reject:
        return _damage("truncated_shard", f"ends within a file, at byte {self._stream.tell()}")

    def _check_end(self) -> None:
        """Read from the first block of zeros to the end: only zeros, at least one block, follow."""
        start = self._stream.tell()
        has_data = False
        while chunk := self._stream.read_data(_CHUNK_BYTES):
            has_data = has_data or bool(chunk.strip(b"\0"))
        if has_data:
            message = f"bytes follow the archive's end at byte {start}, and are not read"
            raise _damage("trailing_data", message)
        if self._stream.tell() - start < tarfile.BLOCKSIZE:
            raise _damage("truncated_shard", "ends within its end mark")


def _damage(reason: str, message: str) -> Reject:
    return Reject("read", reason, message)


class _Header(tarfile.TarInfo):
    """A member's header, whose damage is not mistaken for the archive's end.

    The maps of sparse members are skipped and not parsed: such members are rejected
    (`sparse_member`), and a small map can claim any number of entries and any size.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> _Header:
        stream = tarfile_.fileobj
        start = stream.tell()
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        # RecursionError: a chain of extended headers
        except (
            tarfile.TarError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            if start == 0:
                raise _damage("not_a_tar", f"begins with no tar header: {error}") from error
            if stream.at_end:
                message = f"ends without an end mark: {error}"
                raise _damage("truncated_shard", message) from error
            raise _damage("corrupt_shard", f"header at byte {start}: {error}") from error

    def _proc_sparse(self, tarfile_: Any) -> _Header:
        """Skip the blocks of an old GNU sparse map."""
        header: Any = self
        stream = tarfile_.fileobj
        _, is_extended, _ = header._sparse_structs
        del header._sparse_structs
        while is_extended:
            is_extended = bool(stream.read(tarfile.BLOCKSIZE)[504])
        header.sparse = []
        self.offset_data = stream.tell()
        tarfile_.offset = self.offset_data + header._block(self.size)
        return self

    def _skip_map(self, next_: Any, *_: Any) -> None:
        next_.sparse = []

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _skip_map


class _ForwardFile:
    """The part of the file interface that tarfile needs to read forwards."""

    def __init__(self, file: Any, is_gzip: bool) -> None:
        # read1, because read would drop the good bytes before a cut.
        self._read_some = gzip.GzipFile(fileobj=file, mode="rb").read1 if is_gzip else file.read
        self._position = 0
        self.at_end = False
        self.num_header_bytes = 0  # of the current member, with all its extensions

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        """Read `size` bytes of a header for tarfile; fewer only at the end."""
        self.num_header_bytes += size
        if self.num_header_bytes > _MAX_HEADER_BYTES:
            message = f"a header of more than {_MAX_HEADER_BYTES} bytes at byte {self._position}"
            raise _damage("corrupt_shard", message)
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
            message = f"a header points back from byte {self._position}"
            raise _damage("corrupt_shard", message)
        while position > self._position:
            if not self._read_piece(min(position - self._position, _CHUNK_BYTES)):
                return

    def _read_piece(self, size: int) -> bytes:
        try:
            piece: bytes = self._read_some(size)
        except EOFError:  # a gzip stream without its end
            piece = b""
        except (gzip.BadGzipFile, zlib.error) as error:
            message = f"damaged gzip after byte {self._position}: {error}"
            raise _damage("corrupt_shard", message) from error
        self._position += len(piece)
        self.at_end = not piece
        return piece
