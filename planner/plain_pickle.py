"""Pickles of plain data, read without unpickling: no class is looked up, no code is ever run.

A pickle is a program for a small stack machine. This one knows the instructions that make
dictionaries, lists, tuples, text, numbers, booleans and None, and stops at any other, so that
there is nothing in here that a hostile file could call. What such a file could still do is waste
time and memory; every length is held against the file's, instructions and containers are counted,
a memo index is never larger than the memo, and keys are text or small numbers (whose hashes cannot
be made to collide at will).
"""

from __future__ import annotations

import pickletools
from typing import Any

from planner.errors import InputError

MAX_INSTRUCTIONS = 40_000_000
MAX_CONTAINERS = 5_000_000
MAX_INTEGER_BYTES = 16
MAX_TEXT = 2**20  # characters
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"})
TEXTS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"})
GETS, PUTS = frozenset({"BINGET", "LONG_BINGET"}), frozenset({"MEMOIZE", "BINPUT", "LONG_BINPUT"})
EMPTY: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Refused(ValueError):
    """Why a pickle is not read further."""


class _Machine:
    """The stack machine for plain data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.containers = 0

    def since_mark(self) -> list[Any]:
        """Takes what lies above the last mark."""
        if not self.marks:
            raise _Refused("a mark is missing")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        """The container that is being filled; nothing below the last mark is in reach."""
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) <= floor or type(self.stack[-1]) is not kind:
            raise _Refused(f"no {kind.__name__} to fill")
        return self.stack[-1]

    def pop(self, count: int) -> list[Any]:
        """The last ``count`` values."""
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - floor < count:
            raise _Refused("a value is missing")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def push_container(self, value: Any) -> None:
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise _Refused(f"more than {MAX_CONTAINERS:,} lists and dictionaries")
        self.stack.append(value)

    def fill(self, items: list[Any]) -> None:
        """Puts keys and values by turns into the dictionary on top."""
        target = self.top(dict)
        if len(items) % 2:
            raise _Refused("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and 0 <= key < 65536):
                raise _Refused(f"a dictionary's key is {type(key).__name__}, not text")
            target[key] = value

    def remember(self, index: int | None) -> None:
        """Puts the value on top into the memo."""
        if not self.stack:
            raise _Refused("nothing to remember")
        if index is None or index == len(self.memo):
            self.memo.append(self.stack[-1])
        elif index < len(self.memo):
            self.memo[index] = self.stack[-1]
        else:
            raise _Refused(f"memo index {index} of {len(self.memo)}")

    def step(self, name: str, argument: Any) -> None:
        """Runs one instruction."""
        if name in NUMBERS or name in TEXTS:
            if name == "LONG1" and argument.bit_length() > 8 * MAX_INTEGER_BYTES:
                raise _Refused("an integer of many digits")
            if name in TEXTS and len(argument) > MAX_TEXT:
                raise _Refused(f"a text of over {MAX_TEXT:,} characters")
            self.stack.append(argument)
        elif name in PUTS:
            self.remember(None if name == "MEMOIZE" else argument)
        elif name in GETS:
            if argument >= len(self.memo):
                raise _Refused(f"memo index {argument} of {len(self.memo)}")
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.push_container(EMPTY[name]())
        elif name == "SETITEMS":
            self.fill(self.since_mark())
        elif name == "SETITEM":
            self.fill(self.pop(2))
        elif name == "APPENDS":
            items = self.since_mark()
            self.top(list).extend(items)
        elif name == "APPEND":
            items = self.pop(1)
            self.top(list).extend(items)
        elif name in TUPLES:
            self.push_container(tuple(self.pop(TUPLES[name])))
        elif name == "TUPLE":
            self.push_container(tuple(self.since_mark()))
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"instruction {name}, which plain data does not need: it is not run")


def read_plain_pickle(data: bytes, origin: str) -> Any:
    """The plain data of a pickle (protocol 2 or newer), of the types that JSON has, and tuples.

    Raises InputError, with the byte's position, at the first instruction that could do more than
    make plain data, and for a pickle that is cut off, malformed or too large.
    """
    machine, count, position = _Machine(), 0, 0
    try:
        for opcode, argument, at in pickletools.genops(data):
            count, position = count + 1, at or 0
            if count > MAX_INSTRUCTIONS:
                raise _Refused(f"more than {MAX_INSTRUCTIONS:,} instructions; record fewer events")
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
    except (ValueError, MemoryError, OverflowError, RecursionError) as error:
        reason = str(error)[:160] or type(error).__name__
        raise InputError(f"{origin}, byte {position:,}: not a pickle of plain data: {reason}") from None
    if len(machine.stack) != 1 or machine.marks:
        raise InputError(f"{origin}, byte {position:,}: not a pickle of plain data: it ends early")
    return machine.stack[0]
