"""Where torch is and is not: it is an extra, and only ``planner.truth`` imports it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from planner import TrainingSpec
from planner.errors import InputError
from planner.measure import INSTALL, measure

ROOT = Path(__file__).parents[2]


def test_without_torch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="measuring needs torch and transformers") as caught:
        measure("gpt2-small", TrainingSpec(framework="hf"))
    assert INSTALL in str(caught.value)


def test_torch_has_one_home() -> None:
    for file in [*ROOT.glob("planner/**/*.py"), *ROOT.glob("strategies/**/*.py")]:
        if file.parent.name in ("truth", "probes"):  # probes are run by the interpreters of others
            continue
        names = [
            name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
        ]
        assert not [name for name in names if name.split(".")[0] in ("torch", "transformers")], file


def test_measuring_is_not_loaded_before_it_is_asked_for() -> None:
    code = "import sys, planner.measure, planner.cli_measure; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
