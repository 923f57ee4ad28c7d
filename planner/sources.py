"""Where the formulas of exact terms come from: a table by what a term is, and one by strategy."""

from __future__ import annotations

from collections.abc import Mapping

from planner.defaults import Job
from planner.ledger import Entry
from planner.optimizers import OPTIMIZERS
from strategies.layout import Layout

STATES = "Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1"
ROWS: Mapping[str, str] = {
    "megatron": "Korthikanti et al. 2022, arXiv:2205.05198, section 4.1, and Megatron-LM core 0.16 with "
    "Transformer Engine",
    "torchtitan": "counted in torchtitan 0.3.0 under torch 2.13",
    "fsdp": "counted in transformers 5.23.0 under torch 2.13",
    "deepspeed": "counted in transformers 5.23.0 under torch 2.13",
    "hf": "counted in transformers 5.23.0 under torch 2.13",
}
"""What each framework's rows were counted in (docs/model.md; docs/terms.md lists them)."""
MEGATRONS_KERNELS = "kernels", "megatron"
"""The option with which another framework runs Megatron's rows."""
SHARES: Mapping[str, str] = {
    "DDP": "Li et al. 2020, arXiv:2006.15704, section 3",
    "ZeRO-1": "Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1",
    "ZeRO-2": "Rajbhandari et al. 2020, arXiv:1910.02054, section 5.2",
    "ZeRO-3": "Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3",
    "FSDP": "Zhao et al. 2023, arXiv:2304.11277, section 3.2",
    "TP": "Shoeybi et al. 2019, arXiv:1909.08053, section 3",
    "SP": "Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2",
    "CP": "docs/strategies/context_parallel.md",
    "EP": "Lepikhin et al. 2020, arXiv:2006.16668, section 3",
    "recompute": "Korthikanti et al. 2022, arXiv:2205.05198, section 5",
    "offload": "Ren et al. 2021, arXiv:2101.06840, section 4",
    "in flight": "docs/strategies/pipeline_parallel.md",
}
"""Whose the share of each strategy is, by its label."""
BUFFERS: Mapping[str, str] = {
    "gathered input": "docs/strategies/sequence_parallel.md",
    "routed tokens": "docs/strategies/expert_parallel.md",
    "keys and values": "docs/strategies/context_parallel.md",
    "gradients of keys and values": "docs/strategies/context_parallel.md",
    "heads of the whole sequence": "docs/strategies/context_parallel.md",
    "what the pipeline receives": "docs/strategies/pipeline_parallel.md",
    "staging buffer": "docs/offload.md",
    "gradients on their way": "docs/offload.md",
    "parameters on their way": "docs/offload.md",
    "updated weights from the host": "docs/offload.md",
    "temporaries": "docs/optimizers.md",
    "copies of gradients": "docs/optimizers.md",
    "workspace of the matrix libraries": "docs/model.md#outside-tensors",
    "idle room": "docs/model.md#streams-and-pools",
}
"""What is allocated besides the terms, by how its name begins; else it is the data-parallel strategy's."""


def source_of(entry: Entry, job: Job, layout: Layout) -> str:
    """Where a term's formula comes from: its own source if it has one, else that of what it is."""
    if entry.source:
        return entry.source
    if not entry.dims:
        found = (page for name, page in BUFFERS.items() if entry.name.startswith(name))
        return next(found, f"docs/strategies/{layout.sharding}.md")
    match entry.component:
        case "parameters":
            return f"the model's weights (docs/models.md); {job.stack.version}"
        case "gradients":
            return f"{STATES}; {job.stack.version}"
        case "optimizer_states":
            return f"{STATES}; {OPTIMIZERS[job.training.optimizer].source}"
    option, value = MEGATRONS_KERNELS
    other = job.training.options.get(option) == value
    counted = ROWS.get("megatron" if other else job.stack.name, job.stack.version)
    return f"{counted} (docs/terms.md)"
