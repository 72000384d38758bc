"""The compact LLaMA: a block of five stages, the ends, the KV cache, and what a decode step costs.

The model does no I/O and knows nothing of devices, formats or parallelism. Its stages are handed in, its linears
may be replaced by quantized ones, and its local sizes are read off its tensors. Names and shapes of the parameters
(letters: `fastgen.kernels.reference`):

    embedding.weight                [V, D]
    layers.N.attention_norm.weight  [D]
    layers.N.wqkv.weight            [(H + 2K) d, D]  q rows, k rows, v rows; wqkv.bias where config.qkv_bias
    layers.N.q_norm.weight, k_norm  [d]              where config.qk_norm
    layers.N.wo.weight              [D, H d]         wo.bias where config.output_bias
    layers.N.ffn_norm.weight        [D]
    layers.N.w_gate_up.weight       [2F, D]          gate rows, up rows; w_gate_up.bias where config.mlp_bias
    layers.N.w_down.weight          [D, F]           w_down.bias where config.mlp_bias
    norm.weight                     [D]
    lm_head.weight                  [V, D]           the embedding's own where config.tie_embeddings
"""

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fastgen.config import ModelConfig
from fastgen.kernels import reference
from fastgen.kernels.reference import Step
from fastgen.kernels.rope import Rope
from fastgen.sampling import WHOLE, Vocabulary


class Stages(Protocol):
    """The namespace of stages that a model is handed; `fastgen.kernels.reference` defines each."""

    rotations: Callable[..., Tensor]
    embed: Callable[..., Tensor]
    norm_linear: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    linear_add: Callable[..., Tensor]
    norm_swiglu: Callable[..., Tensor]
    head: Callable[..., Tensor]
    greedy_head: Callable[..., Tensor]


class PartialStages(Stages, Protocol):
    """Stages that one of several ranks can compute its part with.

    They may have two more: `covers` says whether all of them run as kernels, and `linear_sum_add` adds up over linked
    ranks by itself, see `fastgen.kernels.fused`.
    """

    embed_part: Callable[..., Tensor]
    partial_linear: Callable[..., Tensor]


