"""DDP, FSDP2 and tensor parallelism (DTensor) on one rank of a process group that sends nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import distributed

from planner.errors import InputError
from planner.truth.models import blocks_of, final_norm_of

if TYPE_CHECKING:
    from planner.truth.runs import Run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def process_group(data: int, tensor: int) -> Iterator[Any]:
    """Within it, this process is rank 0 of ``data`` x ``tensor``, and collectives return at once.

    Gives the mesh, which is made of real numbers: enter this before tensors become fake. Parts of it
    are made later, when a rank's coordinates cannot be read: the first rank's are always zero.
    """
    if data * tensor == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # which a process group replaces
    dist.init_process_group("fake", rank=0, world_size=data * tensor, store=FakeStore())
    first = patch.object(DeviceMesh, "_compute_coordinates_from_mesh", lambda self, mesh, _: (0,) * mesh.ndim)
    try:
        with first:
            yield init_device_mesh("cuda", (data, tensor), mesh_dim_names=("data", "tensor"))
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def apply_parallelism(model: Any, run: Run, mesh: Any) -> Any:
    """The model as that run's rank sees it."""
    if run.tensor_parallel > 1:
        model = _tensor(model, mesh["tensor"])
    if run.parallel == "ddp":
        return _ddp(model, run)
    if run.parallel == "fsdp":
        return _fsdp(model, run, mesh["data"])
    return model


def loss_context(run: Run) -> AbstractContextManager[Any]:
    """What forward and backward run in: under tensor parallelism each rank has its part of the logits."""
    if run.tensor_parallel == 1:
        return nullcontext()
    from torch.distributed.tensor.parallel import loss_parallel

    context: AbstractContextManager[Any] = loss_parallel()
    return context


def _ddp(model: Any, run: Run) -> Any:
    with patch.object(distributed, "_verify_param_shape_across_processes", lambda *_: True):
        wrapped = distributed.DistributedDataParallel(
            model, init_sync=False, gradient_as_bucket_view=run.gradient_as_bucket_view
        )
    wrapped.logger = _NoLog()  # its statistics need the timer of a real device
    wrapped.reducer = _Reducer(wrapped.reducer)
    # The group that sends nothing gives no result to wait for: the bucket itself is the answer.
    # (A lambda: DDP refuses annotations other than its own classes.)
    wrapped.register_comm_hook(None, lambda state, bucket: _answer_at_once(bucket))
    return wrapped


class _NoLog:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class _Reducer:
    """DDP's reducer, but its buckets stay in the order of the parameters.

    The real one sorts them anew after the first step, by numbers that it sends to the other ranks
    and that a fake tensor does not have; their bytes are the same in any order.
    """

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _answer_at_once(bucket: Any) -> Any:
    answer: Any = torch.futures.Future()
    answer.set_result(bucket.buffer())
    return answer


def _fsdp(model: Any, run: Run, mesh: Any) -> Any:
    """FSDP2 as ``run.wrapping`` has it, one unit per block in any case."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    compute = None if run.precision == "fp32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=DTYPES[run.reduce_dtype])
    options = {"mesh": mesh, "mp_policy": policy}
    reshard = {"reshard_after_forward": run.reshard_after_forward}
    for block in blocks_of(model):
        fully_shard(block, **options, **reshard)
    if run.wrapping == "blocks":
        return fully_shard(model, **options, **reshard)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tail = [final_norm_of(model), head]
    if embedding.weight is head.weight:
        tail.insert(1, embedding)
    else:
        fully_shard(embedding, **options, **reshard)
    fully_shard(tail, **options, reshard_after_forward=False)
    return fully_shard(model, **options)


def _tensor(model: Any, mesh: Any) -> Any:
    """Tensor, sequence and loss parallelism of a Llama-like model: PyTorch's recipe, torchtitan's plan."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    split, vocabulary = Shard(1), Shard(-1)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=split),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=split, output_layouts=vocabulary, use_local_output=False),
    }
    block = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": split},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=split),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(split,), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=split),
    }
    for module, plan in ((model, ends), *((one, block) for one in blocks_of(model))):
        if missing := [name for name in plan if name not in dict(module.named_modules())]:
            raise InputError(
                f"tensor parallelism is measured of models with Llama's modules: this one has no {missing[0]}"
            )
        parallelize_module(module, mesh, plan)
    model.tie_weights()  # each module was given a weight of its own
    return model
