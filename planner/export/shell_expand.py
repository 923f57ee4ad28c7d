"""What words of a bash script stand for: variables, arrays, arithmetic and tests, as far as they are known.

Bash is parsed by tree-sitter's grammar (tree-sitter-bash); what its words mean is worked out here. Nothing is
executed. What is not known leaves a mark with the variable's name, which is carried along to the command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from planner.errors import InputError
from planner.files import plain

START, END = "\ue000", "\ue001"
MARKS = re.compile(f"{START}([^{END}]*){END}")
MOST_BYTES = 256 * 1024
"""Of a script, or of what is read again as one."""
MOST_MADE = 2_000_000
"""Characters that all expansions make together: ``A=$A$A`` doubles them at every step."""
MOST_STEPS = 200_000
MOST_DEPTH = 80

Value = dict[str, str]
"""A variable: its elements by index. A scalar has one, ``0``."""


def marked(name: str) -> str:
    """What stands for a value that is not known: of a variable, or of a command's output."""
    return START + re.sub(r"[\s\ue000\ue001]+", "\u00b7", plain(name, 80)) + END


def unknown_in(text: str) -> tuple[str, ...]:
    """The names whose values are not known in a word.

    >>> unknown_in("a" + marked("TP")), unknown_in("a")
    (('TP',), ())
    """
    return tuple(dict.fromkeys(name for found in MARKS.findall(text) for name in found.split(",")))


def shown(text: str) -> str:
    """A word as it may be shown.

    >>> shown("--size=" + marked("TP"))
    '--size=$TP'
    """
    return plain(MARKS.sub(lambda m: m[1] if m[1].startswith("$") else f"${m[1]}", text), 200)


def parse(text: str) -> tuple[Any, bytes]:
    """The syntax tree of a script and its bytes. Raises InputError for what is none, or too long to read.

    The parser's recovery from errors may take the square of a text's length: it is given up once the text
    was asked for far more often than valid scripts do.
    """
    import tree_sitter_bash
    from tree_sitter import Language, Parser

    data = text.encode()
    if len(data) > MOST_BYTES:
        raise InputError(f"a script of {len(data):,} bytes: they are read up to {MOST_BYTES:,}")
    left = 2000 + len(data) // 32

    def piece(start: int, point: object) -> bytes:
        nonlocal left
        left -= 1
        return data[start : start + 512] if left > 0 else b""

    tree = Parser(Language(tree_sitter_bash.language())).parse(piece)
    if left <= 0:
        raise InputError("this is no shell script: give the launch script, or a file with the flags alone")
    return tree.root_node, data


