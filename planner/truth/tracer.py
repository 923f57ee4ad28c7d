"""Bytes by storage: what is alive at every moment of a training step, and what it was for.

A :class:`Tracer` is entered around code that runs on fake CUDA tensors. It logs each new storage
(operator, shape, element type, module, phase) and its death, in bytes rounded up to 512 as the CUDA
caching allocator does. Nothing is sampled: live bytes are known after every operator.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed.tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDING = 512
"""The CUDA caching allocator's smallest unit, in bytes (``kMinBlockSize``)."""

CATEGORIES = ("param", "buffer", "input", "grad", "opt", "act", "gathered", "temp", "other")
"""``act``: made in the forward pass or the loss; ``gathered``: FSDP's whole parameters; ``temp``:
made in the backward pass or the optimizer step and neither a gradient nor a state; ``other``:
allocated before the step."""


def rounded(size: int) -> int:
    """Bytes that an allocation takes.

    >>> rounded(1), rounded(512), rounded(0)
    (512, 512, 0)
    """
    return -(-size // ROUNDING) * ROUNDING


@dataclass
class Storage:
    """One storage: its rounded ``size`` in bytes, and where it came from."""

    size: int
    op: str
    shape: tuple[int, ...]
    dtype: str
    module: str
    phase: str
    category: str


class Event(NamedTuple):
    """A change of live bytes: ``change`` is positive at birth, negative at death.

    A storage that becomes something else (a temporary that turns out to be a gradient) dies as
    the one and is born as the other.
    """

    phase: str
    change: int
    category: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    module: str


class Saved(NamedTuple):
    """A storage that autograd keeps for the backward pass. ``size`` is in bytes, not rounded.

    ``op`` made it, ``module`` is the one that was running when it was kept.
    """

    size: int
    shape: tuple[int, ...]
    dtype: str
    module: str
    op: str


_WAIT = torch.ops._c10d_functional.wait_tensor.default
_WRAPPERS = (torch.distributed.tensor.DTensor, AsyncCollectiveTensor)


def _local(tensor: Any) -> Any:
    """The tensor on this rank: a DTensor's local part, a wrapper's inner tensor, or the tensor."""
    if isinstance(tensor, torch.distributed.tensor.DTensor):
        tensor = tensor._local_tensor
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.elem
    return tensor if tensor.device.type == "cuda" else None


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Peak:
    """The most bytes alive, when, by category, and by what made them."""

    total: int = 0
    phase: str = ""
    event: int = -1  # index into the events
    by_category: dict[str, int] = field(default_factory=dict)
    storages: list[Storage] = field(default_factory=list)

    def largest(self, count: int = 12) -> list[tuple[str, str, str, str, int, int]]:
        """Category, operator, module (layers as N), element type, bytes and number, largest first."""
        sizes: Counter[tuple[str, str, str, str]] = Counter()
        numbers: Counter[tuple[str, str, str, str]] = Counter()
        for one in self.storages:
            module = ".".join("N" if part.isdigit() else part for part in one.module.split("."))
            key = (one.category, one.op, module, one.dtype)
            sizes[key] += one.size
            numbers[key] += 1
        return [(*key, size, numbers[key]) for key, size in sizes.most_common(count)]


class Tracer(TorchDispatchMode):
    """Logs storages. Use as a context; name phases with :meth:`phase`."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.live: dict[int, Storage] = {}
        self.total = 0
        self.start = 0  # bytes alive at the last reset
        self.by_category: Counter[str] = Counter()
        self.phase_name = "init"
        self.peaks: dict[str, Peak] = {}
        self.phase_end: dict[str, dict[str, int]] = {}
        self.alive_after: dict[str, list[Storage]] = {}
        self.saved: dict[int, Saved] = {}
        self._only_shapes = False  # DTensor asks what an operator makes of whole tensors, which nobody holds
        self._stack: list[str] = []
        self._names: dict[int, str] = {}
        self._made_in: dict[int, str] = {}  # number of a node of the graph -> module of its forward
        self._log: list[tuple[int, Storage | None]] = []  # of each event: which storage, None if dead
        self._alive_before: dict[int, Storage] = {}

    # Phases

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within belongs to this phase."""
        before, self.phase_name = self.phase_name, name
        self._note_peak()
        try:
            yield
        finally:
            self._note_end()
            self.phase_name = before

    def switch(self, name: str) -> None:
        """Ends a phase within a :meth:`phase` and begins the next."""
        self._note_end()
        self.phase_name = name
        self._note_peak()

    def _note_end(self) -> None:
        self.phase_end[self.phase_name] = {**self.by_category, "total": self.total}
        self.alive_after[self.phase_name] = [one for one in self.live.values() if one.size]

    def reset(self) -> None:
        """Forgets events and peaks so far; what is alive stays known."""
        self.events, self.peaks, self.phase_end, self.saved = [], {}, {}, {}
        self._log, self._alive_before, self._made_in = [], dict(self.live), {}
        self.start = self.total

    @property
    def peak(self) -> Peak:
        """The highest of all phases' peaks."""
        return max(self.peaks.values(), key=lambda peak: peak.total, default=Peak())

    def _note_peak(self) -> None:
        peak = self.peaks.setdefault(self.phase_name, Peak())
        if self.total > peak.total:
            peak.total, peak.phase, peak.event = self.total, self.phase_name, len(self.events) - 1
            peak.by_category = dict(self.by_category)

    def finish(self) -> None:
        """Fills in what was alive at the peak of each phase, by replaying births and deaths."""
        alive = dict(self._alive_before)
        wanted: dict[int, list[Peak]] = {}
        for peak in self.peaks.values():
            wanted.setdefault(peak.event, []).append(peak)
        for index, (key, storage) in [(-1, (0, None)), *enumerate(self._log)]:
            if storage is None or not storage.size:
                alive.pop(key, None)
            else:
                alive[key] = storage
            for peak in wanted.get(index, ()):
                peak.storages = list(alive.values())

    # Births and deaths

    def _change(self, key: int, storage: Storage, sign: int) -> None:
        change = sign * storage.size
        self.total += change
        self.by_category[storage.category] += change
        self.events.append(
            Event(
                self.phase_name,
                change,
                storage.category,
                storage.op,
                storage.shape,
                storage.dtype,
                storage.module,
            )
        )
        self._log.append((key, storage if sign > 0 else None))
        if sign > 0:
            self._note_peak()

    def track(self, tensor: Any, op: str = "", category: str | None = None) -> None:
        """Begins to watch a tensor's storage, or gives a watched one another category."""
        local = _local(tensor)
        if local is None:
            return
        raw = local.untyped_storage()
        key = raw._cdata
        if key in self.live:
            known = self.live[key]
            if rounded(raw.nbytes()) != known.size:
                self._resized(key, known, rounded(raw.nbytes()))
            if category is not None and self.live[key].category != category:
                self._recategorise(key, category)
            return
        size = rounded(raw.nbytes())
        if not size:
            return
        shape = tuple(int(length) for length in local.shape)
        storage = Storage(
            size, op, shape, _short(local.dtype), self.module, self.phase_name, category or self._born_as()
        )
        self.live[key] = storage
        weakref.finalize(raw, self._died, key)
        self._change(key, storage, 1)

    def _born_as(self) -> str:
        return {"fwd": "act", "loss": "act", "bwd": "temp", "opt": "temp"}.get(self.phase_name, "other")

    def _died(self, key: int) -> None:
        storage = self.live.pop(key, None)
        if storage is not None:
            self._change(key, storage, -1)

    def _recategorise(self, key: int, category: str) -> None:
        old = self.live[key]
        new = Storage(**{**vars(old), "category": category})
        self.live[key] = new
        self._move(key, old, new)

    def _resized(self, key: int, old: Storage, size: int) -> None:
        new = Storage(**{**vars(old), "size": size})
        self.live[key] = new
        self._move(key, old, new)

    def _move(self, key: int, old: Storage, new: Storage) -> None:
        self._change(key, old, -1)
        self._change(key, new, 1)

    def resized(self, raw: Any) -> None:
        """A storage was given more bytes or let go of them, as FSDP does, without an operator."""
        key, size = raw._cdata, rounded(raw.nbytes())
        if key in self.live:
            if self.live[key].category in ("act", "temp", "other"):
                self._recategorise(key, "gathered")
            if size != self.live[key].size:
                self._resized(key, self.live[key], size)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, _WRAPPERS) for kind in types):
            return NotImplemented  # their own operators on local tensors come by one by one
        if func is _WAIT:
            return args[0]  # as on a GPU; a fake tensor would be copied
        out = func(*args, **(kwargs or {}))
        if self._only_shapes:
            return out
        name = str(func).removeprefix("aten.")
        if name.startswith("prim."):
            return out
        if self._stack:
            self._made_in[torch._C._autograd._get_sequence_nr() - 1] = self._stack[-1]
        if isinstance(out, torch.Tensor):
            self.track(out, name)
        elif isinstance(out, tuple | list):
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.track(leaf, name)
        return out

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Within it, everything is logged: operators, storages resized, which module is running."""
        resize = torch.UntypedStorage.resize_
        whole_shape = ShardingPropagator._propagate_tensor_meta_non_cached

        def resize_(raw: Any, size: int) -> Any:
            out = resize(raw, size)
            self.resized(raw)
            return out

        def only_shapes(*args: Any) -> Any:
            self._only_shapes = True
            try:
                return whole_shape(*args)
            finally:
                self._only_shapes = False

        with (
            patch.object(torch.UntypedStorage, "resize_", resize_),
            patch.object(ShardingPropagator, whole_shape.__name__, only_shapes),
            self.modules_of(model),
            self,
        ):
            yield

    # Modules

    @property
    def module(self) -> str:
        """The module that is running (also again, when recomputed); else the one whose forward made
        the node of the graph that is running backward."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node() if self.phase_name == "bwd" else None
        return "" if node is None else self._made_in.get(node._sequence_nr(), "")

    @contextmanager
    def modules_of(self, model: Any) -> Iterator[None]:
        """Within it, the tracer knows which of the model's modules is running."""
        self._names = {id(module): name for name, module in model.named_modules()}
        handles = [
            torch.nn.modules.module.register_module_forward_pre_hook(self._enter_module),
            torch.nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_module(self, module: Any, _: Any) -> None:
        self._stack.append(self._names.get(id(module), ""))

    def _leave_module(self, module: Any, _: Any, __: Any) -> None:
        if self._stack:
            self._stack.pop()

    # What autograd keeps

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within it, what autograd saves is listed in ``saved``; parameters and buffers are not."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Any) -> Any:
        local = _local(tensor)
        if local is not None:
            raw = local.untyped_storage()
            storage = self.live.get(raw._cdata)
            base = tensor if tensor._base is None else tensor._base
            state = isinstance(base, torch.nn.Parameter)  # also one that FSDP has gathered
            state |= storage is not None and storage.category in ("param", "buffer")
            if raw._cdata not in self.saved and not state:
                shape = tuple(int(length) for length in local.shape)
                made_by = storage.op if storage is not None else ""
                self.saved[raw._cdata] = Saved(raw.nbytes(), shape, _short(local.dtype), self.module, made_by)
        return tensor
