"""Every example in the README and in docs/ is run.

In a ``console`` block each ``$ planner ...`` line is run at 100 columns and the lines below it must
be in its output, one after the other; a line ``...`` stands for lines left out. How long a search
took is not compared. A ``python`` block is a doctest. The commands of a page run one after the other
in a folder of their own, where the repository's are too; ``> FILE`` writes what a command prints.
"""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOOK = re.compile(r"in [\d.,]+ m?s\b")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def tidy(lines: list[str]) -> list[str]:
    return [TOOK.sub("in T", line.rstrip()) for line in lines]


def examples() -> list[tuple[str, str, list[str]]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "console"):
            command, expected = "", list[str]()
            for line in block.splitlines():
                if line.startswith("$ "):
                    if command:
                        found.append((page.name, command, expected))
                    command, expected = line[2:], []
                else:
                    expected.append(line)
            found.append((page.name, command, expected))
    return [one for one in found if one[1].startswith("planner ")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for the files of each page, by name."""
    made = {}
    for page in PAGES:
        made[page.name] = folder = tmp_path_factory.mktemp(page.stem)
        for name in ("docs", "examples", "tests"):
            (folder / name).symlink_to(ROOT / name)
    return made


@pytest.mark.parametrize(("page", "command", "expected"), examples())
def test_console_example(
    page: str,
    command: str,
    expected: list[str],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folders[page])
    words, _, file = command.partition(" > ")
    result = CliRunner().invoke(app, shlex.split(words)[1:], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if file:
        Path(file).write_text(result.stdout)
        assert not expected
    output, position, anywhere = tidy(result.output.splitlines()), 0, True
    for line in tidy(expected):
        if line == "...":
            anywhere = True
            continue
        rest = output[position:] if anywhere else output[position : position + 1]
        assert line in rest, f"{page}: {command}\nmissing: {line!r}\nin:\n{result.output}"
        position += rest.index(line) + 1
        anywhere = False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples(page: Path) -> None:
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    source = "\n".join(blocks(page, "python"))
    test = parser.get_doctest(source, {}, page.name, str(page), 0)
    runner.run(test)
    assert runner.failures == 0


def test_there_are_examples_and_links_lead_somewhere() -> None:
    assert len(examples()) >= 5
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_of_rows_is_what_the_tables_say() -> None:
    check = subprocess.run(
        [sys.executable, "scripts/terms", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
