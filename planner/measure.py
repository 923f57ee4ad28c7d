"""Measured beside predicted: the user's own model, run by PyTorch on tensors without storage.

:func:`measure` builds the model from its configuration, runs a few training steps of one rank on
fake CUDA tensors (:mod:`planner.truth`), and puts every figure beside the planner's: model states,
what a layer keeps for its backward pass, tensor by tensor, and the most bytes alive at each moment.
What no tensor holds (CUDA context, communicators, the allocator's cache) is on neither side.

Needs ``pip install 'distributed-training-planner[truth]'``; without it, an InputError says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.defaults import Job, resolve
from planner.errors import InputError
from planner.given import check_layout, unsupported
from planner.layers import features
from planner.ledger import Entry, tensor_entries, view
from planner.replay import StageReplay
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from planner.stages import Prices, price
from strategies.layout import Layout

if TYPE_CHECKING:
    from planner.truth.runs import Run, Trace

INSTALL = "pip install 'distributed-training-planner[truth]'"
FULL_DEPTH = 40
"""Models of up to so many layers are traced whole; deeper ones from two shallow traces."""
SHALLOW = (4, 6)
"""The layers of those two traces. Every moment is linear in the layers from the fourth on."""
WRAPPING = {"one": "blocks", "split": "accelerate"}
"""FSDP's units by the option ``root``."""
PRECISIONS = {"bf16": "bf16", "fp16": "bf16", "fp32": "fp32", "pure-bf16": "pure-bf16"}
"""The planner's precisions and what is traced: fp16 takes the bytes of bf16."""
IN_WORDS = {"pure-bf16": "pure-bf16 (weights too)", "bf16": "bf16 (fp32 weights)", "fp32": "fp32"}
"""What is traced, as the header of a comparison names it."""


@dataclass(frozen=True)
class Line:
    """One figure, measured and predicted, in bytes (``parameters``: a count)."""

    section: str  # states, layer, moments
    name: str
    measured: float
    predicted: float
    unit: str = "bytes"

    @property
    def error(self) -> float:
        """Predicted over measured, less 1; infinite where something is predicted and nothing is there."""
        if self.measured:
            return self.predicted / self.measured - 1
        return float("inf") if self.predicted else 0.0


@dataclass(frozen=True)
class Kept:
    """Tensors of one size that a layer keeps: elements of one, and bytes of all.

    ``tensors`` are the measured ones as ``(shape, dtype, module, operator, bytes)``; ``terms`` the
    planner's as ``(name, bytes)``.
    """

    dims: str
    elements: float
    measured: float
    predicted: float
    tensors: tuple[tuple[tuple[int, ...], str, str, str, int], ...]
    terms: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Comparison:
    """Everything measured beside everything predicted, of one GPU."""

    model: str
    layers: int
    run: str
    lines: tuple[Line, ...]
    kept: tuple[Kept, ...]
    predicted_peak: dict[str, float] = field(default_factory=dict)  # by component
    measured_peak: dict[str, float] = field(default_factory=dict)  # by category
    notes: tuple[str, ...] = ()

    def line(self, name: str) -> Line:
        """The figure of that name."""
        return next(line for line in self.lines if line.name == name)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON has it."""
        lines = [{**vars(line), "error": line.error if line.measured else None} for line in self.lines]
        rest = {
            name: getattr(self, name)
            for name in ("model", "layers", "run", "predicted_peak", "measured_peak")
        }
        kept = [vars(one) for one in self.kept]
        return {"schema": "planner.measure/1", **rest, "lines": lines, "kept": kept, "notes": self.notes}


def require() -> None:
    """Raises InputError, with the command to install it, where torch or transformers is missing."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise InputError(f"measuring needs {' and '.join(missing)}: {INSTALL}")


def config_values(model: str | Path | Mapping[str, Any] | ModelSpec) -> dict[str, Any]:
    """The configuration to build: a file's or folder's own values, a catalog entry's, or a spec's."""
    if isinstance(model, Mapping):
        return dict(model)
    if isinstance(model, ModelSpec):
        from planner.export.hf_config import config_of

        return config_of(model)
    from planner.families import read_json

    path = Path(model)
    if str(model).endswith(".json") or path.exists():
        data = read_json(path / "config.json" if path.is_dir() else path, "config.json")
        return dict(data.get("config", data))
    return config_values(ModelSpec.from_catalog(str(model)))


def spec_of(model: str | Path | Mapping[str, Any] | ModelSpec) -> ModelSpec:
    """What the planner makes of the same model."""
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, Mapping):
        from planner.families import model_from_config

        return model_from_config(dict(model), "configuration")
    from planner.reading import read_model

    return read_model(str(model))


