"""A sweep as CSV, JSON or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner import __version__
from planner.errors import InputError
from planner.files import write_whole
from planner.pareto import MEASURES
from planner.sweep_row import Row
from planner.sweeping import Sweep

SCHEMA = "planner.sweep/1"


def document(sweep: Sweep) -> dict[str, Any]:
    """The JSON of a sweep."""
    return {
        "schema": SCHEMA,
        "planner": __version__,
        "points": sweep.points,
        "repeated": sweep.repeated,
        "complete": sweep.complete,
        "front_of": list(MEASURES),
        "rows": [row.model_dump() for row in sweep.rows],
    }


def read_rows(path: Path) -> list[Row]:
    """The rows of a sweep's JSON. Raises InputError for what is none."""
    from planner.documents import read_json

    shown, found = read_json(path, SCHEMA, "planner sweep --output sweep.json")
    listed = found.get("rows")
    rows = [Row.read(values) for values in listed] if isinstance(listed, list) else []
    known = [row for row in rows if row is not None]
    if not rows or len(known) < len(rows):
        raise InputError(f"{shown}: not the rows of a sweep of this version: sweep again")
    return known


def as_json(sweep: Sweep) -> str:
    """The document as text."""
    return json.dumps(document(sweep), indent=1) + "\n"


def as_csv(sweep: Sweep) -> str:
    """A line for every row under the names of its fields; empty where there is nothing to say."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in sweep.rows)
    return text.getvalue()


def as_parquet(sweep: Sweep) -> bytes:
    """The same columns, typed."""
    from pyarrow import BufferOutputStream, Table, bool_, field, float64, int64, schema, string
    from pyarrow.parquet import write_table

    kinds = {"int": int64(), "float": float64(), "bool": bool_(), "str": string(), "Verdict": string()}
    columns = [
        field(name, kinds[str(Row.__annotations__[name]).removesuffix(" | None")])
        for name in Row.model_fields
    ]
    buffer = BufferOutputStream()
    table = Table.from_pylist([row.model_dump() for row in sweep.rows], schema=schema(columns))
    write_table(table, buffer, compression="zstd")
    return bytes(buffer.getvalue().to_pybytes())


WRITERS: dict[str, Callable[[Sweep], str | bytes]] = {
    ".csv": as_csv,
    ".json": as_json,
    ".parquet": as_parquet,
}
"""By the end of the file's name."""


def check_output(path: Path) -> None:
    """Raises InputError, before anything is searched, for a file that could not be written afterwards."""
    if path.suffix.lower() not in WRITERS:
        raise InputError(f"--output {path}: name a file that ends in {', '.join(WRITERS)}")
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise InputError(f"--output {path} cannot be written: {what}")
    if path.suffix.lower() == ".parquet":
        from importlib.util import find_spec

        if find_spec("pyarrow") is None:
            extra = "pip install 'distributed-training-planner[parquet]'"
            raise InputError(f"--output {path}: Parquet needs pyarrow, which is not installed: {extra}")


def write(sweep: Sweep, path: Path) -> None:
    """Writes a sweep whole or not at all, in the format of the file's name."""
    write_whole(path, WRITERS[path.suffix.lower()](sweep), f"--output {path}", "sweep.csv")
