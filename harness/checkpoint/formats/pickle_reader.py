"""What a `.bin` of torch.save holds, without torch and without running anything of it.

A pickle is a program. This interpreter knows the operations that a dict of tensors needs and builds only strings, numbers,
tuples, lists, dicts and descriptions of storages and tensors; a global is never looked up, only compared with the names that
torch lets through with `weights_only`. Everything else in a pickle ends the reading with the global's name. Own code instead of
`pickle.Unpickler.find_class`, because that would still let a small file use any amount of memory and time: here operations
are counted, the stack cannot outgrow them, nothing recurses and dict keys are strings or numbers (hashing a tuple nested
a million deep ends the process).

Sources: pickletools of CPython for the operations, torch/_utils.py for the calls that rebuild tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from harness.checkpoint.formats import pickle_objects as objects
from harness.checkpoint.formats.files import Cursor, damaged, quote
from harness.checkpoint.formats.pickle_objects import Inert, Name, Storage, View, Whole
from harness.checkpoint.formats.safetensors_header import MOST_TENSOR_BYTES, check_shape
from harness.core.dtypes import DTYPE_BITS
from harness.core.errors import CheckpointError

OPERATIONS = 500_000  # a tensor takes about 32
MOST_TENSORS = 20_000
TEXT_BYTES = 1 << 16

CONVERT = "convert the model to safetensors with the code that wrote it, on a machine where running it is safe"


class Unpickler:
    """Interprets one pickle and leaves the cursor behind it. `storages` collects the storages it refers to, by key."""

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.views = 0

    def load(self) -> Any:
        """Return what the pickle describes, else raise CheckpointError."""
        take = self.cursor.take
        for _ in range(OPERATIONS):
            code = take(1)[0]
            if code == STOP:
                return self.pop()
            handler = OPCODES.get(code)
            if handler is None:
                raise self.damaged(f"holds the pickle operation {bytes([code])!r}, which no checkpoint needs")
            handler(self)
        raise CheckpointError(self.cursor.blob.where, f"needs more than {OPERATIONS:,} pickle operations: {CONVERT}")

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.damaged("pops an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.damaged("closes what was not opened")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def text(self, length: int, encoding: str = "utf-8") -> str:
        if length > TEXT_BYTES:
            raise self.damaged(f"holds a string of {length} bytes")
        try:
            return self.cursor.take(length).decode(encoding)
        except UnicodeDecodeError as error:
            raise self.damaged("holds a string that is not UTF-8") from error

    def damaged(self, what: str) -> CheckpointError:
        return damaged(self.cursor.blob, f"{what} (at byte {self.cursor.position})")

    def refused(self, path: str) -> CheckpointError:
        what = f"its pickle asks for {quote(path)}, which is code and not weights; nothing was executed"
        return CheckpointError(self.cursor.blob.where, f"{what}. Do not load it unless you trust its author: {CONVERT}")

    def push_global(self, module: str, name: str) -> None:
        path = f"{module}.{name}"
        if path not in objects.ALLOWED and path not in objects.tensor_classes():
            raise self.refused(path)
        self.stack.append(Name(path))

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise self.damaged("sets an item of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.damaged(f"uses {quote(key)} as a key")
            target[key] = value

    def append_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise self.damaged("appends to something that is no list")
        target.extend(items)

    def build(self) -> None:
        """Drop the state of an OrderedDict (`_metadata`), a tensor, or what a tensor keeps beside its parts."""
        self.pop()
        if type(self.top()) not in (dict, View, Inert):
            raise self.damaged(f"sets the state of {quote(self.top())}")

    def new_object(self) -> None:
        """Describe an object of a class that torch makes objects of."""
        self.pop()
        made = self.pop()
        if type(made) is not Name or made.path not in objects.tensor_classes():
            raise self.refused(made.path if type(made) is Name else "an object")
        self.stack.append(Inert(made.path))

    def reduce(self) -> None:
        """Describe what a call would return."""
        arguments, function = self.pop(), self.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise self.damaged(f"calls {quote(function)}")
        if function.path == objects.REBUILD_FROM_TYPE and len(arguments) == 4 and type(arguments[0]) is Name:
            self.stack.append(self.typed(*arguments))
        else:
            self.stack.append(self.called(function, arguments))

    def called(self, function: Name, arguments: tuple[Any, ...]) -> Any:
        if function == objects.ORDERED_DICT and not arguments:
            return {}
        if function.path in objects.REBUILD_V2 and len(arguments) >= 4:
            return self.view(arguments, None)
        if function.path == objects.REBUILD_V3 and len(arguments) >= 7:
            return self.view(arguments, arguments[6])
        if function.path in objects.REBUILD_PARAMETER and arguments and type(arguments[0]) in (View, Whole):
            return arguments[0]
        if function.path in objects.INERT or function.path in objects.tensor_classes():
            return Inert(function.path)
        raise self.damaged(f"calls {quote(function.path)} with {len(arguments)} arguments that do not suit it")

    def typed(self, function: Name, kind: Any, arguments: Any, state: Any) -> View | Whole:
        """Describe a tensor of a class of its own: as the tensors that its state holds, where it wraps others."""
        if type(kind) is not Name or type(arguments) is not tuple or function.path == objects.REBUILD_FROM_TYPE:
            raise self.damaged("describes a tensor of no class")
        if function.path == objects.REBUILD_WRAPPER and kind.path in objects.tensor_classes() and type(state) is dict:
            return Whole(kind.path, {name: part for name, part in state.items() if type(name) is str and type(part) is View})
        made = self.called(function, arguments)
        if type(made) is not View:
            raise self.damaged(f"describes a {quote(kind.path)} that is no tensor")
        return made

    def view(self, arguments: tuple[Any, ...], dtype: Any) -> View:
        """Describe a tensor of (storage, offset, shape, strides, ...), within its storage."""
        self.views += 1
        if self.views > MOST_TENSORS:
            raise CheckpointError(self.cursor.blob.where, f"describes more than {MOST_TENSORS:,} tensors: {CONVERT}")
        storage, offset, shape, strides = arguments[:4]
        if (
            type(storage) is not Storage
            or not all(_is_sizes(sizes) for sizes in (shape, strides, (offset,)))
            or len(shape) != len(strides)
        ):
            raise self.damaged("describes a tensor without storage, shape or strides")
        name = dtype.path.removeprefix("torch.") if type(dtype) is Name else storage.dtype
        if name is None or name not in DTYPE_BITS:
            raise self.damaged("describes a tensor without a dtype")
        size = DTYPE_BITS[name] // 8
        elements = check_shape(self.cursor.blob, f"at byte {self.cursor.position}", shape)
        last = offset + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        if elements and max(last + 1, elements) * size > storage.bytes:
            raise self.damaged("describes a tensor larger than its storage")
        return View(storage, name, offset * size, shape, elements * size)

    def persistent(self) -> None:
        """Describe the storage of ("storage", type, key, location, elements[, view])."""
        fields = self.pop()
        if type(fields) is not tuple or not 5 <= len(fields) <= 6 or fields[0] != "storage" or any(fields[5:]):
            raise self.damaged("refers to something outside that is no storage")
        _, kind, key, _, elements = fields[:5]
        if type(kind) is not Name or "Storage" not in kind.path or type(key) is not str or not _is_sizes((elements,)):
            raise self.damaged("describes a storage without type, key or size")
        dtype = objects.STORAGE_DTYPES.get(kind.path.rpartition(".")[2])
        storage = Storage(key, dtype, elements * (DTYPE_BITS[dtype] // 8 if dtype else 1))
        self.stack.append(self.storages.setdefault(key, storage))


def _is_sizes(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and 0 <= value < MOST_TENSOR_BYTES for value in values)


STOP = ord(".")

Handler = Callable[[Unpickler], None]


def _push(value: Any) -> Handler:
    return lambda machine: machine.stack.append(value)


def _integer(layout: str) -> Handler:
    return lambda machine: machine.stack.append(machine.cursor.unpack(layout))


def _string(layout: str, encoding: str = "utf-8") -> Handler:
    return lambda machine: machine.stack.append(machine.text(machine.cursor.unpack(layout), encoding))


def _skip(length: int) -> Handler:
    return lambda machine: machine.cursor.skip(length)


def _put(layout: str) -> Handler:
    def put(machine: Unpickler) -> None:
        machine.memo[machine.cursor.unpack(layout)] = machine.top()

    return put


def _get(layout: str) -> Handler:
    def get(machine: Unpickler) -> None:
        key = machine.cursor.unpack(layout)
        if key not in machine.memo:
            raise machine.damaged(f"uses entry {key} of a memo that has none")
        machine.stack.append(machine.memo[key])

    return get


def _tuple(count: int) -> Handler:
    def make(machine: Unpickler) -> None:
        stack = machine.stack
        if len(stack) - (machine.marks[-1] if machine.marks else 0) < count:
            raise machine.damaged("pops an empty stack")
        stack[-count:] = [tuple(stack[-count:])]

    return make


def _drop(machine: Unpickler) -> None:
    machine.pop()


def _memoize(machine: Unpickler) -> None:
    machine.memo[len(machine.memo)] = machine.top()


def _long(machine: Unpickler) -> None:
    length = machine.cursor.unpack("<B")
    if length > 16:
        raise machine.damaged(f"holds a number of {length} bytes")
    machine.stack.append(int.from_bytes(machine.cursor.take(length), "little", signed=True))


def _float(machine: Unpickler) -> None:
    machine.stack.append(struct.unpack(">d", machine.cursor.take(8))[0])


def _set_item(machine: Unpickler) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _line(machine: Unpickler) -> str:
    return machine.cursor.line().decode("utf-8", "replace")


def _global(machine: Unpickler) -> None:
    machine.push_global(_line(machine), _line(machine))


def _stack_global(machine: Unpickler) -> None:
    name, module = machine.pop(), machine.pop()
    if type(name) is not str or type(module) is not str:
        raise machine.damaged("asks for a global without a name")
    machine.push_global(module, name)


def _instance(machine: Unpickler) -> None:
    raise machine.refused(f"{_line(machine)}.{_line(machine)}")


def _extension(layout: str) -> Handler:
    def refuse(machine: Unpickler) -> None:
        raise machine.refused(f"copyreg extension {machine.cursor.unpack(layout)}")

    return refuse


def _object(machine: Unpickler) -> None:
    items = machine.pop_mark()
    raise machine.refused(items[0].path if items and type(items[0]) is Name else "an object")


OPCODES: Mapping[int, Handler] = {
    ord(code): handler
    for code, handler in {
        "\x80": _skip(1),  # PROTO
        "\x95": _skip(8),  # FRAME
        "(": lambda machine: machine.marks.append(len(machine.stack)),
        "0": _drop,
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        "J": _integer("<i"),
        "K": _integer("<B"),
        "M": _integer("<H"),
        "\x8a": _long,
        "G": _float,
        "X": _string("<I"),
        "\x8c": _string("<B"),
        "\x8d": _string("<Q"),
        "U": _string("<B", "latin-1"),
        "T": _string("<I", "latin-1"),
        "}": lambda machine: machine.stack.append({}),
        "]": lambda machine: machine.stack.append([]),
        ")": _push(()),
        "\x85": _tuple(1),
        "\x86": _tuple(2),
        "\x87": _tuple(3),
        "t": lambda machine: machine.stack.append(tuple(machine.pop_mark())),
        "a": lambda machine: machine.append_items([machine.pop()]),
        "e": lambda machine: machine.append_items(machine.pop_mark()),
        "s": _set_item,
        "u": lambda machine: machine.set_items(machine.pop_mark()),
        "q": _put("<B"),
        "r": _put("<I"),
        "\x94": _memoize,
        "h": _get("<B"),
        "j": _get("<I"),
        "c": _global,
        "\x93": _stack_global,
        "R": lambda machine: machine.reduce(),
        "b": lambda machine: machine.build(),
        "Q": lambda machine: machine.persistent(),
        "i": _instance,
        "o": _object,
        "\x81": lambda machine: machine.new_object(),
        "\x82": _extension("<B"),
        "\x83": _extension("<H"),
        "\x84": _extension("<i"),
    }.items()
}
