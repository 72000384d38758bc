"""Which part of every tensor a rank holds: a table of names to splits, and pure functions that cut.

    module                rows (outputs)                      columns (inputs)
    embedding, lm_head    a range of the vocabulary           all
    wqkv                  a range of q, of k and of v heads   all
    wo                    all                                 those of the q heads
    w_gate_up             a range of gate and of up           all
    w_down                all                                 those of gate and up
    norms                 all                                 all

A rank's share is a smaller model of the same family, so its own `ModelConfig` describes it: what `wo` and `w_down` give
is a part of a sum over the ranks, and the embedding knows a part of the tokens. Biases that belong to such a sum are
rank 0's alone; the others hold zeros.

A rank holds KV heads with all of their query heads, as evenly as whole KV heads go. Where ranks outnumber KV heads,
each holds one, and ranks that share it divide its query heads. Hidden units are dealt out in blocks, which are groups
where the weights have groups. Nothing needs to divide anything, but a rank must get something of everything.

Letters: H query heads, K key/value heads, d head width, F hidden width, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.checkpoint.lazy import Bounds, Computed, Concat, LazyTensor
from fastgen.checkpoint.names import linear_columns
from fastgen.config import ModelConfig
from fastgen.errors import UsageError
from quantize.format import GROUP_SIZES, WeightFormat
from quantize.linear import dequantize_weight

Span = tuple[int, int]
"""The first index, and the one behind the last."""

BLOCKS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Hidden units, or tokens, that stay together where they can: kernels like whole tiles."""

FINE = 8
"""Blocks for each rank that leave the parts of a total about equal, however they are dealt out."""

KERNEL_BLOCKS = (128, 64)
"""Columns that the kernels for quantized weights take at a time, on GPUs and on CPUs; of others they make a copy."""


class Split(NamedTuple):
    """A rank's part of a matrix: ranges of rows that lie one below the other, and a range of columns; None: all."""

    rows: tuple[Span, ...] | None = None
    columns: Span | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one rank of `world` holds of a model with `config`; see `make_plan`."""

    config: ModelConfig  # of the whole model, with the head that it has in memory
    world: int
    rank: int
    heads: Span
    kv_heads: Span
    hidden: Span
    vocabularies: tuple[Span, ...]  # every rank's part

    @property
    def vocabulary(self) -> Span:
        """This rank's part of the vocabulary."""
        return self.vocabularies[self.rank]

    def local(self) -> ModelConfig:
        """Return the config of this rank's share, a model of its own."""
        return replace(
            self.config,
            n_heads=length(self.heads),
            n_kv_heads=length(self.kv_heads),
            hidden_dim=length(self.hidden),
            vocab_size=length(self.vocabulary),
        )

    def split(self, name: str) -> Split:
        """Return this rank's part of the weight of the module `name`."""
        d, hidden = self.config.head_dim, self.config.hidden_dim
        q, kv = scaled(self.heads, d), scaled(self.kv_heads, d)
        key = self.config.q_dim
        table = {
            "embedding": Split(rows=(self.vocabulary,)),
            "lm_head": Split(rows=(self.vocabulary,)),
            "wqkv": Split(rows=(q, shifted(kv, key), shifted(kv, key + self.config.kv_dim))),
            "wo": Split(columns=q),
            "w_gate_up": Split(rows=(self.hidden, shifted(self.hidden, hidden))),
            "w_down": Split(columns=self.hidden),
        }
        return table.get(name.rpartition(".")[2], Split())

    def tensors(self, tensors: Mapping[str, LazyTensor], formats: Mapping[str, WeightFormat]) -> dict[str, LazyTensor]:
        """Return this rank's part of every tensor, unread.

        Columns of weights in groups are widened to whole groups; `fit` cuts what is too much.
        """
        return {name: self._part(name, tensor, formats) for name, tensor in tensors.items()}

    def _part(self, name: str, tensor: LazyTensor, formats: Mapping[str, WeightFormat]) -> LazyTensor:
        module, _, leaf = name.rpartition(".")
        split = self.split(module)
        if leaf == "bias":
            summed = split.columns is not None and self.rank > 0
            return zeros(tensor) if summed else rows_of(tensor, split.rows)
        if split.columns is None:
            return rows_of(tensor, split.rows)
        width = linear_columns(self.config)[module.rpartition(".")[2]]
        weight_format = formats.get(module)
        return columns(tensor, stretched(widened(split.columns, weight_format), width, tensor.shape[1]))

    def fit(
        self, name: str, stored: Mapping[str, Tensor], weight_format: WeightFormat
    ) -> tuple[dict[str, Tensor], WeightFormat | None]:
        """Return what a quantized linear holds of its tensors as `tensors` gave them, and in which format.

        The values are the same: a group that two ranks share becomes smaller groups with its scale and zero point,
        or, where no kernel knows groups so small, plain weights (format None).
        """
        columns = self.split(name).columns
        if columns is None or weight_format.group_size is None:
            return dict(stored), weight_format
        return cut_groups(stored, columns, weight_format)


