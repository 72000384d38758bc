"""transformers on the same shape, device and dtype: its compiled static cache, as its users run it.

transformers is a development dependency and imported only here; nothing of ours needs it at run time.
"""

import time
from importlib.util import find_spec
from typing import Any

import torch

from fastgen.benchmark import Timing
from fastgen.config import ModelConfig
from fastgen.device import Placement, synchronize
from fastgen.errors import UsageError
from fastgen.load import LoadedModel


def require_comparable(model: LoadedModel) -> None:
    """Raise `UsageError` if transformers is not installed, or the model is no plain Llama in its own precision."""
    if find_spec("transformers") is None:
        raise UsageError("--baseline transformers: pip install transformers (scripts/test does)")
    config = model.config
    biases = config.qkv_bias or config.output_bias or config.mlp_bias
    if config.qk_norm or biases or any(config.windows) or config.rope_scaling:
        raise UsageError("--baseline transformers: only plain Llama shapes are compared")
    if model.formats:
        raise UsageError(f"--baseline transformers: measured beside plain weights only, not {model.format}")


def time_transformers(
    config: ModelConfig, placement: Placement, *, compiled: bool, prompt_tokens: int, new_tokens: int, repeats: int
) -> Timing:
    """Time transformers' Llama with random weights: `generate` with a static, compiled cache, or eager.

    Decode time is that of `new_tokens` less that of one, so prefill is not part of it. The model must be one that
    `require_comparable` passes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  (an optional oracle)

    torch.set_default_dtype(placement.dtype)
    try:
        with torch.device(placement.device):
            model = LlamaForCausalLM(LlamaConfig(**_to_transformers(config))).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    prompt = torch.arange(prompt_tokens, device=placement.device)[None]
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    if compiled:
        options["cache_implementation"] = "static"

    @torch.inference_mode()
    def run(count: int) -> float:
        synchronize(placement.device)
        begin = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options)
        synchronize(placement.device)
        return time.perf_counter() - begin

    start_up = run(new_tokens)
    run(new_tokens)
    firsts = [run(1) for _ in range(repeats)]
    wholes = [run(new_tokens) for _ in range(repeats)]
    first = sorted(firsts)[repeats // 2]
    return Timing(start_up, first, [(whole - first) / (new_tokens - 1) for whole in wholes])


def _to_transformers(config: ModelConfig) -> dict[str, Any]:
    """Return the shape in the names of transformers' LlamaConfig."""
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": None,
        "bos_token_id": None,
    }
