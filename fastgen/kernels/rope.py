"""Rotary position embedding: the frequencies of every scaling kind, and the rotation, in plain torch.

RoPE (RoFormer, arXiv 2104.09864, section 3.4.2) turns the pair (x_j, x_{j+d/2}) of a query or key head at
position p by the angle p * w_j, with w_j = theta^(-2j/d). This is the half-split order of Hugging Face
checkpoints; interleaved ones are permuted while they load (`fastgen.checkpoint.lazy.HalfSplit`). A model that
runs beyond the length L that it was trained on changes w_j, with s the `factor`:

    linear    w_j / s                           position interpolation, arXiv 2306.15595
    dynamic   theta (s n / L - s + 1)^(d/(d-2)) in place of theta, for a text of n > L tokens: dynamic NTK,
                                                arXiv 2309.00071, sections 3.1 and 3.3
    yarn      w_j (g_j + (1 - g_j) / s)         g_j falls from 1 (many turns within L) to 0 (few), linearly
                                                in j; cos and sin grow by 0.1 ln(s) + 1: arXiv 2309.00071
    llama3    w_j (g_j + (1 - g_j) / s)         g_j rises with the number of turns: Llama 3.1, apply_scaling in
                                                meta-llama/llama-models@43e87a3 models/llama3/model.py

Frequencies are rounded to fp32 at the same places as in transformers, so far positions get the same angles.

Letters: B batch, T tokens, H heads, d head_dim. Cosines and sines are computed once a step, as rows of d
numbers for every token, and shared by all layers:

    rows = Rope(config)(positions)         # [B, T, d] fp32: d/2 cosines, then d/2 sines
    q = apply_rope(q, rows)                # [B, T, H, d]
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgen.config import ModelConfig, RopeScaling


def inverse_frequencies(
    config: ModelConfig, *, length: Tensor | int | None = None, device: torch.device | str | None = None
) -> tuple[Tensor, float]:
    """Return w_j as fp32 `[d / 2]` on `device`, and the factor of cosines and sines (1.0 but for yarn).

    `length` is the number of tokens in the text and matters to dynamic NTK only; None and anything below the
    original length stand for the original length. An integer tensor of any shape `[..]` on `device` gives
    `[.., d / 2]`; nothing branches on its value or waits for it, so it may be part of a compiled graph.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / _powers(config, config.rope_theta, device), 1.0
    if scaling.kind == "linear":
        return 1.0 / _powers(config, config.rope_theta, device) / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        return 1.0 / _powers(config, _stretched_theta(config, scaling, length, device), device), 1.0
    if scaling.kind == "yarn":
        return _yarn(config, scaling, device), _yarn_attention_factor(scaling)
    assert scaling.kind == "llama3", f"rope scaling {scaling.kind!r} passed the config's check"
    return _llama3(config, scaling, device), 1.0


class Rope(nn.Module):
    """The model's rows of cosines and sines.

    The frequencies are a buffer that is always fp32 and always real: `.to(dtype)` and `.half()` leave its
    dtype alone (bf16 keeps 8 bits: position 300 could be off by half a radian), a model built on the meta device
    has it on the CPU, and `to_empty` fills it again.
    """

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.is_dynamic = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"
        frequencies, self.attention_factor = inverse_frequencies(config, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return fp32 rows `[B, T, d]` for integer `positions` `[B, T]`: cosines, then sines.

        `lengths` `[B]` are the tokens of each text, for dynamic NTK; None stands for a row's last position
        + 1. A prompt that is prefilled in chunks hands in its full length, or its first keys would be turned as
        if the text ended there.
        """
        frequencies = self.frequencies
        if self.is_dynamic:
            lengths = positions.amax(-1) + 1 if lengths is None else lengths
            frequencies, _ = inverse_frequencies(self.config, length=lengths, device=positions.device)
            frequencies = frequencies.unsqueeze(-2)
        angles = positions.unsqueeze(-1).float() * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self.attention_factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rope":
        # `.to()`, `.half()`, `to_empty()` come through here: ask where they put a tensor, keep its values.
        device = fn(self.frequencies).device
        super()._apply(fn, recurse)
        self.frequencies = inverse_frequencies(self.config, device="cpu")[0].to(device)
        return self


def apply_rope(x: Tensor, rows: Tensor) -> Tensor:
    """Turn every head of `x` `[B, T, H, d]` by its token's row of `rows` `[B, T, d]` (fp32, from `Rope`).

    Computed in fp32, returned in the dtype of `x`.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rows.unsqueeze(-2).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _powers(config: ModelConfig, theta: float | Tensor, device: torch.device | str | None) -> Tensor:
    """Return theta^(2j/d), wavelengths over 2 pi, as fp32 `[d / 2]`; `[.., d / 2]` for a theta `[.., 1]`."""
    d = config.head_dim
    return theta ** (torch.arange(0, d, 2, device=device, dtype=torch.int64).float() / d)


def _stretched_theta(
    config: ModelConfig, scaling: RopeScaling, length: Tensor | int | None, device: torch.device | str | None
) -> Tensor:
    """Return dynamic NTK's theta as fp32 `[.., 1]`."""
    original, factor, d = scaling.original_max_seq_len, scaling.factor, config.head_dim
    assert d > 2, "dynamic NTK stretches theta by a power of d / (d - 2)"
    text = torch.as_tensor(original if length is None else length, device=device).clamp(min=original)
    return config.rope_theta * (factor * text.unsqueeze(-1) / original - (factor - 1)) ** (d / (d - 2))


def _yarn(config: ModelConfig, scaling: RopeScaling, device: torch.device | str | None) -> Tensor:
    powers = _powers(config, config.rope_theta, device)
    d, original, theta = config.head_dim, scaling.original_max_seq_len, config.rope_theta

    def dimension(turns: float) -> float:
        """Return the (fractional) j whose pair makes `turns` full turns within the original length."""
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    width = high - low or 0.001
    kept = 1 - ((torch.arange(d // 2, device=device, dtype=torch.float32) - low) / width).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return growth(scaling.mscale) / growth(scaling.mscale_all_dim)
    return growth(1.0)


def _llama3(config: ModelConfig, scaling: RopeScaling, device: torch.device | str | None) -> Tensor:
    frequencies = 1.0 / _powers(config, config.rope_theta, device)
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_seq_len / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (turns - low) / (high - low)
    between = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    slow = wavelengths > scaling.original_max_seq_len / low
    stretched = torch.where(slow, frequencies / scaling.factor, between)
    return torch.where(wavelengths < scaling.original_max_seq_len / high, frequencies, stretched)
