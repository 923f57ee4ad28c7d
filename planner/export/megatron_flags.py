"""Megatron-LM's flags and what they are in a plan: one table, for writing and for reading.

A field is a path from the plan: ``model.``, of ``ModelSpec``; ``layout.``, of ``LayoutPlan``; ``training.``,
of ``TrainingSpec``; ``option.``, of the framework's own choices; ``run.``, which no plan holds. ``word``
flags have one value, ``words`` one or more; a ``switch`` has none and stands where the field has its
``when``. With ``values`` the field's words are others than Megatron's. ``default`` is what the field is, in
the planner's words, where the flag is left out; ``ALWAYS`` marks those that are written whatever they are.
Where a flag stands for several fields at once, or a field needs more than one flag, ``rule`` says how; the
writer (planner/export/megatron_model.py, _layout.py, _training.py) and the reader have code for these.

Source: megatron/training/arguments.py and megatron/core/transformer/transformer_config.py of megatron-core
0.17.0, 0.18.0 and 0.19.2, which all know every flag here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ALWAYS: Any = object()
"""No default: the flag is written in every file."""
Kind = Literal["integer", "number", "word", "words", "switch"]


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name, ``of`` which field it is, how its value is written."""

    name: str
    of: str
    kind: Kind
    default: Any = None
    values: Mapping[Any, str] = field(default_factory=dict)
    when: Any = True
    rule: str = ""

    @property
    def dest(self) -> str:
        """The name that Megatron's parser gives to the value.

        >>> Flag("--norm-epsilon", "run.norm-epsilon", "number").dest
        'layernorm_epsilon'
        """
        return DESTS.get(self.name, self.name.removeprefix("--").replace("-", "_"))

    def written(self, value: Any) -> tuple[str, ...]:
        """The words of the flag for a field's value; none where it is the default.

        >>> BY_NAME["--cp-comm-type"].written("all-gather"), BY_NAME["--seq-length"].written(4096)
        (('--cp-comm-type', 'all_gather'), ('--seq-length', '4096'))
        """
        if self.kind == "switch":
            return (self.name,) if value == self.when else ()
        if self.default is not ALWAYS and value == self.default:
            return ()
        words = value if self.kind == "words" and not isinstance(value, str) else (value,)
        return (self.name, *(self.values.get(word, _shown(word)) for word in words))