def make_plan(config: ModelConfig, formats: Mapping[str, WeightFormat], world: int, rank: int) -> Plan:
    """Return what rank `rank` of `world` holds of a model whose linears have these formats.

    Raises `UsageError` as `check_split`.
    """
    check_split(config, formats, world)
    heads, kv_heads = split_heads(config, world)[rank]
    vocabularies = deal(config.vocab_size, world, block_of(config.vocab_size, world))
    return Plan(
        config=config,
        world=world,
        rank=rank,
        heads=heads,
        kv_heads=kv_heads,
        hidden=deal(config.hidden_dim, world, _hidden_block(config, formats, world))[rank],
        vocabularies=tuple(vocabularies),
    )


def check_split(config: ModelConfig, formats: Mapping[str, WeightFormat], world: int) -> None:
    """Raise `UsageError` for more ranks than a model can be split over, with the most that it can."""
    problem = obstacle(config, formats, world)
    if problem:
        most = max(size for size in range(1, world) if not obstacle(config, formats, size))
        raise UsageError(
            f"torchrun started {world} processes, and the model cannot be split over so many: {problem}\n"
            f"Start {most} or fewer"
        )


def obstacle(config: ModelConfig, formats: Mapping[str, WeightFormat], world: int) -> str | None:
    """Return in words why a model cannot be split over `world` ranks, None if it can."""
    if world > config.n_heads:
        return f"each needs a head of its own, and it has {config.n_heads}"
    block = _hidden_block(config, formats, world)
    if world > config.hidden_dim // block:
        unit = f"groups of {block}" if block > 1 else "units"
        return f"each needs a part of the {config.hidden_dim // block} {unit} in its hidden layer"
    return None if world <= config.vocab_size else f"each needs a token of its own, and it has {config.vocab_size}"


def split_heads(config: ModelConfig, world: int) -> list[tuple[Span, Span]]:
    """Return the query heads and the key/value heads of every rank."""
    heads, kv_heads = config.n_heads, config.n_kv_heads
    group = heads // kv_heads
    if world <= kv_heads:
        return [(scaled(span, group), span) for span in deal(kv_heads, world, 1)]
    parts = []
    for head, (first, last) in enumerate(deal(world, kv_heads, 1)):  # the ranks that share this KV head
        spans = deal(group, last - first, 1)
        parts += [(shifted(span, head * group), (head, head + 1)) for span in spans]
    return parts


