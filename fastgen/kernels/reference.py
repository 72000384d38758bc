"""The stages of a transformer block in plain torch: what each computes, defined once.

These functions are the definition, the CPU path, what torch.compile fuses, and what tests and benchmarks compare
the kernels beside them with. A model is handed its stages as a namespace with these names, so another file
(`fused`, or tensor parallelism's) can stand in for this one.

Letters: B rows (texts), T new tokens of each, L filled cache positions, S cache capacity; D model width, H query
heads, K key/value heads, G = H / K, d head width, F hidden width, V vocabulary. A linear is a module that maps
[.., in] to [.., out] and may be quantized; a norm holds `weight` [D] and `eps`.

Sources: LLaMA (arXiv 2302.13971): RMSNorm (1910.07467), SwiGLU (2002.05202), RoPE (2104.09864); grouped-query
attention (2305.13245); sliding window (2310.06825).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fastgen.kernels.rope import Rope, apply_rope
from fastgen.sampling import best_token

FEW = 16
"""Tokens of a text that a decode step or a verified draft has at most."""


class Step(NamedTuple):
    """Where the new tokens of one forward pass stand; the same for every layer.

    Attributes:
        positions: [B, T] int64, each token's place in its text; a row's cache is written there.
        key_positions: [L] int64, 0 .. L - 1: the part of the cache that attention reads. Every position that
            may be attended to lies in it; what lies behind a token's own position is masked.
        rope: [B, T, d] float32, cosines then sines of the rotation at `positions`.
    """

    positions: Tensor
    key_positions: Tensor
    rope: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last dimension, computed in fp32, in x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def rotations(positions: Tensor, lengths: Tensor, rope: Rope) -> Tensor:
    """Return `Step.rope` of positions [B, T] in texts of lengths [B]."""
    return rope(positions, lengths)


def embed(tokens: Tensor, embedding: nn.Embedding) -> Tensor:
    """Return the rows of the embedding: tokens [B, T] int64 -> [B, T, D]; a token that is none (-1) gives row 0."""
    return F.embedding(tokens.clamp(min=0), embedding.weight)


def embed_part(tokens: Tensor, embedding: nn.Embedding, first: int) -> Tensor:
    """Return what `embed` does of an embedding that holds tokens `first` on, and zeros for those that it does not."""
    index, size = tokens.clamp(min=0) - first, embedding.num_embeddings
    known = (index >= 0) & (index < size)
    return F.embedding(index.clamp(0, size - 1), embedding.weight).masked_fill(~known[..., None], 0.0)


def norm_linear(x: Tensor, norm: nn.RMSNorm, linear: nn.Module) -> Tensor:
    """Return linear(rms_norm(x)): x [B, T, D] -> [B, T, out]."""
    return linear(_normalize(x, norm))


def linear_add(x: Tensor, linear: nn.Module, residual: Tensor) -> Tensor:
    """Return residual + linear(x): x [B, T, in], residual [B, T, D] -> [B, T, D]."""
    return residual + linear(x)


def partial_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """Return linear(x) as a part of a sum over ranks, x [B, T, in] -> [B, T, D]; kernels may give it in fp32."""
    return linear(x)


def norm_swiglu(x: Tensor, norm: nn.RMSNorm, gate_up: nn.Module) -> Tensor:
    """Return silu(gate) * up with [gate, up] = gate_up(rms_norm(x)): x [B, T, D] -> [B, T, F]."""
    gate, up = gate_up(_normalize(x, norm)).chunk(2, dim=-1)
    return F.silu(gate) * up


def head(x: Tensor, norm: nn.RMSNorm, linear: nn.Module) -> Tensor:
    """Return the logits linear(rms_norm(x)) in fp32: x [.., D] -> [.., V]."""
    return linear(_normalize(x, norm)).float()


def greedy_head(x: Tensor, norm: nn.RMSNorm, linear: nn.Module) -> Tensor:
    """Return the tokens [..] int64 of the largest logits of `head`, or what `best_token` says of them."""
    return best_token(head(x, norm, linear))


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
    """Rotate q and k, append k and v to the caches in place, and attend to the filled part.

    Args:
        qkv: [B, T, (H + 2K) d], the query heads, then the key heads, then the value heads.
        k_cache, v_cache: [B, K, S, d]; row b is written at step.positions[b].
        scale: what the scores are multiplied with, 1 / sqrt(d) in every known family.
        window: a token sees this many positions, its own included; 0 = all before it.
        q_norm, k_norm: RMSNorms over d that are applied to every head before the rotation.

    Returns:
        [B, T, H d].
    """
    B, T, _ = qkv.shape
    K, d = k_cache.shape[1], k_cache.shape[3]
    q, k, v = qkv.view(B, T, -1, d).split((qkv.shape[-1] // d - 2 * K, K, K), dim=2)
    if q_norm is not None and k_norm is not None:
        q, k = _normalize(q, q_norm), _normalize(k, k_norm)
    q, k = apply_rope(q, step.rope), apply_rope(k, step.rope)

    rows = torch.arange(B, device=qkv.device)[:, None]
    k_cache[rows, :, step.positions] = k.to(k_cache.dtype)
    v_cache[rows, :, step.positions] = v.to(v_cache.dtype)

    L = step.key_positions.shape[0]
    q, keys, values = q.view(B, T, K, -1, d), k_cache[:, :, :L].to(q.dtype), v_cache[:, :, :L].to(q.dtype)
    visible = _visible(step, window)
    if q.is_cpu and q.dtype is torch.float32 and T > 1 and is_few(T):
        texts = zip(q, keys, values, visible, strict=True)
        return torch.cat([_attend_one_by_one(*text, scale=scale) for text in texts]).view(B, T, -1)
    # The G query heads that share a key head become rows of one matrix: K and V are read once and never expanded.
    grouped = q.permute(0, 2, 3, 1, 4).reshape(B, K, -1, d)
    mask = visible.repeat(1, grouped.shape[2] // T, 1)[:, None]
    y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return y.view(B, K, -1, T, d).permute(0, 3, 1, 2, 4).reshape(B, T, -1)


def _attend_one_by_one(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float) -> Tensor:
    """Return [T, K, G, d] of one text's q [T, K, G, d], keys and values [K, L, d] and what each token sees, [T, L].

    Every token is a text of its own to the CPU's matrix products, whose order of summing hangs on their shapes: so a
    verified token gets the bits that it gets when it is decoded. That takes up to three times as long, in 16 bits ten
    times, where nobody counts on bits. For G of 4 and more, MKL (as torch 2.13 has it) also parts sums over more than
    192 positions by their number; there the two agree but to rounding.
    """
    keys, values = (each.expand(len(q), -1, -1, -1) for each in (keys, values))
    mask = visible[:, None, None].expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)


def is_few(tokens: int) -> bool:
    """Return whether a text's tokens are as few as a decode step or a verified draft may have.

    A number that is dynamic in a compiled graph, a prefill's, counts as many, so that no width is a graph of its own.
    """
    return statically_known_true(tokens <= FEW)


def _visible(step: Step, window: int) -> Tensor:
    """Return [B, T, L] bool: which cache positions each token may see."""
    query, key = step.positions[:, :, None], step.key_positions
    visible = key <= query
    return visible & (key > query - window) if window else visible


def _normalize(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None, "a norm of a checkpoint has its eps"
    return rms_norm(x, norm.weight, norm.eps)
