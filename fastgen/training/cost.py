"""What training costs in memory and arithmetic, and how fast this device can do arithmetic at best.

Model FLOPs utilization (MFU; PaLM, arXiv 2204.02311, appendix B) is the share of that best which the model's own
products take: recomputation and everything that is not a matrix product count as waste. The best is measured, on
large square products in the training's precision, never taken from a datasheet.
"""

import time

import torch

from fastgen.config import ModelConfig
from fastgen.device import require_memory, synchronize
from fastgen.model import Transformer, parameter_count

SIDE = {"cuda": 8192, "cpu": 1024}
REPEATS = 5


def forward_flops(model: Transformer, context: int) -> int:
    """Return the multiplications and additions per token of a forward pass over rows of `context` tokens."""
    config: ModelConfig = model.config
    looked_up = 0 if config.tie_embeddings else model.embedding.weight.numel()
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2) - looked_up
    # Scores and weighted values take 2 q_dim a key each; a token sees those before it and itself, in its window.
    attention = sum(4 * config.q_dim * _keys(context, window or context) // context for window in config.windows)
    return 2 * matrices + attention


def _keys(context: int, window: int) -> int:
    """Return how many keys all tokens of a row of `context` tokens see together, each at most `window`."""
    inside = min(window, context)
    return inside * (inside + 1) // 2 + (context - inside) * inside


def training_flops(model: Transformer, teacher: Transformer | None, context: int) -> int:
    """Return the FLOPs per token of a training step: the backward pass costs twice the forward pass, a teacher has
    none."""
    return 3 * forward_flops(model, context) + (forward_flops(teacher, context) if teacher else 0)


def require_training_memory(
    config: ModelConfig, rows: int, context: int, device: torch.device, *, loaded: bool
) -> None:
    """Raise `CapacityError` if training a model would not fit the device, however its layers were computed.

    Counts weights (not where they are `loaded`), gradients and AdamW's two moments, all fp32, and the logits of
    `rows` rows with their gradient. Activations between the layers come on top.
    """
    need = (12 if loaded else 16) * parameter_count(config) + 8 * rows * context * config.vocab_size
    require_memory(device, need, "training this model", "a smaller --shape or --context, or a higher --accumulate")


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
