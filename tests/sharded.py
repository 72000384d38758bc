"""A small model whole and in parts: what tests of tensor parallelism compare, on threads and on processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastgen.engine import Engine
from fastgen.kernels import reference
from fastgen.load import LoadedModel, build
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from quantize.format import WeightFormat
from quantize.scheme import Scheme
from tests.models import random_model
from tp.apply import shard
from tp.dist import Ranks
from tp.plan import make_plan

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [65, 66], [120, 7, 250, 9, 11]]
LONG_PROMPT = list(range(100, 120))
"""Too many tokens for the CPU kernels, which round activations to 16 bits by their largest: it differs in a part."""


@dataclass(frozen=True)
class Case:
    """A model, how its weights are stored, and on how many ranks it is to be the same."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    quant: str | None = None
    group_size: int | None = None
    symmetric: bool = False
    worlds: tuple[int, ...] = (2, 3, 4)


GROUPS = {"dim": 256, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32, "hidden_dim": 512}
SMOLLM2 = {"dim": 72, "n_heads": 9, "n_kv_heads": 3, "head_dim": 16, "hidden_dim": 96}

CASES = {
    "fp32": Case(),
    "int8": Case(quant="int8"),
    "int4 g32": Case(GROUPS, quant="int4"),
    "int4 g32 symmetric": Case(GROUPS, quant="int4", symmetric=True, worlds=(2,)),
    "int4 g128, heads share groups": Case(GROUPS, quant="int4", group_size=128),
    "int4, groups smaller than any kernel's": Case(
        SMOLLM2 | {"n_heads": 6, "hidden_dim": 128, "output_bias": True, "mlp_bias": True}, quant="int4"
    ),
    "one KV head": Case({"n_kv_heads": 1}),
    "9/3 heads": Case(SMOLLM2, worlds=(2, 3, 4, 5, 6)),
    "tied embeddings": Case({"tie_embeddings": True}),
    "tied embeddings, int8": Case({"tie_embeddings": True}, quant="int8", worlds=(2,)),
    "259 tokens": Case({"vocab_size": 259}),
    "1031 tokens": Case({"vocab_size": 1031}),
    "biases": Case({"qkv_bias": True, "output_bias": True, "mlp_bias": True}, worlds=(3,)),
    "biases, int8": Case({"qkv_bias": True, "output_bias": True, "mlp_bias": True}, quant="int8", worlds=(3,)),
    "QK norm and a window": Case({"qk_norm": True, "windows": (4, 0)}, worlds=(2,)),
}

SAMPLED = SamplingOptions(temperature=1.0, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=5)


def whole(case: Case) -> LoadedModel:
    """The model on one rank."""
    model = random_model(**case.changes)
    formats: dict[str, WeightFormat] = {}
    if case.quant:
        size = {} if case.quant == "int8" else {"group_size": case.group_size or 32}
        scheme = Scheme(quant=case.quant, symmetric=case.symmetric, **size)
        formats = scheme.formats(model.config)
    config, tensors = model.checkpoint.config, model.checkpoint.tensors
    transformer = build(config, tensors, model.placement, formats=formats)
    return replace(model, transformer=transformer, formats=formats)


def part(model: LoadedModel, ranks: Ranks, *, check: bool = True) -> LoadedModel:
    """This rank's part of the model."""
    plan = make_plan(model.config, model.formats, ranks.world, ranks.rank)
    config, tensors = model.checkpoint.config, model.checkpoint.tensors
    transformer = build(config, tensors, model.placement, formats=model.formats, plan=plan, ranks=ranks)
    shard(transformer, reference, plan, ranks, check=check)
    return replace(model, transformer=transformer, plan=plan, ranks=ranks)


@torch.inference_mode()
def logits(model: LoadedModel) -> Tensor:
    """Logits [T, V] of a prompt."""
    tokens = torch.tensor([LONG_PROMPT])
    length = tokens.shape[1]
    model.transformer.allocate_cache(1, length)
    positions = torch.arange(length)
    hidden = model.transformer(tokens, positions[None], positions, torch.tensor([length]))
    return model.transformer.logits(hidden)[0]


def texts(model: LoadedModel, draft: LoadedModel | None = None) -> dict[str, list[tuple[int, ...]]]:
    """Tokens of greedy and sampled texts, one and three at a time; with a draft, one at a time and speculated."""
    found = {}
    for batch in (1,) if draft else (1, 3):
        for name, sampling in (("greedy", SamplingOptions()), ("sampled", SAMPLED)):
            options = GenerationOptions(max_new_tokens=6, ignore_eos=True, logprobs=True, sampling=sampling)
            if draft:
                engine: Engine = SpeculativeEngine(model, Speculation(draft=draft, count=3), max_seq_len=64)
            else:
                engine = Engine(model, batch=batch, max_seq_len=64)
            found[f"{name}, batch {batch}"] = [row.tokens for row in engine.generate(PROMPTS[:batch], options)]
    return found


def drafting(case: Case) -> LoadedModel:
    """A model that drafts for a case's: it is right at times."""
    return random_model(seed=1, **case.changes)
