"""The stages of `reference` as kernels, one launch each, for decoding on CUDA.

Hand this module to a model in place of the reference: Transformer(config, stages=fused). The kernels take up to 16
tokens (texts x new tokens) in bf16 or fp16 whose linears are plain or `PackedLinear` (int4, int8), and heads whose
dims are a multiple of 16; anything else goes to the reference, so the same model prefills or runs on a CPU. Positions
of several new tokens must be consecutive, and launches on two streams of one GPU must not overlap.

    prepare(device)      # before anything is compiled or captured
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fastgen.kernels import attend as _attend
from fastgen.kernels import entry as _entry
from fastgen.kernels import head as _head
from fastgen.kernels import launch, reference
from fastgen.kernels import linear_add as _linear_add
from fastgen.kernels import linear_sum as _linear_sum
from fastgen.kernels import norm_linear as _norm_linear
from fastgen.kernels import norm_swiglu as _norm_swiglu
from fastgen.kernels import packed_linear as _packed
from fastgen.kernels.exchange import CAPACITY
from fastgen.kernels.packed import TILE, PackedLinear
from fastgen.kernels.reference import Step
from fastgen.kernels.rope import Rope

LINEARS = ("wqkv", "wo", "w_gate_up", "w_down", "lm_head")
HEAD_STEP = 16
"""What a head's dims must be a multiple of."""


def covers(model: nn.Module, head_dim: int, tokens: int) -> bool:
    """Whether every stage of a model runs as a kernel for `tokens` tokens; of dynamic RoPE, all but the rotations."""
    named = [(name.rsplit(".", 1)[-1], module) for name, module in model.named_modules()]
    others = [module.weight for _, module in named if isinstance(module, nn.Embedding | nn.RMSNorm)]
    return (
        all(_has_kernel(name, module) for name, module in named if name in LINEARS)
        and all(_narrow(weight) and weight.dtype == others[0].dtype for weight in others)
        and head_dim % HEAD_STEP == 0
        and tokens <= launch.MAX_TOKENS
    )


def _has_kernel(name: str, linear: nn.Module) -> bool:
    """Whether a kernel multiplies with a linear of this name."""
    if isinstance(linear, PackedLinear):
        whole = name != "w_gate_up" or linear.out_features % TILE == 0
        return whole and linear.in_features <= launch.MAX_COLUMNS
    return (
        isinstance(linear, nn.Linear)
        and _narrow(linear.weight)
        and _in_lines(linear.weight)
        and linear.in_features <= launch.MAX_COLUMNS
    )


def prepare(device: torch.device) -> None:
    """Allocate what the kernels keep on a device; call it before a CUDA graph is captured."""
    launch.workspace(device)


def rotations(positions: Tensor, lengths: Tensor, rope: Rope) -> Tensor:
    """See `reference.rotations`."""
    if rope.is_dynamic or not positions.is_cuda or positions.numel() > launch.MAX_TOKENS:
        return reference.rotations(positions, lengths, rope)
    return _entry.rotations(positions, rope.frequencies, rope.attention_factor)


def embed(tokens: Tensor, embedding: nn.Embedding) -> Tensor:
    """See `reference.embed`."""
    if not _narrow(embedding.weight) or tokens.numel() > launch.MAX_TOKENS:
        return reference.embed(tokens, embedding)
    return _entry.embed(tokens, embedding.weight, 0)


def embed_part(tokens: Tensor, embedding: nn.Embedding, first: int) -> Tensor:
    """See `reference.embed_part`."""
    if not _narrow(embedding.weight) or tokens.numel() > launch.MAX_TOKENS:
        return reference.embed_part(tokens, embedding, first)
    return _entry.embed(tokens, embedding.weight, first)


def norm_linear(x: Tensor, norm: nn.RMSNorm, linear: nn.Module) -> Tensor:
    """See `reference.norm_linear`."""
    if isinstance(linear, nn.Linear) and _streams(x, linear.weight, norm.weight):
        return _norm_linear.norm_linear(x, norm.weight, _eps(norm), linear.weight, linear.bias)
    if _multiplies(linear, x, norm.weight):
        return _packed_linear(x, norm, linear)
    return reference.norm_linear(x, norm, linear)


def linear_add(x: Tensor, linear: nn.Module, residual: Tensor) -> Tensor:
    """See `reference.linear_add`."""
    if isinstance(linear, nn.Linear) and _streams(x, linear.weight):
        return _linear_add.linear_add(x, linear.weight, linear.bias, residual)
    if _multiplies(linear, x, residual):
        return _packed_linear(x, None, linear, residual)
    return reference.linear_add(x, linear, residual)


def partial_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """See `reference.partial_linear`; of so few tokens that kernels may take them always in fp32, for another rank's
    part may have widths that they do take."""
    if isinstance(linear, nn.Linear) and _streams(x, linear.weight):
        return _linear_add.partial_linear(x, linear.weight, linear.bias)
    if _multiplies(linear, x, x):
        return _packed_linear(x, None, linear, wide=True)
    part = reference.partial_linear(x, linear)
    return part.float() if _narrow(x) and x.numel() // x.shape[-1] <= launch.MAX_TOKENS else part


