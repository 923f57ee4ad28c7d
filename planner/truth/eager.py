"""Makes fake CUDA tensors take the paths that real ones take in eager training.

- Scaled dot product attention picks its kernel in C++ by the GPU's properties; here by the same
  rules for an Ampere or newer GPU: flash where it can be, else memory-efficient, else plain maths.
- Autocast switches itself off without a GPU; here it does not.
- transformers takes a fake tensor for a sign of tracing and then keeps causal masks that eager
  training drops, and looks for packed sequences, of which a batch without a mask has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

_plain_attention = F.scaled_dot_product_attention
HALF = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIM = 256  # the widest head of the flash kernel


def attention_kernel(query: Any, key: Any, value: Any, mask: Any, grouped: bool) -> str:
    """``flash``, ``efficient`` or ``math``, as PyTorch prefers them: flash takes one width of heads only."""
    same_heads = query.shape[1] == key.shape[1]
    usable = query.dtype in HALF and mask is None and query.shape[-1] <= FLASH_HEAD_DIM
    usable &= value.shape[-1] == query.shape[-1]
    if usable and (same_heads or grouped):
        return "flash"
    masked_in_step = mask is None or not mask.requires_grad
    return "efficient" if same_heads and not grouped and masked_in_step else "math"


def _padded(tensor: Any, multiple: int) -> Any:
    missing = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, missing)) if missing else tensor


def _as_bias(mask: Any, query: Any, key: Any) -> Any:
    """The mask as the efficient kernel wants it: additive, rows of a multiple of 16, one per head."""
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=query.dtype)
        mask = bias.masked_fill_(mask.logical_not(), float("-inf"))
    length = mask.shape[-1]
    if length % 16:
        mask = F.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _autocast(tensor: Any) -> Any:
    """Attention is among the operators that autocast runs in its lower precision."""
    if tensor is None or tensor.dtype != torch.float32 or not torch.is_autocast_enabled("cuda"):
        return tensor
    return tensor.to(torch.get_autocast_dtype("cuda"))


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention`` through the kernel that a GPU would choose."""
    query, key, value, attn_mask = (_autocast(tensor) for tensor in (query, key, value, attn_mask))
    kernel = attention_kernel(query, key, value, attn_mask, enable_gqa)
    width = query.shape[-1]
    if kernel == "flash":
        scale = width**-0.5 if scale is None else scale
        query, key, value = (_padded(tensor, 8) for tensor in (query, key, value))
        op = torch.ops.aten._scaled_dot_product_flash_attention
        out = op(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width] if out.shape[-1] != width else out
    if kernel == "efficient":
        bias = None if attn_mask is None else _as_bias(attn_mask, query, key)
        op = torch.ops.aten._scaled_dot_product_efficient_attention
        differentiable = any(tensor.requires_grad for tensor in (query, key, value))
        out = op(query, key, value, bias, differentiable, dropout_p, is_causal, scale=scale)
        return out[0]
    return _plain_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


class _NoStream:
    """A stream, an event and the context of a stream that never wait: one rank runs in order."""

    device_index = 0
    priority = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> _NoStream:
        return self

    record_event = record

    def wait(self, *_: Any) -> None: ...

    wait_event = wait_stream = synchronize = wait

    def query(self) -> bool:
        return True


_one_stream = _NoStream()


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it, fake CUDA tensors are treated as tensors of a GPU in eager training."""
    from transformers import masking_utils
    from transformers.utils import import_utils

    replaced = (
        (F, "scaled_dot_product_attention", attention),
        (torch.cuda.amp.common, "amp_definitely_not_available", _returns(False)),
        (torch.cuda, "is_bf16_supported", _returns(True)),
        (torch.cuda, "current_device", _returns(0)),
        (torch.cuda, "get_device_capability", _returns((9, 0))),
        (torch.cuda, "set_device", _returns(None)),
        (torch.cuda, "synchronize", _returns(None)),
        (torch.cuda, "Stream", _NoStream),
        (torch.cuda, "Event", _NoStream),
        (torch.cuda, "current_stream", _returns(_one_stream)),
        (torch.cuda, "stream", _returns(_one_stream)),
        (import_utils, "is_fake_tensor", _returns(False)),
        (masking_utils, "find_packed_sequence_indices", _returns(None)),
    )
    with ExitStack() as stack:
        for owner, name, new in replaced:
            stack.enter_context(patch.object(owner, name, new))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield
