"""What Megatron-Bridge makes of an export: JSON cases on standard input, a JSON line for each.

A case has ``files``, ``env``, ``world`` and ``arch``. Its ``train.py`` is run in a folder of its own, up to
where training would start; the configuration that it hands over is set up and validated as ``pretrain`` does
first. Packages for GPUs, and those of other models, are stood in for by empty modules.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import logging
import os
import runpy
import sys
import tempfile
import types
import typing
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
sys.path.pop(0)  # this folder, whose scripts are called as what they judge with
if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
if not hasattr(typing, "override"):  # Python 3.11 runs the wheel of 3.12
    typing.override = lambda one: one
ABSENT = """
    triton transformer_engine modelopt apex flash_attn mamba_ssm causal_conv1d qwen_vl_utils
    diffusers timm open_clip mlflow comet_ml fla bitsandbytes datasets wandb peft tensorboard
    nvidia_resiliency_ext google antlr4 hydra sacrebleu nltk tensorstore zarr rouge_score
    megatron.energon flask_restful flask pandas tqdm imageio webdataset torchvision decord soundfile
    librosa av PIL requests sentencepiece tiktoken regex
"""


class Anything:
    """Stands for whatever a module has."""

    __name__ = "anything"

    def __init__(self, *_, **__):
        pass

    def __call__(self, *given, **named):
        return given[0] if len(given) == 1 and callable(given[0]) and not named else self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, _):
        return self

    def __mro_entries__(self, _):
        return ()

    def __or__(self, _):
        return self

    __ror__ = __or__


class Module(types.ModuleType):
    __version__ = "3.0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is not installed."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, _path=None, _target=None):
        if any(name == one or name.startswith(f"{one}.") for one in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


def there(name):
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(name) is not None
    return False


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


with quiet():
    import torch
    import transformers  # before anything that it looks for is stood in for  # noqa: F401

    torch.compile = lambda one=None, *_, **__: one if callable(one) else (lambda other: other)
    sys.meta_path.append(Absent([name for name in ABSENT.split() if not there(name)]))
    import megatron.core.utils as core_utils
    from packaging.version import Version

    core_utils._te_version = Version("2.20.0")
    import megatron.bridge.training.config as bridge
    import megatron.bridge.training.pretrain as training


class FusedAdam:
    """Transformer Engine's, as far as the precision-aware optimizer looks at it."""

    def __init__(self, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad):
        pass


optimizers = types.ModuleType("transformer_engine.pytorch.optimizers")
optimizers.FusedAdam = FusedAdam
sys.modules[optimizers.__name__] = optimizers

READ = {
    "model": """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
        tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
        context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
        sequence_parallel seq_length vocab_size recompute_granularity recompute_method
        recompute_num_layers recompute_modules num_moe_experts cp_comm_type fp8 fp8_recipe fp4
        params_dtype gated_linear_unit cpu_offloading_num_layers num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage hidden_dropout mtp_num_layers
    """,
    "train": "micro_batch_size global_batch_size train_iters",
    "ddp": "use_distributed_optimizer use_megatron_fsdp data_parallel_sharding_strategy grad_reduce_in_fp32 "
    "num_distributed_optimizer_instances overlap_grad_reduce overlap_param_gather "
    "megatron_fsdp_main_grads_dtype fp8_param_gather reuse_grad_buf_for_mxfp8_param_ag",
    "optimizer": "optimizer lr exp_avg_dtype optimizer_cpu_offload optimizer_offload_fraction",
    "checkpoint": "save load ckpt_format",
    "dataset": "seq_length data_path",
    "dist": "use_tp_pp_dp_mapping",
}


def plain(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value


def judge(case):
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS",):
        os.environ.pop(name, None)
    os.environ.update(case["env"], RANK="0", WORLD_SIZE=str(case["world"]), LOCAL_RANK="0")
    torch.cuda.get_device_capability = lambda *_, **__: (case["arch"], 0)
    handed = []
    training.pretrain = lambda config, forward_step_func: handed.append(config)
    stage = "train.py"
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            for name, text in case["files"].items():
                Path(folder, name).write_text(text, encoding="utf-8")
            sys.argv = ["train.py"]
            runpy.run_path(str(Path(folder, "train.py")), run_name="__main__")
            (config,) = handed
            stage = "validate"
            config.model.apply_rope_fusion = config.model.moe_permute_fusion = False
            config.model.gradient_accumulation_fusion = False
            bridge.runtime_config_update(config)
    except (Exception, SystemExit) as error:
        return {"ok": False, "stage": stage, "error": f"{type(error).__name__}: {error}"[:600]}
    found = {
        part: {name: plain(getattr(getattr(config, part), name, None)) for name in names.split()}
        for part, names in READ.items()
    }
    return {"ok": True, "data_parallel_size": config.data_parallel_size, **found}


for one in json.load(sys.stdin):
    told = judge(one)
    sys.__stdout__.write(json.dumps(told, default=str) + "\n")
    sys.__stdout__.flush()