class Expander:
    """Variables of a script, and what words come to with them."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = dict(given)
        self.variables: dict[str, Value] = {name: {"0": value} for name, value in given.items()}
        self.arguments = [given[str(n)] for n in range(1, _positional(given) + 1)]
        self.script = "script"
        self.source = b""
        self.notes: dict[str, None] = {}
        self.unset: dict[str, None] = {}
        self.steps = self.made = self.depth = 0

    def substituted(self, node: Any) -> str:
        """What a command writes, where that is known without running it."""
        return marked(self.text(node))

    # Bookkeeping

    def text(self, node: Any) -> str:
        """The source of a node."""
        return self.source[node.start_byte : node.end_byte].decode(errors="replace")

    def step(self, made: int = 0) -> None:
        """Counts work. Raises InputError where a script takes too much of it."""
        self.steps += 1
        self.made += made
        if self.steps > MOST_STEPS or self.made > MOST_MADE:
            raise InputError("this script makes too much to be read: give a file with the flags alone")

    def assign(self, name: str, value: Value) -> None:
        """Sets a variable, unless it was given. Of one set to a command's output the name is not known."""
        if name in self.given:
            return
        self.step(sum(map(len, value.values())))
        self.variables[name] = {
            index: MARKS.sub(lambda m: marked(name) if "$" in m[1] else m[0], text)
            for index, text in value.items()
        }

    def value_of(self, name: str) -> str | None:
        """A scalar, an array's first element or a positional argument; None where nothing was set."""
        if name.isdigit():
            if name == "0":
                return self.script
            place = int(name[:6])
            return self.arguments[place - 1] if place <= len(self.arguments) else None
        if name == "#":
            return str(len(self.arguments))
        if name in ("@", "*"):
            return " ".join(self.arguments)
        found = self.variables.get(name)
        return None if found is None else next(iter(found.values()), "")

    # Words

    def fields(self, node: Any) -> list[str]:
        """The words that one word of a command comes to."""
        made: list[str] = []
        current: str | None = None
        for text, quoted in self.pieces(node):
            if text is None:
                if current is not None:
                    made.append(current)
                current = None
            elif quoted:
                current = (current or "") + text
            else:
                parts = re.split(r"[ \t\n]+", text)
                for number, part in enumerate(parts):
                    if number and current is not None:
                        made.append(current)
                        current = None
                    if part:
                        current = (current or "") + part
        if current is not None:
            made.append(current)
        self.step(sum(map(len, made)))
        return made

    def joined(self, node: Any | None) -> str:
        """The text of a word where it is not split, as on the right of an assignment."""
        if node is None:
            return ""
        text = "".join(" " if part is None else part for part, _ in self.pieces(node))
        self.step(len(text))
        return text

    def pieces(self, node: Any, quoted: bool = False) -> Iterator[tuple[str | None, bool]]:
        """Texts of a word with whether they are quoted; None between array elements that stay apart."""
        self.depth += 1
        self.step()
        if self.depth > MOST_DEPTH:
            raise InputError(f"line {node.start_point[0] + 1} is nested too deeply to be read")
        try:
            yield from self._pieces(node, quoted)
        finally:
            self.depth -= 1

    def _pieces(self, node: Any, quoted: bool) -> Iterator[tuple[str | None, bool]]:
        kind = node.type
        if kind in ("string", "translated_string"):
            if not self._is_elements(node):
                yield "", True
            yield from self._string(node)
        elif kind == "raw_string":
            yield self.text(node)[1:-1], True
        elif kind == "ansi_c_string":
            body = re.sub(r"\\(['\"\\])", r"\1", self.text(node)[2:-1])
            yield body.replace("\\n", "\n").replace("\\t", "\t"), True
        elif kind == "concatenation":
            for child in node.children:
                yield from self.pieces(child, quoted)
        elif kind == "simple_expansion":
            yield from self._variable(self.text(node).strip()[1:], quoted)
        elif kind == "expansion":
            yield from self._expansion(node, quoted)
        elif kind == "arithmetic_expansion":
            inner = [child for child in node.children if child.is_named]
            yield self.number(inner[0] if len(inner) == 1 else None, node), quoted
        elif kind == "command_substitution":
            yield self.substituted(node), quoted
        elif kind == "process_substitution":
            yield marked("$(" + self.text(node)[2:]), True
        elif kind == "array":
            for child in node.named_children:
                yield None, False
                yield from self.pieces(child)
        elif kind != "comment":
            yield re.sub(r"\\(.)", r"\1", self.text(node).replace("\\\n", ""), flags=re.S), True

    def _is_elements(self, node: Any) -> bool:
        """Is a string ``"$@"`` or ``"${NAME[@]}"`` alone, which is no word where there are no elements?"""
        return re.fullmatch(r'"(\$@|\$\{@\}|\$\{\w+\[@\]\})"', self.text(node).strip()) is not None

    def _string(self, node: Any) -> Iterator[tuple[str | None, bool]]:
        """Text between double quotes. Blanks before a ``$`` are part of that node in the grammar."""
        place, end = node.start_byte + self.text(node).index('"') + 1, node.end_byte
        end -= self.source[end - 1 : end] == b'"'
        for child in node.named_children:
            if child.type == "string_content":
                continue
            start = child.start_byte
            while self.source[start : start + 1] in (b" ", b"\t", b"\n"):
                start += 1
            if start > place:
                yield self._literal(place, start), True
            for text, _ in self.pieces(child, quoted=True):
                yield text, True
            place = child.end_byte
        if end > place:
            yield self._literal(place, end), True

    def _literal(self, start: int, end: int) -> str:
        text = self.source[start:end].decode(errors="replace").replace("\\\n", "")
        return re.sub(r'\\([$`"\\])', r"\1", text)

    def _variable(self, name: str, quoted: bool) -> Iterator[tuple[str | None, bool]]:
        if name in ("@", "*"):
            yield from self._all(self.arguments, quoted and name == "@", quoted)
            return
        value = self.value_of(name)
        yield marked(name) if value is None else value, quoted

    def _all(self, values: list[str], apart: bool, quoted: bool) -> Iterator[tuple[str | None, bool]]:
        if apart:
            for number, value in enumerate(values):
                if number:
                    yield None, False
                yield value, True
        else:
            yield " ".join(values), quoted

    def _expansion(self, node: Any, quoted: bool) -> Iterator[tuple[str | None, bool]]:
        """``${...}``: a default, an alternative, an element, all elements, their number; else not known."""
        parts = [child for child in node.children if child.type not in ("${", "}")]
        before = parts.pop(0).type if parts and parts[0].type in ("#", "!") and len(parts) > 1 else ""
        if not parts:
            yield marked(self.text(node)), quoted
            return
        named, rest = parts[0], parts[1:]
        name, index = self.text(named), "0"
        if named.type == "subscript":
            inner = named.children
            name, index = self.text(inner[0]), self.joined(inner[2]) if len(inner) > 2 else "0"
        value = self._element(name, index)
        if index in ("@", "*") and name not in "@*" and not rest and before in ("", "#"):
            elements = self.variables.get(name)
            if before:
                yield str(len(elements or {})), quoted
            else:
                whole = list(elements.values()) if elements is not None else [marked(name)]
                yield from self._all(whole, quoted and index == "@", quoted)
            return
        if before == "!":
            target = value or ""
            yield self.value_of(target) or marked(target or name), quoted
            return
        if before == "#":
            known = value is not None and not unknown_in(value)
            yield str(len(value or "")) if known else marked(name), quoted
            return
        if not rest:
            if name in ("@", "*"):
                yield from self._variable(name, quoted)
            else:
                yield marked(name) if value is None else value, quoted
            return
        yield from self._operation(node, name, value, rest, quoted)

    def _operation(
        self, node: Any, name: str, value: str | None, rest: list[Any], quoted: bool
    ) -> Iterator[tuple[str | None, bool]]:
        operator, words = rest[0].type, rest[1:]
        empty = value is None or (operator.startswith(":") and not value)
        if operator in (":-", "-", ":=", "="):
            if not empty:
                yield value, quoted
                return
            if value is None:
                self.unset[name] = None
            made = "".join(self.joined(word) for word in words)
            if "=" in operator:
                self.assign(name, {"0": made})
            if quoted or operator in (":=", "="):
                yield made, quoted
            else:
                for word in words:
                    yield from self.pieces(word)
        elif operator in (":+", "+"):
            if value is None:
                self.unset[name] = None
            yield "" if empty else "".join(self.joined(word) for word in words), quoted
        elif operator in (":?", "?"):
            yield marked(name) if empty or value is None else value, quoted
        elif value is not None and not unknown_in(value) and operator in ("^^", ",,"):
            yield value.upper() if operator == "^^" else value.lower(), quoted
        elif value is not None and not unknown_in(value) and operator in ("#", "##", "%", "%%"):
            yield _cut(value, operator, self.text(words[0]) if words else ""), quoted
        else:
            yield marked(self.text(node) if value is not None else name), quoted

    def _element(self, name: str, index: str) -> str | None:
        if name.isdigit() or name in ("#", "@", "*"):
            return self.value_of(name)
        elements = self.variables.get(name)
        if elements is None or index in ("@", "*"):
            return None
        if not index.lstrip("-").isdigit() and index not in elements:
            index = self.value_of(index) or index
        if index == "0" and "0" not in elements:
            return next(iter(elements.values()), "")
        return elements.get(index, "")

    def number(self, node: Any | None, whole: Any) -> str:
        """What an arithmetic expression comes to; here it is not known."""
        return marked(self.text(whole))


def _positional(given: Mapping[str, str]) -> int:
    count = 0
    while str(count + 1) in given:
        count += 1
    return count


def _cut(value: str, operator: str, pattern: str) -> str:
    """``${NAME##*/}`` and such: the shortest or longest beginning or end that matches is cut off."""
    from fnmatch import fnmatchcase

    if len(value) > 1000 or len(pattern) > 100:
        return marked("$" + pattern)
    pattern = pattern.strip("\"'")
    cuts = list(range(len(value) + 1))
    if operator in ("##", "%"):
        cuts.reverse()
    for cut in cuts:
        if operator[0] == "#" and fnmatchcase(value[:cut], pattern):
            return value[cut:]
        if operator[0] == "%" and fnmatchcase(value[cut:], pattern):
            return value[:cut]
    return value
