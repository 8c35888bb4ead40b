"""An unpickler that calls nothing. It turns every object of a pickle into a record of what the pickle says about it.

A usual unpickler calls what a pickle names, and its BUILD, APPENDS and SETITEMS change whatever the pickle puts under
them: a class or a function of the process too. Here a name stays a :class:`Name`, an object becomes a :class:`Record`,
and only records, lists and dicts that this reading made are changed.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DAMAGED = (
    pickle.UnpicklingError,
    struct.error,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors of an unpickler on damaged bytes."""

_ORDER = (pickle.PROTO, pickle.MARK, pickle.POP, pickle.POP_MARK)
_NUMBERS = (pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT)
_CONSTANTS = (pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE)
_TEXTS = (pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8)
_BYTES = (pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8)
_TUPLES = (pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_EMPTY = (pickle.EMPTY_LIST, pickle.EMPTY_DICT)
_NAMES = (pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE)
_AS_PYTHON = (*_ORDER, *_NUMBERS, *_CONSTANTS, *_TEXTS, *_BYTES, *_TUPLES, *_EMPTY, *_NAMES)
"""Opcodes that are read as Python's own unpickler reads them. These and those that :class:`PlainUnpickler` reads itself
are what Python writes for plain objects since protocol 2. Left out are registered extensions, persistent ids, buffers,
sets, and all of protocols 0 and 1."""
_KEYS = {str, int, bool, type(None)}


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names. It was neither imported nor called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Record:
    """An object of a pickle: the class or function that would make it, with arguments and state.

    No record equals another one, so that a record can be the key of a dict, whatever it holds.
    """

    __slots__ = ("args", "is_new", "name", "state")

    def __init__(self, name: Name, args: tuple[Any, ...], *, is_new: bool) -> None:
        self.name, self.args = name, args
        self.is_new = is_new
        """Whether it is made anew (NEWOBJ). A call (REDUCE) may also return an object that others share."""
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name}>"


class _StopError(Exception):
    """The end of a pickle, with the object that it holds."""


class _Dispatch(dict[int, Callable[[Any], None]]):
    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f"refused: it has the opcode {opcode:#04x}, which such a file does not need")


class PlainUnpickler(pickle._Unpickler):
    """Reads the pickle in ``content`` as records. A subclass tells by :meth:`knows` which names a pickle may have.

    Raises one of ``DAMAGED`` where the pickle is damaged or refused.
    """

    stack: list[Any]
    metastack: list[list[Any]]
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes) -> None:
        self._stream = io.BytesIO(content)
        super().__init__(self._stream, fix_imports=False)

    def load(self) -> Any:
        # As in Python's own, but without frames, which take a third of the time: all bytes are in memory already.
        self.stack, self.metastack = [], []
        self.append = self.stack.append
        read = self.read = self._stream.read
        self.readline = self._stream.readline
        dispatch = self.dispatch
        try:
            while opcode := read(1):
                dispatch[opcode[0]](self)
        except _StopError as stop:
            return stop.args[0]
        raise EOFError("it has no end")

    def knows(self, name: Name) -> bool:
        """Tell whether such a pickle may have a name."""
        raise NotImplementedError

    def make(self, name: Name, args: tuple[Any, ...], *, is_new: bool) -> object:
        """Return what stands for an object."""
        return {} if name == _ORDERED and not args else Record(name, args, is_new=is_new)

    def find_class(self, module: str, name: str) -> Any:
        found = Name(module, name)
        if not self.knows(found):
            raise pickle.UnpicklingError(f"refused, since it would run code: it asks for {module}.{name}")
        return found

    def _load_stop(self) -> None:
        raise _StopError(self.stack.pop())

    def _load_frame(self) -> None:
        self.read(8)

    def _load_object(self, *, is_new: bool) -> None:
        args = self.stack.pop()
        name = self.stack[-1]
        if type(name) is not Name or type(args) is not tuple:
            raise pickle.UnpicklingError("it calls what is no class")
        self.stack[-1] = self.make(name, args, is_new=is_new)

    def _load_reduce(self) -> None:
        self._load_object(is_new=False)

    def _load_newobj(self) -> None:
        self._load_object(is_new=True)

    def _load_build(self) -> None:
        state = self.stack.pop()
        record = self.stack[-1]
        if type(record) is not Record or not record.is_new or record.state is not None:
            raise pickle.UnpicklingError("refused: it changes what it did not make")
        record.state = state

    def _load_append(self) -> None:
        value = self.stack.pop()
        self._own(list).append(value)

    def _load_appends(self) -> None:
        values = self.pop_mark()
        self._own(list).extend(values)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, pairs: list[Any]) -> None:
        changed = self._own(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in _KEYS and type(key) is not Record:
                raise pickle.UnpicklingError(f"a key of type {type(key).__name__}")
            changed[key] = value

    def _own(self, kind: type) -> Any:
        """Return the list or dict on top. All of these were made here."""
        if type(self.stack[-1]) is not kind:
            raise pickle.UnpicklingError("refused: it changes what it did not make")
        return self.stack[-1]

    def _load_binput(self) -> None:
        self._put(self.read(1)[0])

    def _load_long_binput(self) -> None:
        self._put(struct.unpack("<I", self.read(4))[0])

    def _put(self, number: int) -> None:
        # An unpickler in C, which may read the same bytes later, takes memory for all numbers up to the largest one.
        if number > len(self.memo):
            raise pickle.UnpicklingError(f"it numbers an object {number} after {len(self.memo)}")
        self.memo[number] = self.stack[-1]

    dispatch = _Dispatch(
        {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _AS_PYTHON}
        | {
            pickle.STOP[0]: _load_stop,
            pickle.FRAME[0]: _load_frame,
            pickle.REDUCE[0]: _load_reduce,
            pickle.NEWOBJ[0]: _load_newobj,
            pickle.BUILD[0]: _load_build,
            pickle.APPEND[0]: _load_append,
            pickle.APPENDS[0]: _load_appends,
            pickle.SETITEM[0]: _load_setitem,
            pickle.SETITEMS[0]: _load_setitems,
            pickle.BINPUT[0]: _load_binput,
            pickle.LONG_BINPUT[0]: _load_long_binput,
        }
    )


_ORDERED = Name("collections", "OrderedDict")
