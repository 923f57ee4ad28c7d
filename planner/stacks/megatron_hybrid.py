"""Megatron-LM's hybrids: a layer of its ``HybridStack`` has one part, a Mamba-2 mixer, attention or an MLP.

What a Mamba-2 mixer keeps is what its kernels save for their backward (mamba-ssm 2.x,
``mamba_split_conv1d_scan_combined``, called by megatron/core/ssm/mamba_mixer.py with
``use_mamba_mem_eff_path``, its default): the whole output of the product in, the scan's output before the
gate; then the gated norm's input, statistics and output. All else is computed again in the backward, chunk by
chunk (Dao and Gu 2024, arXiv:2405.21060, section 6), and lives only there. In bytes per token of half
precision, of ``d`` inner elements, ``g`` groups of ``n`` states, ``a`` heads and width ``h``:
``4h + 10d + 4gn + 2a + 4g + 4``. Vectors with one element per head are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.stacks import traffic
from planner.stacks.base import BYTE, COMPUTE, FP32, UNTIL_FULL, Row
from strategies.base import Role

H, D, G, A, STATES, PRODUCTS = (
    "batch seq residual",
    "batch seq ssm_heads ssm_head_dim",
    "batch seq ssm_groups state",
    "batch seq ssm_heads",
    "batch seq ssm_heads ssm_head_dim state",
    "batch seq ssm_groups chunk:128",
)
TRANSIENT, BUFFER = Role.TRANSIENT, Role.BUFFER
CHUNK = 128
"""Tokens of a chunk (megatron/core/ssm/mamba_mixer.py, ``chunk_size``), whatever the model's configuration
says: results do not depend on it. A sequence's last chunk counts by its part."""


MAMBA_KEPT = (
    Row("gate and input of the scan", D, 2, steps="core"),
    Row("B and C", G, 2, steps="core"),
    Row("time steps", A, 1, steps="core"),
    Row("scan's output before the gate", D, 1, steps="core"),
    Row("gated scan's output", D, 1, steps="out"),
    Row("gated norm statistics", "batch seq ssm_groups", 1, FP32, steps="out"),
    Row("gated norm's output", D, 1, steps="out"),
    Row("state space input (norm output)", H, 1, steps="qkv"),
    Row("dropout mask after the state space", H, 1, BYTE, when="dropout", steps="out"),
)
# ssd_combined.py, MambaSplitConv1dScanCombinedFn.backward and _mamba_chunk_scan_combined_bwd. Most lives
# either when the states' gradients are passed from chunk to chunk (the step "scan"), or with the gradients of
# B and C and of their products (the step "core"); before, the gated norm's own (the step "out").
MAMBA_BACKWARD = (
    Row("gradients of the gated norm's output and input", D, 2, steps="out"),
    Row("gradient of the block's output, during the scan's", H, 1, steps="scan"),
    Row("gradients of the gated output and of the scan's", D, 4, steps="scan core"),
    Row("convolved input, again", D, 2, steps="scan core"),
    Row("convolved B and C, again", G, 4, steps="scan core"),
    Row("gradient of the convolved input", D, 2, steps="scan core"),
    Row("gradients of the convolved B and C", G, 4, steps="scan core"),
    Row("gradients of gate and input", D, 6, steps="scan core qkv"),
    Row("gradients of B and C", G, 6, steps="scan core qkv"),
    Row("gradient of the time steps", A, 3, steps="scan core qkv"),
    Row("time steps, copied", A, 2, steps="scan core"),
    # Megatron-LM's products have the sequence first, the kernels the batch.
    Row("gradients of gate and input, turned", D, 2, steps="qkv"),
    Row("gradients of B and C, turned", G, 2, steps="qkv"),
    Row("gradient of the time steps, turned", A, 1, steps="qkv"),
    Row("products of C and B", PRODUCTS, 2, FP32, steps="scan core"),
    Row("states of the chunks and their gradients in fp32", STATES, 2 / CHUNK, FP32, steps="scan"),
    Row("states of the chunks and their gradients", STATES, 4 / CHUNK, steps="scan core"),
    Row("time steps and decays in fp32", A, 2, FP32, steps="scan"),
    # Decays' gradients: one for each of four blocks of a chunk's rows, before they are added up.
    Row("time steps, decays and their gradients in fp32", A, 12, FP32, steps="core"),
    Row("gradients of B and C in fp32", G, 2, FP32, steps="core"),
    Row("gradients of the products of C and B", PRODUCTS, 2, FP32, steps="core"),
)
# Kernels read their inputs and write their outputs once: of the inner elements the convolution (2, again 2,
# backward 3), the states (1, again 1), the scan with its gate (4, backward 6), the gradients of states, B, C,
# their products and decays (1 + 1 + 1 + 2 + 2), of the input (3), and the gated norm (2, backward 3).
MAMBA_TRAFFIC = (
    traffic.row("convolution, scan, gate and gated norm", D, 34),
    traffic.row("convolution and scan: B and C", G, 32),
    traffic.row("states of the chunks", STATES, 11.5 / CHUNK, dtype=FP32),
    traffic.row("products of C and B", PRODUCTS, 10, dtype=FP32),
    traffic.row("time steps and decays", A, 30, dtype=FP32),
)
MAMBA = (
    *traffic.given("mixer:mamba", *(replace(row, kept_by=UNTIL_FULL) for row in MAMBA_KEPT)),
    *traffic.given("mixer:mamba", *(replace(row, role=TRANSIENT) for row in MAMBA_BACKWARD)),
    *traffic.given("mixer:mamba", *MAMBA_TRAFFIC),
)
# Transformer Engine's stand-ins (get_dummy_wgrad) of the products in and out.
MAMBA_STAGE = (
    Row("stand-in gradient, state space: gate and input", "hidden ssm_heads ssm_head_dim", 2, COMPUTE),
    Row("stand-in gradient, state space: B and C", "hidden ssm_groups state", 2, COMPUTE),
    Row("stand-in gradient, state space: time steps", "hidden ssm_heads", 1, COMPUTE),
    Row("stand-in gradient, state space: output", "ssm_heads ssm_head_dim hidden", 1, COMPUTE),
)

