"""Plans for Megatron-LM: a file of flags, and a script that starts a node's processes with them.

Written for Megatron-LM with megatron-core 0.17 to 0.19, of which each knows every flag of the table in
planner/export/megatron_flags.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from planner.errors import InputError
from planner.export.base import Export, Subject, setting_of
from planner.export.megatron_flags import BY_NAME, GROUPS
from planner.export.megatron_layout import layout_values
from planner.export.megatron_model import LEFT, is_hybrid, model_values
from planner.export.megatron_training import training_values
from planner.export.rendering import rendered
from planner.files import plain

VERSIONS = ("0.19", "0.18", "0.17")
FRAMEWORKS = ("megatron",)
SETTINGS = {
    "script": "what is run, pretrain_gpt.py unless given",
    "data-path": "prefixes of tokenized data with their weights; else Megatron-LM makes data up",
    "tokenizer-type": "HuggingFaceTokenizer ...; else NullTokenizer, with the model's vocabulary",
    "tokenizer-model": "its file or name",
    "save": "a folder for checkpoints",
    "save-interval": "steps between them, 1000 unless given",
    "load": "a folder of checkpoints to go on from; that of save unless given",
    "lr": "the learning rate, 1e-4 unless given",
    "train-iters": "steps; else those of the plan's tokens, or 100",
    "log-interval": "steps between lines of the log, 1 unless given",
    "eval-interval": "steps between evaluations, 1000 unless given",
    "eval-iters": "batches of an evaluation, 0 unless given: none is made",
    "rotary-base": "of rotary positions, 10000 unless given",
    "norm-epsilon": "of norms, 1e-5 unless given",
}
ARGUMENTS = "plan.args"
BLACKWELL = 10.0
"""Compute capability from which CUDA_DEVICE_MAX_CONNECTIONS need not be 1 (arguments.py, validate_args)."""
SCRIPT = "pretrain_gpt.py"
HYBRID = {
    "0.17": ("pretrain_mamba.py", "megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"),
    "0.18": ("pretrain_hybrid.py", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
}
HYBRID["0.19"] = HYBRID["0.18"]


def export(subject: Subject, version: str, settings: Mapping[str, str]) -> Export:
    """A plan as ``plan.args`` and ``launch.sh``. Raises NotExpressible for what cannot be told."""
    values = values_of(subject, version, settings)
    script = setting_of(settings, "script", HYBRID[version][0] if is_hybrid(subject.model) else SCRIPT)
    told = tuple(notes(subject, settings))
    version_of = f"for Megatron-LM with megatron-core {version}"
    header = subject.header(also=(version_of, *(f"note: {one}" for one in told)))
    env = environment(subject)
    return Export(
        target="megatron",
        version=version,
        files={
            ARGUMENTS: header + "".join(_lines(values)),
            "launch.sh": rendered(
                "megatron_launch.sh.jinja",
                header=header,
                arguments=ARGUMENTS,
                env=env,
                script=script,
                nodes=subject.nodes,
                per_node=subject.per_node,
            ),
        },
        by_hand=(ARGUMENTS, "launch.sh"),
        env=env,
        program=(script, *words_of(values)),
        notes=told,
    )


def values_of(subject: Subject, version: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """What every flag is for a plan, by its name, in the planner's words."""
    found = model_values(subject, version) | layout_values(subject) | training_values(subject, version)
    found |= _run(subject, version, settings)
    return {name: value for name, value in found.items() if value is not None}


def words_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """All words of the flags, in the table's order."""
    return tuple(word for name in BY_NAME if name in values for word in BY_NAME[name].written(values[name]))


