"""What a plan is in Hugging Face's words: TrainingArguments, peft's LoraConfig, bitsandbytes.

Read in transformers 5.23 (training_args.py, trainer_optimizer.py, integrations/liger.py) and peft 0.21
(tuners/lora/config.py). One table serves both directions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from planner import __version__
from planner.errors import InputError
from planner.export.base import NotExpressible, Subject, setting_of
from planner.export.structured import HEADER, is_on, section_of
from planner.files import plain

ARGUMENTS = "training_args.json"
PEFT = "peft.json"
OPTIMIZERS: Mapping[tuple[str, str], str] = {
    ("adamw", "fused"): "adamw_torch_fused",
    ("adamw", "foreach"): "adamw_torch",
    ("sgd", "foreach"): "sgd",
    ("lion", "fused"): "lion_32bit",
    ("trainer-lion8bit", "fused"): "lion_8bit",
    ("trainer-adamw8bit", "fused"): "adamw_bnb_8bit",
    ("paged-adamw", "fused"): "paged_adamw_32bit",
    ("paged-adamw8bit", "fused"): "paged_adamw_8bit",
    ("torchao-adamw8bit", "fused"): "adamw_torch_8bit",
    ("torchao-adamw4bit", "fused"): "adamw_torch_4bit",
    ("transformers-adafactor", "fused"): "adafactor",
    ("lomo", "fused"): "lomo",
}
"""Optimizer and optimizer_step of a plan -> ``optim``. Of names that stand for several, the first."""
ALIASES = {"adamw_8bit": "adamw_bnb_8bit"}
NEAREST = {
    "adam": "adamw",
    "momentum": "adamw",
    "adamw8bit": "trainer-adamw8bit",
    "adam8bit": "trainer-adamw8bit",
    "lion8bit": "trainer-lion8bit",
    "adafactor": "transformers-adafactor",
}
"""Optimizers that the Trainer has no name for, and what comes nearest."""
ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}
"""Kinds of attention -> ``attn_implementation`` of ``from_pretrained``."""
LIGER = {"fused": "cross_entropy", "chunked": "fused_linear_cross_entropy"}
"""The option loss -> which of Liger's kernels is on; all others off."""
LIGER_KERNELS = (
    "cross_entropy",
    "fused_linear_cross_entropy",
    "rope",
    "swiglu",
    "geglu",
    "rms_norm",
    "layer_norm",
)
PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "tf32": "tf32", "fp32": "", "pure-bf16": ""}
"""Precisions -> the switch of TrainingArguments."""
LLAMA = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
OPT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj", "up": "fc1", "down": "fc2"}
GPT2 = {**dict.fromkeys("qkv", "c_attn"), "o": "attn.c_proj", "up": "c_fc", "down": "mlp.c_proj"}
NEOX = {
    **dict.fromkeys("qkv", "query_key_value"),
    "o": "attention.dense",
    "up": "dense_h_to_4h",
    "down": "dense_4h_to_h",
}
TARGETS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), LLAMA),
    "opt": OPT,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "bloom": {**NEOX, "o": "self_attention.dense"},
}
"""Names of a block's products in transformers' modules, by model type, as peft matches them: by their end."""


def script_of(settings: Mapping[str, str], default: str = "train.py") -> str:
    """The training script that the user has. Raises InputError for what would be taken for an option."""
    script = setting_of(settings, "script", default)
    if not script.strip() or script.startswith("-"):
        raise InputError(f"--set script={plain(script)}: name a script, as in script={default}")
    return script


def training_arguments(subject: Subject) -> dict[str, Any]:
    """TrainingArguments of a plan, by name. Raises NotExpressible.

    ``run_name`` says where they come from: HfArgumentParser refuses keys of others, and JSON has no comments.
    """
    plan, options = subject.plan, subject.options()
    training, layout = subject.job.training, subject.layout
    found: dict[str, Any] = {
        "run_name": f"planner {__version__}, plan {subject.digest}: {plain(plan.model, 100)} on "
        f"{plan.num_gpus} x {plain(plan.gpu, 60)} as {layout.describe()}",
        "per_device_train_batch_size": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.grad_accum,
        "bf16": training.precision == "bf16",
        "fp16": training.precision == "fp16",
    }
    if training.precision in ("fp32", "tf32"):
        found["tf32"] = training.precision == "tf32"
    if training.precision not in PRECISIONS:
        raise NotExpressible(
            f"precision={training.precision}: TrainingArguments have {', '.join(PRECISIONS)}",
            {"precision": "pure-bf16"},
        )
    if options.get("loss", "eager") != "eager":
        kernel = LIGER[options["loss"]]
        found["use_liger_kernel"] = True
        found["liger_kernel_config"] = {name: name == kernel for name in LIGER_KERNELS}
    if options.get("compile") == "on":
        found["torch_compile"] = True
    return found


def optimizer_of(subject: Subject) -> str:
    """``optim`` of a plan. Raises NotExpressible."""
    training = subject.job.training
    step = subject.options().get("optimizer_step", "fused")
    if name := OPTIMIZERS.get((training.optimizer, step)):
        return name
    others = [kind for name, kind in OPTIMIZERS if name == training.optimizer]
    if others:
        raise NotExpressible(
            f"optimizer_step={step} of {training.optimizer} is not to be said in TrainingArguments, whose "
            f"optim={OPTIMIZERS[training.optimizer, others[0]]} is {others[0]}",
            {"option": {"optimizer_step": others[0]}},
        )
    near = NEAREST.get(training.optimizer, "adamw")
    raise NotExpressible(
        f"optimizer={training.optimizer} has no name in transformers' optim: make it in your code, with "
        f"Trainer(optimizers=...), or use {near}",
        {"optimizer": near},
    )


