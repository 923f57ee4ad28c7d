#!/usr/bin/env python3
"""Measures what a GPU takes and gives in training: memory, speed, and what lies outside tensors.

Needs torch alone (transformers, if there, adds Hugging Face's LLaMA), so the file can be copied to a
machine and run. docs/measure_gpu.md explains the result; every number's key ends in its unit.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

SCHEMA = "planner.gpu-measurements/1"
KEPT = (0, 1, 2, 4, 6)  # of a block's seven products, under selective: query, key, value, gate, down
LENGTHS = (1024, 2048, 4096, 8192, 16384)
Record = dict[str, Any]
attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)


class Shape(NamedTuple):
    """A LLaMA's dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    def flops(self, seq: int, batch: int, pairs: float = 1.0) -> float:
        """FLOPs of a step, forward and backward; ``pairs`` is the part of s x s positions that counts."""
        h, d = self.hidden, self.hidden // self.heads
        block = 2 * h * d * (self.heads + self.kv_heads) + 3 * h * self.ffn
        matrices = self.layers * block + h * self.vocab
        return float(seq * batch * (6 * matrices + 12 * self.layers * seq * self.heads * d * pairs))


class Case(NamedTuple):
    """One thing to measure; ``--only`` selects a group."""

    id: str
    group: str
    settings: Record
    quick: bool


