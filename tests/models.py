"""Small random models and a tokenizer of bytes, for tests that need no real ones."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.checkpoint.lazy import Bounds, Checkpoint, LazyTensor
from fastgen.config import ModelConfig
from fastgen.device import choose_placement
from fastgen.load import LoadedModel, build
from fastgen.model import Transformer
from fastgen.tokenizer.byte_tokens import ByteTokenizer

TINY = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 48, "vocab_size": 258,
    "max_seq_len": 256,
}  # fmt: skip


class InMemory(LazyTensor):
    """A lazy tensor over one that is there."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self.tensor = tensor

    def read(self, bounds: Bounds) -> Tensor:
        return self.tensor[tuple(slice(*bound) for bound in bounds)].clone()


def random_weights(config: ModelConfig, seed: int = 0, scale: float = 0.5) -> dict[str, Tensor]:
    """Weights by our names, large enough that greedy texts do not repeat one token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        parameters = dict(Transformer(config).named_parameters())
    weights = {}
    for name, parameter in parameters.items():
        noise = torch.randn(parameter.shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if "norm" in name else scale * noise
    return weights


def random_model(seed: int = 0, *, device: str = "cpu", dtype: str = "fp32", **changes: Any) -> LoadedModel:
    """A tiny model with random weights and a byte tokenizer; `changes` go over `TINY`."""
    config = ModelConfig(**(TINY | changes))
    tensors = {name: InMemory(tensor) for name, tensor in random_weights(config, seed).items()}
    placement = choose_placement(device, dtype)
    checkpoint = Checkpoint(
        path=Path("random"), format="random", config=config, dtype=torch.float32, tensors=tensors,
        open_tokenizer=ByteTokenizer,
    )  # fmt: skip
    transformer = build(config, tensors, placement)
    return LoadedModel(transformer=transformer, tokenizer=ByteTokenizer(), checkpoint=checkpoint, placement=placement)
