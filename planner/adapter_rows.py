"""What adapters keep, make and move in a block, as rows of a stack's table."""

from __future__ import annotations

from collections.abc import Iterator

from planner.adapters import STEP, Tuning
from planner.stacks.base import BYTE, COMPUTE, FP32, UNTIL_FULL, Row
from strategies.base import Role


def adapter_rows(tuning: Tuning) -> Iterator[Row]:
    """What the adapters of a block keep, make and move.

    Read off peft 0.21's modules on tensors without storage (tests/data/traced_adapters.json): the
    input if it is not the product's own (cast, dropped out with its mask, or gathered), ``A x``, and
    under autocast both weights in half precision. In its backward two gradients of its input are there at
    a time: 2 bytes each, or in fp32 before and after the dropout or beside their cast.
    """

    assert tuning.adapters is not None
    wide = FP32 if tuning.casts == "fp32" else COMPUTE
    words = {"q": "batch seq residual", "o": "batch seq heads head_dim", "down": "batch seq ffn"}
    outs = {"q": "heads head_dim", "k": "kv_heads head_dim", "v": "kv_heads head_dim", "gate": "ffn"}
    rank = f"rank:{tuning.adapters.rank}"
    steps: dict[str, str] = {}
    for module in tuning.modules():
        name, step = "-".join(module), STEP[module[0]]
        dims = words.get(module[0], words["q"])
        low = f"batch seq low_rank:{tuning.adapters.rank}"
        whole = dims.replace("residual", "hidden") if tuning.gathers_inputs else dims
        steps[step] = whole

        def row(label: str, over: str, count: float, dtype: str, *role: Role, read_by: str = "") -> Row:
            return Row(
                f"{label} of {name}'s adapter",  # noqa: B023
                over,
                count,
                dtype,
                UNTIL_FULL,
                role=role[0] if role else Role.ACTIVATION,
                steps=step,  # noqa: B023
                read_by=read_by,
            )

        if tuning.own_inputs or (tuning.gathers_inputs and step in ("qkv", "up", "down")):
            yield row("input", whole, 1, wide)
        if tuning.adapters.dropout:
            yield row("dropout mask", whole, 1, BYTE, read_by="input")
        yield row("A x", low, 1, wide)
        if tuning.casts == "autocast":
            into = dims.removeprefix("batch seq ").replace("residual", "hidden")
            yield row("weight A, cast,", f"{into} {rank}", 1, COMPUTE, read_by="input")
            for one in module:
                out = outs.get("gate" if one == "up" else one, "hidden")
                yield row(f"weight B, cast, ({one})", f"{rank} {out}", 1, COMPUTE)
        if tuning.adapters.dora:
            yield from _decomposed(tuning, module)
        moved = 6 + 5 * bool(tuning.adapters.dropout) + 4 * bool(tuning.casts)
        yield row("reads and writes of the input", dims, moved, COMPUTE, Role.TRAFFIC)
        for one in module:
            out = outs.get("gate" if one == "up" else one, "residual")
            yield row(f"reads and writes of {one}'s output", f"batch seq {out}", 10, COMPUTE, Role.TRAFFIC)
    passing = 2 + 4 * bool(tuning.casts) + 2 * bool(tuning.adapters.dropout)
    for step, dims in steps.items():  # one adapter at a time
        yield Row("gradients of an adapter's input", dims, passing, BYTE, role=Role.TRANSIENT, steps=step)
    # The last product of a block, run again: its result, its adapter's, this one scaled; the MLP's input.
    if tuning.casts and "down" in steps:
        yield Row("outputs beside an adapter", words["q"], 4, COMPUTE, role=Role.TRANSIENT, steps="down")
    if tuning.adapters.quantize:
        yield from _dequantized(tuning)


def _decomposed(tuning: Tuning, module: tuple[str, ...]) -> Iterator[Row]:
    """What DoRA adds (Liu et al. 2024, arXiv:2402.09353, section 4): magnitudes times directions.

    peft 0.21's ``DoraLinearLayer`` keeps the result of the product and of the adapter, for the gradient
    of the magnitudes; with dropout it runs the product again in the adapter's type, whose cast weight is
    kept. The norms of ``W + B A`` are outside the graph: for them it makes ``B A`` from a square unit
    matrix, its scaled copy and the sum, at the end of a block the last product's.
    """

    assert tuning.adapters is not None
    wide = FP32 if tuning.casts == "fp32" else COMPUTE
    again = tuning.adapters.dropout > 0
    ends = {"q": "heads head_dim", "k": "kv_heads head_dim", "v": "kv_heads head_dim", "o": "hidden"}
    for one in module:
        out, step = ends.get(one, "hidden" if one == "down" else "ffn"), STEP[one]
        into = {"o": "heads head_dim", "down": "ffn"}.get(one, "hidden")
        tokens = f"batch seq {out.replace('hidden', 'residual')}"
        named = f"of {one}, decomposed"
        yield Row(f"result {named}", tokens, 1, wide if again else COMPUTE, UNTIL_FULL, steps=step)
        yield Row(f"result of the adapter {named}", tokens, 1, wide, UNTIL_FULL, steps=step)
        yield Row(f"scales {named}", out, 3, wide, UNTIL_FULL, steps=step)
        if again and tuning.casts:
            yield Row(f"weight cast, {named}", f"{into} {out}", 1, wide, UNTIL_FULL, steps=step)
        yield Row(f"norms {named}", f"{into} {out}", 12, COMPUTE, UNTIL_FULL, role=Role.TRAFFIC)
    if module[-1] == "down":
        square = f"ffn square:{tuning.model.intermediate_size}"
        yield Row("unit matrix of the norms", square, 1, FP32, role=Role.TRANSIENT, steps="down")
        yield Row("sum of the weights", "ffn hidden", 3, FP32, role=Role.TRANSIENT, steps="down")


def _dequantized(tuning: Tuning) -> Iterator[Row]:
    """One weight at a time in the products' precision, made in every pass through it.

    bitsandbytes ``MatMul4Bit`` keeps the packed weight and makes the other again for the gradient of its
    input: it is read (a quarter of the width) and written, forward and backward.
    """

    query, key, mlp = "hidden heads head_dim", "hidden kv_heads head_dim", "hidden ffn"
    largest = {"qkv": query, "out": query, "up": mlp, "down": mlp}
    for step, dims in largest.items():
        yield Row("dequantised weight", dims, 1, COMPUTE, role=Role.TRANSIENT, steps=step)
    for dims, count in ((query, 2), (key, 2), (mlp, 2 + tuning.model.gated_mlp)):
        yield Row("dequantisation", dims, 2.5 * count, COMPUTE, UNTIL_FULL, role=Role.TRAFFIC)