def measure(
    model: str | Path | Mapping[str, Any] | ModelSpec,
    training: TrainingSpec = TrainingSpec(framework="hf"),
    layout: Layout = Layout(),
    *,
    recompute: str = "none",
    layers: int | None = None,
    cluster: ClusterSpec | None = None,
) -> Comparison:
    """Runs the model of ``layers`` layers (its own by default) and compares with the prediction.

    ``layout`` is one GPU or DDP over ``data_parallel`` (framework hf), or FSDP over it (framework fsdp),
    there also of tensor and sequence parallelism over ``tensor_parallel``. With the option ``root=split``
    FSDP's units are those that accelerate makes.
    Raises InputError for what cannot be built, and where torch is missing.
    """
    require()
    spec, values = spec_of(model), config_values(model)
    if layers is not None:
        if not 1 <= layers <= 1000:
            raise InputError(f"layers={layers}: use 1 to 1000")
        spec = spec.model_copy(update={"num_hidden_layers": layers})
    if training.framework not in ("hf", "fsdp"):
        raise InputError(f"framework={training.framework} cannot be built here: use fsdp or hf")
    if layout.sharding == "fsdp" and training.framework == "hf" and layout.world_size > 1:
        raise InputError("framework=hf is one GPU or DDP: for FSDP use framework fsdp")
    cluster = cluster or ClusterSpec.parse(f"{layout.world_size}xH100")
    job = resolve(spec, cluster, training.model_copy(update={"global_batch_size": layout.global_batch_size}))
    check_layout(job, layout)
    if recompute not in job.stack.policies:
        raise InputError(f"recompute={recompute!r}: use {' or '.join(job.stack.policies)}")
    prices = price(job, layout, (recompute,))
    ledgers = predicted_ledgers(prices)
    run = replace(
        _run(values, job, layout, recompute),
        wrapping=WRAPPING[job.training.options.get("root", "one")],
        reduce_dtype="fp32" if prices.wire.reduce_bytes == 4 else "bf16",
    )
    traced, notes = _trace(run, spec.num_hidden_layers)
    return _compare(spec, run, traced, ledgers, (*notes, *_caveats(run, job, layout)))


def predicted_ledgers(prices: Prices) -> dict[str, list[Entry]]:
    """The planner's tensors at the highest point of every moment.

    Tensor parallelism is priced also where the framework is planned without it: a note says so.
    """
    rows = ((int(prices.rows),),)
    stage = view(prices, rows, 0)
    peaks = StageReplay(prices, 0, rows).run().peaks()
    return {moment: list(tensor_entries(prices, stage, snapshot)) for moment, (snapshot, _) in peaks.items()}


def _run(values: Mapping[str, Any], job: Job, layout: Layout, recompute: str) -> Run:
    """The run that a job and a layout stand for. Raises InputError if it cannot be built here."""
    from planner.truth.runs import Run

    if layout.pipeline_parallel > 1 or layout.grad_accum > 1:
        raise InputError("pipelines and accumulated gradients cannot be measured: use one of each")
    if layout.context_parallel * layout.expert_parallel * layout.expert_tensor_parallel > 1:
        raise InputError("context and expert parallelism cannot be measured: use one of each")
    if layout.data_shards != layout.data_parallel:
        raise InputError("hybrid sharding cannot be measured: leave data_shards out")
    if layout.sharding not in ("ddp", "fsdp"):
        raise InputError(f"sharding={layout.sharding} cannot be measured: use ddp or fsdp")
    parallel = layout.sharding if layout.data_parallel > 1 else "none"
    if (tensor := int(layout.tensor_parallel)) > 1:
        if parallel != "fsdp":
            raise InputError(
                f"tensor_parallel={tensor} is measured together with FSDP: use framework fsdp, sharding fsdp "
                "and data_parallel 2 or more"
            )
        if not layout.sequence_parallel:
            raise InputError("tensor parallelism is measured with sequence parallelism: leave it on")
        if {"eager", "masked"} & features(job.model, job.training, job.stack):
            # transformers would make a mask as long as the rank's own part of the sequence.
            raise InputError(
                "tensor parallelism is measured without an attention mask: use attention=sdpa, and a "
                "seq_length below the model's sliding window"
            )
    training = job.training
    if training.precision not in PRECISIONS:
        raise InputError(f"precision={training.precision} cannot be measured: use {' or '.join(PRECISIONS)}")
    if training.optimizer != "adamw" or training.options.get("optimizer_step") == "in_backward":
        raise InputError("the optimizer step is measured with AdamW, fused or foreach: use optimizer=adamw")
    precision = PRECISIONS[training.precision]
    if job.stack.name == "fsdp" and precision == "bf16" and parallel in ("none", "ddp"):
        raise InputError("FSDP's mixed precision takes a group of GPUs that it shards over: use 2 or more")
    if (loss := training.options.get("loss", "eager")) != "eager":
        raise InputError(f"option loss={loss} cannot be measured: use loss=eager")
    if training.attention == "flash":
        raise InputError(
            "attention=flash cannot be measured: use sdpa, which runs PyTorch's own flash kernel in half "
            "precision, or eager"
        )
    if training.dropout is not None:
        values = {**values, **dict.fromkeys(_DROPOUTS.get(values["model_type"], ()), training.dropout)}
    return Run(
        config=values,
        layers=1,
        seq_length=job.seq_length,
        micro_batch_size=int(layout.micro_batch_size),
        precision=precision,
        attention="eager" if training.attention == "eager" else "sdpa",
        recompute=recompute,
        optimizer=training.options.get("optimizer_step", "fused"),
        parallel=parallel,
        gpus=int(layout.world_size),
        tensor_parallel=tensor,
        reshard_after_forward=bool(layout.reshard_after_forward),
        gradient_as_bucket_view=training.options.get("gradient_view") == "on",
    )


