"""The JSON of commands that answer with plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.specs import ClusterSpec, ModelSpec


def document_of(model: ModelSpec, cluster: ClusterSpec, plans: list[Plan]) -> dict[str, Any]:
    """The JSON of a command that answers with plans."""
    dumped = [plan.model_dump(mode="json") for plan in plans]
    return {
        "schema": "planner.plans/1",
        "model": {"num_parameters": model.num_parameters, **model.model_dump(mode="json")},
        "cluster": {
            "gpu": cluster.gpu.name,
            "num_gpus": cluster.num_gpus,
            "gpus_per_node": cluster.gpus_per_node,
            "nodes_per_leaf": cluster.nodes_per_leaf,
            "oversubscription": cluster.oversubscription,
            "usable_bytes": cluster.gpu.usable_bytes,
            "capacity_bytes": cluster.capacity_bytes,
            "host_memory_bytes": cluster.host_memory_bytes,
            "nvme_bytes": cluster.nvme_bytes,
        },
        "training": dumped[0]["training"],
        "assumptions": dumped[0]["assumptions"],
        "plans": dumped,
        "proof": dumped[0]["proof"],
    }
