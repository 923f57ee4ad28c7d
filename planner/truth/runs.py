"""One rank's training step on fake tensors: build, warm up, read the next step.

:func:`trace` answers with a :class:`Trace`: bytes of each moment, what autograd kept, and the ordered
events. The first steps differ from the rest (optimizer states are made, FSDP learns its order), so one
is thrown away on a single GPU and two on several.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.truth import guard, quiet
from planner.truth.eager import as_on_a_gpu
from planner.truth.models import build_config, build_model
from planner.truth.parallel import apply_parallelism, loss_context, process_group
from planner.truth.tracer import Event, Peak, Saved, Storage, Tracer

MOMENTS = ("forward", "loss", "backward", "optimizer step")
IN_A_BLOCK = re.compile(r"\.\d+(\.|$)")
"""Modules of a list: ``model.layers.3.mlp``."""


@dataclass(frozen=True)
class Run:
    """What is run. ``precision`` is of the weights and products:

    - ``pure-bf16``, ``fp32``: one type for everything;
    - ``bf16``: fp32 weights; products in bf16 through autocast, or under FSDP through its
      ``MixedPrecisionPolicy``;
    - ``pure-bf16`` under FSDP: bf16 shards.

    ``parallel`` is ``none``, ``ddp`` or ``fsdp`` over ``gpus / tensor_parallel``; tensor parallelism
    comes with sequence and loss parallelism.
    ``wrapping`` are FSDP's units: ``blocks`` and a root with the rest, or those of ``accelerate`` 1.15
    (embedding, blocks, norm and head together and never resharded after the forward), which also
    runs the model under autocast.
    """

    config: Mapping[str, Any]
    layers: int
    seq_length: int
    micro_batch_size: int = 1
    precision: str = "pure-bf16"
    attention: str = "sdpa"
    recompute: str = "none"
    optimizer: str = "fused"  # or foreach, or in_backward
    parallel: str = "none"
    gpus: int = 1
    tensor_parallel: int = 1
    reduce_dtype: str = "fp32"
    wrapping: str = "blocks"
    reshard_after_forward: bool = True
    gradient_as_bucket_view: bool = False
    saved: bool = True  # list what autograd keeps


@dataclass
class Trace:
    """What one rank held in the step that was read. Bytes, allocator rounding included."""

    n_params: int
    states: dict[str, int]  # param, grad, opt (and other: buckets), at rest
    saved: list[Saved]
    kept: list[Storage] = field(repr=False)  # alive at the end of the forward pass, states aside
    after_forward: dict[str, int]
    phase_peaks: dict[str, Peak]
    phase_ends: dict[str, dict[str, int]]
    events: list[Event] = field(repr=False)
    start: int = 0  # bytes alive before the first event

    @property
    def saved_bytes(self) -> int:
        """Bytes of the storages that autograd kept, not rounded."""
        return sum(one.size for one in self.saved)

    @property
    def moments(self) -> dict[str, int]:
        """The most bytes alive at each moment: ``forward``, ``loss`` (to the end of the head's
        backward), ``backward`` (of the blocks and the embedding) and ``optimizer step``."""
        moments = dict.fromkeys(MOMENTS, 0)
        place, live = "forward", self.start
        for event in self.events:
            if event.phase != "bwd":
                place = {"fwd": "forward", "loss": "loss", "opt": "optimizer step"}.get(event.phase, place)
            elif place == "loss" and IN_A_BLOCK.search(event.module):
                place = "backward"
            moments[place] = max(moments[place], live, live + event.change)
            live += event.change
        return moments

    @property
    def peak(self) -> Peak:
        """The highest moment."""
        return max(self.phase_peaks.values(), key=lambda peak: peak.total)


class _InBackward:
    """An optimizer of each parameter, which steps as soon as the gradient is there and frees it."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        self.each = {parameter: torch.optim.AdamW([parameter], fused=True) for parameter in parameters}
        for parameter in self.each:
            parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: Any) -> None:
        self.each[parameter].step()
        self.each[parameter].zero_grad()

    @property
    def state(self) -> dict[Any, Any]:
        return {parameter: one.state[parameter] for parameter, one in self.each.items() if one.state}

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


def _optimizer(model: Any, implementation: str) -> Any:
    if implementation == "in_backward":
        return _InBackward(model.parameters())
    return torch.optim.AdamW(
        model.parameters(), lr=1e-3, fused=implementation == "fused", foreach=implementation == "foreach"
    )