_DROPOUTS = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "opt": ("dropout", "attention_dropout"),
    "bloom": ("hidden_dropout", "attention_dropout"),
}


@dataclass(frozen=True)
class _Traced:
    """What the whole model holds, and what one layer keeps."""

    n_params: float
    states: Mapping[str, float]
    moments: Mapping[str, float]
    forward_end: float
    layer: Sequence[Any]  # Saved or Storage
    layer_bytes: float
    by_category: Mapping[str, float]


def _trace(run: Run, layers: int) -> tuple[_Traced, list[str]]:
    from planner.truth.runs import trace

    two, three = (trace(replace(run, layers=count)) for count in (2, 3))
    layer = _difference(two, three, full=run.recompute == "full")
    if layers <= FULL_DEPTH:
        known = {2: two, 3: three}
        whole = known.get(layers) or trace(replace(run, layers=layers))
        return _summary(whole, layer), []
    low, high = (_summary(trace(replace(run, layers=count)), layer) for count in SHALLOW)
    note = f"extrapolated to {layers} layers from traces of {SHALLOW[0]} and {SHALLOW[1]}"
    return _line_through(low, high, layers), [note]


def _difference(two: Trace, three: Trace, full: bool) -> list[Any]:
    """What a third layer adds to what is kept: under recompute, storages still alive."""
    left: list[Any] = list(two.kept if full else two.saved)
    added = []
    keys = [_key(one) for one in left]
    for one in three.kept if full else three.saved:
        if _key(one) in keys:
            keys.remove(_key(one))
        else:
            added.append(one)
    return added


def _key(one: Any) -> tuple[Any, ...]:
    module = ".".join("N" if part.isdigit() else part for part in one.module.split("."))
    return (one.size, one.shape, one.dtype, module, one.op)


def _summary(trace: Trace, layer: Sequence[Any]) -> _Traced:
    return _Traced(
        trace.n_params,
        trace.states,
        trace.moments,
        trace.after_forward["total"],
        layer,
        sum(one.size for one in layer),
        trace.peak.by_category,
    )


