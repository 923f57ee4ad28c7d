"""Fields of custom resources as their definitions have them: tests/data/kubernetes_fields.json.

The table has every field that is written, with its type and limits, from the definition that ``source``
names. Pods' templates have a schema of their own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "kubernetes_fields.json").read_text())
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


def problems(document: Any, generation: str = "") -> list[str]:
    """What a resource's definition does not know, or has otherwise; ``generation`` of a kind, as in 2.1."""
    fields = TABLE[f"{document['apiVersion']} {document['kind']}{generation}"]["fields"]
    rest = {key: value for key, value in document.items() if key not in ("apiVersion", "kind", "metadata")}
    return list(_walk(fields, rest, ""))


def _walk(fields: dict[str, Any], value: Any, path: str) -> Any:
    if path:
        known = fields.get(path) or fields.get(re.sub(r"\.[^.]*$", ".*", path))
        if known is None:
            yield f"{path} is not known"
            return
        if known["type"] == "pod template":
            return
        yield from _of_value(known, value, path)
        path = path if path in fields else re.sub(r"\.[^.]*$", ".*", path)
    if isinstance(value, dict):
        for key, one in value.items():
            wild = f"{path}.*" in fields
            yield from _walk(fields, one, f"{path}.*" if wild else f"{path}.{key}".strip("."))
    elif isinstance(value, list):
        for one in value:
            yield from _walk(fields, one, f"{path}[]")


def _of_value(known: dict[str, Any], value: Any, path: str) -> Any:
    kind = known.get("type")
    fits = isinstance(value, (int, str) if kind == "int-or-string" else TYPES[str(kind)])
    if not fits or (isinstance(value, bool) and kind != "boolean"):
        yield f"{path} is {value!r}, not {kind}"
        return
    if value not in known.get("enum", [value]):
        yield f"{path} is {value!r}, not one of {known['enum']}"
    if isinstance(value, str) and not re.search(known.get("pattern", ""), value):
        yield f"{path} is {value!r}, not {known['pattern']}"
    if isinstance(value, int) and not known.get("minimum", value) <= value <= known.get("maximum", value):
        yield f"{path} is {value}, out of range"
    if isinstance(value, (str, list)):
        unit = "Items" if isinstance(value, list) else "Length"
        if not known.get(f"min{unit}", 0) <= len(value) <= known.get(f"max{unit}", len(value)):
            yield f"{path} has {len(value)}, too few or too many"
    if isinstance(value, dict):
        yield from (f"{path} lacks {one}" for one in known.get("required", ()) if one not in value)


def kueue_problems(documents: list[Any]) -> list[str]:
    """What Kueue's rules across fields refuse (kueue 0.19.2, the definitions' x-kubernetes-validations)."""
    found = []
    by_kind = {one["kind"]: one["spec"] for one in documents}
    levels = [one["nodeLabel"] for one in by_kind["Topology"]["levels"]]
    if len(set(levels)) < len(levels) or "kubernetes.io/hostname" in levels[:-1]:
        found.append("levels: each once, the host's last")
    flavor = by_kind["ResourceFlavor"]
    if flavor.get("topologyName") and not flavor.get("nodeLabels"):
        found.append("a flavor with a topology has a node label")
    for group in by_kind["ClusterQueue"]["resourceGroups"]:
        for one in group["flavors"]:
            if [resource["name"] for resource in one["resources"]] != group["coveredResources"]:
                found.append("a flavor's resources are those that the group covers, in order")
    return found
