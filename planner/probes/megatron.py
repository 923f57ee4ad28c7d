"""What Megatron-LM's own parser and model make of flags: JSON cases on standard input, a JSON line for each.

A case has ``words``, ``env``, ``world`` and ``arch`` (9 is Hopper); with ``ranks``, the real model of each of
them is built, on the meta device, and its parameters are counted. Runs without a GPU and without Transformer
Engine: what asks for either is answered, and fusions that only it has are off. A second argument is a folder
with another megatron-core.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import logging
import math
import os
import sys
import types
import typing
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
sys.path.pop(0)  # this folder, whose scripts are called as what they judge with
if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
if not hasattr(typing, "override"):  # Python 3.11 runs the wheel of 3.12
    typing.override = lambda one: one


class Anything:
    """Stands for whatever a kernel's module has."""

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


class Module(types.ModuleType):
    __version__ = "3.0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Triton(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The compiler of kernels that megatron-core imports from 0.18 on, and does not run here."""

    def find_spec(self, name, _path=None, _target=None):
        if name.partition(".")[0] == "triton":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        yield errors


with quiet():
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.compile = lambda one=None, *_, **__: one if callable(one) else (lambda other: other)
    if importlib.util.find_spec("triton") is None:
        sys.meta_path.insert(0, Triton())
    import megatron.core.utils as core_utils
    from packaging.version import Version

    core_utils._te_version = Version("2.20.0")
    import megatron.training.arguments as arguments
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.num_microbatches_calculator import (
        destroy_num_microbatches_calculator,
        get_num_microbatches,
        init_num_microbatches_calculator,
    )
    from megatron.core.package_info import __version__ as version
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.training.training import get_megatron_optimizer_config


class Duplicated(torch.nn.Module):
    """A product that every rank has in whole, as Transformer Engine's; the local one would be cut."""

    def __init__(self, inputs, outputs, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs))


multi_latent_attention.TELinear = Duplicated


class FusedAdam:
    """Transformer Engine's, as far as the precision-aware optimizer looks at it."""

    def __init__(self, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad):
        pass


optimizers = types.ModuleType("transformer_engine.pytorch.optimizers")
optimizers.FusedAdam = FusedAdam
sys.modules[optimizers.__name__] = optimizers
usual = DotProductAttention.__init__


def attention(self, *given, k_channels=None, v_channels=None, num_splits=None, **named):
    """Without parameters, so of any width."""
    usual(self, *given, **named)


DotProductAttention.__init__ = attention
torch.cuda.current_device = lambda: "meta"
torch.Tensor.cuda = lambda self, *_, **__: self
torch.cuda.Stream = torch.cuda.Event = lambda *_, **__: None

READ = """
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size data_parallel_size
    sequence_parallel use_distributed_optimizer use_megatron_fsdp data_parallel_sharding_strategy
    num_distributed_optimizer_instances use_tp_pp_dp_mapping micro_batch_size global_batch_size
    seq_length recompute_granularity recompute_method recompute_num_layers recompute_modules
    optimizer sgd_momentum use_precision_aware_optimizer optimizer_cpu_offload optimizer_offload_fraction
    cpu_offloading_num_layers
    params_dtype fp8 fp8_recipe fp8_param_gather reuse_grad_buf_for_mxfp8_param_ag fp4
    accumulate_allreduce_grads_in_fp32 exp_avg_dtype exp_avg_sq_dtype
    padded_vocab_size num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups
    kv_channels hidden_dropout attention_dropout cp_comm_type hierarchical_context_parallel_sizes
    transformer_impl moe_router_topk moe_ffn_hidden_size num_experts window_size mtp_num_layers
    max_position_embeddings overlap_grad_reduce overlap_param_gather tokenizer_type tokenizer_model
    data_path save load train_iters lr rotary_base
"""


def plain(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value


def parsed(case, rank):
    """The arguments of one rank, checked by Megatron-LM."""
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_CPU_OFFLOAD_V1"):
        os.environ.pop(name, None)
    world = case["world"]
    os.environ.update(case["env"], RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank % 8))
    arguments.get_device_arch_version = lambda: case["arch"]
    torch.cuda.get_device_capability = lambda *_, **__: (case["arch"], 0)
    sys.argv = ["pretrain_gpt.py", *case["words"]]
    args = arguments.parse_args()
    arguments.validate_args(args)
    args.apply_rope_fusion = args.moe_permute_fusion = args.moe_router_fusion = False
    return args


