"""A reader of the pickles in PyTorch files that supports only tensors and simple values.

It is not Python's unpickler: it imports nothing, calls nothing and sets no attribute. It supports
these values: None, booleans, integers, text, tuples, lists, dicts, and PyTorch's storages and
tensors, both only as descriptions (`StoredStorage`, `StoredTensor`). Every other value (of other
classes, sets, bytes, floats) becomes `OPAQUE`, so that a Lightning checkpoint with its optimizer
and callbacks can be read. The opcodes are documented in CPython's `pickletools`. PyTorch's use of
them is in `torch/serialization.py` and `torch/_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

import torch

from latentcache.vae.archive import Malformed

# A whole Stable Diffusion checkpoint has 50,000 opcodes. An object needs one opcode and up to 100
# bytes of memory, so this also limits the memory of a hostile pickle.
MAX_OPCODES = 1_000_000

MAX_NAME_CHARS = 1024
"""Longer text is not kept, because it is not the name of a tensor."""

MAX_DIMS = 16
_MAX_INTEGER_BYTES = 16
_MAX_GLOBAL_BYTES = 512


@final
class _Opaque:
    """The placeholder of every unsupported value."""

    def __repr__(self) -> str:
        return "OPAQUE"


OPAQUE: Final = _Opaque()

_STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


@dataclass(frozen=True, slots=True, eq=False)
class StoredStorage:
    """A storage of `num_elements` of one dtype, elsewhere in the file under the name `key`."""

    key: str
    dtype: torch.dtype
    num_elements: int

    @property
    def num_bytes(self) -> int:
        """The size in bytes."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor that is a view within a storage; `offset` and `stride` are in elements."""

    storage: StoredStorage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the elements in bytes."""
        return math.prod(self.size) * self.storage.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class _Function:
    """A function that a pickle may call, replaced by one that returns a description."""

    call: Callable[[tuple[object, ...]], object]


@dataclass(frozen=True, slots=True, eq=False)
class _StorageType:
    dtype: torch.dtype


def _new_dict(arguments: tuple[object, ...]) -> object:
    return {} if not arguments else OPAQUE


def _rebuild_tensor(arguments: tuple[object, ...]) -> object:
    """Describe the result of `torch._utils._rebuild_tensor_v2`; check that it fits the storage."""
    if len(arguments) < 4:
        return OPAQUE
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, StoredStorage):
        return OPAQUE
    if not (
        isinstance(offset, int)
        and isinstance(size, tuple)
        and isinstance(stride, tuple)
        and len(size) == len(stride) <= MAX_DIMS
        and all(type(number) is int and number >= 0 for number in (offset, *size, *stride))
    ):
        raise Malformed("a tensor has no usable offset, size and stride")
    num_elements = math.prod(size)
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if num_elements and (last >= storage.num_elements or num_elements > storage.num_elements):
        raise Malformed("a tensor is larger than its storage")
    if not num_elements and max((offset, *size, *stride)) > storage.num_elements + 2**31:
        raise Malformed("an empty tensor has no usable offset, size and stride")
    return StoredTensor(storage, offset, size, stride)


def _rebuild_parameter(arguments: tuple[object, ...]) -> object:
    is_tensor = arguments and isinstance(arguments[0], StoredTensor)
    return arguments[0] if is_tensor else OPAQUE


_GLOBALS: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Function(_new_dict),
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch", "UntypedStorage"): _StorageType(torch.uint8),
    ("torch.storage", "UntypedStorage"): _StorageType(torch.uint8),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
}


class TensorPickle:
    """A reader of consecutive pickles.

    Args:
        data: the bytes with the pickles.
        position: the start of the first pickle. The attribute moves to the end of each one read.

    Attributes:
        storages: the storages of all pickles, by key.
    """

    def __init__(self, data: memoryview, position: int = 0) -> None:
        self.position = position
        self.storages: dict[str, StoredStorage] = {}
        self._data = data
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def load(self) -> object:
        """Read one pickle. Its value may contain itself.

        Raises:
            Malformed: it is cut off, too large, or has an opcode that PyTorch does not write.
        """
        self._stack, self._marks, self._memo = [], [], {}
        for _ in range(MAX_OPCODES):
            opcode = self._byte()
            if opcode == _STOP:
                return self._pop()
            handler = _HANDLERS.get(opcode)
            if handler is None:
                raise Malformed(f"its pickle has the unsupported opcode {opcode:#04x}")
            handler(self)
        raise Malformed(f"its pickle has more than {MAX_OPCODES} opcodes")

    def _take(self, size: int) -> memoryview:
        start = self.position
        if size < 0 or size > len(self._data) - start:
            raise Malformed("its pickle is cut off")
        self.position = start + size
        return self._data[start : start + size]

    def _byte(self) -> int:
        if self.position >= len(self._data):
            raise Malformed("its pickle is cut off")
        self.position += 1
        return self._data[self.position - 1]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _pop(self) -> object:
        if not self._stack:
            raise Malformed("its pickle takes a value where there is none")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[object]:
        if not self._marks:
            raise Malformed("its pickle takes a mark where there is none")
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _top(self) -> object:
        if not self._stack:
            raise Malformed("its pickle takes a value where there is none")
        return self._stack[-1]

    def _push_text(self, size: int) -> None:
        data = self._take(size)
        is_name = size <= MAX_NAME_CHARS
        self._stack.append(bytes(data).decode("utf-8", "backslashreplace") if is_name else OPAQUE)

    def _push_bytes(self, size: int) -> None:
        self._take(size)
        self._stack.append(OPAQUE)

    def _push_integer(self, size: int) -> None:
        data = self._take(size)
        is_usual = size <= _MAX_INTEGER_BYTES
        self._stack.append(int.from_bytes(data, "little", signed=True) if is_usual else OPAQUE)

    def _push_tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._stack.append(tuple(reversed(values)))

    def _push_global(self, module: object, name: object) -> None:
        if isinstance(module, str) and isinstance(name, str):
            self._stack.append(_GLOBALS.get((module, name), OPAQUE))
        else:
            self._stack.append(OPAQUE)

    def _line(self) -> str:
        line = bytes(self._data[self.position : self.position + _MAX_GLOBAL_BYTES])
        size = line.find(b"\n")
        if size < 0:
            raise Malformed("its pickle has a name that does not end")
        self.position += size + 1
        return line[:size].decode("utf-8", "backslashreplace")

    def _proto(self) -> None:
        if self._byte() > 5:
            raise Malformed("its pickle is of an unknown protocol")

    def _frame(self) -> None:
        self._take(8)  # the length, which readers need only for reading ahead

    def _global(self) -> None:
        self._push_global(self._line(), self._line())

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._push_global(module, name)

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise Malformed("its pickle takes a value that is not in its memo")
        self._stack.append(self._memo[index])

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if isinstance(function, _Function) and isinstance(arguments, tuple):
            self._stack.append(function.call(arguments))
        else:
            self._stack.append(OPAQUE)

    def _build(self) -> None:
        self._pop()  # the state of an object, which would set attributes; it is ignored
        self._top()

    def _discard(self) -> None:
        self._pop()

    def _discard_to_mark(self) -> None:
        self._pop_to_mark()

    def _make_opaque(self, num_values: int) -> None:
        for _ in range(num_values):
            self._pop()
        self._stack.append(OPAQUE)

    def _make_opaque_from_mark(self) -> None:
        self._pop_to_mark()
        self._stack.append(OPAQUE)

    def _add_items(self) -> None:
        self._pop_to_mark()
        self._top()

    def _append(self, values: list[object]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(values)

    def _append_one(self) -> None:
        self._append([self._pop()])

    def _set_items(self, values: list[object]) -> None:
        """Set the items with text keys; other keys name no tensors and may not be hashable."""
        if len(values) % 2:
            raise Malformed("its pickle has a key without a value")
        target = self._top()
        if not isinstance(target, dict):
            return
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, str):
                target[key] = value if isinstance(value, dict | StoredTensor) else OPAQUE

    def _set_one(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _persistent(self) -> None:
        """Read a storage's description: ("storage", type, key, device, elements[, view])."""
        pid = self._pop()
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise Malformed("its pickle has an external reference that is not a storage")
        _, kind, key, _, num_elements, *view = pid
        if not isinstance(kind, _StorageType):
            self._stack.append(OPAQUE)
            return
        if not isinstance(key, str) or type(num_elements) is not int or num_elements < 0:
            raise Malformed("a storage has no usable name and size")
        storage = self.storages.get(key)
        if storage is None:
            storage = self.storages[key] = StoredStorage(key, kind.dtype, num_elements)
        elif (storage.dtype, storage.num_elements) != (kind.dtype, num_elements):
            raise Malformed("a storage has two types or sizes")
        self._stack.append(OPAQUE if any(part is not None for part in view) else storage)


