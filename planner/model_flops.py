"""FLOPs of what mixes tokens, per token, forward and backward: that which no matrix of weights has."""

from __future__ import annotations

from typing import assert_never

from planner.model import Mixer, ModelSpec


def mixer_flops(model: ModelSpec, mixer: Mixer, seq_length: int) -> float:
    """FLOPs of one block's mixer for one token, forward and backward, in a sequence of that many tokens.

    - attention: ``12 s a d``, counted in full as if not causal (Chowdhery et al. 2022, arXiv:2204.02311,
      appendix B): two products of ``2 s a d`` forward, twice that backward. Keys and values of unlike
      widths (latent attention) count each its own: ``6 s a (d_qk + d_v)``. A window shorter than the
      sequence counts instead of it; cross attention counts that to the encoder's output too.
    - ``mamba``: ``21 h p n`` of ``h`` heads with ``p`` elements and ``n`` states each: 7 per state forward,
      as Megatron-LM counts the scan (``megatron/training/training.py``, ``mamba_layer_flops``).
    - ``delta``: ``24 h k v`` of ``h`` value heads with ``k x v`` states: 4 multiply-adds per state forward
      (Megatron-LM, ``gdn_layer_flops``).

    The convolution before a state space adds 6 per weight of it.
    """
    match mixer:
        case "full" | "bidirectional":
            return _attention(model, seq_length)
        case "window":
            return _attention(model, min(seq_length, model.sliding_window or seq_length))
        case "cross":
            return 2 * _attention(model, seq_length)
        case "mamba":
            assert model.state_space is not None
            space = model.state_space
            inner = space.num_heads * space.head_dim
            channels = inner + 2 * space.n_groups * space.state_size
            return 21.0 * inner * space.state_size + 6.0 * channels * space.conv_kernel
        case "delta":
            assert model.delta is not None
            net = model.delta
            values = net.num_value_heads * net.value_head_dim
            channels = 2 * net.num_key_heads * net.key_head_dim + values
            return 24.0 * values * net.key_head_dim + 6.0 * channels * net.conv_kernel
        case "none":
            return 0.0
    assert_never(mixer)


def _attention(model: ModelSpec, keys: int) -> float:
    widths = 2 * model.head_dim
    if latent := model.latent:
        widths = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
    return 6.0 * keys * model.num_attention_heads * widths
