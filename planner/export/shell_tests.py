"""Arithmetic and tests of a bash script, as far as their values are known."""

from __future__ import annotations

import re
from typing import Any

from planner.export.shell_expand import MARKS, MOST_DEPTH, Expander, marked, unknown_in


class Calculator(Expander):
    """Words, and what is worked out with them."""

    def number(self, node: Any | None, whole: Any) -> str:
        """What an arithmetic expression comes to, as text; a mark of what is not known in it."""
        missing: dict[str, None] = {}
        value = None if node is None else self.arithmetic(node, missing)
        return marked(",".join(missing) or self.text(whole)) if value is None else str(value)

    def arithmetic(self, node: Any, missing: dict[str, None]) -> int | None:
        """A whole number of 64 bits as bash has them, or None; names that are not known go to ``missing``."""
        self.step()
        self.depth += 1
        try:
            if self.depth > MOST_DEPTH:
                return None
            return self._arithmetic(node, missing)
        finally:
            self.depth -= 1

    def _arithmetic(self, node: Any, missing: dict[str, None]) -> int | None:
        kind, children = node.type, node.children
        if kind in ("parenthesized_expression", "arithmetic_expansion"):
            inner = node.named_children
            return self.arithmetic(inner[0], missing) if len(inner) == 1 else None
        if kind == "binary_expression" and len(children) == 3:
            return self._operate(children, missing)
        if kind in ("unary_expression", "postfix_expression") and len(children) == 2:
            first, last = children
            operator = first.type if kind == "unary_expression" else last.type
            operand = last if kind == "unary_expression" else first
            value = self.arithmetic(operand, missing)
            if value is not None and operator in ("++", "--"):
                changed = value + (1 if operator == "++" else -1)
                self.assign(self.text(operand), {"0": str(changed)})
                return changed if kind == "unary_expression" else value
            signed = {"-": -value, "+": value, "!": int(not value)} if value is not None else {}
            return signed.get(operator)
        if kind == "ternary_expression" and len(children) == 5:
            test = self.arithmetic(children[0], missing)
            return None if test is None else self.arithmetic(children[2 if test else 4], missing)
        if kind in ("variable_name", "word") and not self.text(node).isdigit():
            name = self.text(node)
            value_text = self.value_of(name)
            text = marked(name) if value_text is None else value_text or "0"
        else:
            text = self.joined(node)
        if unknown := unknown_in(text):
            missing.update(dict.fromkeys(unknown))
            return None
        text = text.strip()
        return int(text) if re.fullmatch(r"-?\d{1,18}", text) else None

    def _operate(self, children: list[Any], missing: dict[str, None]) -> int | None:
        operator = children[1].type
        right = self.arithmetic(children[2], missing)
        if operator in ("=", "+=", "-=", "*=", "/="):
            name = self.text(children[0])
            left = 0 if operator == "=" else self.arithmetic(children[0], missing)
            value = right if operator == "=" else _binary(operator[0], left, right)
            self.assign(name, {"0": marked(name) if value is None else str(value)})
            return value
        return _binary(operator, self.arithmetic(children[0], missing), right)

    def holds(self, node: Any) -> bool | None:
        """Whether a test is true; None where that is not known. A variable never set counts as empty."""
        self.step()
        self.depth += 1
        try:
            return None if self.depth > MOST_DEPTH else self._holds(node)
        finally:
            self.depth -= 1

    def _holds(self, node: Any) -> bool | None:
        kind = node.type
        children = [child for child in node.children if child.type not in ("[", "]", "[[", "]]", "(", ")")]
        if kind == "compound_statement" or (kind == "test_command" and self.text(node).startswith("((")):
            inner = node.named_children
            number = self.arithmetic(inner[0], {}) if len(inner) == 1 else None
            return None if number is None else bool(number)
        if kind in ("test_command", "parenthesized_expression"):
            return self.holds(children[0]) if len(children) == 1 else None
        if kind == "unary_expression" and len(children) == 2:
            operator = self.text(children[0])
            if operator == "!":
                inside = self.holds(children[1])
                return None if inside is None else not inside
            if operator not in ("-z", "-n"):
                return None
            value = self._tested(children[1])
            return None if value is None else (value == "") is (operator == "-z")
        if kind == "binary_expression" and len(children) >= 3:
            return self._compares(children)
        if not kind.endswith(("word", "string", "expansion", "number", "concatenation")):
            return None
        value = self._tested(node)
        return None if value is None else value != ""

    def _compares(self, children: list[Any]) -> bool | None:
        operator = self.text(children[1])
        if operator in ("&&", "||", "-a", "-o"):
            left, right = self.holds(children[0]), self.holds(children[2])
            stops = operator in ("||", "-o")  # the value that settles it
            if stops in (left, right):
                return stops
            return None if None in (left, right) else not stops
        left_text, parts = self._tested(children[0]), [self._tested(child) for child in children[2:]]
        if left_text is None or None in parts:
            return None
        right_text = "".join(part or "" for part in parts)
        if operator in ("=", "==", "!="):
            from fnmatch import fnmatchcase
            from glob import escape

            pattern = "".join(
                escape(part or "") if child.type in ("string", "raw_string") else part or ""
                for child, part in zip(children[2:], parts, strict=True)
            )
            return fnmatchcase(left_text, pattern) is (operator != "!=")
        numbers = [int(t) if re.fullmatch(r"\s*-?\d{1,18}\s*", t) else None for t in (left_text, right_text)]
        value = _binary(
            {"-eq": "==", "-ne": "!=", "-lt": "<", "-le": "<=", "-gt": ">", "-ge": ">="}.get(
                operator, operator
            ),
            *numbers,
        )
        return None if value is None else bool(value)

    def _tested(self, node: Any) -> str | None:
        """The text of a test's operand; None where it is not known."""
        text = self.joined(node)
        missing = unknown_in(text)
        if any("$" in name or name in self.variables for name in missing):
            return None
        self.unset.update(dict.fromkeys(missing))
        return MARKS.sub("", text)


def _binary(operator: str, left: int | None, right: int | None) -> int | None:
    if left is None or right is None or (operator in ("/", "%") and right == 0):
        return None
    if operator == "**" and not 0 <= right <= 63:
        return None
    table: dict[str, Any] = {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        "/": lambda: abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1),
        "%": lambda: abs(left) % abs(right) * (1 if left >= 0 else -1),
        "**": lambda: left**right,
        "==": lambda: left == right,
        "!=": lambda: left != right,
        "<": lambda: left < right,
        "<=": lambda: left <= right,
        ">": lambda: left > right,
        ">=": lambda: left >= right,
        "&&": lambda: bool(left and right),
        "||": lambda: bool(left or right),
    }
    if operator not in table:
        return None
    value = int(table[operator]())
    return value if abs(value) < 2**63 else None