def _shown(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


MODEL = (
    Flag("--num-layers", "model.num_hidden_layers", "integer", ALWAYS),
    Flag("--hidden-size", "model.hidden_size", "integer", ALWAYS),
    Flag("--ffn-hidden-size", "model.intermediate_size", "integer", ALWAYS),
    Flag("--num-attention-heads", "model.num_attention_heads", "integer", ALWAYS),
    Flag(
        "--group-query-attention",
        "model.num_key_value_heads",
        "switch",
        rule="where it is not num_attention_heads; not with latent attention",
    ),
    Flag(
        "--num-query-groups",
        "model.num_key_value_heads",
        "integer",
        rule="counts with --group-query-attention only",
    ),
    Flag(
        "--kv-channels",
        "model.head_dim",
        "integer",
        ALWAYS,
        rule="v_head_dim with latent attention; left out it is hidden_size / num_attention_heads",
    ),
    Flag(
        "--max-position-embeddings",
        "model.max_position_embeddings",
        "integer",
        ALWAYS,
        rule="the sequence length, if that is more; with learned positions a parameter for each",
    ),
    Flag(
        "--vocab-size",
        "model.vocab_size",
        "integer",
        ALWAYS,
        rule="one less in 0.17, whose NullTokenizer adds a token",
    ),
    Flag("--make-vocab-size-divisible-by", "stack.vocabulary_multiple", "integer", 128),
    Flag(
        "--padded-vocab-size",
        "stack.padded_vocabulary",
        "integer",
        rule="vocab_size, up to a multiple of vocabulary_multiple x tensor_parallel",
    ),
    Flag("--untie-embeddings-and-output-weights", "model.tie_word_embeddings", "switch", when=False),
    Flag(
        "--position-embedding-type",
        "model.position_embedding",
        "word",
        "learned",
        {"learned": "learned_absolute", "rotary": "rope", "none": "none"},
    ),
    Flag("--rotary-percent", "model.rotary_fraction", "number", 1.0),
    Flag(
        "--normalization", "model.norm", "word", "layernorm", {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
    ),
    Flag("--swiglu", "model.gated_mlp", "switch", rule="with hidden_act silu; gpt_oss has --quick-geglu"),
    Flag("--quick-geglu", "model.gated_mlp", "switch", rule="gpt_oss only"),
    Flag("--glu-linear-offset", "model.hidden_act", "number", rule="1 for gpt_oss"),
    Flag("--activation-func-clamp-value", "model.hidden_act", "number", rule="7 for gpt_oss"),
    Flag("--squared-relu", "model.hidden_act", "switch", when="relu2"),
    Flag(
        "--disable-bias-linear",
        "model.mlp_bias",
        "switch",
        when=False,
        rule="mlp_bias, attention_output_bias, qkv_bias, the experts' and the router's are all or none",
    ),
    Flag(
        "--add-qkv-bias",
        "model.qkv_bias",
        "switch",
        rule="with --disable-bias-linear; else all products have biases",
    ),
    Flag(
        "--qk-layernorm",
        "model.qk_norm",
        "switch",
        rule="with latent attention: the norms of what is compressed",
    ),
    Flag(
        "--apply-layernorm-1p",
        "model.model_type",
        "switch",
        rule="nemotron, qwen3_next: a norm's weight is counted from 1",
    ),
    Flag("--attention-output-gate", "model.attention_gate", "switch"),
    Flag("--softmax-type", "model.attention_sinks", "word", False, {True: "learnable"}),
    Flag("--window-size", "model.sliding_window", "word", rule="sliding_window - 1, 0"),
    Flag(
        "--window-attn-skip-freq",
        "model.mixers",
        "word",
        rule="a list, 1 for each layer with a window, 0 for each without",
    ),
    Flag("--num-experts", "model.experts.num_experts", "integer"),
    Flag("--moe-router-topk", "model.experts.num_experts_per_tok", "integer"),
    Flag("--moe-ffn-hidden-size", "model.experts.intermediate_size", "integer"),
    Flag("--moe-shared-expert-intermediate-size", "model.experts.shared_intermediate_size", "integer", 0),
    Flag(
        "--moe-router-pre-softmax",
        "model.experts.num_experts_per_tok",
        "switch",
        rule="with --moe-router-topk 1, which needs it",
    ),
    Flag("--moe-shared-expert-gate", "model.experts.shared_gate", "switch"),
    Flag(
        "--moe-layer-freq",
        "model.mlps",
        "word",
        rule="a list, 1 for each layer with experts, 0 for each without; left out all have some",
    ),
    Flag("--multi-latent-attention", "model.latent", "switch", rule="where it is not None"),
    Flag("--q-lora-rank", "model.latent.q_lora_rank", "integer"),
    Flag("--kv-lora-rank", "model.latent.kv_lora_rank", "integer", 32),
    Flag("--qk-head-dim", "model.latent.qk_nope_head_dim", "integer", 128),
    Flag("--qk-pos-emb-head-dim", "model.latent.qk_rope_head_dim", "integer", 64),
    Flag("--v-head-dim", "model.latent.v_head_dim", "integer", 128),
    Flag(
        "--experimental-attention-variant", "model.delta", "word", rule="gated_delta_net where it is not None"
    ),
    Flag(
        "--linear-attention-freq",
        "model.mixers",
        "word",
        rule="a list, 1 for each layer with a delta net, 0 for each without",
    ),
    Flag("--linear-num-key-heads", "model.delta.num_key_heads", "integer", 16),
    Flag("--linear-num-value-heads", "model.delta.num_value_heads", "integer", 32),
    Flag("--linear-key-head-dim", "model.delta.key_head_dim", "integer", 128),
    Flag("--linear-value-head-dim", "model.delta.value_head_dim", "integer", 128),
    Flag("--linear-conv-kernel-dim", "model.delta.conv_kernel", "integer", 4),
    Flag(
        "--hybrid-layer-pattern",
        "model.mixers",
        "word",
        rule="M, *, - and E for each layer, with | between stages; another script",
    ),
    Flag("--mamba-num-heads", "model.state_space.num_heads", "integer"),
    Flag("--mamba-head-dim", "model.state_space.head_dim", "integer", 64),
    Flag("--mamba-num-groups", "model.state_space.n_groups", "integer", 8),
    Flag("--mamba-state-dim", "model.state_space.state_size", "integer", 128),
    Flag("--mtp-num-layers", "model.mtp_layers", "integer", rule="with option mtp=on"),
    Flag("--hidden-dropout", "model.dropout", "number", 0.1, rule="training.dropout, where it is given"),
    Flag(
        "--attention-dropout",
        "model.attention_dropout",
        "number",
        0.1,
        rule="training.dropout, where it is given",
    ),
)
PARALLELISM = (
    Flag("--tensor-model-parallel-size", "layout.tensor_parallel", "integer", ALWAYS),
    Flag("--sequence-parallel", "layout.sequence_parallel", "switch"),
    Flag("--pipeline-model-parallel-size", "layout.pipeline_parallel", "integer", ALWAYS),
    Flag(
        "--num-virtual-stages-per-pipeline-rank",
        "layout.chunks",
        "integer",
        1,
        rule="schedule interleaved; not with --pipeline-model-parallel-layout, which says it too",
    ),
    Flag(
        "--num-layers-per-virtual-pipeline-stage",
        "layout.chunks",
        "integer",
        rule="read only: layers / pipeline_parallel / this",
    ),
    Flag("--decoder-first-pipeline-num-layers", "stages.layers", "integer", rule="of the first stage"),
    Flag("--decoder-last-pipeline-num-layers", "stages.layers", "integer", rule="of the last stage"),
    Flag(
        "--pipeline-model-parallel-layout",
        "stages.layers",
        "word",
        rule="E, t, m, L are embedding, a layer, a module for a further token, loss; | between stages of "
        "all first chunks, then of all second ones",
    ),
    Flag("--context-parallel-size", "layout.context_parallel", "integer", ALWAYS),
    Flag(
        "--cp-comm-type",
        "layout.context_comm",
        "words",
        values={"ring": "p2p", "all-gather": "all_gather", "ulysses": "a2a", "ulysses+ring": "a2a+p2p"},
        rule="with context parallelism; left out it is ring",
    ),
    Flag(
        "--hierarchical-context-parallel-sizes",
        "layout.ulysses_degree",
        "words",
        rule="with ulysses+ring: ulysses_degree, and context_parallel over it",
    ),
    Flag("--expert-model-parallel-size", "layout.expert_parallel", "integer", 1),
    Flag(
        "--expert-tensor-parallel-size",
        "layout.expert_tensor_parallel",
        "integer",
        rule="with experts; left out it is tensor_parallel",
    ),
    Flag("--use-distributed-optimizer", "layout.sharding", "switch", when="zero1"),
    Flag(
        "--use-megatron-fsdp",
        "layout.sharding",
        "switch",
        rule="zero2 and fsdp, with --data-parallel-sharding-strategy and --ckpt-format fsdp_dtensor",
    ),
    Flag(
        "--data-parallel-sharding-strategy",
        "layout.sharding",
        "word",
        values={"ddp": "no_shard", "zero1": "optim", "zero2": "optim_grads", "fsdp": "optim_grads_params"},
        rule="with --use-megatron-fsdp",
    ),
    Flag("--ckpt-format", "layout.sharding", "word", rule="fsdp_dtensor with --use-megatron-fsdp"),
    Flag(
        "--num-distributed-optimizer-instances",
        "layout.data_shards",
        "integer",
        rule="data_parallel / data_shards",
    ),
    Flag("--use-tp-pp-dp-mapping", "layout.rank_order", "switch", when="tp-pp-dp"),
)
BATCH = (
    Flag("--micro-batch-size", "layout.micro_batch_size", "integer", ALWAYS),
    Flag("--global-batch-size", "training.global_batch_size", "integer", ALWAYS),
    Flag("--seq-length", "training.seq_length", "integer", ALWAYS),
    Flag(
        "--moe-expert-capacity-factor",
        "training.expert_capacity_factor",
        "number",
        rule="with --moe-pad-expert-input-to-capacity",
    ),
    Flag(
        "--moe-pad-expert-input-to-capacity",
        "training.expert_capacity_factor",
        "switch",
        rule="where it is not None",
    ),
)
QUANTIZED = ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8")
PRECISION = (
    Flag("--bf16", "training.precision", "switch", rule="bf16 and all of 8 and 4 bits"),
    Flag("--fp16", "training.precision", "switch", when="fp16"),
    Flag("--fp8-format", "training.precision", "word", rule="hybrid with --fp8-recipe"),
    Flag(
        "--fp8-recipe",
        "training.precision",
        "word",
        values={name: name.removeprefix("fp8-") for name in QUANTIZED},
        rule="with --fp8-format",
    ),
    Flag("--fp8-param-gather", "option.fp8_param_gather", "switch", when="on"),
    Flag("--reuse-grad-buf-for-mxfp8-param-ag", "option.fp8_param_gather", "switch", when="on", rule="mxfp8"),
    Flag("--fp4-format", "training.precision", "word", rule="e2m1 with nvfp4"),
    Flag("--fp4-recipe", "training.precision", "word", values={"nvfp4": "nvfp4"}),
    Flag(
        "--grad-reduce-in-bf16",
        "training.gradient_dtype",
        "switch",
        when="bf16",
        rule="with --bf16, whose gradients are else of fp32",
    ),
    Flag(
        "--accumulate-allreduce-grads-in-fp32",
        "training.gradient_dtype",
        "switch",
        when="fp32",
        rule="with --fp16, whose gradients are else of fp16; --bf16 implies it",
    ),
    Flag(
        "--megatron-fsdp-main-grads-dtype",
        "training.gradient_dtype",
        "word",
        rule="with --use-megatron-fsdp, fp32 or bf16",
    ),
    Flag(
        "--use-precision-aware-optimizer",
        "training.optimizer_dtype",
        "switch",
        rule="with moments that are not of fp32, and with --optimizer-cpu-offload",
    ),
    Flag("--exp-avg-dtype", "training.optimizer_dtype", "word", "fp32"),
    Flag("--exp-avg-sq-dtype", "training.optimizer_dtype", "word", "fp32"),
)
RECOMPUTE = (
    Flag(
        "--recompute-granularity",
        "recompute",
        "word",
        "none",
        {"full": "full", "selective": "selective"},
        rule="selective without core_attn is recompute none with options recomputed",
    ),
    Flag("--recompute-method", "recompute", "word", rule="uniform for full, block for full:N"),
    Flag(
        "--recompute-num-layers",
        "recompute",
        "integer",
        rule="1 with uniform; N of full:N with block, of each chunk",
    ),
    Flag("--recompute-modules", "recompute", "words", rule="MODULES"),
    Flag(
        "--recompute-activations",
        "recompute",
        "switch",
        rule="read only: selective of core_attn, unless --recompute-modules says otherwise",
    ),
)
MODULES = {
    "core_attn": ("recompute", "selective"),
    "layernorm": ("norm", "recomputed"),
    "mlp": ("mlp", "recomputed"),
    "moe": ("moe", "recomputed"),
    "moe_act": ("moe_act", "recomputed"),
    "shared_experts": ("shared_experts", "recomputed"),
    "mla_up_proj": ("mla_up_proj", "recomputed"),
}
"""``--recompute-modules``: the policy, or the option and its value, that each is."""
OPTIMIZER = (
    Flag(
        "--optimizer",
        "training.optimizer",
        "word",
        values={"adamw": "adam", "adam": "adam", "momentum": "sgd", "sgd": "sgd"},
        rule="Megatron-LM's adam decouples weight decay: it is adamw; sgd has --sgd-momentum",
    ),
    Flag("--sgd-momentum", "training.optimizer", "number", rule="0 for sgd, 0.9 for momentum"),
)
KERNELS = (
    Flag(
        "--transformer-impl",
        "option.attention",
        "word",
        "flash",
        {"flash": "transformer_engine", "eager": "local"},
    ),
    Flag("--no-bias-swiglu-fusion", "option.swiglu", "switch", when="unfused"),
    Flag("--cross-entropy-loss-fusion", "option.loss", "switch", when="fused"),
    Flag("--cross-entropy-fusion-impl", "option.loss", "word", rule="te with loss fused"),
    Flag("--overlap-grad-reduce", "option.overlap", "switch", when="on"),
    Flag(
        "--overlap-param-gather",
        "option.overlap",
        "switch",
        rule="on, where parameters are gathered: not with ddp",
    ),
    Flag("--tp-comm-overlap", "option.tp_comm_overlap", "switch", when="on"),
    Flag("--moe-token-dispatcher-type", "option.dispatcher", "word", "allgather"),
    Flag("--moe-grouped-gemm", "option.attention", "switch", rule="with experts, unless eager"),
    Flag("--moe-permute-fusion", "option.attention", "switch", rule="as --moe-grouped-gemm"),
    Flag("--no-rope-fusion", "option.attention", "switch", when="eager"),
    Flag("--no-persist-layer-norm", "option.attention", "switch", rule="eager, with rmsnorm"),
)
OFFLOAD = (
    Flag("--optimizer-cpu-offload", "layout.offload", "switch", rule="optimizer"),
    Flag(
        "--optimizer-offload-fraction",
        "stages.offload",
        "number",
        1.0,
        rule="of a stage's parameters, those of layers that offload their optimizer states",
    ),
    Flag(
        "--cpu-offloading-num-layers",
        "stages.offload",
        "integer",
        0,
        rule="layers that offload their activations",
    ),
)
RUN = (
    Flag("--train-iters", "run.train-iters", "integer", ALWAYS),
    Flag("--lr", "run.lr", "number", ALWAYS),
    Flag("--tokenizer-type", "run.tokenizer-type", "word", ALWAYS),
    Flag("--tokenizer-model", "run.tokenizer-model", "word"),
    Flag("--mock-data", "run.data-path", "switch", when=""),
    Flag("--data-path", "run.data-path", "words", ""),
    Flag("--log-interval", "run.log-interval", "integer", ALWAYS),
    Flag("--eval-interval", "run.eval-interval", "integer", ALWAYS),
    Flag("--eval-iters", "run.eval-iters", "integer", ALWAYS),
    Flag("--save", "run.save", "word", ""),
    Flag("--save-interval", "run.save-interval", "integer", ""),
    Flag("--load", "run.load", "word", ""),
    Flag("--rotary-base", "run.rotary-base", "integer", ""),
    Flag("--norm-epsilon", "run.norm-epsilon", "number", ""),
    # A mask of seq x seq bytes for each sequence is in no plan.
    Flag("--no-create-attention-mask-in-dataloader", "run.mask", "switch", rule="always"),
    Flag("--spec", "run.spec", "words", rule="of hybrids in 0.17"),
)
GROUPS = {
    "model": MODEL,
    "parallelism": PARALLELISM,
    "batch": BATCH,
    "precision": PRECISION,
    "recompute": RECOMPUTE,
    "optimizer": OPTIMIZER,
    "kernels": KERNELS,
    "offload": OFFLOAD,
    "run": RUN,
}
FLAGS = tuple(flag for group in GROUPS.values() for flag in group)
DESTS = {
    "--norm-epsilon": "layernorm_epsilon",
    "--apply-layernorm-1p": "layernorm_zero_centered_gamma",
    "--disable-bias-linear": "add_bias_linear",
    "--fp8-format": "fp8",
    "--fp4-format": "fp4",
    "--no-bias-swiglu-fusion": "bias_swiglu_fusion",
    "--no-rope-fusion": "apply_rope_fusion",
    "--no-create-attention-mask-in-dataloader": "create_attention_mask_in_dataloader",
}
"""Flags whose name in Megatron's parser is another."""
BY_NAME = {flag.name: flag for flag in FLAGS}
