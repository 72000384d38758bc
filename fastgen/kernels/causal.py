"""The stages for whole texts at once, without a cache: what training and scoring of given texts hand to the model.

All stages but `attend` are the reference's own. Here it attends within the texts of the batch, which start at
position 0 and are all T tokens long, so it is the causal attention that torch differentiates and has fast kernels
for. Letters: `fastgen.kernels.reference`.

    model = Transformer(config, stages=CausalStages(config.n_kv_heads))
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.kernels import reference
from fastgen.kernels.reference import Step
from fastgen.kernels.rope import apply_rope


class CausalStages:
    """Stages of a model with `n_kv_heads` key/value heads, which only a cache would tell otherwise."""

    def __init__(self, n_kv_heads: int) -> None:
        self.rotations: Callable[..., Tensor] = reference.rotations
        self.embed: Callable[..., Tensor] = reference.embed
        self.norm_linear: Callable[..., Tensor] = reference.norm_linear
        self.attend: Callable[..., Tensor] = partial(attend, n_kv_heads=n_kv_heads)
        self.linear_add: Callable[..., Tensor] = reference.linear_add
        self.norm_swiglu: Callable[..., Tensor] = reference.norm_swiglu
        self.head: Callable[..., Tensor] = reference.head
        self.greedy_head: Callable[..., Tensor] = reference.greedy_head


def attend(
    qkv: Tensor,
    k_cache: None,
    v_cache: None,
    step: Step,
    *,
    n_kv_heads: int,
    scale: float,
    window: int = 0,
    q_norm: nn.RMSNorm | None = None,
    k_norm: nn.RMSNorm | None = None,
) -> Tensor:
    """Rotate q and k, and attend to all tokens up to each one's own; differentiable, appends to no cache.

    Args:
        qkv: [B, T, (H + 2K) d].
        step: of positions 0 .. T - 1 in every row.
        scale, window, q_norm, k_norm: as in `reference.attend`.

    Returns:
        [B, T, H d].
    """
    assert k_cache is None and v_cache is None, "a model that has a cache is in use for generation"
    B, T, width = qkv.shape
    K, d = n_kv_heads, step.rope.shape[-1]
    q, k, v = qkv.view(B, T, -1, d).split((width // d - 2 * K, K, K), dim=2)
    if q_norm is not None and k_norm is not None:
        q, k = _normalize(q, q_norm), _normalize(k, k_norm)
    q, k = apply_rope(q, step.rope), apply_rope(k, step.rope)
    mask = _window_mask(T, window, qkv.device) if 0 < window < T else None
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return y.transpose(1, 2).reshape(B, T, -1)


def _window_mask(T: int, window: int, device: torch.device) -> Tensor:
    """Return [T, T] bool: which tokens each one may see."""
    query, key = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    return (key <= query) & (key > query - window)


def _normalize(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None, "a norm of a checkpoint has its eps"
    return reference.rms_norm(x, norm.weight, norm.eps)