def recomputed(subject: Subject, target: str) -> bool:
    """Are all layers recomputed, or none? Raises NotExpressible for some."""
    policy, count = subject.recompute(target)
    if count is not None:
        raise NotExpressible(
            f"{target} recomputes all layers of a model or none: the plan has {count} of a stage's",
            {"recompute": "full"},
        )
    if policy not in ("none", "full"):
        raise NotExpressible(
            f"recompute={policy}: {target} has none and full of Hugging Face's modules", {"recompute": "full"}
        )
    return policy == "full"


def notes_of(subject: Subject) -> Iterator[str]:
    """What the training script has to do for the plan to be what runs."""
    training, options = subject.job.training, subject.options()
    attention = options.get("attention", "sdpa")
    if attention not in ATTENTION:
        raise NotExpressible(
            f"attention={attention} is not one of transformers': it has {', '.join(ATTENTION)}",
            {"attention": "flash"},
        )
    width = "bfloat16" if training.precision == "pure-bf16" else "float32"
    if training.framework == "deepspeed":
        width = "" if training.precision in ("bf16", "fp16") else width
    dtype = f", dtype=torch.{width}" if width and not training.adapters else ""
    yield f'load the model with attn_implementation="{ATTENTION[attention]}"{dtype}'
    yield f"sequences of {training.seq_length} tokens are left to your data"
    if training.dropout is not None:
        yield f"dropout {training.dropout:g} is set in the model's configuration"
    if options.get("loss") == "chunked":
        yield "Liger's fused_linear_cross_entropy has chunks of its own; the plan has eighths of the tokens"
    if training.optimizer == "paged-adamw8bit":
        yield "transformers keeps 32-bit states of embeddings under 8-bit optimizers; they may be evicted too"
    if training.adapters:
        yield f"adapters: {PEFT} has LoraConfig's keys and, where weights are in 4 bits, BitsAndBytesConfig's"
        if training.adapters.dtype is None and training.precision == "pure-bf16":
            yield "get_peft_model(..., autocast_adapter_dtype=False): adapters are planned in bf16"
        if training.adapters.keeps_inputs:
            yield "inputs of quantised products are planned as bitsandbytes 0.41 keeps them"
    elif training.frozen.embeddings:
        blocks = f" and of the first {training.frozen.blocks} blocks" if training.frozen.blocks else ""
        yield f"call requires_grad_(False) on the weights of the embeddings{blocks}"


def peft_of(subject: Subject, flat: bool = False) -> dict[str, str]:
    """The file of a plan's adapters; none without. ``flat``: the quantised weights are shared out.

    ``lora`` has LoraConfig's arguments, ``quantization`` BitsAndBytesConfig's.
    """
    adapters = subject.job.training.adapters
    if adapters is None:
        return {}
    names: str | list[str] = "all-linear"
    if adapters.targets != ("all-linear",):
        table = TARGETS.get(subject.model.model_type)
        if table is None:
            raise NotExpressible(
                f"targets={'+'.join(adapters.targets)}: modules of {subject.model.model_type} are not "
                "known by name here: use targets=all-linear",
                {"lora": f"rank={adapters.rank},targets=all-linear"},
            )
        names = list(dict.fromkeys(table[one] for one in adapters.products(subject.model)))
    found: dict[str, Any] = {
        HEADER: subject.header("").splitlines(),
        "lora": {
            "r": adapters.rank,
            "lora_alpha": 2 * adapters.rank,
            "lora_dropout": adapters.dropout,
            "target_modules": names,
            "use_dora": adapters.dora,
            "bias": "none",
            "task_type": "CAUSAL_LM",
        },
    }
    if adapters.quantize:
        compute = "float16" if subject.job.training.precision == "fp16" else "bfloat16"
        found["quantization"] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": adapters.quantize,
            "bnb_4bit_use_double_quant": adapters.double,
            "bnb_4bit_compute_dtype": compute,
            **({"bnb_4bit_quant_storage": compute} if flat else {}),
        }
    return {PEFT: text_of(found)}


def lora_text(found: Mapping[str, Any]) -> tuple[str, str | None]:
    """``--lora`` and ``--quantize`` of such a file, whose modules are of the family that has most of them.

    Raises InputError for modules that no family here has.
    """
    lora, quantization = section_of(found, "lora"), section_of(found, "quantization")
    names = lora.get("target_modules") or "all-linear"
    words = [f"rank={lora.get('r', 8)}"]
    if isinstance(names, list):
        given = [str(name) for name in names]
        tables = [{one: own for one, own in table.items() if own in given} for table in TARGETS.values()]
        most = max(tables, key=len)
        if not most:
            raise InputError(
                f"target_modules: {plain(', '.join(given))}: give --lora with the products' names"
            )
        words.append("targets=" + "+".join(most))
    if lora.get("lora_dropout"):
        words.append(f"dropout={lora['lora_dropout']}")
    words += ["dora=on"] * is_on(lora.get("use_dora"))
    words += ["double=on"] * is_on(quantization.get("bnb_4bit_use_double_quant"))
    return ",".join(words), "nf4" if is_on(quantization.get("load_in_4bit")) else None


def text_of(found: Mapping[str, Any]) -> str:
    """JSON as it is written to a file."""
    return json.dumps(found, indent=2, ensure_ascii=True) + "\n"


def words_of(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """TrainingArguments as a script's words."""
    words: list[str] = []
    for name, value in arguments.items():
        text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        words += [f"--{name}", text]
    return tuple(words)