def linear_sum_add(x: Tensor, linear: nn.Module, residual: Tensor, sum_add: Callable[..., Tensor]) -> Tensor:
    """Return the residual plus the sum of linear(x) over the ranks, which `exchange` must link; other than by kernels
    it is sum_add(part, residual)."""
    if isinstance(linear, nn.Linear) and _streams(x, linear.weight) and residual.numel() <= CAPACITY:
        return _linear_sum.linear_sum_add(x, linear.weight, linear.bias, residual)
    if _multiplies(linear, x, residual) and residual.numel() <= CAPACITY:
        return _linear_sum.packed_sum_add(x, linear.words, linear.scales, linear.bias, residual)
    return sum_add(partial_linear(x, linear), residual)


def norm_swiglu(x: Tensor, norm: nn.RMSNorm, gate_up: nn.Module) -> Tensor:
    """See `reference.norm_swiglu`."""
    if isinstance(gate_up, nn.Linear) and _streams(x, gate_up.weight, norm.weight):
        return _norm_swiglu.norm_swiglu(x, norm.weight, _eps(norm), gate_up.weight, gate_up.bias)
    if _multiplies(gate_up, x, norm.weight) and gate_up.out_features % TILE == 0:
        return _packed.packed_swiglu(
            x, norm.weight, _eps(norm), gate_up.words, gate_up.scales, gate_up.bias, gate_up.out_features
        )
    return reference.norm_swiglu(x, norm, gate_up)


def head(x: Tensor, norm: nn.RMSNorm, linear: nn.Module) -> Tensor:
    """See `reference.head`."""
    if isinstance(linear, nn.Linear) and _streams(x, linear.weight, norm.weight):
        return _head.head(x, norm.weight, _eps(norm), linear.weight, linear.bias)
    if _multiplies(linear, x, norm.weight):
        return _packed_linear(x, norm, linear, wide=True)
    return reference.head(x, norm, linear)


def greedy_head(x: Tensor, norm: nn.RMSNorm, linear: nn.Module) -> Tensor:
    """See `reference.greedy_head`."""
    if isinstance(linear, nn.Linear) and _streams(x, linear.weight, norm.weight):
        return _head.greedy_head(x, norm.weight, _eps(norm), linear.weight, linear.bias)
    if _multiplies(linear, x, norm.weight):
        return _packed.packed_greedy_head(
            x, norm.weight, _eps(norm), linear.words, linear.scales, linear.bias, linear.out_features
        )
    return reference.greedy_head(x, norm, linear)


def attend(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    step: Step,
    *,
    scale: float,
    window: int = 0,
    q_norm: nn.RMSNorm | None = None,
    k_norm: nn.RMSNorm | None = None,
) -> Tensor:
    """See `reference.attend`."""
    gains = [norm.weight for norm in (q_norm, k_norm) if norm is not None]
    if not all(_fits(qkv, tensor) for tensor in (k_cache, *gains)) or k_cache.shape[3] % HEAD_STEP:
        return reference.attend(qkv, k_cache, v_cache, step, scale=scale, window=window, q_norm=q_norm, k_norm=k_norm)
    q_gain, k_gain = (None if norm is None else norm.weight for norm in (q_norm, k_norm))
    eps = 0.0 if q_norm is None else _eps(q_norm)
    return _attend.attend(
        qkv, k_cache, v_cache, step.positions, step.rope, q_gain, k_gain, eps, scale, window
    )  # fmt: skip


def _packed_linear(
    x: Tensor, norm: nn.RMSNorm | None, linear: PackedLinear, residual: Tensor | None = None, *, wide: bool = False
) -> Tensor:
    gain, eps = (None, 0.0) if norm is None else (norm.weight, _eps(norm))
    return _packed.packed_linear(
        x, gain, eps, linear.words, linear.scales, linear.bias, residual, linear.out_features, wide
    )


def _multiplies(linear: nn.Module, x: Tensor, other: Tensor) -> TypeGuard[PackedLinear]:
    """Whether x, of the dtype of `other`, is multiplied by kernels with packed weights, whose scales must have it."""
    return isinstance(linear, PackedLinear) and linear.dtype == x.dtype and _fits(x, other)


def _fits(x: Tensor, weight: Tensor) -> bool:
    tokens = x.numel() // x.shape[-1]
    few = tokens <= launch.MAX_TOKENS and x.shape[-1] <= launch.MAX_COLUMNS
    return few and _narrow(x) and weight.dtype == x.dtype


def _streams(x: Tensor, weight: Tensor, gain: Tensor | None = None) -> bool:
    return _fits(x, weight) and _in_lines(weight) and (gain is None or gain.dtype == x.dtype)


def _in_lines(weight: Tensor) -> bool:
    """Whether rows of the weight begin at multiples of 16 bytes, which is what a lane copies."""
    return weight.shape[1] % 8 == 0


def _narrow(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _eps(norm: nn.RMSNorm) -> float:
    assert norm.eps is not None, "a norm of a checkpoint has its eps"
    return norm.eps
