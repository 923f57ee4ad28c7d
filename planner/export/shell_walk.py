"""The statements of a bash script, followed with the variables that they set: branches, loops, functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from planner.errors import InputError
from planner.export.shell_expand import MARKS, MOST_DEPTH, Value, marked, parse, shown, unknown_in
from planner.export.shell_tests import Calculator
from planner.files import plain

SHELLS = ("bash", "sh", "zsh")
MOST_ROUNDS = 1000
"""Of one loop."""


@dataclass(frozen=True)
class Command:
    """One command: its words, the environment that it runs in, where it is, and whether it surely runs."""

    words: tuple[str, ...]
    env: Mapping[str, str]
    line: int
    sure: bool


class Walker(Calculator):
    """Walks a script's syntax tree with the variables that it sets."""

    def __init__(self, known: Mapping[str, str], files: Mapping[str, str], fixed: set[str]) -> None:
        super().__init__(known)
        self.given = {name: value for name, value in known.items() if name in fixed}
        self.files = files
        self.exported: set[str] = set(known)
        self.functions: dict[str, tuple[Any, bytes]] = {}
        self.commands: list[Command] = []
        self.left = ""  # exit, return, break or continue, on its way out
        self.sure = True
        self.line_of = ""

    def note(self, node: Any | None, text: str) -> None:
        where = f"{self.line_of}line {node.start_point[0] + 1}: " if node is not None else ""
        if len(self.notes) < 100:
            self.notes[plain(MARKS.sub(lambda m: m[1], where + text), 300)] = None

    @contextmanager
    def deeper(self) -> Iterator[None]:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise InputError("this script is nested too deeply to be read: give a file with the flags alone")
        try:
            yield
        finally:
            self.depth -= 1

    def read(self, text: str) -> None:
        """Follows a script, or text that is run as one, in the variables as they are."""
        with self.deeper():
            before, (root, self.source) = self.source, parse(text)
            try:
                self.run(root)
            finally:
                self.source = before

    def run_all(self, nodes: list[Any]) -> bool | None:
        """Follows statements in order; says how the last one ended."""
        ended: bool | None = True
        for node in nodes:
            if self.left:
                break
            ended = self.run(node)
        return ended

    def run(self, node: Any) -> bool | None:
        """Follows one statement; says whether it ended well, None where that is not known."""
        self.step()
        with self.deeper():
            way = getattr(self, f"_{node.type}", None)
            if way is not None:
                done: bool | None = way(node)
                return done
            if node.type == "ERROR" or node.is_missing:
                self.note(node, f"{plain(self.text(node), 40)} is not read: bash may not take it either")
            return self.run_all(node.named_children) if node.named_children else True

    # Statements

    def _comment(self, node: Any) -> bool:
        return True

    _heredoc_redirect = _file_redirect = _herestring_redirect = _comment

    def _variable_assignment(self, node: Any) -> bool:
        self._set(node)
        return True

    def _set(self, node: Any) -> str:
        """An assignment; the variable's name."""
        target, operator = node.children[0], node.children[1].type if len(node.children) > 1 else "="
        value = node.children[2] if len(node.children) > 2 else None
        index = None
        if target.type == "subscript":
            index = self.joined(target.children[2]) if len(target.children) > 2 else "0"
            target = target.children[0]
        name = self.text(target)
        old = self.variables.get(name)
        if value is not None and value.type == "array":
            words = [word for child in value.named_children for word in self.fields(child)]
            first = max((int(i) for i in old or {} if i.isdigit()), default=-1) + 1 if operator == "+=" else 0
            made: Value = dict(old or {}) if operator == "+=" else {}
            for number, word in enumerate(words):
                keyed = re.fullmatch(r"\[([^\]]+)\]=(.*)", word, re.S)
                made[keyed[1] if keyed else str(first + number)] = keyed[2] if keyed else word
            self.assign(name, made)
            return name
        text = self.joined(value)
        place = index or "0"
        if operator == "+=":
            text = (old or {}).get(place, "") + text
        self.assign(name, {**(old or {}), place: text} if index is not None else {"0": text})
        return name

    def _declaration_command(self, node: Any) -> bool:
        kind = node.children[0].type
        exports = kind == "export" or any(self.text(child) == "-x" for child in node.children)
        for child in node.named_children:
            name = ""
            if child.type == "variable_assignment":
                name = self._set(child)
            elif child.type == "variable_name":
                name = self.text(child)
            if name and exports:
                self.exported.add(name)
        return True

    def _unset_command(self, node: Any) -> bool:
        for child in node.named_children:
            name = self.text(child)
            if name not in self.given:
                self.variables.pop(name, None)
                self.exported.discard(name)
                if name in ("CUDA_DEVICE_MAX_CONNECTIONS",):
                    self.variables[name] = {}
        return True

    def _function_definition(self, node: Any) -> bool:
        name, body = node.child_by_field_name("name"), node.child_by_field_name("body")
        if name is not None and body is not None:
            self.functions[self.text(name)] = (body, self.source)
        return True

    def _subshell(self, node: Any) -> bool | None:
        before = self._saved()
        ended = self.run_all(node.named_children)
        self._restore(before)
        self.left = ""
        return ended

    def _pipeline(self, node: Any) -> bool:
        self.run_all(node.named_children)
        return True

    def _redirected_statement(self, node: Any) -> bool | None:
        body = node.child_by_field_name("body")
        for child in node.children:
            if child.type == "heredoc_redirect":
                self._here(node, body, child)
        return self.run(body) if body is not None else True

    def _here(self, node: Any, body: Any | None, redirect: Any) -> None:
        """A here-document: what a shell is handed is a script, what is written to a file is that file's."""
        parts = {child.type: child for child in redirect.children}
        start, inside = parts.get("heredoc_start"), parts.get("heredoc_body")
        if start is None or inside is None:
            return
        quoted = self.text(start)[:1] in ("'", '"', "\\")
        text = self.text(inside) if quoted else self._expanded(inside)
        words = self.text(body).split() if body is not None else []
        if any(word.rpartition("/")[2] in (*SHELLS, "sbatch") for word in words):
            before = self._saved()
            self.read(text)
            self._restore(before)
            return
        targets = [child for child in (*node.children, *redirect.children) if child.type == "file_redirect"]
        for target in targets:
            named = [*target.named_children][-1:]
            if named:
                self.files = {**self.files, self.joined(named[0]): text}

    def _expanded(self, node: Any) -> str:
        made, place = [], node.start_byte
        for child in node.named_children:
            if child.type == "heredoc_content":
                continue
            made += [self._literal(place, child.start_byte), self.joined(child)]
            place = child.end_byte
        return "".join([*made, self._literal(place, node.end_byte)])

    def _list(self, node: Any) -> bool | None:
        left, operator, right = node.children[0], node.children[1].type, node.children[-1]
        first = self.run(left)
        wanted = operator == "&&"
        if self.left or first is (not wanted):
            return first
        if first is wanted:
            return self._tentatively(left, lambda: self.run(right))
        ends: list[bool | None] = []
        self._either([lambda: ends.append(self.run(right)), lambda: None], left)
        return None

    def _test_command(self, node: Any) -> bool | None:
        return self.holds(node)

    def _compound_statement(self, node: Any) -> bool | None:
        if self.text(node).startswith("(("):
            return self.holds(node)
        return self.run_all(node.named_children)

    def _negated_command(self, node: Any) -> bool | None:
        inside = self.run_all(node.named_children)
        return None if inside is None else not inside

    # Ways that depend on a test

    def _if_statement(self, node: Any) -> bool | None:
        """The tests in order with what each leads to; where one is not known, both ways."""
        ways: list[tuple[Any | None, list[Any]]] = []
        children, rest = [c for c in node.children if c.is_named], []
        if children:
            rest = [c for c in children[1:] if c.type not in ("elif_clause", "else_clause")]
            ways.append((children[0], rest))
        for child in children[1:]:
            own = list(child.named_children)
            if child.type == "elif_clause" and own:
                ways.append((own[0], own[1:]))
            elif child.type == "else_clause":
                ways.append((None, own))
        return self._first_of(ways)

    def _first_of(self, ways: list[tuple[Any | None, list[Any]]]) -> bool | None:
        if not ways:
            return True
        (test, body), rest = ways[0], ways[1:]
        outcome = True if test is None else self.run(test)
        if outcome is True:
            return self._tentatively(test, lambda: self.run_all(body))
        if outcome is False:
            return self._first_of(rest)
        self._either([lambda: self.run_all(body), lambda: self._first_of(rest)], test)
        return None

    def _tentatively(self, test: Any | None, way: Callable[[], bool | None]) -> bool | None:
        """A way that leaves the script because something is not given is not taken: the rest is asked for."""
        before = self._saved()
        ended = way()
        if self.left == "exit" and test is not None:
            found = self.commands
            self._restore(before)
            self.commands, self.left = found, ""
            self.note(test, f"{plain(self.text(test), 80)} leaves the script: read on as if it did not")
        return ended

    def _case_statement(self, node: Any) -> bool | None:
        value = node.child_by_field_name("value")
        text = MARKS.sub("", self.joined(value)) if value is not None else ""
        missing = unknown_in(self.joined(value)) if value is not None else ()
        if any("$" in name or name in self.variables for name in missing):
            items = [lambda c=c: self.run_all(self._body(c)) for c in _items(node)]
            self._either([*items, lambda: None], value)
            return None
        self.unset.update(dict.fromkeys(missing))
        for item in _items(node):
            for pattern in self._patterns(item):
                if fnmatchcase(text, pattern):
                    return self.run_all(self._body(item))
        return True

    def _patterns(self, item: Any) -> list[str]:
        patterns = []
        for child in item.children:
            if child.type == ")":
                break
            if child.is_named:
                patterns.append(self.joined(child))
        return patterns

    def _body(self, item: Any) -> list[Any]:
        kinds = [child.type for child in item.children]
        start = kinds.index(")") + 1 if ")" in kinds else 0
        return [child for child in item.children[start:] if child.is_named]

    def _either(self, ways: list[Callable[[], Any]], test: Any) -> None:
        """Follows each way from here, and goes on with what they have in common."""
        before, was_sure = self._saved(), self.sure
        ends = []
        self.sure = False
        for way in ways:
            self._restore(before)
            way()
            if self.left != "exit":
                ends.append(self._saved())
            self.left = ""
        self.sure = was_sure
        self._restore(before)
        if not ends:
            return
        names = dict.fromkeys(name for variables, *_ in ends for name in variables)
        apart: list[str] = []
        for name in names:
            values = [variables.get(name) for variables, *_ in ends]
            if all(value == values[0] for value in values):
                if values[0] is not None:
                    self.variables[name] = values[0]
                continue
            self.variables[name], told = _common(name, values)
            apart.append(f"{name} ({told})" if told else name)
        if apart:
            held = plain(self.text(test), 80)
            self.note(test, f"whether {held} holds is not known: nor is what it sets in {', '.join(apart)}")

    def _saved(self) -> tuple[dict[str, Value], set[str], list[str], dict[str, tuple[Any, bytes]]]:
        return dict(self.variables), set(self.exported), list(self.arguments), dict(self.functions)

    def _restore(self, saved: tuple[Any, ...]) -> None:
        self.variables, self.exported = dict(saved[0]), set(saved[1])
        self.arguments, self.functions = list(saved[2]), dict(saved[3])

    # Loops

    def _for_statement(self, node: Any) -> bool:
        children = node.named_children
        name, body = self.text(children[0]), children[-1]
        values = [word for child in children[1:-1] for word in self.fields(child)]
        if any(unknown_in(value) for value in values):
            self.note(node, "a loop whose values are not known is followed once")
            self._either([lambda: self._round(name, marked(name), body), lambda: None], children[0])
            return True
        for value in values[:MOST_ROUNDS]:
            self._round(name, value, body)
            if self._stopped():
                break
        return True

    def _round(self, name: str, value: str, body: Any) -> None:
        self.assign(name, {"0": value})
        self.run(body)

    def _stopped(self) -> bool:
        stopped = self.left not in ("", "continue")
        if self.left in ("break", "continue"):
            self.left = ""
        return stopped

    def _while_statement(self, node: Any) -> bool:
        test, body = node.named_children[0], node.named_children[-1]
        wanted = node.children[0].type != "until"
        for _ in range(MOST_ROUNDS):
            outcome = self.run(test)
            if outcome is None:
                self.note(node, "a loop whose end is not known is followed once")
                self._either([lambda: self.run(body), lambda: None], test)
                return True
            if outcome is not wanted:
                return True
            self.run(body)
            if self._stopped():
                return True
        return True

    def _c_style_for_statement(self, node: Any) -> bool:
        self.note(node, "a counting loop is followed once")
        self._either([lambda: self.run(node.named_children[-1]), lambda: None], node)
        return True


def _items(node: Any) -> list[Any]:
    return [child for child in node.named_children if child.type == "case_item"]


def _common(name: str, values: list[Value | None]) -> tuple[Value, str]:
    """What all ways leave in a variable: elements or words that they begin with alike, and a mark."""
    lists = [list((value or {}).values()) for value in values]
    if all(len(one) <= 1 for one in lists):
        split = [(one[0] if one else "").split() for one in lists]
        shared = _alike(split)
        rest = [" ".join(words[shared:]) for words in split]
        longest = max(rest, key=len)
        if not any(words[:1] and words[0].startswith("-") for words in split):
            return {"0": marked(name)}, shown(plain(" or ".join(one or "nothing" for one in rest), 80))
        return {"0": " ".join([*split[0][:shared], marked(name)])}, shown(plain(longest, 80))
    shared = _alike(lists)
    kept = {str(number): text for number, text in enumerate(lists[0][:shared])}
    longest = max((" ".join(one[shared:]) for one in lists), key=len)
    return {**kept, str(shared): marked(name)}, shown(plain(longest, 120))


def _alike(lists: list[list[str]]) -> int:
    count = 0
    for same in zip(*lists, strict=False):
        if len(set(same)) > 1:
            break
        count += 1
    return count