MLP_STEPS, MIXER_STEPS = ("down", "act", "up", "norm2"), ("out", "core", "qkv", "norm1")
KNOWN = {"block input": "", "input of the second norm": "mixes feeds"}


def by_parts(*rows: Row) -> tuple[Row, ...]:
    """Rows of a block of mixer and MLP, each under the condition that the part is there that it is of.

    Its dimensions say so, or its steps. A row of both parts is halved where there is one: of two norms and
    two sums a block of one part has one.
    """
    return tuple(part for row in rows for part in _by_part(row))


def _by_part(row: Row) -> Iterator[Row]:
    lengths, steps = row.dims.split(), row.steps.split()
    own = (set(steps) <= set(MLP_STEPS), set(steps) <= set(MIXER_STEPS))
    if row.name in KNOWN:
        yield _when(row, KNOWN[row.name])
    elif {"heads", "kv_heads", "head_dim"} & set(lengths) or ("attention" in row.name and not own[0]):
        yield _when(row, "attends")
    elif "ffn" in lengths:  # a dense MLP's (planner/stacks/megatron_experts.py, ``usual``)
        yield row
    elif steps and own[0]:
        yield _when(row, "feeds")
    elif steps and own[1]:
        yield _when(row, "mixes")
    else:
        yield _when(row, "mixes feeds")
        for without, remaining in (("!feeds", MIXER_STEPS), ("!mixes", MLP_STEPS)):
            left = [step for step in steps if step in remaining]
            share = len(left) / len(steps) if steps else 1 / 2
            yield _when(replace(row, count=row.count * share, steps=" ".join(left)), without)


def _when(row: Row, condition: str) -> Row:
    return replace(row, when=f"{row.when} {condition}".strip())


def of_stage(*rows: Row) -> tuple[Row, ...]:
    """A stage's rows, those of attention where there is some; and those of state spaces."""
    found = [row if "ffn" in row.dims.split() else _when(row, "attends") for row in rows]
    return (*found, *(_when(replace(row, role=BUFFER), "mcore mixer:mamba") for row in MAMBA_STAGE))
