"""The pickle inside a torch file, read without running anything: it may name tensors, storages and dictionaries.

A pickle is a program. Here it has the few opcodes that torch writes, and the constructors of `_KNOWN`, which are our
own and only take notes; whatever else it names is refused before it could be looked up. Written over Python's own
unpickler rather than the compiled one, whose opcodes are fixed and whose table of references grows as large as a file
says.

A small pickle can hold tuples of tuples that are exponentially large when walked: nothing from a file is printed,
hashed or compared here unless it is a string or a number.

Knows torch's names. Reads no values, and knows nothing of files beyond the stream that it is given.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpcpu.errors import CheckpointError

DTYPES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "uint8": "U8", "int8": "I8",
    "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""Torch's dtypes by safetensors' names."""

_STORAGES = {
    "BFloat16Storage": "bfloat16", "HalfStorage": "float16", "FloatStorage": "float32", "DoubleStorage": "float64",
    "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32",
    "LongStorage": "int64", "BoolStorage": "bool", "UntypedStorage": "", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip

MAX_PICKLE_BYTES = 32 << 20  # the largest published are a few megabytes


class RefusedError(Exception):
    """Something in a pickle that no file of weights needs, in words."""


@dataclass(frozen=True)
class Dtype:
    """A dtype by torch's name; empty: bytes."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of values in the file, by its key there."""

    key: str
    dtype: str  # torch's name; empty: bytes
    count: int  # in units of dtype


@dataclass(frozen=True)
class Tensor:
    """A tensor over a storage; offset and strides count values."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the values lie together, in order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    @property
    def end(self) -> int:
        """Values of the storage up to the last one of the tensor."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class _Noted:
    """An object that is no tensor, or no plain one."""

    what: str


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    dtype = storage.dtype if isinstance(storage, Storage) else ""
    return _checked_tensor(storage, offset, shape, strides, dtype)


def _tensor_of_dtype(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> Tensor:  # fmt: skip  # noqa: E501
    return _checked_tensor(storage, offset, shape, strides, dtype.name if isinstance(dtype, Dtype) else "")


def _checked_tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str) -> Tensor:
    for sizes in (shape, strides):
        if type(sizes) is not tuple or not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
            raise RefusedError("a tensor whose shape and strides are no tuples of sizes")
    plain = isinstance(storage, Storage) and type(offset) is int and 0 <= offset < 2**48
    if not plain or len(shape) != len(strides) or len(shape) > 16:
        raise RefusedError("a tensor that names no place in a storage")
    return Tensor(storage, dtype, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _dictionary(*pairs: Any) -> OrderedDict[Any, Any]:
    made: OrderedDict[Any, Any] = OrderedDict()
    for pair in pairs[0] if pairs else ():
        _check_key(pair[0])
        made[pair[0]] = pair[1]
    return made


def _check_key(key: Any) -> None:
    if not isinstance(key, (str, int)):
        raise RefusedError(f"a dictionary with a key that is a {type(key).__name__}")


def _other(what: str) -> Callable[..., _Noted]:
    return lambda *_: _Noted(what)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_sparse_tensor"): _other("sparse tensor"),
    ("torch._utils", "_rebuild_qtensor"): _other("quantised tensor of torch's own kind"),
    ("torch.serialization", "_get_layout"): _other("layout"),
    ("torch", "Size"): tuple,
    ("torch", "device"): _other("device"),
    **{("torch", name): Dtype(dtype) for name, dtype in _STORAGES.items()},
    **{("torch.storage", name): Dtype(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): Dtype(name) for name in (*DTYPES, "complex64", "complex128")},
}
"""What a pickle may name. Each is ours, and takes notes."""


_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
""".split()


def _opcodes() -> dict[int, Callable[[Any], None]]:
    """What each opcode does: Python's own way, ours, or a refusal."""
    ours = {"SETITEM": _Unpickler.set_item, "SETITEMS": _Unpickler.set_items, "BUILD": _Unpickler.ignore_state}

    def refuse(name: str) -> Callable[[Any], None]:
        def refused(_: Any) -> None:
            raise RefusedError(f"the opcode {name}, which torch does not write; nothing was executed")

        return refused

    codes = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
    theirs = pickle._Unpickler.dispatch
    return {
        code: ours.get(name, theirs[code]) if name in _OPCODES else refuse(name)
        for name, code in codes.items()
        if code in theirs
    }


class _Unpickler(pickle._Unpickler):
    stack: list[Any]

    def __init__(self, stream: io.BufferedIOBase) -> None:
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None:
            raise RefusedError(
                f"{module}.{name}, which is no part of weights; code in it could run: nothing was executed"
            )
        return known

    def persistent_load(self, said: Any) -> Storage:
        """`("storage", kind, key, device, count)`, in old files with None behind it."""
        match said:
            case ("storage", Dtype(name=dtype), str(key), _, int(count)) if 0 <= count < 2**48:
                storage = Storage(key, dtype, count)
            case ("storage", Dtype(name=dtype), str(key), _, int(count), None) if 0 <= count < 2**48:
                storage = Storage(key, dtype, count)
            case _:
                raise RefusedError("a storage that is not described as torch does")
        if self.storages.setdefault(key, storage) != storage:
            raise RefusedError(f"two descriptions of storage {key}")
        return storage

    def set_item(self) -> None:
        _check_key(self.stack[-2])
        pickle._Unpickler.load_setitem(self)  # type: ignore[attr-defined]

    def set_items(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]

    def ignore_state(self) -> None:
        """Attributes of a dictionary, such as torch's versions of its entries: nothing is set on anything."""
        self.stack.pop()


_Unpickler.dispatch = _opcodes()


def load(stream: io.BufferedIOBase) -> tuple[Any, dict[str, Storage]]:
    """One pickled object of notes, and the storages that it names; leaves the stream behind it. Raises RefusedError."""
    unpickler = _Unpickler(stream)
    try:
        return unpickler.load(), unpickler.storages
    except RefusedError:
        raise
    except RecursionError:
        raise RefusedError("objects nested too deep") from None
    except Exception as error:  # of the many ways in which bytes are no pickle
        raise RefusedError(f"no pickle of weights ({type(error).__name__}: {error!s:.80})") from None


def tensors(value: Any) -> dict[str, Tensor]:
    """The dictionary of tensors that was pickled, checked. Raises CheckpointError naming the entry, without a file."""
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a {_kind(value)}, expected a dictionary of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"entry {name!r:.80} is a {_kind(tensor)}, expected tensors by name")
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"tensor {name} is {tensor.dtype or 'of no dtype'}, which cannot be read here")
    return dict(value)


def _kind(value: Any) -> str:
    return value.what if isinstance(value, _Noted) else type(value).__name__