def _checkpoint(model: Any) -> None:
    """Recomputes every block; the method has two names in the releases that are allowed."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _autocast(run: Run) -> AbstractContextManager[Any]:
    accelerate = run.parallel == "fsdp" and run.wrapping == "accelerate"
    if run.precision == "bf16" and (run.parallel in ("none", "ddp") or accelerate):
        context: AbstractContextManager[Any] = torch.autocast("cuda", dtype=torch.bfloat16)
        return context
    return nullcontext()


def _mark_gradients(tracer: Tracer, model: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            tracer.track(parameter.grad, category="grad")


def _watch_gradients(tracer: Tracer, model: Any) -> None:
    def mark(parameter: Any) -> None:
        if parameter.grad is not None:
            tracer.track(parameter.grad, category="grad")

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(mark)


def _watch_states(tracer: Tracer, model: Any) -> None:
    for parameter in model.parameters():
        tracer.track(parameter, category="param")
    for buffer in model.buffers():
        tracer.track(buffer, category="buffer")


@contextmanager
def _without_collector() -> Iterator[None]:
    """Reference counts alone decide when a tensor dies, so that two runs agree."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Step:
    """The pieces of a training step and the tracer that watches them."""

    def __init__(self, run: Run, model: Any, inner: Any, tracer: Tracer) -> None:
        self.run, self.model, self.tracer = run, model, tracer
        self.optimizer = _optimizer(model, run.optimizer)
        shape = (run.micro_batch_size, run.seq_length)
        names = ("input_ids", "labels")
        self.inputs = {name: torch.zeros(shape, dtype=torch.long, device="cuda") for name in names}
        if run.tensor_parallel > 1:  # else the model counts the positions of its own part
            self.inputs["position_ids"] = torch.arange(run.seq_length, device="cuda").unsqueeze(0)
        for tensor in self.inputs.values():
            tracer.track(tensor, category="input")
        inner.get_output_embeddings().register_forward_hook(lambda *_: tracer.switch("loss"))

    def forward(self) -> Any:
        """The loss alone: the logits go, as they do in a trainer that does not keep the output."""
        with _autocast(self.run):
            return self.model(**self.inputs).loss

    def __call__(self, saving: Callable[[], AbstractContextManager[Any]]) -> None:
        tracer = self.tracer
        with loss_context(self.run):
            with tracer.phase("fwd"), saving():
                loss = self.forward()
            with tracer.phase("bwd"):
                loss.backward()
                del loss
                _mark_gradients(tracer, self.model)
        with tracer.phase("opt"):
            self.optimizer.step()
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        tracer.track(value, category="opt")
            self.optimizer.zero_grad()


def trace(run: Run) -> Trace:
    """Runs a few steps on fake tensors and reads the last."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    guard.install()
    with ExitStack() as stack:
        stack.enter_context(quiet.only_errors())
        mesh = stack.enter_context(process_group(run.gpus // run.tensor_parallel, run.tensor_parallel))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(as_on_a_gpu())
        config = build_config(run.config, run.layers)
        weights = "bf16" if run.precision == "pure-bf16" else "fp32"
        inner = build_model(config, run.attention, weights)
        n_params = sum(p.numel() for p in inner.parameters())
        if run.recompute == "full":
            _checkpoint(inner)
        tracer = Tracer()
        with tracer.watching(inner):
            model = apply_parallelism(inner, run, mesh)
            _watch_states(tracer, model)
            _watch_gradients(tracer, model)
            return _read(run, _Step(run, model, inner, tracer), n_params)


def _read(run: Run, step: _Step, n_params: int) -> Trace:
    tracer = step.tracer
    for _ in range(1 if run.gpus == 1 else 2):
        step(nullcontext)
    with _without_collector():
        tracer.reset()
        step(tracer.saving if run.saved else nullcontext)
    tracer.finish()
    ends = tracer.phase_end
    states = {name: ends["bwd"].get(name, 0) for name in ("param", "grad", "opt", "other")}
    peaks = {name: peak for name, peak in tracer.peaks.items() if name != "init"}
    return Trace(
        n_params=n_params,
        states=states,
        saved=list(tracer.saved.values()),
        kept=[one for one in tracer.alive_after["loss"] if one.category == "act"],
        after_forward=ends["loss"],
        phase_peaks=peaks,
        phase_ends=ends,
        events=list(tracer.events),  # the deaths of the model itself still come
        start=tracer.start,
    )
