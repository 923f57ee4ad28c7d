"""Exports in front of the real tools' own parsers, each in an environment of its own (scripts/contract)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

HOME = Path(os.environ.get("PLANNER_CONTRACT", Path(__file__).parents[2] / ".contract"))
WANTED = int(os.environ.get("PLANNER_CONTRACT_PLANS", "200"))
"""Random plans that each tool must take; with fewer than 200, of other cases there are fewer as well."""
JUDGES = Path(__file__).parent / "judges"
PROBES = Path(__file__).parents[2] / "planner" / "probes"
"""Judges that ``planner preflight`` asks too."""


def python_of(environment: str) -> Path:
    """The interpreter of an environment that scripts/contract made; the test is left out without it."""
    python = HOME / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment {environment}: scripts/contract {environment} makes it")
    return python


def judged(environment: str, judge: str, cases: list[Any], timeout: float = 300, **env: str) -> list[Any]:
    """What a judge, a script beside this file, says of each case: JSON to its input, JSON lines back."""
    script = PROBES / judge if (PROBES / judge).exists() else JUDGES / judge
    done = subprocess.run(
        [str(python_of(environment)), str(script)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]