def memory_cases(tiny: bool) -> Iterator[Case]:
    """Training runs, the most telling first."""

    def case(shape: Shape, seq: int, micro_batch: int, quick: bool = False, **more: Any) -> Case:
        if tiny:
            h, _, a, kv, f, v = shape
            shape, seq = Shape(h // 32, 2, a // 8, kv // 8, f // 32, v // 100), seq // 64
        s: Record = {"model": "plain", "shape": shape._asdict(), "seq": seq, "micro_batch": micro_batch}
        s |= {"precision": "pure-bf16", "recompute": "none", "optimizer": "adamw-fused"}
        s |= {"compiled": False, "accumulate": 1} | more
        words = [s["model"], f"h{shape.hidden}l{shape.layers}v{shape.vocab}", f"s{seq}b{micro_batch}"]
        words += [s[key] for key in ("precision", "recompute", "optimizer")]
        words += ["compiled"] * s["compiled"] + [f"accumulate{s['accumulate']}"] * (s["accumulate"] > 1)
        return Case("memory:" + "-".join(words), "memory", s, quick)

    more: Record
    policies = ("none", "full", "selective")
    base = (Shape(4096, 8, 32, 8, 14336, 32000), 4096, 1)
    for precision in ("pure-bf16", "fsdp", "autocast"):
        yield from (case(*base, True, precision=precision, recompute=word) for word in policies)
    yield from (case(*base, True, model="hf", recompute=word) for word in policies[:2])
    for optimizer in ("adamw-foreach", "sgd"):
        yield from (case(*base, True, optimizer=optimizer, precision=p) for p in ("pure-bf16", "fsdp"))
    for more in ({}, {"recompute": "full"}, {"precision": "fsdp"}):
        yield case(*base, not more, compiled=True, **more)
    yield case(*base, True, accumulate=2)
    yield case(*base, model="hf", precision="autocast")
    for more in ({}, {"precision": "fsdp"}, {"model": "hf"}):  # a large vocabulary: the loss is the peak
        yield case(base[0]._replace(vocab=128000), *base[1:], **more)
    middle = Shape(2048, 16, 16, 8, 5632, 32000)
    for shape in (middle, Shape(8192, 2, 64, 8, 28672, 32000), Shape(1024, 12, 16, 16, 2816, 32000)):
        for seq, batch in ((2048, 4), (2048, 1), (8192, 1), (1024, 8), (16384, 1)):
            quick = shape == middle and batch == 4
            yield from (case(shape, seq, batch, quick, recompute=word) for word in policies)
            yield from (case(shape, seq, batch, **more) for more in ({"precision": "fsdp"}, {"model": "hf"}))


def compute_cases(tiny: bool) -> Iterator[Case]:
    """Kernels alone: products, attention, bandwidth, optimizers."""
    cut = 64 if tiny else 1
    lengths, heads = [n // cut for n in LENGTHS], 4 if tiny else 32
    for dtype in ("bfloat16", "float16", "float32"):  # fp32 products as TF32
        sizes = [(n, n, n) for n in lengths]
        yield Case(f"matmul:square-{dtype}", "compute", {"dtype": dtype, "sizes": sizes}, dtype == "bfloat16")
    for h, a, kv, f in ((4096, 32, 8, 14336), (8192, 64, 8, 28672), (2048, 16, 8, 5632)):
        pairs = set()  # (outputs, inputs) of a layer's and the head's products on one of t GPUs
        for t in (1, 2, 4, 8):
            qkv = h * (a + 2 * kv) // a // t
            pairs |= {(qkv, h), (h, h // t), (2 * f // t, h), (h, f // t), (128256 // t, h)}
        sizes = [(m, n // cut, k // cut) for n, k in sorted(pairs) for m in lengths]
        yield Case(f"matmul:llama-h{h}", "compute", {"dtype": "bfloat16", "sizes": sizes}, h == 4096)
    for d, kernel, kv in itertools.product((128, 64), ("FLASH_ATTENTION", "CUDNN_ATTENTION"), (32, 8)):
        s = {"kernel": kernel, "head_dim": d, "heads": heads, "kv_heads": kv // 8 if tiny else kv}
        s |= {"lengths": [*lengths, 32768 // cut], "tokens": 32768 // cut}
        yield Case(f"attention:{kernel[:5].lower()}-d{d}-kv{kv}", "compute", s, d == 128 and kernel[0] == "F")
    s = {"tensor_bytes": [n * 2**20 // cut**2 for n in (16, 64, 256, 1024, 4096)]}
    yield Case("bandwidth:copy-and-elementwise", "compute", s, True)
    for name, dtype in itertools.product(("adamw-fused", "adamw-foreach", "sgd"), ("float32", "bfloat16")):
        s = {"optimizer": name, "dtype": dtype, "tensors": 64, "elements": 2**24 // cut**2}
        yield Case(f"optimizer:{name}-{dtype}", "compute", s, name == "adamw-fused")


def all_cases(tiny: bool) -> list[Case]:
    """Every case, by importance: bytes outside tensors first, then memory and kernels in turns."""
    environments = {"libraries": {}, "communicator": {}, "eager-loading": {"CUDA_MODULE_LOADING": "EAGER"}}
    outside = ({"name": name, "environment": more} for name, more in environments.items())
    mixed = [Case(f"context:{s['name']}", "context", s, True) for s in outside]
    kernels = compute_cases(tiny)
    for index, case in enumerate(memory_cases(tiny)):
        mixed += [case, *itertools.islice(kernels, index % 2)]
    return [*mixed, *kernels]


class Block(nn.Module):
    """torchtitan's LLaMA block. It recomputes its own inside, so that FSDP's hooks stay outside."""

    def __init__(self, shape: Shape, recompute: str) -> None:
        super().__init__()
        self.recompute, self.head_dim = recompute, shape.hidden // shape.heads
        h, kv, f = shape.hidden, shape.kv_heads * self.head_dim, shape.ffn
        linear = functools.partial(nn.Linear, bias=False)
        self.q, self.k, self.v, self.out = linear(h, h), linear(h, kv), linear(h, kv), linear(h, h)
        self.gate, self.up, self.down = linear(h, f), linear(h, f), linear(f, h)
        self.norm1, self.norm2 = nn.RMSNorm(h), nn.RMSNorm(h)

    def body(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def rotate(x: Tensor) -> Tensor:  # in fp32; keeps nothing but the shared tables
            first, second = x.float().chunk(2, -1)
            return (x.float() * cos + torch.cat((-second, first), -1) * sin).type_as(x)

        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = attend(rotate(q), rotate(k), v, enable_gqa=q.shape != k.shape)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def forward(self, *args: Tensor) -> Any:
        if self.recompute == "none":
            return self.body(*args)
        more: Any = {"context_fn": keep_some} if self.recompute == "selective" else {}
        return checkpoint(self.body, *args, use_reentrant=False, **more)


def keep_some() -> Any:
    """Op-level selective recompute: attention and most products are kept, the rest runs again."""
    seen = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = "scaled_dot_product" in str(op)
        if op is torch.ops.aten.mm.default:
            keep = seen[context.is_recompute] % 7 in KEPT
            seen[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Decoder(nn.Module):
    """Embedding, blocks, norm and an untied head; returns the loss."""

    def __init__(self, shape: Shape, seq: int, recompute: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape, recompute) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        rates = 1e4 ** -torch.linspace(0, 1, shape.hidden // shape.heads // 2 + 1, dtype=torch.float32)[:-1]
        angles = torch.outer(torch.arange(seq, dtype=torch.float32), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())


class Device:
    """The GPU, or in a dry run the CPU: same calls, and None for what only a GPU can tell."""

    def __init__(self, dry: bool, repeats: int) -> None:
        self.gpu, self.repeats, self.torch = not dry, repeats, torch.device("cpu" if dry else "cuda:0")
        if dry:
            torch.set_num_threads(1)  # tiny products only wait for each other's threads

    def randn(self, *size: int, dtype: str = "bfloat16") -> Tensor:
        return torch.randn(*size, device=self.torch, dtype=getattr(torch, dtype))

    def clean(self) -> None:
        """Returns cached memory; forgets peaks, cuBLAS workspaces and compiled code."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
            torch.cuda.empty_cache()
            self.memory()

    def memory(self) -> Record:
        """The allocator's counters, now and at their peak; the next peak starts here."""
        stats: Record = {}
        if self.gpu:
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            torch.cuda.reset_peak_memory_stats()
        pairs = itertools.product(("allocated", "active", "reserved"), ("peak", "current"))
        return {f"{kind}_{word}_bytes": stats.get(f"{kind}_bytes.all.{word}") for kind, word in pairs}

    def used(self) -> Record:
        """Memory in use on the whole device, and what of it is not this process's tensors or cache."""
        if not self.gpu:
            return dict.fromkeys(("device_used_bytes", "reserved_bytes", "context_bytes"))
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        used, kept = total - free, torch.cuda.memory_reserved()
        return {"device_used_bytes": used, "reserved_bytes": kept, "context_bytes": used - kept}

    def mark(self) -> Any:
        """A moment, on the device's own clock."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, *marks: Any) -> list[float]:
        if self.gpu:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 if self.gpu else b - a for a, b in itertools.pairwise(marks)]

    def seconds(self, run: Callable[..., Any], *args: Any) -> float:
        """Median seconds of a call, in rows of calls of about 20 ms each."""

        def row(count: int) -> float:
            start = self.mark()
            for _ in range(count):
                run(*args)
            return max(self.between(start, self.mark())[0], 1e-9) / count

        row(2)
        count = max(1, min(100, int(0.02 / row(1)))) if self.gpu else 1
        return statistics.median(row(count) for _ in range(self.repeats))

    def join(self) -> None:
        """A process group of one, without a port."""
        if not dist.is_initialized():
            more: Any = {"backend": "nccl", "device_id": self.torch} if self.gpu else {"backend": "gloo"}
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **more)


def optimizer_of(name: str, parameters: list[Any]) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-5)
    return torch.optim.AdamW(parameters, lr=1e-5, fused=name == "adamw-fused", foreach=name != "adamw-fused")


def build(t: SimpleNamespace, shape: Shape, device: Device) -> Any:
    """The model of a memory case; autocast and fsdp keep fp32 weights."""
    dtype = torch.bfloat16 if t.precision == "pure-bf16" else torch.float32
    if t.model == "hf":
        from transformers import LlamaConfig, LlamaForCausalLM

        names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size"
        sizes: Any = dict(zip([*names.split(), "vocab_size"], shape, strict=True))
        with device.torch:
            hf: Any = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=t.seq, use_cache=False))
        if t.recompute == "full":
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        return hf.to(dtype).train()
    with device.torch:
        model = Decoder(shape, t.seq, t.recompute)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # the rotary tables stay in fp32
    if t.compiled:
        for block in model.blocks:
            block.compile(backend="inductor" if device.gpu else "eager")
    if t.precision == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        device.join()
        more: Any = {"mesh": dist.device_mesh.init_device_mesh(device.torch.type, (1,))}
        more["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in (model.embedding, *model.blocks):
            fully_shard(unit, **more)
        fully_shard([model.norm, model.head], reshard_after_forward=False, **more)
        fully_shard(model, **more)
    return model


def run_memory(settings: Record, device: Device) -> Record:
    """Trains: three steps to settle, one watched phase by phase, the rest on the clock."""
    t, shape = SimpleNamespace(**settings), Shape(**settings["shape"])
    before, model = device.used()["device_used_bytes"], build(t, shape, device)
    device.clean()  # of what building left in the cache
    optimizer = optimizer_of(t.optimizer, list(model.parameters()))
    ids = torch.randint(shape.vocab, (t.micro_batch, t.seq), device=device.torch)
    losses: list[Tensor] = []

    def step() -> Iterator[str]:
        for _ in range(t.accumulate):
            with torch.autocast(device.torch.type, torch.bfloat16, enabled=t.precision == "autocast"):
                loss = model(input_ids=ids, labels=ids).loss if t.model == "hf" else model(ids, ids)
            losses[:] = [loss.detach()]
            yield "forward"
            (loss / t.accumulate).backward()
            del loss
            yield "backward"
        optimizer.step()
        optimizer.zero_grad()
        yield "step"

    for _ in range(3):
        list(step())
    phases: dict[str, Record] = {}
    start = device.memory()
    for name in step():
        old, now = phases.get(name, {}), device.memory()
        phases[name] = {k: max(v, old.get(k, 0)) if v and "peak" in k else v for k, v in now.items()}
    runs: list[dict[str, float]] = []
    for _ in range(device.repeats):
        marks = [("", device.mark()), *((name, device.mark()) for name in step())]
        spent = list(zip(marks[1:], device.between(*(mark for _, mark in marks)), strict=True))
        runs.append({word: sum(s for (name, _), s in spent if name == word) for word in phases})
        runs[-1]["total"] = sum(s for _, s in spent)
    middle = {f"{word}_seconds": statistics.median(run[word] for run in runs) for word in runs[0]}
    total, batch = middle["total_seconds"], t.micro_batch * t.accumulate
    flops = [shape.flops(t.seq, batch, pairs) for pairs in (1.0, 0.5)]
    held = [v for state in optimizer.state.values() for v in state.values()]
    sizes = [sum(v.numel() * v.element_size() for v in group) for group in (model.parameters(), held)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter_bytes": sizes[0],
        "optimizer_bytes": sizes[1],
        **{k: v and max(p[k] for p in phases.values()) for k, v in start.items() if "peak" in k},
        "between_steps_allocated_bytes": start["allocated_current_bytes"],
        "phases": phases,
        **device.used(),
        "device_used_before_bytes": before,
        "allocation_retries": torch.cuda.memory_stats()["num_alloc_retries"] if device.gpu else None,
        **middle,
        "total_seconds_each": [run["total"] for run in runs],
        "tokens_per_second": t.seq * batch / total,
        "attention_full_flops": flops[0],
        "attention_causal_flops": flops[1],
        "attention_causal_tflop_per_second": flops[1] / total / 1e12,
        "loss": float(losses[0]),
    }


def run_matmul(s: Record, device: Device) -> Record:
    """A linear layer's forward (m tokens, n outputs, k inputs) and its backward's two products."""
    torch.backends.cuda.matmul.allow_tf32 = True
    readings = []
    for m, n, k in s["sizes"]:
        x, w, g = (device.randn(*size, dtype=s["dtype"]) for size in ((m, k), (n, k), (m, n)))
        products = {"forward": (x, w.T), "input_gradient": (g, w), "weight_gradient": (g.T, x)}
        spent = {name: device.seconds(torch.matmul, *pair) for name, pair in products.items()}
        one = {"m": m, "n": n, "k": k} | {f"{name}_seconds": value for name, value in spent.items()}
        one |= {f"{name}_tflop_per_second": 2e-12 * m * n * k / value for name, value in spent.items()}
        readings.append(one | {"training_tflop_per_second": 6e-12 * m * n * k / sum(spent.values())})
    return {"readings": readings}


def run_attention(s: Record, device: Device) -> Record:
    """Causal attention; half of the s x s pairs count, and the backward has 2.5 times the FLOPs."""
    readings, heads, kv, d = [], s["heads"], s["kv_heads"], s["head_dim"]
    for length in s["lengths"]:
        batch = max(1, s["tokens"] // length)
        q, k, v = (device.randn(batch, n, length, d).requires_grad_() for n in (heads, kv, kv))
        run = functools.partial(attend, q, k, v, enable_gqa=heads != kv)
        with sdpa_kernel(getattr(SDPBackend, s["kernel"] if device.gpu else "MATH")):
            ahead, out = device.seconds(run), run()
            back = device.seconds(torch.autograd.grad, out, (q, k, v), torch.randn_like(out), True)
        tflop = 2e-12 * batch * heads * length**2 * d
        one = {"sequence": length, "batch": batch, "forward_seconds": ahead, "backward_seconds": back}
        one |= {"forward_tflop_per_second": tflop / ahead, "backward_tflop_per_second": 2.5 * tflop / back}
        readings.append(one)
    return {"readings": readings}


def run_bandwidth(s: Record, device: Device) -> Record:
    """Bytes read and written per second: copy, sum of two, and silu."""
    readings = []
    for size in s["tensor_bytes"]:
        a, b, c = (device.randn(size // 2) for _ in range(3))
        copy, add = device.seconds(a.copy_, b), device.seconds(functools.partial(torch.add, out=a), b, c)
        spent = {"copy": copy / 2, "add": add / 3, "silu": device.seconds(F.silu, b) / 2}
        rates = {f"{name}_bytes_per_second": size / value for name, value in spent.items()}
        readings.append({"tensor_bytes": size} | rates)
    return {"readings": readings}


def run_optimizer(s: Record, device: Device) -> Record:
    """An optimizer step, against the least traffic: states and weights read and written, gradients read."""
    weights = [device.randn(s["elements"], dtype=s["dtype"]) for _ in range(s["tensors"])]
    for w in weights:
        w.grad = torch.randn_like(w)
    least = (3 if s["optimizer"] == "sgd" else 7) * sum(w.numel() * w.element_size() for w in weights)
    spent = device.seconds(optimizer_of(s["optimizer"], weights).step)
    return {"least_bytes": least, "seconds": spent, "least_bytes_per_second": least / spent}


def run_context(s: Record, device: Device) -> Record:
    """Memory outside tensors after each first use; always in a process of its own."""
    x = torch.zeros(2**24 if device.gpu else 2**18, device=device.torch, dtype=torch.bfloat16)
    q = x[: 2**16].view(1, 4, 128, 128).detach().requires_grad_()
    uses: dict[str, Callable[[], Any]] = {"first_use": lambda: None, "kernel": lambda: x + 1}
    if s["name"] == "communicator":
        uses |= {"process_group": device.join, "all_reduce": lambda: dist.all_reduce(x)}
    uses |= {"cublas": lambda: q.detach() @ q.detach(), "attention": lambda: attend(q, q, q).sum().backward()}
    return {"stages": {name: (use(), device.used())[1] for name, use in uses.items()}}


def failed(problem: BaseException) -> Record:
    """The record of a case that raised: out of memory, or its first line."""
    line = (str(problem).strip().splitlines() or [""])[0][:300]
    oom = any(word in str(problem).lower() for word in ("out of memory", "alloc_failed"))
    return {"oom": oom, "error": f"{type(problem).__name__}: {line}", "result": None}


def attempt(case: Case, device: Device) -> Record:
    """A case's record, whatever happens to it."""
    device.clean()
    try:
        result = globals()["run_" + case.id.split(":")[0]](case.settings, device)
        return {"oom": False, "error": None, "result": result}
    except Exception as problem:
        return failed(problem.with_traceback(None)) | {"at_error": device.memory()}


def in_child(case: Case, args: argparse.Namespace, seconds: float) -> Record:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/record.json"
        command = [sys.executable, __file__, "--case", case.id, "--out", out, *["--dry-run"] * args.dry_run]
        env = {**os.environ, **case.settings.get("environment", {})}
        try:
            run = functools.partial(subprocess.run, env=env, timeout=seconds, capture_output=True, text=True)
            run([*command, f"--repeats={args.repeats}"], check=True)
            return json.loads(Path(out).read_text())  # type: ignore[no-any-return]
        except (subprocess.SubprocessError, OSError) as problem:
            said = (getattr(problem, "stderr", "") or "").strip().splitlines()[-1:]
            return failed(problem) | {"said": said}


def nvidia_smi() -> Record:
    """What the driver says of the first visible GPU; None for what it does not."""
    fields = "driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    keys = "driver memory_mib memory_used_mib sm_clock_mhz sm_clock_max_mhz power_limit_w temperature_celsius"
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        words: list[Any] = [word.strip() for word in line.split(",")]
    except (OSError, subprocess.SubprocessError):
        words = []
    words = [float(w) if re.fullmatch(r"\d+(\.\d+)?", w) else w for w in words] or [None] * 7
    return dict(zip(keys.split(), words, strict=False))


def run_facts(s: Record, device: Device) -> Record:
    """What torch says of itself and the GPU."""
    facts: Record = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    facts |= {"python": platform.python_version(), "platform": platform.platform(), "gpu": None}
    facts |= {name: os.environ.get(name) for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")}
    if device.gpu:
        own = torch.cuda.get_device_properties(device.torch)
        facts |= {
            "gpu": own.name,
            "memory_bytes": own.total_memory,
            "multiprocessors": own.multi_processor_count,
        }
        facts |= {"compute_capability": f"{own.major}.{own.minor}", "cudnn": torch.backends.cudnn.version()}
        facts["nccl"] = torch.cuda.nccl.version() if dist.is_nccl_available() else None
    return facts


def predict(s: Record, gpu: str) -> Record:
    """The planner's figures for a memory case: bytes of tensors at each moment, seconds of a step."""
    from dataclasses import replace

    from planner import ClusterSpec, ModelSpec, TrainingSpec
    from planner.defaults import resolve
    from planner.stages import price
    from strategies.layout import Layout

    shape, hf = Shape(**s["shape"]), s["model"] == "hf"
    names = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    )
    sizes: Any = dict(zip(names.split(), shape, strict=True)) | {"head_dim": shape.hidden // shape.heads}
    model = ModelSpec(name="measured", model_type="llama", max_position_embeddings=s["seq"], **sizes)
    kind = re.search(r"GB200|[ABH][128]00|L40S|V100|MI300X|4090", gpu)
    training: Record = {"framework": "hf" if hf else "torchtitan", "optimizer": s["optimizer"].split("-")[0]}
    training |= {"seq_length": s["seq"], "global_batch_size": s["micro_batch"] * s["accumulate"]}
    training["precision"] = "pure-bf16" if hf and s["precision"] == "pure-bf16" else "bf16"
    gpu = f"1x{kind[0] if kind else 'H100'}"
    job = resolve(model, ClusterSpec.parse(gpu), TrainingSpec(**training))
    if s["precision"] == "pure-bf16":
        job = replace(job, recipe=replace(job.recipe, weight=2, gradient=2, moment=2))
    sharding = "fsdp" if s["precision"] == "fsdp" else "ddp"
    layout = Layout(micro_batch_size=s["micro_batch"], grad_accum=s["accumulate"], sharding=sharding)
    candidate = price(job, layout, (s["recompute"],)).spread()
    tensors, moment = candidate.peak(0, [shape.layers])
    own = {"framework": job.stack.name, "gpu": job.cluster.gpu.name, "moment": moment}
    return own | {"tensors_peak_bytes": tensors, "total_seconds": candidate.cost([[shape.layers]])}


def compare(document: Record) -> Record:
    """Adds what the planner predicts beside each memory case."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    for case in document["cases"]:
        if case["id"].startswith("memory:"):
            try:
                case["predicted"] = own = predict(case["settings"], document["facts"]["gpu"] or "")
            except Exception as problem:  # the planner is not there, or refuses the case
                case["predicted"] = {"error": failed(problem)["error"]}
                continue
            for key, measured in (("tensors_peak_bytes", "allocated_peak_bytes"), ("total_seconds",) * 2):
                value = (case["result"] or {}).get(measured)
                own[f"{key}_over_measured"] = own[key] / value if value else None
    return document


def write(document: Record, out: Path) -> None:
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flag = functools.partial(parser.add_argument, action="store_true")
    flag("--list", help="print the cases and stop")
    flag("--quick", help="the most telling cases only: a few minutes")
    flag("--dry-run", help="tiny shapes on the CPU: tries the script, measures nothing")
    flag("--isolate", help="a process for every case, not only for those of context")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no case after this long")
    parser.add_argument("--only", choices=("memory", "compute", "context"), help="one group of cases")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed steps or rows of calls; the median counts"
    )
    parser.add_argument("--out", type=Path, default=Path("measured.json"), help="the result (%(default)s)")
    text = "add the planner's predictions: to an earlier result, or to this one"
    parser.add_argument("--compare", nargs="?", const="", metavar="FILE", help=text)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = [c for c in all_cases(args.dry_run) if args.only in (None, c.group) and c.quick >= args.quick]
    if args.list:
        print("\n".join(case.id for case in chosen))
        return 0
    if args.compare:
        write(compare(json.loads(Path(args.compare).read_text())), args.out)
        return 0
    if not args.dry_run and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA GPU; try --list, or --dry-run on the CPU")
    device, facts = Device(args.dry_run, args.repeats), Case("facts:", "", {}, True)
    if args.case:
        write(attempt({c.id: c for c in [facts, *chosen]}[args.case], device), args.out)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cases: list[Record] = []
    document = {"schema": SCHEMA, "complete": False, "dry_run": args.dry_run, "quick": args.quick}
    document |= {"isolated": args.isolate, "repeats": args.repeats, "before": nvidia_smi()}
    document |= {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cases": cases}
    document |= {"facts": in_child(facts, args, 300)["result"], "not_run": [c.id for c in chosen]}
    start = time.monotonic()
    try:
        for case in chosen:
            left = args.minutes * 60 - (time.monotonic() - start)
            if left <= 0:
                break
            began, child = time.monotonic(), args.isolate or case.group == "context"
            record: Record = {"id": case.id, "settings": case.settings}
            record |= {"device_before": nvidia_smi()} if child else {}
            record |= in_child(case, args, min(left, 1800)) if child else attempt(case, device)
            record |= {"elapsed_seconds": time.monotonic() - began, "device_after": nvidia_smi()}
            cases.append(record)
            document["not_run"] = [c.id for c in chosen[len(cases) :]]
            write(document, args.out)
            print(f"{case.id}: {record['error'] or 'done'}", file=sys.stderr)
    except KeyboardInterrupt:
        print("measure_gpu: interrupted; what was measured until then is kept", file=sys.stderr)
    document["complete"] = not document["not_run"]
    if args.compare is not None:
        compare(document)
    write(document, args.out)
    print(f"{len(cases)} cases in {args.out}")
    return 0 if document["complete"] else 1


if __name__ == "__main__":
    sys.exit(main())
