"""Directions of imports: strategies know the standard library only, and heavy ones stay in place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def who_imports(package: str) -> set[str]:
    """Modules that import a package; probes are scripts for the interpreters of others."""
    files = [*ROOT.glob("planner/**/*.py"), *ROOT.glob("strategies/**/*.py")]
    files = [file for file in files if file.parent.name != "probes"]
    return {
        str(file.relative_to(ROOT))
        for file in files
        if any(name.split(".")[0] == package for name in imports(file))
    }


def test_strategies_import_the_standard_library_and_each_other_only() -> None:
    for file in ROOT.glob("strategies/*.py"):
        for name in imports(file):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top == "strategies", f"{file.name} imports {name}"


def test_a_strategy_does_not_see_the_others_but_what_it_extends() -> None:
    extends = {"zero2": {"zero1"}, "fsdp": {"zero3"}}
    names = {file.stem for file in ROOT.glob("strategies/*.py")} - {"__init__", "base", "layout"}
    for name in names:
        seen = {
            n.split(".")[1] for n in imports(ROOT / f"strategies/{name}.py") if n.startswith("strategies.")
        }
        assert seen - {"base"} <= extends.get(name, set())


def test_heavy_packages_have_a_home_each() -> None:
    assert who_imports("pulp") == {"planner/program.py"}
    renderers = {
        "planner/render.py",
        "planner/render_advice.py",
        "planner/render_alternatives.py",
        "planner/render_audit.py",
        "planner/render_cluster.py",
        "planner/render_compare.py",
        "planner/render_explain.py",
        "planner/render_cost.py",
        "planner/render_infer.py",
        "planner/render_measure.py",
        "planner/render_offload.py",
        "planner/render_plans.py",
        "planner/render_preflight.py",
        "planner/render_sweep.py",
        "planner/render_validate.py",
    }
    assert who_imports("rich") == renderers
    assert who_imports("typer") == {
        "planner/cli.py",
        "planner/cli_audit.py",
        "planner/cli_cluster.py",
        "planner/cli_launch.py",
        "planner/cli_plans.py",
        "planner/cli_preflight.py",
        "planner/cli_report.py",
        "planner/cli_serve.py",
        "planner/options.py",
    }
    for package in ("joblib", "dask", "distributed", "ray"):
        assert who_imports(package) == {"planner/sweeping.py"}, package
    assert who_imports("pyarrow") == {"planner/sweep_files.py"}
    assert who_imports("starlette") == {"planner/web/app.py"}
    assert who_imports("uvicorn") == {"planner/web/server.py"}
    for package in ("torch", "transformers"):
        assert {str(Path(file).parent) for file in who_imports(package)} == {"planner/truth"}, package


def test_prices_know_no_solver_no_rendering_and_no_plan() -> None:
    lower = ("layers", "layouts", "candidate", "stages", "network", "bounds", "defaults", "specs")
    lower += ("replay", "ledger", "stacks/base", "families/__init__", "unplanned", "shape")
    upper = {
        "planner.plan",
        "planner.api",
        "planner.render",
        "planner.cli",
        "planner.program",
        "planner.best_first",
    }
    for name in lower:
        assert not upper & set(imports(ROOT / f"planner/{name}.py", top_level_only=True)), name


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "{'numpy', 'pydantic', 'pulp', 'networkx', 'rich', 'typer'}"
    code = f"import sys, planner; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_files_stay_readable_in_one_sitting() -> None:
    longest = max(
        len(f.read_text().splitlines())
        for f in [*ROOT.glob("planner/**/*.py"), *ROOT.glob("strategies/*.py")]
    )
    assert longest <= 480
