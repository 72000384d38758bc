"""Generation the slow, obvious way: the engine's twin, and the oracle of its tests.

Every token is computed from the whole text so far in one pass, with no cache kept, no chunks and no streaming.

Dynamic RoPE scaling is the one case in which the two differ by design: it turns keys by the length that the text had
when they were computed, which for the engine (and transformers) is that of the prompt, and here that of the whole text.
"""

from collections.abc import Sequence

import torch

from fastgen.load import LoadedModel
from fastgen.noise import NoiseKey
from fastgen.sampling import SamplingOptions, sample


@torch.inference_mode()
def generate_naively(
    model: LoadedModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    options: SamplingOptions,
    *,
    sample_id: int = 0,
) -> list[int]:
    """Return `max_new_tokens` tokens that continue `prompt`, stop tokens or not."""
    device, text = model.placement.device, list(prompt)
    model.transformer.allocate_cache(1, len(prompt) + max_new_tokens)
    for _ in range(max_new_tokens):
        positions = torch.arange(len(text), device=device)
        length = torch.tensor([len(text)], device=device)
        hidden = model.transformer(torch.tensor([text], device=device), positions[None], positions, length)
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=device)
        seen[0, text] = True
        key = NoiseKey(seed=options.seed, sample=torch.tensor([sample_id], device=device), position=length)
        token = sample(model.transformer.logits(hidden[:, -1]), options, key=key, seen=seen)
        text.append(int(token))
    return text[len(prompt) :]