def _line_through(low: _Traced, high: _Traced, layers: int) -> _Traced:
    steps = (layers - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])

    def at(a: float, b: float) -> float:
        return a + steps * (b - a)

    def every(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {name: at(a.get(name, 0), b.get(name, 0)) for name in {*a, *b}}

    return _Traced(
        at(low.n_params, high.n_params),
        every(low.states, high.states),
        every(low.moments, high.moments),
        at(low.forward_end, high.forward_end),
        low.layer,
        low.layer_bytes,
        every(low.by_category, high.by_category),
    )


def _caveats(run: Run, job: Job, layout: Layout) -> list[str]:
    notes = ["tensors only: CUDA context, NCCL and the allocator's cache are on neither side"]
    if run.recompute == "full":
        notes.append("a layer's kept bytes are storages alive after the forward, in units of 512 bytes")
    if run.tensor_parallel > 1:
        notes.append("tensor, sequence and loss parallelism are DTensor's, of the Hugging Face modules")
        if unsupported(job.stack, layout):
            notes.append(f"{job.stack.name} is planned without tensor parallelism: shown as if it had it")
    if run.precision != job.training.precision:
        notes.append(f"{job.training.precision} is run in {run.precision}, which takes the same bytes")
    return notes


_STATES = {"parameters": "param", "gradients": "grad", "optimizer_states": "opt"}


def _total(entries: Iterable[Entry], component: str | None = None) -> float:
    return sum(entry.held for entry in entries if component in (None, entry.component))


def _compare(
    spec: ModelSpec, run: Run, traced: _Traced, ledgers: Mapping[str, list[Entry]], notes: Sequence[str]
) -> Comparison:
    lines = [Line("states", "number of parameters", traced.n_params, spec.num_parameters, "parameters")]
    at_rest = ledgers["optimizer step"]
    for component, category in _STATES.items():
        size = traced.states.get(category, 0)
        if category == "grad" and run.parallel == "ddp":
            size += traced.states.get("other", 0)  # DDP's buckets, which the planner counts with them
        name = component.replace("_", " ")
        lines.append(Line("states", name, size, _total(at_rest, component)))
    blocks = [
        entry
        for entry in ledgers["forward end"]
        if entry.layer == "block" and entry.component == "activations"
    ]
    depth = spec.num_hidden_layers
    kept = _by_size(traced.layer, blocks, depth)
    lines.append(Line("layer", "kept by one layer", traced.layer_bytes, _total(blocks) / depth))
    predicted = {name: _total(entries) for name, entries in ledgers.items()}
    backward = max(v for k, v in predicted.items() if k not in ("forward end", "loss", "optimizer step"))
    if run.parallel != "fsdp":  # the planner's includes what is gathered on the way there
        lines.append(Line("moments", "forward end", traced.forward_end, predicted["forward end"]))
    lines.append(Line("moments", "loss", traced.moments["loss"], predicted["loss"]))
    lines.append(Line("moments", "backward", traced.moments["backward"], backward))
    step = "optimizer step"
    lines.append(Line("moments", step, traced.moments[step], predicted[step]))
    highest = max(predicted, key=lambda name: predicted[name])
    lines.append(Line("moments", "peak", max(traced.moments.values()), predicted[highest]))
    components: dict[str, float] = defaultdict(float)
    for entry in ledgers[highest]:
        components[entry.component] += entry.held
    return Comparison(
        model=spec.name,
        layers=depth,
        run=_describe(run),
        lines=tuple(lines),
        kept=kept,
        predicted_peak=dict(components),
        measured_peak={name: size for name, size in traced.by_category.items() if size},
        notes=tuple(notes),
    )


def _describe(run: Run) -> str:
    tensor = run.tensor_parallel
    where = "one GPU" if run.gpus == 1 else f"one of {run.gpus} GPUs"
    if run.parallel != "none":
        where += f", {run.parallel.upper()} over {run.gpus // tensor}"
    if tensor > 1:
        where += f", tensor and sequence parallelism over {tensor}"
    return (
        f"{where}: sequence {run.seq_length}, micro-batch {run.micro_batch_size}, "
        f"{IN_WORDS[run.precision]}, attention {run.attention}, recompute {run.recompute}, "
        f"AdamW {run.optimizer}"
    )


def _by_size(layer: Sequence[Any], blocks: Sequence[Entry], depth: int) -> tuple[Kept, ...]:
    """Tensors and terms of a layer, those of the same number of elements together."""
    tensors: dict[int, list[Any]] = defaultdict(list)
    for one in layer:
        tensors[prod(one.shape)].append(one)
    terms: dict[int, list[Entry]] = defaultdict(list)
    for entry in blocks:
        terms[round(entry.held / depth / entry.unit)].append(entry)
    for elements in sorted(set(tensors) - set(terms)):
        # A tensor of several parts (a fused weight) stands with its parts.
        parts = next((n for n in (2, 3, 4) if elements % n == 0 and elements // n in terms), None)
        if parts is not None:
            tensors[elements // parts] += tensors.pop(elements)
    rows = []
    for elements in sorted({*tensors, *terms}, reverse=True):
        mine, theirs = terms[elements], tensors[elements]
        rows.append(
            Kept(
                dims=" = ".join(dict.fromkeys(" ".join(entry.dims) for entry in mine)),
                elements=elements,
                measured=float(sum(one.size for one in theirs)),
                predicted=_total(mine) / depth,
                tensors=tuple((one.shape, one.dtype, one.module, one.op, one.size) for one in theirs),
                terms=tuple((entry.name, entry.held / depth) for entry in mine),
            )
        )
    return tuple(rows)