def deal(total: int, world: int, block: int) -> list[Span]:
    """Return `world` ranges that make up 0 .. total, equal to within a block; all but the last end on blocks."""
    blocks = total // block
    ends = [block * (blocks * rank // world) for rank in range(world)] + [total]
    return list(pairwise(ends))


def block_of(total: int, world: int) -> int:
    """Return in blocks of which size a total is best dealt out: the largest that gives equal parts, else the largest
    of which everyone gets several."""
    even = [block for block in BLOCKS if total % (block * world) == 0]
    several = [block for block in BLOCKS if total // block >= FINE * world]
    return (even or several or [1])[0]


def _hidden_block(config: ModelConfig, formats: Mapping[str, WeightFormat], world: int) -> int:
    """Return in blocks of which size the hidden units are dealt out: whole groups, and where it leaves the parts about
    equal, what kernels take at a time."""
    total, plain = config.hidden_dim, block_of(config.hidden_dim, world)
    groups = [weight_format.group_size or 1 for name, weight_format in formats.items() if name.endswith(".w_down")]
    if not groups:
        return plain
    group = max(groups)  # powers of two: each divides the largest
    for block in KERNEL_BLOCKS:
        is_fine = total % (block * world) == 0 or total >= FINE * block * world
        if block >= group and total % block == 0 and is_fine:
            return block
    return max(group, plain)


def length(span: Span) -> int:
    """Return how many indices a range has."""
    return span[1] - span[0]


def scaled(span: Span, factor: int) -> Span:
    """Return the range of elements of which each index stands for `factor`."""
    return span[0] * factor, span[1] * factor


def shifted(span: Span, offset: int) -> Span:
    """Return the range moved on."""
    return span[0] + offset, span[1] + offset


def widened(span: Span, weight_format: WeightFormat | None) -> Span:
    """Return the range of columns with all groups that it touches."""
    group = (weight_format and weight_format.group_size) or 1
    return span[0] // group * group, -(-span[1] // group) * group


def stretched(span: Span, size: int, other: int) -> Span:
    """Return the range of `other` indices that stands for this one of `size`: words and groups for columns."""
    return span[0] * other // size, -(-span[1] * other // size)


def rows_of(tensor: LazyTensor, spans: Iterable[Span] | None) -> LazyTensor:
    """Return ranges of a tensor's rows, one below the other, unread; None: all."""
    if spans is None:
        return tensor
    parts = [rows(tensor, span) for span in spans]
    return Concat(parts) if len(parts) > 1 else parts[0]


def cut_groups(
    stored: Mapping[str, Tensor], columns: Span, weight_format: WeightFormat
) -> tuple[dict[str, Tensor], WeightFormat | None]:
    """Cut columns out of int4 tensors (`quantize.int4`) that begin with the group of the first column; see `Plan.fit`.

    Whole groups stay as they are; `columns` counts from the first column of the whole matrix.
    """
    group = weight_format.group_size
    assert group is not None, "int4 weights have groups"
    fine, first, count = gcd(group, *columns), columns[0] % group, length(columns)
    if fine == group:
        return dict(stored), weight_format
    if fine not in GROUP_SIZES:
        plain = dequantize_weight(stored, weight_format, torch.float32)[:, first : first + count]
        return {"weight": plain} | {leaf: stored[leaf] for leaf in ("bias",) if leaf in stored}, None
    cut = dict(stored)
    cut["weight_packed"] = stored["weight_packed"][:, first // 8 : (first + count) // 8].contiguous()
    for leaf in ("weight_scale", "weight_zero_point"):
        if leaf in stored:
            finer = stored[leaf].repeat_interleave(group // fine, 1)
            cut[leaf] = finer[:, first // fine : (first + count) // fine].contiguous()
    return cut, replace(weight_format, group_size=fine)


def rows(tensor: LazyTensor, span: Span) -> LazyTensor:
    """Return a range of a tensor's rows, unread."""

    def compute(bounds: Bounds) -> Tensor:
        return tensor.read((shifted(bounds[0], span[0]), *bounds[1:]))

    return Computed((length(span), *tensor.shape[1:]), tensor.dtype, compute)


def columns(tensor: LazyTensor, span: Span) -> LazyTensor:
    """Return a range of a matrix's columns, unread."""

    def compute(bounds: Bounds) -> Tensor:
        return tensor.read((bounds[0], shifted(bounds[1], span[0])))

    return Computed((tensor.shape[0], length(span)), tensor.dtype, compute)


def zeros(tensor: LazyTensor) -> LazyTensor:
    """Return zeros of a tensor's shape: a bias that another rank adds."""

    def compute(bounds: Bounds) -> Tensor:
        return torch.zeros([length(span) for span in bounds], dtype=tensor.dtype)

    return Computed(tensor.shape, tensor.dtype, compute)
