"""Where every rank runs: its node, its GPU there, and its place in the groups of the layout.

Frameworks number ranks over nodes in the order in which the nodes are started, so a placement is an order of
nodes. In all of them the ranks of a pipeline stage follow each other where pipeline parallelism is the
outermost axis: a stage is then a block of nodes, and blocks are what is kept together under a leaf switch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.export.base import Subject


def stage_nodes(subject: Subject) -> int | None:
    """Nodes that one pipeline stage fills, which follow each other; all of them where there is one stage.

    None where a stage is no block of whole nodes: where it fills a node in part, or where pipeline
    parallelism is not the outermost axis of the rank order.
    """
    layout, whole = subject.layout, subject.per_node * layout.pipeline_parallel
    outermost = layout.pipeline_parallel == 1 or layout.rank_order.endswith("-pp")
    return subject.plan.num_gpus // whole if outermost and subject.plan.num_gpus % whole == 0 else None
