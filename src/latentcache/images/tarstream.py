"""A tar read strictly forwards, in which neither a cut nor damage can pass for the end.

tarfile parses the headers. By itself it takes a damaged header, a missing one and the end of the
bytes for the end of the archive, and would so drop the rest in silence; here each is told apart.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, Protocol, cast

# A larger member is never an image or a caption, and a larger header never a header.
MAX_MEMBER_BYTES = 2**30

# POSIX ends an archive with two blocks of zeros.
_END_MARK_BYTES = 2 * tarfile.BLOCKSIZE

_CHUNK_BYTES = 2**20


class Readable(Protocol):
    """What has a `read`."""

    def read(self, size: int, /) -> bytes:
        """Read at most so many bytes."""
        ...


class TarEnds(Exception):
    """The archive cannot be read beyond this point, and this is not its proper end.

    Args:
        reason: `not_a_tar`, `truncated_shard`, `corrupt_shard` or `trailing_data`.
        message: one line.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


class TarStream:
    """Iterates over the members of a tar, plain or gzipped.

    Args:
        file: its `read` gives no bytes only at the end. What it raises passes through.
        is_gzip: whether the bytes are a gzipped tar.
    """

    def __init__(self, file: Readable, *, is_gzip: bool) -> None:
        self._stream = _ForwardFile(file, is_gzip)
        self._tar: tarfile.TarFile | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Give each member; names that are not UTF-8 hold surrogate escapes.

        Raises:
            TarEnds: the archive ends before or after its proper end.
        """
        try:
            self._tar = tarfile.TarFile(
                fileobj=cast(IO[bytes], self._stream),
                tarinfo=_Header,
                encoding="utf-8",
                errors="surrogateescape",
            )
            while (member := self._tar.next()) is not None:
                self._tar.members = []  # type: ignore[attr-defined]  # else it keeps every member
                yield member
        except tarfile.ReadError as error:
            raise self._cut() from error
        self._check_end()

    def read(self, member: tarfile.TarInfo) -> bytes:
        """Read the data of the member last given.

        Raises:
            TarEnds: it is cut or damaged.
        """
        assert self._tar is not None
        assert member.size <= MAX_MEMBER_BYTES
        try:
            return cast(IO[bytes], self._tar.extractfile(member)).read()
        except tarfile.ReadError as error:
            raise self._cut() from error

    @property
    def is_in_member(self) -> bool:
        """Whether reading stopped within the member last given, before its last block's end."""
        # tarfile keeps in `offset` where the next header begins.
        return self._tar is not None and self._stream.tell() < cast(Any, self._tar).offset

    def _cut(self) -> TarEnds:
        return TarEnds("truncated_shard", f"ends within a file, at byte {self._stream.tell()}")

    def _check_end(self) -> None:
        """Read on from the first block of zeros: nothing but zeros may follow, and one block."""
        start = self._stream.tell()
        has_data = False
        while chunk := self._stream.read(_CHUNK_BYTES):
            has_data = has_data or bool(chunk.strip(b"\0"))
        if has_data:
            raise TarEnds(
                "trailing_data", f"bytes follow the archive's end at byte {start}, and are not read"
            )
        if self._stream.tell() - start + tarfile.BLOCKSIZE < _END_MARK_BYTES:
            raise TarEnds("truncated_shard", "ends within its end mark")


class _Header(tarfile.TarInfo):
    """A member's header; damage to it does not look like the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Header:
        stream = cast(_ForwardFile, tarfile_.fileobj)
        start = stream.tell()
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (tarfile.TarError, ValueError, LookupError) as error:
            if start == 0:
                raise TarEnds("not_a_tar", f"begins with no tar header: {error}") from error
            if stream.at_end:
                raise TarEnds("truncated_shard", f"ends without an end mark: {error}") from error
            raise TarEnds("corrupt_shard", f"header at byte {start}: {error}") from error


class _ForwardFile:
    """As much of a file as tarfile needs to read forwards."""

    def __init__(self, file: Readable, is_gzip: bool) -> None:
        self._read_some = file.read
        if is_gzip:
            # read1, because read would drop the good bytes in front of a cut.
            self._read_some = gzip.GzipFile(fileobj=cast(IO[bytes], file), mode="rb").read1
        self._position = 0
        self.at_end = False

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        """Read so many bytes, fewer only at the end."""
        if size > MAX_MEMBER_BYTES:
            raise TarEnds("corrupt_shard", f"a header of {size} bytes at byte {self._position}")
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