def environment(subject: Subject) -> dict[str, str]:
    """Variables of every process.

    With tensor or context parallelism Megatron-LM wants one queue to the GPU before Blackwell, for the order
    of its messages; Megatron-FSDP wants several: 8 are CUDA's own number.
    """
    layout, capability = subject.layout, subject.cluster.gpu.compute_capability
    if layout.sharding in ("zero2", "fsdp"):
        return {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    cut = layout.tensor_parallel > 1 or layout.context_parallel > 1
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if cut and (capability or 0.0) < BLACKWELL else {}


def _run(subject: Subject, version: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """What is no part of a plan: data, steps, learning rate, checkpoints."""
    training = subject.plan.training
    steps = 100
    if training.tokens:
        steps = max(1, ceil(training.tokens / (subject.job.global_batch_size * subject.job.seq_length)))
    found: dict[str, Any] = {
        "--train-iters": _whole(settings, "train-iters", str(steps)),
        "--lr": _number(settings, "lr", "1e-4"),
        "--tokenizer-type": setting_of(settings, "tokenizer-type", "NullTokenizer"),
        "--mock-data": setting_of(settings, "data-path"),
        "--data-path": tuple(_path(word, "data-path") for word in _split(settings, "data-path")) or "",
        "--no-create-attention-mask-in-dataloader": True,
        # Without an interval 0.17 to 0.19 divide by None (training.py, get_train_valid_test_num_samples).
        "--log-interval": _whole(settings, "log-interval", "1"),
        "--eval-interval": _whole(settings, "eval-interval", "1000"),
        "--eval-iters": _whole(settings, "eval-iters", "0", least=0),
    }
    for name in ("tokenizer-model", "save", "load"):
        if value := setting_of(settings, name):
            found[f"--{name}"] = _path(value, name)
    if "--save" in found:
        found["--save-interval"] = _whole(settings, "save-interval", "1000")
        found.setdefault("--load", found["--save"])  # a job that is queued again goes on
    elif "save-interval" in settings:
        raise InputError("--set save-interval: nothing is saved: give --set save=FOLDER too")
    if "rotary-base" in settings:
        found["--rotary-base"] = _whole(settings, "rotary-base", "")
    if "norm-epsilon" in settings:
        found["--norm-epsilon"] = _number(settings, "norm-epsilon", "")
    if found["--tokenizer-type"] != "NullTokenizer":
        found["--vocab-size"] = None
    if is_hybrid(subject.model):
        found["--spec"] = HYBRID[version][1:]
    return found


def _split(settings: Mapping[str, str], name: str) -> list[str]:
    try:
        return shlex.split(setting_of(settings, name))
    except ValueError as error:
        raise InputError(f"--set {name}: {error}: quote as in a shell") from None


def _path(word: str, name: str) -> str:
    """A word that Megatron-LM's parser does not take for a flag."""
    if word.startswith("-"):
        raise InputError(f"--set {name}={plain(word)}: that is read as a flag: write ./{plain(word)}")
    return word


def _whole(settings: Mapping[str, str], name: str, default: str, least: int = 1) -> int:
    value = setting_of(settings, name, default)
    if not (value.isascii() and value.isdigit() and least <= int(value[:20]) <= 10**12):
        raise InputError(f"--set {name}={plain(value)}: use a whole number, {least} or more")
    return int(value)


def _number(settings: Mapping[str, str], name: str, default: str) -> float:
    value = setting_of(settings, name, default)
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e12:
        raise InputError(f"--set {name}={plain(value)}: use a number above 0, as in 1e-4")
    return number


def _lines(values: Mapping[str, Any]) -> Iterator[str]:
    for group, flags in GROUPS.items():
        stated = [flag.written(values[flag.name]) for flag in flags if flag.name in values]
        if any(stated):
            yield f"\n# {group}\n"
        yield from (shlex.join(words) + "\n" for words in stated if words)


def notes(subject: Subject, settings: Mapping[str, str]) -> Iterator[str]:
    """What the files cannot say, of a plan that is trained by Megatron-LM's modules."""
    layout, training = subject.layout, subject.plan.training
    if not settings.get("data-path"):
        yield "it trains on data that Megatron-LM makes up: give --set data-path=... and a tokenizer"
    if not settings.get("train-iters") and not training.tokens:
        yield "it stops after 100 steps: give --set train-iters=N, or plan with --tokens"
    if settings.get("data-path") and not settings.get("tokenizer-type"):
        yield "the tokenizer is NullTokenizer: give --set tokenizer-type and tokenizer-model of the data's"
    if not settings.get("save"):
        yield "nothing is saved: give --set save=FOLDER, from which it goes on too, and save-interval"
    if "lr" not in settings:
        yield "the learning rate is 1e-4 and falls to 0: give --set lr=..."
    if training.optimizer == "adam":
        yield "Megatron-LM's adam decouples weight decay, as adamw does; with --weight-decay 0 there is none"
    yield LEFT
    if subject.model.experts:
        yield "tokens are spread evenly by no loss: add --moe-aux-loss-coeff and how they are balanced"
    if subject.options()["attention"] == "flash":
        yield "Transformer Engine chooses cuDNN or FlashAttention; where neither runs, it keeps scores"
    else:
        yield "--transformer-impl local takes fused norms and fused gradients from Apex"
    if layout.sharding in ("zero2", "fsdp"):
        yield "CUDA_DEVICE_MAX_CONNECTIONS must not be 1 with Megatron-FSDP: no wrapper may set it so"
    if subject.options().get("mtp") == "on":
        yield "modules for further tokens are planned as kept; --recompute-granularity full is theirs too"
    offloads = ((stage.layers, *one) for stage in subject.plan.stages for one in stage.offload.items())
    if any("optimizer" in what and 0 < n < layers for layers, what, n in offloads):
        yield "Megatron-LM offloads the first parameters up to its fraction, whichever layers they are of"
