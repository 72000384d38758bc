"""What a model takes and how fast it can be at best, from its config alone: bytes by format, KV cache, floors.

A decode step of one text reads every weight once, and the keys and values of the text so far; nothing is faster than
these bytes over the memory's read bandwidth. The model is built without storage, so its names and shapes are the real
ones; the formats of its weights are counted by these rules:

    fp32, bf16  every parameter
    int8        matrices: 8 bits, and a bf16 scale for every row
    int4        matrices: 4 bits, and a bf16 scale and a 4-bit zero point for every group of weights in a row; a width
                that the group size does not divide takes the largest of 128, 64 and 32 that does, else int8

Embedding, norms and biases of the quantized formats are bf16. Where embedding and head are tied, the head becomes an
int8 matrix of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastgen.config import ModelConfig
from fastgen.model import Transformer
from quantize.format import INT8, WeightFormat, int4
from tp.plan import Plan, Split, length, make_plan, obstacle

PLAIN_BITS = {"fp32": 32, "bf16": 16, "int8": 16, "int4": 16}
"""Bits of everything that is not quantized, the KV cache included, by format."""

SCALE_BITS, ZERO_BITS = 16, 4
GROUPS = (256, 128, 64, 32)
WORLD_SIZES = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one format of a model takes, in bytes."""

    format: str
    parameters: int
    weight_bytes: int  # in memory
    kv_bytes_per_token: int  # in memory, all layers
    read_bytes: dict[int, int | None]  # of weights by the rank with the most, by world size; None: not so many ranks

    @property
    def bits_per_parameter(self) -> float:
        """Effective bits, scales and zero points included."""
        return 8 * self.weight_bytes / self.parameters

    def memory_bytes(self, tokens: int) -> int:
        """Bytes of the weights and of a KV cache for so many tokens; activations are small beside them."""
        return self.weight_bytes + tokens * self.kv_bytes_per_token

    def fitting_tokens(self, available: int) -> int:
        """Return for how many tokens the available bytes suffice, 0 if not even for the weights."""
        return max(0, available - self.weight_bytes) // self.kv_bytes_per_token

    def tokens_per_second(self, gb_per_second: float, world_size: int = 1) -> float | None:
        """Return the most that devices of this read bandwidth can decode, by the largest share of the weights alone."""
        read = self.read_bytes[world_size]
        return None if read is None else gb_per_second * 1e9 / read


def costs(config: ModelConfig, *, group_size: int = 128) -> list[Cost]:
    """Return the cost of every format, the widest first; `group_size` is int4's."""
    with torch.device("meta"):
        model = Transformer(config)
    return [_cost(model, name, group_size) for name in PLAIN_BITS]


def matrix_bits(rows: int, columns: int, weight_format: str, group_size: int = 128) -> int:
    """Return the bits of a weight matrix, each of whose rows is quantized on its own."""
    if weight_format == "int4":
        fitting = [size for size in (group_size, *GROUPS) if size <= group_size and columns % size == 0]
        if fitting:
            return rows * (4 * columns + columns // fitting[0] * (SCALE_BITS + ZERO_BITS))
    if weight_format in ("int4", "int8"):
        return rows * (8 * columns + SCALE_BITS)
    return rows * columns * PLAIN_BITS[weight_format]


def _cost(model: Transformer, weight_format: str, group_size: int) -> Cost:
    config, plain = model.config, PLAIN_BITS[weight_format]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(module.weight.numel() for _, module in _matrices(model))
    embedding = model.embedding.weight.numel()
    tied = config.tie_embeddings
    others = parameters - matrices - (0 if tied else embedding)  # norms and biases
    quantized = weight_format in ("int8", "int4")

    def bits(plan: Plan) -> int:
        """Bits of one rank's matrices."""
        return sum(
            matrix_bits(
                *_part_shape(module, plan.split(name)),
                "int8" if quantized and tied and name == "lm_head" else weight_format,
                group_size,
            )
            for name, module in _matrices(model)
        )

    shares = {size: list(map(bits, _plans(config, weight_format, group_size, size))) for size in WORLD_SIZES}
    table = 0 if tied and not quantized else embedding * plain
    fixed = (others + config.dim) * plain if table else others * plain  # with the embedding's one row
    return Cost(
        format=weight_format,
        parameters=parameters,
        weight_bytes=(sum(shares[1]) + others * plain + table) // 8,
        kv_bytes_per_token=2 * config.n_layers * config.kv_dim * plain // 8,
        read_bytes={size: (max(share) + fixed) // 8 if share else None for size, share in shares.items()},
    )


def _matrices(model: Transformer) -> Iterator[tuple[str, nn.Linear]]:
    """Yield what a step multiplies with, by the last part of its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name.rpartition(".")[2], module


def _part_shape(module: nn.Linear, split: Split) -> tuple[int, int]:
    """Return the rows and columns of a rank's part of a matrix."""
    rows = module.out_features if split.rows is None else sum(map(length, split.rows))
    return rows, module.in_features if split.columns is None else length(split.columns)


def _plans(config: ModelConfig, weight_format: str, group_size: int, world: int) -> list[Plan]:
    """Return what every rank holds; empty where there can be no such ranks."""
    formats: dict[str, WeightFormat] = {}
    if weight_format == "int8":
        formats["layers.0.w_down"] = INT8  # a plan looks at this linear only
    elif weight_format == "int4":
        formats["layers.0.w_down"] = int4(config.hidden_dim, group_size, symmetric=False)
    if obstacle(config, formats, world):
        return []
    return [make_plan(config, formats, world, rank) for rank in range(world)]
