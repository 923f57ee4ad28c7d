"""The commands of a bash script: what they do to its variables, and which of them start something else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from planner.export.shell_expand import marked, parse, shown, unknown_in
from planner.export.shell_text import arguments, checked
from planner.export.shell_walk import SHELLS, Command, Walker
from planner.files import plain


class Reader(Walker):
    """A whole script with its commands. None of them is run."""

    def _command(self, node: Any) -> bool | None:
        own: dict[str, str] = {}
        words: list[str] = []
        for child in node.named_children:
            if child.type == "variable_assignment":
                kept = dict(self.variables)
                name = self._set(child)
                own[name] = self.value_of(name) or ""
                self.variables = kept
            elif child.type == "command_name":
                words += [word for inner in child.children for word in self.fields(inner)]
            elif child.type in ("herestring_redirect", "file_redirect", "heredoc_redirect"):
                continue
            else:
                words += self.fields(child)
        return self._ran(node, words, own)

    def _ran(self, node: Any, words: list[str], own: dict[str, str]) -> bool | None:
        """What a command does to variables; or that it runs, with its words."""
        while words and words[0] in ("exec", "command", "builtin", "time", "nohup"):
            words = words[1:]
        if not words:
            return True
        name, rest = words[0], words[1:]
        if name in ("exit", "return", "break", "continue"):
            self.left = name
            return None
        if name in (":", "true"):
            return True
        if name == "false":
            return False
        if name in ("test", "["):
            inside = self.text(node).strip().removeprefix(name).removesuffix("]" if name == "[" else "")
            return self._tested_again(inside)
        if name == "shift":
            del self.arguments[: int(rest[0]) if rest and rest[0].isdigit() else 1]
        elif name == "set" and "--" in rest:
            self.arguments = rest[rest.index("--") + 1 :]
        elif name in ("read", "mapfile", "readarray", "let"):  # their input is not known
            for word in rest:
                if re.fullmatch(r"[A-Za-z_]\w*", target := word.partition("=")[0].rstrip("+*/-")):
                    self.assign(target, {"0": marked(f"$({name})")})
            return None
        elif name in ("source", "."):
            self._source(node, rest)
        elif name == "eval":
            self.read(" ".join(rest))
        elif name in self.functions:
            self._called(name, rest)
        elif name not in ("echo", "printf", "cat", "grep", "sed", "awk", "export"):
            self._launched(node, words, own)
        return True

    def _tested_again(self, inside: str) -> bool | None:
        before, (root, source) = self.source, parse(f"[ {inside} ]")
        self.source = source
        try:
            tests = root.named_children
            return self.holds(tests[0]) if len(tests) == 1 and tests[0].type == "test_command" else None
        finally:
            self.source = before

    def _source(self, node: Any, rest: list[str]) -> None:
        text = self._file(rest[0]) if rest else None
        if text is None:
            self.note(node, f"{shown(rest[0]) if rest else ''} is read there: give that file too")
            return
        kept, self.line_of = self.line_of, f"{plain(rest[0].rpartition('/')[2], 40)}, "
        self.read(checked(rest[0], text))
        self.line_of, self.left = kept, "" if self.left == "return" else self.left

    def _called(self, name: str, rest: list[str]) -> None:
        (body, source), before = self.functions[name], (self.source, self.arguments)
        self.source, self.arguments = source, rest
        with self.deeper():
            self.run(body)
        self.source, self.arguments = before
        self.left = "" if self.left == "return" else self.left

    def _file(self, name: str) -> str | None:
        """A file that was given, by its name without folders."""
        base = name.rpartition("/")[2]
        found = [text for path, text in self.files.items() if path.rpartition("/")[2] == base and base]
        return found[0] if len(found) == 1 else None

    def _launched(self, node: Any, words: list[str], own: dict[str, str]) -> None:
        """A program that is started: one more shell, a script that is given too, or something else."""
        exported = {name: self.value_of(name) or "" for name in self.exported if self.variables.get(name)}
        env = {**exported, **own}
        for place, word in enumerate(words[:-1]):
            is_shell = any(one.rpartition("/")[2] in SHELLS for one in words[:place])
            if is_shell and re.fullmatch(r"-\w*c", word):
                self._inside(words[place + 1], words[place + 3 :], env)
                return
        for place, word in enumerate(words[:20]):
            text = self._file(word) if word.endswith((".sh", ".sbatch", ".slurm")) else None
            if text is not None and text is not self.files.get(self.script):
                self._inside(checked(word, text), words[place + 1 :], env)
                return
        if len(self.commands) < 1000:
            line = node.start_point[0] + 1
            self.commands.append(Command(tuple(words), env, line, self.sure))

    def _inside(self, text: str, arguments: list[str], env: Mapping[str, str]) -> None:
        before = self._saved()
        self.variables |= {name: {"0": value} for name, value in env.items()}
        self.arguments = arguments
        self.read(text)
        self._restore(before)
        self.left = ""

    def substituted(self, node: Any) -> str:
        """``$(cat FILE)`` of a file that is given, and what echo and expr write; else it is not known."""
        inner = node.named_children
        if len(inner) != 1:
            return super().substituted(node)
        source, words = inner[0], []
        if source.type == "file_redirect":
            words = ["cat", *(word for child in source.named_children for word in self.fields(child))]
        elif source.type == "command":
            words = [w for c in source.named_children for i in (c.children or [c]) for w in self.fields(i)]
        text = self._file(words[1]) if len(words) == 2 and words[0] == "cat" else None
        if text is not None:
            return " ".join(arguments(words[1], text))
        if words[:1] == ["expr"] and len(words) > 1:
            return self._counted(" ".join(words[1:]), node)
        if words[:1] == ["echo"] and not any(word.startswith("-") for word in words[1:2]):
            return " ".join(words[1:])
        return super().substituted(node)

    def _counted(self, text: str, node: Any) -> str:
        if unknown := unknown_in(text):
            return marked(",".join(unknown))
        before, (root, self.source) = self.source, parse(f"$(({text}))")
        try:
            found = root
            while found.type != "arithmetic_expansion" and found.named_children:
                found = found.named_children[0]
            return self.joined(found) if found.type == "arithmetic_expansion" else marked(text)
        finally:
            self.source = before