class Block(nn.Module):
    """One layer; its KV cache are buffers of its own, so that CUDA graphs find them at fixed addresses."""

    k_cache: Tensor  # [B, K, S, d]
    v_cache: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.register_buffer("k_cache", None, persistent=False)
        self.register_buffer("v_cache", None, persistent=False)
        self.scale = config.head_dim**-0.5
        self.window = config.windows[layer]
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.wqkv = nn.Linear(config.dim, config.q_dim + 2 * config.kv_dim, bias=config.qkv_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.wo = nn.Linear(config.q_dim, config.dim, bias=config.output_bias)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.w_gate_up = nn.Linear(config.dim, 2 * config.hidden_dim, bias=config.mlp_bias)
        self.w_down = nn.Linear(config.hidden_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor, step: Step, stages: Stages) -> Tensor:
        """Return the block's output for x [B, T, D], and append to the cache."""
        qkv = stages.norm_linear(x, self.attention_norm, self.wqkv)
        y = stages.attend(
            qkv, self.k_cache, self.v_cache, step,
            scale=self.scale, window=self.window, q_norm=self.q_norm, k_norm=self.k_norm,
        )  # fmt: skip
        x = stages.linear_add(y, self.wo, x)
        h = stages.norm_swiglu(x, self.ffn_norm, self.w_gate_up)
        return stages.linear_add(h, self.w_down, x)


@torch.compiler.nested_compile_region
def run_as_region(block: Block, x: Tensor, step: Step, stages: Stages) -> Tensor:
    """Run a block so that torch.compile compiles it once for all layers."""
    return block(x, step, stages)


class Transformer(nn.Module):
    """A LLaMA-family decoder. Build it on the meta device, give it weights (`fastgen.load`), then a cache."""

    def __init__(self, config: ModelConfig, stages: Stages = reference) -> None:
        super().__init__()
        self.config = config
        self.stages = stages
        self.by_region = False
        self.cache_owner: object = None
        self.vocabulary: Vocabulary = WHOLE
        self.vocab_size = config.vocab_size  # of the whole, where `config` and `vocabulary` are of a part
        self.rope = Rope(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        self.requires_grad_(False)

    def allocate_cache(self, batch: int, capacity: int, *, owner: object = None) -> None:
        """Give every layer an empty KV cache for `batch` texts of up to `capacity` tokens, in the weights' dtype.

        Positions at and behind a text's end hold garbage: whatever is written there is overwritten by the token
        that comes to stand there before anything attends to it. So rolling back is only going back to a position. What
        is masked counts 0 times, and so must be finite: see `clear_cache`.

        A model has one cache: `cache_owner` tells whose it is, so that an earlier owner sees that theirs is gone.
        """
        self.cache_owner = None  # should memory end in the middle
        like = self.embedding.weight
        shape = (batch, self.config.n_kv_heads, capacity, self.config.head_dim)
        with torch.inference_mode(False):  # a graph that was compiled for a cache of ordinary tensors serves the next
            for block in self.layers:
                block.k_cache = torch.zeros(shape, dtype=like.dtype, device=like.device)
                block.v_cache = torch.zeros_like(block.k_cache)
        self.cache_owner = owner

    def clear_cache(self) -> None:
        """Make all keys and values 0, after a text that made some of them not finite."""
        for block in self.layers:
            for cache in block.buffers(recurse=False):
                cache.zero_()

    def first_layers(self, count: int, *, own_cache: bool = False) -> "Transformer":
        """Return the model that stops after `count` layers: its modules and weights are this one's, and so is its KV
        cache, unless it is to have its own."""
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view.layers = self.layers[:count]
        if own_cache:
            view.cache_owner = None
            view.layers = nn.ModuleList(copy.copy(block) for block in view.layers)
            for block in view.layers:
                block._buffers = dict(block._buffers)
        return view

    def forward(self, tokens: Tensor, positions: Tensor, key_positions: Tensor, lengths: Tensor) -> Tensor:
        """Return the last layer's output for new tokens, before the final norm, and append to the cache.

        Args:
            tokens, positions: [B, T] int64; row b's tokens and their places in its text.
            key_positions: [L] int64, 0 .. L - 1, with L above every position (`reference.Step`).
            lengths: [B] int64, tokens in each text so far, prompt tokens that are still to come included; only
                dynamic RoPE scaling looks at it.

        Returns:
            [B, T, D].
        """
        step = Step(positions, key_positions, self.stages.rotations(positions, lengths, self.rope))
        x = self.stages.embed(tokens, self.embedding)
        for block in self.layers:
            x = run_as_region(block, x, step, self.stages) if self.by_region else block(x, step, self.stages)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits [.., V] of `forward`'s output [.., D]."""
        return self.vocabulary.join(self.own_logits(hidden))

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the part of the vocabulary, `self.vocabulary`, that this model's head knows."""
        return self.stages.head(hidden, self.norm, self.lm_head)

    def greedy_token(self, hidden: Tensor) -> Tensor:
        """Return the token [..] of the largest logit of `forward`'s output [.., D], where the vocabulary is whole."""
        return self.stages.greedy_head(hidden, self.norm, self.lm_head)

    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step of one text must read: every parameter once, of an embedding that
        is not also the head only one row."""
        total = sum(tensor_bytes(parameter) for parameter in self.parameters())
        if not self.config.tie_embeddings:
            total -= tensor_bytes(self.embedding.weight) - tensor_bytes(self.embedding.weight[0])
        return total

    def kv_bytes(self, filled: int) -> int:
        """Bytes of keys and values that a decode step reads for one text of `filled` tokens."""
        element = self.embedding.weight.element_size()
        seen = sum(min(window or filled, filled) for window in self.config.windows)
        return 2 * seen * self.config.kv_dim * element


def parameter_count(config: ModelConfig) -> int:
    """Return how many weights a model has, in whatever format and shares it is held; tied ones count once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor's elements take."""
    return tensor.numel() * tensor.element_size()
