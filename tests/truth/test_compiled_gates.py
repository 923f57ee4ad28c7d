"""What ``torch.compile`` keeps of Megatron-LM's compiled gates: AOTAutograd's min-cut partition, on the CPU.

Inductor takes the same partition. The functions are those of gated_delta_net.py (``_apply_gated_norm`` after
Transformer Engine's norm, which breaks the graph) and attention.py (``_apply_output_gate``), core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

B, S, HEADS, WIDTH = 2, 64, 4, 16
HALF = torch.bfloat16
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def leaf(*shape: int) -> Any:
    return torch.randn(*shape, dtype=HALF).requires_grad_()


def kept(function: Callable[..., Any], *inputs: Any, compiled: bool = True) -> int:
    """Bytes of the storages that backward keeps of a function."""
    found: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch._dynamo.reset()
    if compiled:
        function = torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(found.values())


def normed_gate(normed: Any, gate: Any) -> Any:
    product = normed * torch.nn.functional.silu(gate.reshape(-1, WIDTH).float())
    return product.to(HALF)


def output_gate(output: Any, gate: Any) -> Any:
    gate = gate.contiguous().view(*output.shape)
    return (output * torch.sigmoid(gate.float())).to(HALF)


def test_a_delta_nets_compiled_gate_keeps_its_inputs_only() -> None:
    elements = B * S * HEADS * WIDTH
    inputs = leaf(B * S * HEADS, WIDTH), leaf(B, S, HEADS, WIDTH)
    assert kept(normed_gate, *inputs) == 2 * 2 * elements
    assert kept(normed_gate, *inputs, compiled=False) > 4 * 2 * elements  # copies in fp32


@pytest.mark.parametrize("key_heads", [1, 2])
def test_attentions_compiled_gate_keeps_its_inputs_and_what_they_are_views_of(key_heads: int) -> None:
    each = HEADS // key_heads * WIDTH
    product = leaf(S, B, key_heads, 2 * each + 2 * WIDTH)
    gate = torch.split(product, [each, each, WIDTH, WIDTH], dim=3)[1].reshape(S, B, HEADS, WIDTH)
    output = leaf(S, B, HEADS * WIDTH)
    elements = S * B * HEADS * WIDTH
    beside = elements + 2 * S * B * WIDTH if key_heads == 1 else 0  # queries, keys and values
    assert kept(output_gate, output, gate) == 2 * (2 * elements + beside)