def _push(make: Callable[[], object]) -> Callable[[TensorPickle], None]:
    return lambda reader: reader._stack.append(make())


_STOP = ord(".")
_HANDLERS: dict[int, Callable[[TensorPickle], None]] = {
    0x80: TensorPickle._proto,
    0x95: TensorPickle._frame,
    ord("("): lambda reader: reader._marks.append(len(reader._stack)),
    ord("0"): TensorPickle._discard,
    ord("1"): TensorPickle._discard_to_mark,
    # Atoms.
    ord("N"): _push(lambda: None),
    0x88: _push(lambda: True),
    0x89: _push(lambda: False),
    ord("J"): lambda reader: reader._push_integer(4),
    ord("K"): lambda reader: reader._stack.append(reader._byte()),
    ord("M"): lambda reader: reader._stack.append(reader._number(2)),
    0x8A: lambda reader: reader._push_integer(reader._byte()),
    0x8B: lambda reader: reader._push_integer(reader._number(4)),
    ord("G"): lambda reader: reader._push_bytes(8),
    # Text: of Python 2, then of Python 3.
    ord("T"): lambda reader: reader._push_text(reader._number(4)),
    ord("U"): lambda reader: reader._push_text(reader._byte()),
    ord("X"): lambda reader: reader._push_text(reader._number(4)),
    0x8C: lambda reader: reader._push_text(reader._byte()),
    0x8D: lambda reader: reader._push_text(reader._number(8)),
    # Bytes.
    ord("B"): lambda reader: reader._push_bytes(reader._number(4)),
    ord("C"): lambda reader: reader._push_bytes(reader._byte()),
    0x8E: lambda reader: reader._push_bytes(reader._number(8)),
    0x96: lambda reader: reader._push_bytes(reader._number(8)),
    # Containers.
    ord(")"): _push(tuple),
    0x85: lambda reader: reader._push_tuple(1),
    0x86: lambda reader: reader._push_tuple(2),
    0x87: lambda reader: reader._push_tuple(3),
    ord("t"): lambda reader: reader._stack.append(tuple(reader._pop_to_mark())),
    ord("]"): _push(list),
    ord("a"): TensorPickle._append_one,
    ord("e"): lambda reader: reader._append(reader._pop_to_mark()),
    ord("}"): _push(dict),
    ord("s"): TensorPickle._set_one,
    ord("u"): lambda reader: reader._set_items(reader._pop_to_mark()),
    0x8F: _push(lambda: OPAQUE),
    0x90: TensorPickle._add_items,
    0x91: TensorPickle._make_opaque_from_mark,
    # The memo.
    ord("q"): lambda reader: reader._put(reader._byte()),
    ord("r"): lambda reader: reader._put(reader._number(4)),
    0x94: lambda reader: reader._put(len(reader._memo)),
    ord("h"): lambda reader: reader._get(reader._byte()),
    ord("j"): lambda reader: reader._get(reader._number(4)),
    # Objects.
    ord("c"): TensorPickle._global,
    0x93: TensorPickle._stack_global,
    ord("R"): TensorPickle._reduce,
    ord("b"): TensorPickle._build,
    0x81: lambda reader: reader._make_opaque(2),
    0x92: lambda reader: reader._make_opaque(3),
    ord("Q"): TensorPickle._persistent,
}
