"""Interpret the pickles in PyTorch files (`torch/serialization.py`) without Python's unpickler.

`pickletools.genops` parses the opcodes. Nothing is imported and no attribute is set. Integers,
text, tuples, lists, dicts with text keys, and descriptions of storages and tensors are kept. Every
other value becomes None, so that a Lightning checkpoint with its optimizer can be read.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, BinaryIO

import torch

from latentcache.errors import first_line

# A whole Stable Diffusion checkpoint has 50,000 opcodes. An opcode adds at most one object, so this
# also limits the memory of a hostile pickle.
MAX_OPCODES = 1_000_000

MAX_NAME_CHARS = 1024
"""Longer text is not kept, because it is not the name of a tensor."""

_MAX_DIMS = 16
_MAX_INTEGER_BITS = 128


class Malformed(Exception):
    """A checkpoint violates its format; the message describes the problem."""


@dataclass(frozen=True, slots=True)
class StoredStorage:
    """A storage of `num_elements` of one dtype, elsewhere in the file under the name `key`."""

    key: str
    dtype: torch.dtype
    num_elements: int

    @property
    def num_bytes(self) -> int:
        """The size in bytes."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
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


def load_pickle(file: BinaryIO, storages: dict[str, StoredStorage]) -> object:
    """Read one pickle; raise `Malformed` if it is cut off, too large, or not a pickle.

    Args:
        file, storages: moves to the end of the pickle; receives the storages that it names, by key.
    """
    try:
        return _interpret(file, storages)
    except LookupError as error:
        raise Malformed("its pickle takes a value that does not exist") from error
    # `genops` warns of unknown escapes in names. With `-W error` this is an exception.
    except (DeprecationWarning, TypeError, ValueError) as error:
        raise Malformed(f"its pickle is damaged: {first_line(error)[:200]}") from error


def _interpret(file: BinaryIO, storages: dict[str, StoredStorage]) -> object:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for index, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if index == MAX_OPCODES:
            break
        if opcode.name == "MARK":
            marks.append(len(stack))
            continue
        taken = _take(stack, marks, opcode.stack_before)
        match opcode.name:
            case "STOP":
                return taken[0]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = taken[0]
                stack += taken
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                target, *values = taken
                if isinstance(target, list):
                    target += values
                stack.append(target)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                _set_items(*taken)
                stack.append(taken[0])
            case "GLOBAL":
                stack.append(_GLOBALS.get(argument))
            case "STACK_GLOBAL":
                stack.append(_GLOBALS.get(" ".join(taken)))
            case "REDUCE":
                stack.append(_call(*taken))
            case "BUILD":  # sets the attributes of an object, which are ignored
                stack.append(taken[0])
            case "BINPERSID":
                stack.append(_describe_storage(taken[0], storages))
            case _:
                value = argument if _is_kept(argument) else None
                stack += [value] * len(opcode.stack_after)
    raise Malformed(f"its pickle has more than {MAX_OPCODES} opcodes")


def _take(stack: list[Any], marks: list[int], operands: list[pickletools.StackObject]) -> list[Any]:
    """Remove and return the values that an opcode takes from the stack."""
    start = len(stack) - len(operands)
    if pickletools.markobject in operands:
        start = marks.pop() - operands.index(pickletools.markobject)
    if start < 0:
        raise IndexError
    taken = stack[start:]
    del stack[start:]
    return taken


def _is_kept(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_NAME_CHARS
    return isinstance(value, int) and value.bit_length() <= _MAX_INTEGER_BITS


def _set_items(target: object, *items: object) -> None:
    """Set the items with text keys. Other keys name no tensors, and may take forever to hash."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(target, dict) and isinstance(key, str):
            target[key] = value


def _call(function: object, arguments: object) -> object:
    if isinstance(function, FunctionType) and isinstance(arguments, tuple):
        return function(*arguments[:4])  # more are not used, and may be a million
    return None


def _describe_storage(pid: object, storages: dict[str, StoredStorage]) -> StoredStorage | None:
    match pid[:7] if isinstance(pid, tuple) else None:
        case ("storage", None, *_):
            return None  # a type of elements that no weights have
        case ("storage", torch.dtype() as dtype, str(key), _, int(num_elements), *view) if (
            num_elements >= 0
        ):
            storage = StoredStorage(key, dtype, num_elements)
            if storages.setdefault(key, storage) != storage:
                raise Malformed("a storage has two types or sizes")
            return storage if view in ([], [None]) else None
    raise Malformed("its pickle has a storage without a usable type, name and size")


def _rebuild_tensor(
    storage: object = None, offset: Any = None, size: Any = None, stride: Any = None
) -> StoredTensor | None:
    """Describe the result of `torch._utils._rebuild_tensor_v2`; check that it fits the storage."""
    if not isinstance(storage, StoredStorage):
        return None
    if not (
        isinstance(size, tuple)
        and isinstance(stride, tuple)
        and len(size) == len(stride) <= _MAX_DIMS
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


# Module and name of a global, and what replaces it. All other globals become None.
_GLOBALS: dict[Any, Callable[..., object] | torch.dtype] = {
    "collections OrderedDict": lambda *arguments: None if arguments else {},
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor=None, *_: (
        tensor if isinstance(tensor, StoredTensor) else None
    ),
    "torch UntypedStorage": torch.uint8,
    "torch.storage UntypedStorage": torch.uint8,
    "torch BFloat16Storage": torch.bfloat16,
    "torch BoolStorage": torch.bool,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch ShortStorage": torch.int16,
}
