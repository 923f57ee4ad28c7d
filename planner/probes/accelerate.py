"""What ``accelerate launch`` and the Trainer make of files: their own parsers, without a GPU.

A case is ``{"files", "world", "options"}``: the files by name, processes in all, and the words before the
script.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore")
sys.path.pop(0)  # this folder, whose files have the names of the tools
with contextlib.redirect_stdout(io.StringIO()):
    import torch
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.utils import dataclasses as plugins
    from accelerate.utils import launch as launching
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

launching.is_port_in_use = lambda *args, **more: False
# FSDP1's plugin asks on which GPU it is.
plugins.is_cuda_available = lambda: True
torch.cuda.current_device = lambda: 0
OWN = ("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_")


def launched(folder: Path) -> tuple[Any, dict[str, str]]:
    """The launcher's arguments, and the environment that it gives to processes."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(folder / "accelerate.yaml"), "train.py"])
    args.nondefault = getattr(args, "nondefault", set())
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if defaults.mixed_precision else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, env = launching.prepare_deepspeed_cmd_env(args)
    else:
        env = launching.prepare_multi_gpu_env(args)
    return args, {name: value for name, value in env.items() if name.startswith(OWN)}


def mesh_of(args: Any, kind: Any) -> dict[str, int]:
    if not args.use_parallelism_config:
        return {}
    own = ParallelismConfig()
    own._validate_accelerator(
        SimpleNamespace(
            multi_device=True,
            num_processes=args.num_processes,
            is_fsdp2=args.use_fsdp,
            is_main_process=False,
            distributed_type=kind,
        )
    )
    return {name: size for name, size in own._sizes.items() if size > 1}


def deepspeed_of(arguments: TrainingArguments, world: int) -> dict[str, Any]:
    """The file with what the Trainer fills in, for so many processes that have data of their own."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    plugin = DeepSpeedPlugin()
    found = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
    names = (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "learning_rate"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "save_on_each_node"),
        *("fp16", "fp16_full_eval", "bf16", "bf16_full_eval"),
    )
    told = SimpleNamespace(world_size=world, **{name: getattr(arguments, name) for name in names})
    found.trainer_config_process(told)
    if found.mismatches:
        raise ValueError(str(found.mismatches))
    zero = DeepSpeedZeroConfig(**found.config.get("zero_optimization", {}))
    return {
        "batch": [found.config[name] for name in ("train_batch_size", "train_micro_batch_size_per_gpu")],
        "stage": int(zero.stage),
        "init": plugin.zero3_init_flag,
    }


def read(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    for name, text in case["files"].items():
        (folder / name).write_text(text)
    os.chdir(folder)
    args, env = launched(folder)
    os.environ.update(env)
    answer: dict[str, Any] = {
        "processes": args.num_processes,
        "machines": args.num_machines,
        "mixed": args.mixed_precision,
        "kind": next((k for k in ("deepspeed", "fsdp") if getattr(args, f"use_{k}")), "ddp"),
    }
    if args.use_fsdp:
        plugin = FullyShardedDataParallelPlugin()
        answer["fsdp"] = {
            "version": plugin.fsdp_version,
            "reshard": str(plugin.reshard_after_forward),
            "strategy": str(plugin.sharding_strategy),
            "offload": "Offload" in type(plugin.cpu_offload).__name__
            and type(plugin.cpu_offload).__name__ != "OffloadPolicy"
            and getattr(plugin.cpu_offload, "offload_params", True),
            "checkpointing": plugin.activation_checkpointing,
            "wrap": getattr(plugin.auto_wrap_policy, "__name__", str(plugin.auto_wrap_policy)),
        }
    if (folder / "training_args.json").exists():
        given = json.loads((folder / "training_args.json").read_text())
        parser = HfArgumentParser(TrainingArguments)
        # The Trainer asks the machine for what its parser need not: bf16, tf32, the processes of a job.
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
            os.environ.pop(name, None)
        on_machine = {"use_cpu": True} | ({"tf32": None} if given.get("tf32") else {})
        (arguments,) = parser.parse_dict({**given, **on_machine}, allow_extra_keys=False)
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "run_name")
        answer["arguments"] = {name: getattr(arguments, name) for name in names} | {
            "optim": str(getattr(arguments.optim, "value", arguments.optim)),
            "checkpointing": bool(arguments.gradient_checkpointing),
            "compile": arguments.torch_compile,
            "liger": arguments.liger_kernel_config if arguments.use_liger_kernel else None,
        }
        if args.use_deepspeed:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            answer["deepspeed"] = deepspeed_of(arguments, case["world"])
    answer["mesh"] = mesh_of(args, "DEEPSPEED" if args.use_deepspeed else "FSDP")
    if (folder / "peft.json").exists():
        from peft import LoraConfig
        from transformers import BitsAndBytesConfig

        given = json.loads((folder / "peft.json").read_text())
        lora = LoraConfig(**given["lora"])
        answer["lora"] = [lora.r, sorted(lora.target_modules) if lora.target_modules != "all-linear" else []]
        if "quantization" in given:
            answer["bits"] = str(BitsAndBytesConfig(**given["quantization"]).bnb_4bit_quant_type)
    return answer


def main() -> None:
    before = dict(os.environ)
    for case in json.load(sys.stdin):
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                answer = {"ok": True, **read(case, Path(folder))}
        except (Exception, SystemExit) as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
        os.chdir("/")
        print(json.dumps(answer, default=str), flush=True)


main()