def groups(args, case, rank):
    """The ranks' groups, as Megatron-LM makes them."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=case["world"])
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )


def judge(case):
    stage, errors = "argparse", io.StringIO()
    try:
        with quiet() as errors:
            args = parsed(case, 0)
            stage = "TransformerConfig"
            config = arguments.core_transformer_config_from_args(args)
            stage = "optimizer"
            get_megatron_optimizer_config(args)
            stage = "micro-batches"
            init_num_microbatches_calculator(
                0, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
            )
            micro_batches = get_num_microbatches()
            destroy_num_microbatches_calculator()
            stage = "tokenizer"
            if args.tokenizer_type == "NullTokenizer":
                args.vocab_tokens = build_tokenizer(args).vocab_size
            stage = "groups"
            groups(args, case, 0)
            ranks = dist.get_process_group_ranks
            placed = {
                "tp": ranks(parallel_state.get_tensor_model_parallel_group()),
                "pp": ranks(parallel_state.get_pipeline_model_parallel_group()),
                "dp": ranks(parallel_state.get_data_parallel_group()),
                "cp": ranks(parallel_state.get_context_parallel_group()),
                "ep": ranks(parallel_state.get_expert_model_parallel_group()),
            }
            closed()
            stage = "model"
            counted = {rank: counts(case, rank) for rank in case.get("ranks", ())}
    except (Exception, SystemExit) as error:
        with contextlib.suppress(Exception):
            destroy_num_microbatches_calculator()
        closed()
        told = errors.getvalue().strip().splitlines()
        words = told[-1] if isinstance(error, SystemExit) and told else str(error)
        return {"ok": False, "stage": stage, "error": f"{type(error).__name__}: {words}"[:600]}
    found = {name: plain(getattr(args, name, None)) for name in READ.split()}
    return {
        "ok": True,
        "version": version,
        "micro_batches": micro_batches,
        "vocab_tokens": getattr(args, "vocab_tokens", None),
        "groups": placed,
        "counts": counted,
        "gated": config.gated_linear_unit,
        **found,
    }


def closed():
    with quiet(), contextlib.suppress(Exception):
        parallel_state.destroy_model_parallel()
    with quiet(), contextlib.suppress(Exception):
        dist.destroy_process_group()


def counts(case, rank):
    """Parameters and layers of each model chunk of a rank."""
    args = parsed(case, rank)
    args.use_cpu_initialization, args.perform_initialization = True, False
    args.gradient_accumulation_fusion, args.no_persist_layer_norm = False, True
    args.cpu_offloading_num_layers, args.cpu_offloading = 0, False
    args.moe_grouped_gemm = False  # SequentialMLP has the same parameters
    if args.recompute_modules:
        args.recompute_modules = [one for one in args.recompute_modules if one != "moe_act"]
    config = arguments.core_transformer_config_from_args(args)
    config.persist_layer_norm = config.layernorm_zero_centered_gamma = False
    config.sequence_parallel, config.context_parallel_size = False, 1  # neither has parameters
    groups(args, case, rank)
    found = []
    for chunk in range(args.virtual_pipeline_model_parallel_size or 1):
        at = chunk if args.virtual_pipeline_model_parallel_size else None
        place = {} if at is None else {"ignore_virtual": False, "vp_stage": at}
        with torch.device("meta"):
            model = built(args, config, at, place)
        found.append([sum(one.numel() for one in model.parameters()), len(model.decoder.layers)])
    closed()
    return found


def built(args, config, at, place):
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=args.normalization, vp_stage=at
    )
    if args.multi_latent_attention:
        for layer in spec.layer_specs:
            latent = layer.submodules.self_attention.submodules
            latent.linear_q_down_proj = latent.linear_kv_down_proj = Duplicated
            if args.q_lora_rank is None:
                latent.q_layernorm = IdentityOp
    ahead = None
    if args.mtp_num_layers:
        ahead = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=False, vp_stage=at
        )
    return GPTModel(
        config,
        spec,
        args.padded_vocab_size or math.ceil(args.vocab_size / 128) * 128,
        args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        mtp_block_spec=ahead,
        vp_stage=at,
    )


for one in json.load(sys.stdin):
    told = judge(one)
    sys.__stdout__.write(json.dumps(told, default=str) + "\n")
    sys.__stdout__.flush()
