"""What a model in training writes: a short text by the engine, from the very weights that are being trained."""

from pathlib import Path

import torch

from fastgen.checkpoint.lazy import Checkpoint
from fastgen.completion import GenerationOptions
from fastgen.device import Placement
from fastgen.engine import Engine
from fastgen.load import LoadedModel
from fastgen.model import Transformer
from fastgen.sampling import SamplingOptions
from fastgen.tokenizer.base import Tokenizer

LENGTH = 80
TEMPERATURE = 0.8


def sample_text(model: Transformer, tokenizer: Tokenizer, seed: int) -> str:
    """Return up to 80 tokens of text, from its beginning, sampled at temperature 0.8."""
    if tokenizer.bos_id is None:
        return ""
    with torch.device("meta"):
        twin = Transformer(model.config)  # with the reference's stages, which keep a cache
    twin.load_state_dict({name: parameter.detach() for name, parameter in model.state_dict().items()}, assign=True)
    twin.requires_grad_(False)
    weight = model.embedding.weight
    twin.rope.to(weight.device)
    checkpoint = Checkpoint(
        path=Path("the model in training"), format="memory", config=model.config, dtype=weight.dtype, tensors={},
        open_tokenizer=lambda: tokenizer,
    )  # fmt: skip
    placement = Placement(weight.device, torch.float32, "the weights that are trained")
    loaded = LoadedModel(transformer=twin.eval(), tokenizer=tokenizer, checkpoint=checkpoint, placement=placement)
    options = GenerationOptions(
        max_new_tokens=min(LENGTH, model.config.max_seq_len - 1),
        sampling=SamplingOptions(temperature=TEMPERATURE, seed=seed),
    )
    return Engine(loaded, max_seq_len=options.max_new_tokens + 1).generate([[tokenizer.bos_id]], options)[0].text
