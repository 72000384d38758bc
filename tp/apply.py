"""A model's share on one rank: stages that add up over the ranks, a vocabulary in parts, quantizing a slice.

The model is a smaller one of its family (`Plan.local`) and knows nothing of the others. What makes it a part of the
whole is handed in from here: `linear_add` and `embed` sum over the ranks, and sampling sees the others' best scores.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.model import PartialStages, Transformer
from fastgen.noise import hash_u32
from fastgen.sampling import RANKS_DIFFER, Vocabulary
from quantize.format import WeightFormat
from quantize.linear import Rows, quantize_weight
from tp.dist import Ranks
from tp.plan import Plan, length


class ShardedStages:
    """The stages of `fastgen.kernels.reference` over several ranks, on top of those that one rank computes with."""

    def __init__(self, stages: PartialStages, plan: Plan, ranks: Ranks) -> None:
        self._stages, self._ranks, self._first = stages, ranks, plan.vocabulary[0]
        self._posted: Callable[..., Tensor] | None = getattr(stages, "linear_sum_add", None) if ranks.linked else None
        self.embed: Callable[..., Tensor] = self._embed
        self.linear_add: Callable[..., Tensor] = self._linear_add
        self.norm_linear, self.norm_swiglu = stages.norm_linear, stages.norm_swiglu
        self.rotations, self.attend = stages.rotations, stages.attend
        self.head, self.greedy_head = stages.head, stages.greedy_head

    def covers(self, model: nn.Module, head_dim: int, tokens: int) -> bool:
        """Whether every rank's stages all run as kernels: ranks that compile and ranks that do not would wait for each
        other's sums. The ranks come here together."""
        covers: Callable[..., bool] = getattr(self._stages, "covers", _never)
        return not self._ranks.any(not covers(model, head_dim, tokens))

    def _embed(self, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
        """See `reference.embed`; the rank that knows a token gives its row, the others zeros."""
        return self._ranks.sum(self._stages.embed_part(tokens, embedding, self._first))

    def _linear_add(self, x: Tensor, linear: nn.Module, residual: Tensor) -> Tensor:
        """See `reference.linear_add`; x is this rank's part of the input."""
        if self._posted:
            return self._posted(x, linear, residual, self._ranks.sum_add)
        return self._ranks.sum_add(self._stages.partial_linear(x, linear), residual)


def _never(model: nn.Module, head_dim: int, tokens: int) -> bool:
    """Stages that are no kernels cover nothing."""
    return False


class ShardedVocabulary(Vocabulary):
    """This rank's part of the vocabulary; see `fastgen.sampling.Vocabulary`."""

    is_whole = False

    def __init__(self, plan: Plan, ranks: Ranks, *, check: bool = False) -> None:
        self.first = plan.vocabulary[0]
        self._ranks, self._check = ranks, check
        self._sizes = [length(span) for span in plan.vocabularies]

    def gather(self, x: Tensor) -> Tensor:
        return self._ranks.gather(x).movedim(0, -2).flatten(-2)

    def largest(self, number: int) -> int:
        return self._ranks.largest(number)

    def join(self, logits: Tensor) -> Tensor:
        largest = max(self._sizes)
        parts = self._ranks.gather(F.pad(logits, (0, largest - logits.shape[-1]))).unbind()
        return torch.cat([part[..., :size] for part, size in zip(parts, self._sizes, strict=True)], -1)

    def check(self, token: Tensor, hidden: Tensor, logits: Tensor, *, fed: Tensor | None = None) -> Tensor:
        if not self._check:
            return token
        # All logits and the hidden state that they come from must be the same bits on all ranks, and so must the
        # tokens: states are sums over the ranks, the same everywhere even if each has fed a token of its own.
        words = torch.cat((self.join(logits), hidden.float()), -1).view(torch.int32).long()
        words = torch.cat((words, torch.stack((token, token if fed is None else fed), -1)), -1)
        place = torch.arange(words.shape[-1], device=words.device)
        digest = hash_u32(words & 0xFFFF_FFFF, place).sum(-1, keepdim=True)
        # One difference spoils all tokens: ranks that accept different numbers of drafts would not all come to it.
        return torch.where((self.gather(digest) == digest).all(), token, RANKS_DIFFER)


def shard(transformer: Transformer, stages: PartialStages, plan: Plan, ranks: Ranks, *, check: bool = False) -> None:
    """Make a model that was built by `plan.local` a part of the whole, which computes its own part with `stages`;
    `check` compares the ranks at every step."""
    transformer.stages = ShardedStages(stages, plan, ranks)
    transformer.vocabulary = ShardedVocabulary(plan, ranks, check=check)
    transformer.vocab_size = plan.config.vocab_size


def quantize_part(
    name: str,
    weight: Rows,
    weight_format: WeightFormat,
    plan: Plan,
    ranks: Ranks,
    *,
    scales: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the tensors that stand for this rank's part of a weight, with the values that they have in the whole.

    A scale of int8 is of a whole row: where a row is divided, the ranks find its largest weight together.
    """
    if weight_format.bits != 8 or plan.split(name).columns is None:
        return quantize_weight(name, weight, weight_format, scales=scales, device=device)
    part = weight[:].to(device)
    own = part.abs().amax(1, keepdim=True).float()
    with ranks.waiting():
        largest = ranks.gather(own).amax(0)
    return quantize_weight(name, part, weight_format, scales=scales, device=device, largest=largest)
