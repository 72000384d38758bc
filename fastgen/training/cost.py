"""What a training step costs in arithmetic, and how fast this device can do arithmetic at best.

Model FLOPs utilization (MFU; PaLM, arXiv 2204.02311, appendix B) is the share of that best which the model's own
products take: recomputation and everything that is not a matrix product count as waste. The best is measured, on
large square products in the training's precision, never taken from a datasheet.
"""

import time

import torch

from fastgen.config import ModelConfig
from fastgen.device import synchronize
from fastgen.model import Transformer

SIDE = {"cuda": 8192, "cpu": 1024}
REPEATS = 5


def forward_flops(model: Transformer, context: int) -> int:
    """Return the multiplications and additions per token of a forward pass over rows of `context` tokens."""
    config: ModelConfig = model.config
    looked_up = 0 if config.tie_embeddings else model.embedding.weight.numel()
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2) - looked_up
    # Scores and weighted values, 2 q_dim each a key; a token sees half the row on average.
    attention = sum(4 * config.q_dim * min(window or context, context) // 2 for window in config.windows)
    return 2 * matrices + attention


def training_flops(model: Transformer, teacher: Transformer | None, context: int) -> int:
    """Return the FLOPs per token of a training step: the backward pass costs twice the forward pass, a teacher has
    none."""
    return 3 * forward_flops(model, context) + (forward_flops(teacher, context) if teacher else 0)


def measure_flop_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best of several large matrix products, in FLOP/s."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first one warms up, and is never the best
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
